"""Replay: rows of experience in a ring, from which transitions or sequences are drawn, uniformly or by priority.

The layout is decision 0008.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rookery.data.frames import REACH, Observations, StackedFrames
from rookery.data.plan import ReplayPlan
from rookery.data.samples import FLAGS, SPAN, STEP, Hindsight, Samples, Sequences, Transitions
from rookery.data.storage import Key, Memory, Ring, allocator, leaves, nested, plain, tensor_of
from rookery.data.sum_tree import SumTree, sum_tree
from rookery.envs.spec import EnvSpec
from rookery.envs.spec import leaves as leaf_spaces
from rookery.envs.vector import Obs

__all__ = ["ReplayBuffer", "check_priorities"]

NEEDED = ("obs", "action", *FLAGS)
DROPPED = ("discounted_return", "raw_reward", "start", "q", "best", "priority")  # of an unroll, but not of replay
ENTERING = ("replay", "entering")  # priority that a row gets when it can first be drawn

Looks = dict[Key, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of what is stored in a cell

EPSILON = 1e-6  # least priority, so that a row whose error is 0 is seen again (Schaul et al. 2016, section 3.3)
SPARSE = 0.25  # share of cells that can be drawn, below which they are listed instead of guessed


class ReplayBuffer:
    """The last rows of W·B lanes, from which samples are drawn again and again.

    Processes that share the memory may each be one writer, and one may sample uniformly; priorities belong to one
    process that writes and samples.

    Args:
        plan: what is kept, and what a sample is.
        lanes: B, the lanes of each writer.
        writers: W, the actors that insert, each its own stream of rows.
        seed: of the samples.
        stack: K, frames in an observation `[B, K·C, ...]`, oldest first; each is stored once.
        memory: "ram"; "shared" with the processes that are handed the buffer after its first insert; or the folder of
            memory-mapped files.
        device: of the memory, and of the samples.
        spec: of the environment, for the reward of goals (`plan.hindsight`), and to know a saved replay of another.

    Raises:
        ValueError: for settings that cannot work, alone or together.
    """

    def __init__(
        self,
        plan: ReplayPlan,
        lanes: int,
        *,
        writers: int = 1,
        seed: int = 0,
        stack: int = 1,
        memory: Memory = "ram",
        device: torch.device | str = "cpu",
        spec: EnvSpec | None = None,
    ) -> None:
        _check_plan(plan, lanes * writers, stack, spec)
        self.plan, self.lanes, self.writers, self.stack, self.spec = plan, lanes, writers, stack, spec
        self.device = torch.device(device)
        allocate = allocator(memory, self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # The newest row holds an observation only, and the oldest frames are seen in later stacks only.
        self._ring = ring = Ring(plan.capacity // (lanes * writers) + stack, lanes, writers, allocate)
        self._frames = StackedFrames(ring, stack) if stack > 1 else None
        observations = self._frames or Observations(ring)
        self._samples: Samples
        if plan.hindsight and spec is not None and spec.goal_reward is not None:
            self._samples = Hindsight(ring, observations, plan, spec.goal_reward)
        else:
            self._samples = (Sequences if plan.sequence else Transitions)(ring, observations, plan)
        self._tree = sum_tree(ring.cells, allocate, self.device) if plan.alpha > 0 else None
        self._largest = 1.0  # priority seen so far
        # Of each writer: rows written, and how many of its cells can be drawn.
        counters = allocator("shared" if memory == "shared" else "ram", torch.device("cpu"))
        self._counts = counters("counts", (writers, 2), torch.int64).zero_()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: memory that is shared stays so; a generator travels as bytes."""
        return {**self.__dict__, "generator": self.generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        noise = torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8)
        self.__dict__.update(state, generator=torch.Generator(state["device"]).set_state(noise))

    def __len__(self) -> int:
        """How many samples there are to be drawn now."""
        return sum(ready for _, ready in self._counts.tolist())

    @property
    def fill(self) -> float:
        """The share of its rows that are written."""
        rows = self._ring.rows
        return sum(min(written, rows) for written, _ in self._counts.tolist()) / (rows * self.writers)

    # Writing.

    def insert(self, rows: Mapping[str, Any], writer: int = 0) -> int:
        """Store an unroll: of `obs` all T+1 rows `[T+1, B, ...]`, of other columns the first T.

        The last observation is the true next one after row T−1, and the first of this writer's next insert. If that
        begins with another, its stream was broken off (the actor began anew, or an unroll was lost): the episodes that
        were running count as truncated.

        Args:
            rows: obs, action, reward, terminated, truncated, valid, and what else the algorithm recorded. `priority`
                `[T, B]` is what rows can be drawn by at first; without, it is the largest so far.

        Returns:
            The number of valid rows.

        Raises:
            ValueError: for rows unlike those of the first insert, more rows than fit, or priorities that are no
                finite numbers ≥ 0; nothing is stored then.
        """
        if not 0 <= writer < self.writers:
            raise ValueError(f"there is no writer {writer}; this buffer has writers 0 to {self.writers - 1}.")
        rows = {name: value.to(self.device) for name, value in rows.items()}
        columns = self._columns_of(rows)
        valid, priorities = columns["valid",], rows.get("priority")
        if priorities is not None:
            check_priorities(priorities, valid, valid.shape)
        first = self._counts.tolist()[writer][0]
        goes_on = first > 0 and self._goes_on(columns, rows["obs"], writer, first)
        reaches = None
        if self._frames is not None:
            before = self._ring.get(REACH, writer, first, 1)[0] if goes_on else None
            reaches = self._frames.reaches(rows["obs"], valid, before)
        if not self._ring.columns:  # only now: what is refused leaves no layout behind
            self._allocate(_looks_of(columns))
        if first > 0 and not goes_on:
            first = self._close(writer, first)
        self._evict(writer, first, len(valid))
        for key, leaf in columns.items():
            self._ring.put(key, writer, first, leaf)
        if reaches is not None:
            self._ring.put(REACH, writer, first, reaches)
        if self._tree is not None:
            self._enter(writer, first, valid, priorities)
        self._follow(writer, first, first + len(valid))
        return int(valid.count_nonzero())

    def _columns_of(self, rows: Mapping[str, Any]) -> dict[Key, Tensor]:
        """What is stored of an unroll, `[T, B, ...]`, and `obs`, `[T+1, B, ...]`."""
        missing = [name for name in NEEDED if name not in rows]
        if missing:
            raise ValueError(f"an insert brings {', '.join(NEEDED)}; this one lacks {', '.join(missing)}.")
        columns: dict[Key, Tensor] = {}
        for name, value in rows.items():
            if name in DROPPED or (name == "state" and value.ndim < 3):  # a state [B, S] is that before row 0 only
                continue
            columns.update(leaves(value, (name,)))
        obs = columns.get(("obs",))
        if self._frames is not None:
            columns["obs",] = self._newest(obs)
        count = next(len(leaf) for key, leaf in columns.items() if key[0] == "obs") - 1
        columns = {key: leaf if key[0] == "obs" else leaf[:count] for key, leaf in columns.items()}
        if self._ring.columns:
            _check_looks(_looks_of(columns), _looks_of(self._ring.columns), "this insert")
        for key, leaf in columns.items():
            wanted = [count + (key[0] == "obs"), self.lanes]
            if list(leaf.shape[:2]) != wanted:
                raise ValueError(
                    f"{'.'.join(key)!r} has shape {list(leaf.shape)}; {count} rows of {self.lanes} lanes bring "
                    f"{[*wanted, *leaf.shape[2:]]} of it."
                )
        most = self._ring.rows - self.plan.longest - self.stack
        if not 1 <= count <= most:
            raise ValueError(
                f"an insert of {count} rows does not fit capacity={self.plan.capacity} over "
                f"{self.lanes * self.writers} lanes; insert 1 to {most} rows at once."
            )
        return columns

    def _newest(self, obs: Tensor | None) -> Tensor:
        assert self._frames is not None
        if obs is None or obs.ndim < 3 or obs.shape[2] % self.stack:
            seen = "a structure" if obs is None else f"of shape {list(obs.shape)}"
            raise ValueError(f"obs is {seen}, and stack={self.stack} takes one tensor [T+1, B, {self.stack}·C, ...].")
        return self._frames.newest(obs)

    def _allocate(self, looks: Looks) -> None:
        for key, (shape, dtype) in looks.items():
            self._ring.add(key, shape, dtype)
        for key, dtype in self._samples.columns.items():
            self._ring.add(key, (), dtype)
        if self._frames is not None:
            self._ring.add(REACH, (), torch.uint8)
        if self._tree is not None:
            self._ring.add(ENTERING, (), torch.float32)
        self._ring.add(SPAN, (), torch.int16)
        self._ring.columns[SPAN].zero_()

    def _goes_on(self, columns: dict[Key, Tensor], stacks: Obs, writer: int, head: int) -> bool:
        """Whether an unroll begins with the observation that the last one of its writer ended with."""
        stored = ((self._ring.get(key, writer, head, 1), leaf[:1]) for key, leaf in columns.items() if key[0] == "obs")
        if not all(_same(old, new) for old, new in stored):
            return False
        if self._frames is None:
            return True
        cells = self._ring.cells_of(writer, head, 1)[0]
        readable = self._frames.readable(self._ring.take(REACH, cells))
        return torch.equal(self._frames.read(cells[readable]), stacks[0][readable])

    def _close(self, writer: int, head: int) -> int:
        """End running episodes as truncated: the newest observation is their final one, in a row of its own.

        Gives the number of the next row.
        """
        ring = self._ring
        self._evict(writer, head, 1)
        terminated, truncated, valid = (ring.get((name,), writer, head - 1, 1) for name in FLAGS[1:])
        truncated |= valid & ~terminated
        for name in FLAGS:
            ring.get((name,), writer, head, 1).zero_()
        self._follow(writer, head - 1, head + 1)
        return head + 1

    def _evict(self, writer: int, head: int, rows: int) -> None:
        """What so many new rows overwrite, or take a frame from, can no longer be drawn."""
        before, after = (max(0, newest + 1 - self._ring.rows) for newest in (head, head + rows))
        if after == before:
            return
        count = after - before + self.plan.burn_in + self.stack - 1
        span = self._ring.get(SPAN, writer, before, count).clone()
        place = torch.arange(before, before + count, device=self.device).unsqueeze(-1)
        if self.plan.burn_in:
            place = place - self._lead(writer, before, count)
        if self._frames is not None:
            place = place - self._reach(writer, before, count) % self.stack
        self._mark(writer, before, span * (place >= after))

    def _lead(self, writer: int, first: int, count: int) -> Tensor:
        """How many rows a sequence from each of these rows on shows before it, `[count, B]`."""
        return self._ring.get(STEP, writer, first, count).clamp(max=self.plan.burn_in)

    def _reach(self, writer: int, first: int, count: int) -> Tensor:
        """`REACH` of the first row that a sample from each of these rows on shows, `[count, B]`."""
        most = self.plan.burn_in
        reach = self._ring.get(REACH, writer, first - most, count + most)
        if not most:
            return reach
        place = torch.arange(most, most + count, device=self.device).unsqueeze(-1)
        return reach.gather(0, place - self._lead(writer, first, count))

    def _enter(self, writer: int, first: int, valid: Tensor, priorities: Tensor | None) -> None:
        """Note the priorities that new rows will have."""
        entering = torch.full(valid.shape, self._largest, device=self.device) if priorities is None else priorities
        self._largest = max(self._largest, float(torch.where(valid, entering, 0.0).max()))
        self._ring.put(ENTERING, writer, first, entering)

    def _follow(self, writer: int, first: int, head: int) -> None:
        """Rows from `first` to below `head` are there: work out what can be drawn now."""
        low, span = self._samples.follow(writer, first, head)
        if self._frames is not None:
            span = span * self._frames.readable(self._reach(writer, low, len(span)))
        self._counts[writer, 0] = head
        self._mark(writer, low, span)

    def _mark(self, writer: int, first: int, span: Tensor) -> None:
        """Store spans, and with them what can be drawn."""
        old = self._ring.get(SPAN, writer, first, len(span))
        gained = int(span.count_nonzero()) - int(old.count_nonzero())
        if gained:
            self._counts[writer, 1] += gained
        if self._tree is not None:
            changed = (span > 0) != (old > 0)
            priority = self._leaf(self._ring.get(ENTERING, writer, first, len(span)))
            cells = self._ring.cells_of(writer, first, len(span))
            self._tree.set(cells[changed], torch.where(span > 0, priority, 0.0)[changed])
        self._ring.put(SPAN, writer, first, span)

    # Sampling.

    def sample(self, count: int, beta: float = 1.0) -> dict[str, Obs]:
        """Draw N = `count` samples.

        Args:
            beta: exponent of the importance weights.

        Returns:
            What was recorded, `weight` [N], and `index` [N] for `prioritise`. Of transitions, all of it `[N, ...]`: the
            row's obs, action and so on; `reward`, `discount` and `next_obs`, so that its target is
            reward + discount·V(next_obs). Of sequences, all of it `[burn_in + T, N, ...]` but `obs` and `start`, which
            have a row more, and the recurrent `state` `[N, S]` before the first row shown. Rows of the burn-in and
            beyond the episode's end are not valid; `start` is True in the episode's first row, if that is shown.

        Raises:
            ValueError: while there is nothing to be drawn, or if `count` is not at least 1.
        """
        if count < 1:
            raise ValueError(f"count={count} is no number of samples; draw 1 or more.")
        if not len(self):
            raise ValueError(
                f"none of the {int(self._counts[:, 0].sum()) * self.lanes} rows inserted so far begins a whole sample; "
                "insert more before sampling."
            )
        if self._tree is None:
            cells, weight = self._uniform(count), torch.ones(count, device=self.device)
        else:
            cells, weight = self._by_priority(self._tree, count, beta)
        batch = self._samples.read(cells, self.generator)
        return {**batch, "weight": weight, "index": self._serial(cells)}

    def chance(self, index: Tensor) -> Tensor:
        """Of each of these samples `[N]` at a draw, float64, by its `index`; 1 for all without priorities."""
        if self._tree is None:
            return torch.ones(len(index), dtype=torch.float64, device=self.device)
        leaf = self._tree.leaves.index_select(0, index.to(self.device).remainder(self._ring.cells))
        return leaf / self._tree.total()

    def prioritise(self, index: Tensor, priorities: Tensor) -> None:
        """Set the priorities `[N]` of samples by their `index` `[N]`; what was overwritten since then is left out.

        Raises:
            ValueError: for priorities that are no finite numbers ≥ 0; none is set then.
        """
        index, priorities = index.to(self.device), priorities.detach().to(self.device)
        highest = check_priorities(priorities, None, index.shape)
        if self._tree is None or not len(index):
            return
        self._largest = max(self._largest, highest)
        cells = tensor_of(plain(index) % self._ring.cells)
        oldest = max(written for written, _ in self._counts.tolist()) - self._ring.rows  # of the rows that are there
        if int(plain(index).min()) < oldest * self.lanes * self.writers:
            there = self._serial(cells) == index
            cells, priorities = cells[there], priorities[there]
        self._tree.change(cells, self._leaf(priorities))

    def _leaf(self, priority: Tensor) -> Tensor:
        return tensor_of(plain(priority.double()).clip(EPSILON) ** self.plan.alpha)

    def _uniform(self, count: int) -> Tensor:
        """Cells `[N]`, each that can be drawn as likely as any other."""
        span, ring = self._ring.columns[SPAN].view(-1), self._ring
        counts = self._counts.tolist()
        used = min(max(written for written, _ in counts), ring.rows) * self.lanes * self.writers
        if sum(ready for _, ready in counts) < SPARSE * used:
            listed = span.nonzero().squeeze(-1)
            return listed[self._integers(len(listed), count)]
        cells = self._integers(used, count)
        while not (found := span.index_select(0, cells)).all():
            cells = torch.where(found > 0, cells, self._integers(used, count))
        return cells

    def _integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator, device=self.device)

    def _by_priority(self, tree: SumTree, count: int, beta: float) -> tuple[Tensor, Tensor]:
        """Cells `[N]`, of each batch b of the plan one from each bth of the priorities' sum, and importance weights.

        The weights are (M·P(i))^−β over their maximum (Schaul et al. 2016, section 3.4), here the maximum in the batch,
        as most later code has it: it needs no second tree, and M and the sum cancel.
        """
        batches = count // self.plan.batch if count % self.plan.batch == 0 else 1
        lots = torch.rand(batches, count // batches, generator=self.generator, device=self.device, dtype=torch.float64)
        return tree.draw(lots, beta)

    def _serial(self, cells: Tensor) -> Tensor:
        """A number that what is in a cell has for all time: its writer's row, counted from the first, · L + lane."""
        width = self.lanes * self.writers
        newest: Any = self._counts.tolist()[0][0] * width - 1  # number that could be
        if self.writers > 1:
            written = self._counts[:, 0].to(self.device).repeat_interleave(self.lanes)
            newest = plain(written.index_select(0, cells.remainder(width)) * width - 1)
        return tensor_of(newest - (newest - plain(cells)) % self._ring.cells)

    # Saving.

    def state(self) -> dict[str, Any]:
        """All that decides the future, as copies; of the ring only the rows that were written."""
        filled = min(int(self._counts[:, 0].max()) + 1, self._ring.rows)
        saved = {
            "layout": self._layout(),
            "generator": self.generator.get_state(),
            "counts": self._counts.clone(),
            "largest": self._largest,
            "columns": nested({key: column[:filled].clone() for key, column in self._ring.columns.items()}),
        }
        if self._tree is not None:
            saved["sums"] = self._tree.state(filled * self.lanes * self.writers)
        return saved

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what `load_state` cannot load.

        Raises:
            ValueError: for the state of a buffer with another layout, other columns or of another environment.
        """
        mine, saved = self._layout(), {"burn_in": 0, **state["layout"]}  # which replays saved earlier do not name
        other = {name: value for name, value in saved.items() if mine.get(name) != value}
        if other:
            wanted = {name: mine.get(name) for name in other}
            raise ValueError(f"the saved replay has {other} where this one has {wanted}; give both the same settings.")
        columns = dict(leaves(state["columns"]))
        if self.spec is not None and columns:
            _check_shapes(columns, self.spec, self.stack)
        if self._ring.columns and columns:
            _check_looks(_looks_of(columns), _looks_of(self._ring.columns), "the saved replay")

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state()` was taken; what `check_state` refuses is refused before anything is loaded."""
        self.check_state(state)
        columns = dict(leaves(state["columns"]))
        if columns and not self._ring.columns:
            self._allocate(_looks_of(columns))
        if self._ring.columns:
            self._ring.columns[SPAN].zero_()
        for key, leaf in columns.items():
            if key in self._ring.columns:  # replays saved earlier have n-step returns, too
                self._ring.columns[key][: len(leaf)] = leaf
        if self._tree is not None:
            self._tree.load_state(state["sums"])
        self.generator.set_state(state["generator"].cpu())
        self._counts.copy_(state["counts"])
        self._largest = float(state["largest"])

    def _layout(self) -> dict[str, int | float]:
        """What a saved replay has to share with the one that loads it."""
        own = {"lanes": self.lanes, "writers": self.writers, "stack": self.stack}
        names = ("capacity", "gamma", "n_step", "alpha", "sequence", "overlap", "burn_in", "hindsight")
        return {**own, **{name: getattr(self.plan, name) for name in names}}


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, and NaN where the other is."""
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _check_plan(plan: ReplayPlan, lanes: int, stack: int, spec: EnvSpec | None) -> None:
    plan.check(lanes)
    if not 1 <= stack <= 64:
        raise ValueError(f"stack={stack} is no number of frames; use 1 to 64.")
    most = torch.iinfo(torch.int16).max
    for name in ("sequence", "n_step"):
        if (steps := getattr(plan, name)) > most:
            raise ValueError(f"{name}={steps} is too long; use at most {most} steps.")
    if plan.hindsight and (spec is None or spec.goal_reward is None):
        raise ValueError(
            f"hindsight={plan.hindsight} needs to know what a goal is worth; give goal_reward(achieved, desired) in a "
            "spec."
        )
    if plan.hindsight and stack > 1:
        raise ValueError(f"hindsight={plan.hindsight} reads goals from structures, not from stacks; use stack=1.")


def _looks_of(columns: Mapping[Key, Tensor]) -> Looks:
    """Shape and dtype in a cell of what an insert brought."""
    return {key: (tuple(leaf.shape[2:]), leaf.dtype) for key, leaf in columns.items() if key[0] != "replay"}


def _check_looks(looks: Looks, mine: Looks, who: str) -> None:
    for key in sorted(looks.keys() | mine.keys()):
        seen, wanted = (
            f"{str(both[key][1]).removeprefix('torch.')}{list(both[key][0])}" if key in both else "nothing"
            for both in (looks, mine)
        )
        if seen != wanted:
            raise ValueError(
                f"{who} has {seen} a lane as {'.'.join(key)!r} where this buffer stores {wanted}; give rows like those "
                "of the first insert."
            )


def _check_shapes(columns: Mapping[Key, Tensor], spec: EnvSpec, stack: int) -> None:
    """Refuse saved observations and actions that are not of this environment's shapes."""
    for name, space in (("obs", spec.obs_space), ("action", spec.action_space)):
        saved = {".".join(key): [*leaf.shape[2:]] for key, leaf in columns.items() if key[0] == name}
        wanted = {".".join((name, *key)): [*(leaf.shape or ())] for key, leaf in leaf_spaces(space).items()}
        if name == "obs" and stack > 1:
            wanted[name][0] //= stack  # each frame is stored once
        if saved != wanted:
            raise ValueError(
                f"the saved replay has {saved} a lane where {spec.id} has {wanted}; resume with the environment that "
                "the checkpoint is of."
            )


def check_priorities(priorities: Tensor, valid: Tensor | None, shape: torch.Size) -> float:
    """The largest, 0 if there are none; refuses another shape, and where `valid` what is negative or not finite."""
    if priorities.shape != shape:
        raise ValueError(f"priorities {list(priorities.shape)} came for {list(shape)} samples; give one each.")
    judged = priorities if valid is None else torch.where(valid, priorities, 0.0)
    if not judged.numel():
        return 0.0
    numbers = plain(judged)
    low, high = float(numbers.min()), float(numbers.max())  # NaN if any is
    if not 0.0 <= low <= high < math.inf:
        place = (~((judged >= 0) & judged.isfinite())).nonzero()[0].tolist()
        raise ValueError(
            f"the priority {float(priorities[tuple(place)])} at {place} cannot be drawn by; give finite numbers of 0 "
            "or more."
        )
    return high

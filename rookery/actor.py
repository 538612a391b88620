"""What an actor does: act in B lanes with the weights it was given, and fill unrolls."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rookery.algorithms.base import Acted, Algorithm, Explore, PolicyNet, flat
from rookery.data.unroll import UnrollBuffer
from rookery.envs.tensor.base import TensorEnv
from rookery.envs.vector import EnvError, Obs, VectorEnv
from rookery.estimators import linear_recurrence
from rookery.nn.compiled import compiled, precision

__all__ = ["Collector", "Unroll", "joined", "new_unroll"]

COLUMNS = ("reward", "terminated", "truncated", "valid")
CHUNK = 8  # rows that are compiled as one function; more rows a call cost less, and compile longer
Result = TypeVar("Result")


class Unroll:
    """A slot for T steps of B lanes, and what was noted when it was filled."""

    def __init__(self, buffer: UnrollBuffer, state: Tensor, records: bool) -> None:
        self.buffer = buffer
        self.records = records  # whether acting gives more than actions, which the row to bootstrap from needs too
        self.state_in = state.clone()  # [B, S] recurrent state before row 0
        self.version = torch.zeros((), dtype=torch.int64)  # of the weights that acted
        self.learnt_in = torch.full((), -1)  # the number of the batch that it is part of (`topologies.replicas`)
        self.priority: Tensor | None = None  # [T, B] of the rows in replay, where the algorithm gives them

    def part(self, lanes: slice) -> Unroll:
        """Some of its lanes, in the same memory."""
        part = copy.copy(self)
        part.buffer = copy.copy(self.buffer)
        part.buffer.storage = {name: rows[:, lanes] for name, rows in self.buffer.storage.items()}
        part.state_in = self.state_in[lanes]
        part.priority = None if self.priority is None else self.priority[:, lanes]
        return part

    def batch(self) -> dict[str, Obs]:
        """The rows by name, `[T+1, B, ...]`, and the recurrent `state` before row 0, `[B, S]`."""
        more = {} if self.priority is None else {"priority": self.priority}
        return {**self.buffer.storage, "state": self.state_in, **more}

    def state(self) -> dict[str, Any]:
        """All that is in it."""
        rows = {name: value if isinstance(value, Tensor) else value.to_dict() for name, value in self.batch().items()}
        return {"rows": rows, "version": self.version}

    def load_state(self, state: dict[str, Any]) -> None:
        """Hold what was in the one that `state()` was taken of."""
        self.version.copy_(state["version"])
        for name, value in self.batch().items():
            saved = state["rows"][name]
            value.copy_(saved) if isinstance(value, Tensor) else value.update_(saved)


def joined(unrolls: Sequence[Unroll], device: torch.device) -> dict[str, Any]:
    """Unrolls side by side, as one batch of all their lanes; a single one that is on the device is not copied."""
    batches = [unroll.batch() for unroll in unrolls]
    whole = (
        batches[0]
        if len(batches) == 1
        else {name: torch.cat([batch[name] for batch in batches], dim=int(name != "state")) for name in batches[0]}
    )
    return {name: value.to(device) for name, value in whole.items()}


def new_unroll(algorithm: Algorithm, example: tuple[dict[str, Obs], bool], state: Tensor, steps: int) -> Unroll:
    """Room for so many rows like the example (`Collector.example`)."""
    row, records = example
    unroll = Unroll(UnrollBuffer(row, steps), state, records)
    unroll.priority = algorithm.priorities(unroll.batch())
    return unroll


def _outliving(act: Callable[..., Acted]) -> Callable[..., Acted]:
    """Acting whose results are still there after the next call: a CUDA graph writes its own to the same memory."""

    def acting(*args: Any) -> Acted:
        acted = act(*args)
        record = {name: value.clone() for name, value in acted.record.items()}
        return Acted(acted.action.clone(), record, acted.state.clone())

    return acting


class Collector:
    """Steps an environment with an algorithm's policy, T rows at a time.

    `seconds` has how long was spent in the environment and in acting so far, by `clock`; on a GPU, in issuing the work.

    Args:
        net: acts; the collector keeps it to itself, and fills it by `load`.
        steps: T, the rows of an unroll.
        compile: wrap acting in `torch.compile`, and with a tensor environment whole rows of acting and stepping.
        graphs: replay what was compiled as CUDA graphs.
        bf16: run the trunk in bfloat16.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        algorithm: Algorithm,
        net: PolicyNet,
        env: VectorEnv,
        steps: int,
        seed: int,
        *,
        compile: bool = False,
        graphs: bool = False,
        bf16: bool = False,
    ) -> None:
        self.algorithm, self.net, self.env, self.T = algorithm, net, env, steps
        self.generator = torch.Generator(env.device).manual_seed(seed)
        self.returns: list[float] = []  # of the episodes that ended since they were last taken
        self.lengths: list[int] = []
        self.steps = 0  # valid ones so far
        self.seconds: dict[str, float] = defaultdict(float)  # by activity
        self._flat, self.version = flat(algorithm, net, learns=False), 0
        self._bf16 = bf16
        self._tensor_env = env.innermost if isinstance(env.innermost, TensorEnv) else None
        whole = compile and self._tensor_env is not None  # rows of acting and stepping, not acting alone
        self._chunk = next(n for n in range(CHUNK, 0, -1) if steps % n == 0) if whole else steps
        self._act, self._step, self._rows = self._choose, env.step, self._collect
        if whole:  # no clock inside what is compiled
            self._rows = self._timed("environment and inference", compiled(self._collect, graphs))
        else:
            act = compiled(self._choose, graphs) if compile else self._choose
            self._act = self._timed("inference", _outliving(act) if graphs else act)
            self._step = self._timed("environment", env.step)
        self._scale = torch.ones(env.lanes, device=env.device)  # of exploration
        self._obs = env.reset(seed)
        self._state = net.initial_state(env.lanes, env.device)
        self._start = torch.ones(env.lanes, dtype=torch.bool, device=env.device)  # the row is an episode's first
        self._ended = torch.zeros_like(self._start)  # the row before ended its episode
        self._sums = torch.zeros(3, env.lanes, device=env.device)  # return, length and discounted return so far
        self._static: dict[str, Any] = {}  # where the lanes stand between replays of a CUDA graph
        if whole and graphs:
            lanes_now = {name: getattr(self, name).clone() for name in ("_obs", "_state", "_start")}
            carry: dict[str, Tensor] = env.carry()  # type: ignore[attr-defined]  # tensor environments have it
            self._static = {"env": {name: value.clone() for name, value in carry.items()}, "lanes": lanes_now}

    def _choose(self, obs: Obs, state: Tensor, noise: Tensor) -> Acted:
        with precision(self.env.device, self._bf16):
            return self.algorithm.act(self.net, obs, state, Explore(noise, self._scale))

    def _timed(self, activity: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, whose seconds count as that activity."""
        clock = self.clock

        def timed(*args: Any) -> Result:
            began = clock()
            result = function(*args)
            self.seconds[activity] += clock() - began
            return result

        return timed

    def load(self, version: int, values: dict[str, Tensor]) -> None:
        """Act with these weights from now on."""
        self._flat.restore(values)
        self.version = version

    @torch.no_grad()
    def slot(self) -> Unroll:
        """A new slot, allocated from one example row."""
        return new_unroll(self.algorithm, self.example(), self.memory, self.T)

    @property
    def device(self) -> torch.device:
        """Of the lanes."""
        return self.env.device

    @property
    def memory(self) -> Tensor:
        """The recurrent state `[B, S]` of the lanes."""
        return self._state

    def close(self) -> None:
        self.env.close()

    def example(self) -> tuple[dict[str, Obs], bool]:
        """A row, and whether acting gives more than actions."""
        floats = torch.zeros(self.env.lanes, device=self.env.device)
        noise = self.net.draw((self.env.lanes,), torch.Generator(self.env.device))
        acted = self._choose(self._obs, self._state, noise)
        row = {
            "obs": self._obs,
            "action": acted.action,
            "reward": floats,
            "discounted_return": floats,
            **{name: floats.bool() for name in ("terminated", "truncated", "valid", "start")},
            **acted.record,
        }
        return row, bool(acted.record)

    async def ready(self) -> None:
        """Nothing to wait for: an unroll is filled within a turn."""

    async def filled(self, unroll: Unroll, scale: Tensor | float = 1.0) -> int:
        """`fill`, for whom it is all the same whether these lanes' actions are chosen here."""
        return self.fill(unroll, scale)

    @torch.no_grad()
    def fill(self, unroll: Unroll, scale: Tensor | float = 1.0) -> int:
        """T steps of every lane into the slot, explored by `scale`, `[B]` or a number; gives how many were valid."""
        noise, ahead = self._begin(unroll, scale)
        raw: list[Tensor] = []
        for first in range(0, self.T, self._chunk):
            part = slice(first, first + self._chunk)
            rows = self._rows(noise[part], ahead[part])
            raw += rows.pop("raw_reward", [])
            unroll.buffer.write(rows, first)
            if self._static:
                self._settle()
        if not unroll.records:
            return self._end(unroll, raw, {})
        # These lanes act again, with newer weights: this is for the record alone.
        acted = self._timed("inference", self._choose)(self._obs, self._state, noise[-1])
        return self._end(unroll, raw, acted.record)

    def _begin(self, unroll: Unroll, scale: Tensor | float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Draw the noise of T + 1 rows, and what a tensor environment takes for T."""
        unroll.state_in.copy_(self._state)
        self._scale[:] = scale
        noise = self.net.draw((self.T + 1, self.env.lanes), self.generator).unbind(0)
        return noise, self._tensor_env.draw(self._tensor_env.generator, self.T).unbind(0) if self._tensor_env else ()

    def _end(self, unroll: Unroll, raw: list[Tensor], record: dict[str, Tensor]) -> int:
        """Write the last row, and all that follows from the others; gives how many steps were valid."""
        if self._tensor_env is not None:
            self._tensor_env.noise = None
        rest = {"obs": self._obs, "start": self._start, **record}
        unroll.buffer.write({name: [value] for name, value in rest.items()}, self.T)
        unroll.version.fill_(self.version)
        unroll.learnt_in.fill_(-1)
        valid = self._account(unroll.buffer, raw)
        if unroll.priority is not None:
            unroll.priority.copy_(cast(Tensor, self.algorithm.priorities(unroll.batch())))
        return valid

    def _collect(self, noise: Sequence[Tensor], ahead: Sequence[Tensor]) -> dict[str, list[Obs]]:
        """As many rows as there is noise, by name; leaves the lanes where the last row led."""
        rows: dict[str, list[Obs]] = defaultdict(list)
        for index, own in enumerate(noise):
            if self._tensor_env is not None:
                self._tensor_env.noise = ahead[index]
            for name, value in self._row(self._act(self._obs, self._state, own)).items():
                rows[name].append(value)
        return rows

    def _row(self, acted: Acted) -> dict[str, Obs]:
        """Step the lanes; gives the row."""
        step = self._step(acted.action)
        row = {"obs": self._obs, "start": self._start, "action": acted.action, **acted.record, **step.columns()}
        self._obs = step.obs
        if self.net.state_size:  # the row after an invalid one is an episode's first, and begins with no memory
            self._start = ~step.valid
            self._state = acted.state.masked_fill(self._start.unsqueeze(-1), 0)
        return row

    def _settle(self) -> None:
        """Copy the lanes out of the memory of the CUDA graph, which the next replay overwrites."""
        self.env.settle(self._static["env"])  # type: ignore[attr-defined]  # as above
        for name, static in self._static["lanes"].items():
            static.copy_(getattr(self, name))
            setattr(self, name, static)

    def _account(self, buffer: UnrollBuffer, raw: list[Tensor]) -> int:
        """Returns, lengths and discounted returns so far in every row; takes down the episodes that ended."""
        rows: dict[str, Any] = {name: buffer.storage[name][:-1] for name in (*COLUMNS, "discounted_return")}
        ended = rows["terminated"] | rows["truncated"]
        goes_on = torch.cat([self._ended[None], ended[:-1]]).logical_not().float()
        decay = torch.stack([goes_on, goes_on, self.algorithm.gamma * goes_on], 1)  # [T, 3, B]
        reward = torch.stack(raw) if raw else rows["reward"]
        sums = linear_recurrence(
            decay, torch.stack([reward, rows["valid"].float(), rows["reward"]], 1), self._sums, reverse=False
        )
        rows["discounted_return"].copy_(sums[:, 2])
        if self._tensor_env is not None:  # others are looked at in every step
            self._refuse_non_finite(buffer.storage["obs"][1:], rows["reward"], sums[:, 1])
        self._sums, self._ended = sums[-1].clone(), ended[-1].clone()
        if ended.any():
            self.returns += sums[:, 0][ended].tolist()
            self.lengths += [int(length) for length in sums[:, 1][ended].tolist()]
        valid = int(rows["valid"].sum())
        self.steps += valid
        return valid

    def _refuse_non_finite(self, obs: Obs, reward: Tensor, length: Tensor) -> None:
        """What T steps led to, `[T, B, ...]`; `length` has which step of its episode each was."""
        leaves: Any = [obs] if isinstance(obs, Tensor) else obs.values(include_nested=True, leaves_only=True)
        for name, value in [*(("obs", leaf) for leaf in leaves), ("reward", reward)]:
            if value.is_floating_point() and not (finite := torch.isfinite(value)).all():
                row, lane = (~finite).nonzero()[0, :2].tolist()
                where = f"lane {lane} at step {int(length[row, lane])} of its episode (row {row} of the unroll)"
                raise EnvError(
                    f"{self.env.spec.id} gave {name} that is not finite in {where}: "
                    f"{value[row, lane].flatten()[:8].tolist()}."
                )

    def episodes(self) -> dict[str, Any]:
        """The episodes that ended since the last call: their number, mean return and length, and each return."""
        returns, lengths, self.returns, self.lengths = self.returns, self.lengths, [], []
        if not returns:
            return {}
        mean_return, mean_length = sum(returns) / len(returns), sum(lengths) / len(lengths)
        return {
            "episodes": len(returns),
            "episode_return": mean_return,
            "episode_length": mean_length,
            "returns": returns,
        }

    def state(self) -> dict[str, Any]:
        """All that decides the next unroll but the weights; without the environment's, where it cannot save its own."""
        own = {"noise": self.generator.get_state(), "returns": self.returns, "lengths": self.lengths}
        own["steps"] = self.steps
        if not self.env.spec.saves_state:
            return own
        lanes = {"state": self._state, "start": self._start, "ended": self._ended, "sums": self._sums}
        obs = self._obs if isinstance(self._obs, Tensor) else self._obs.to_dict()
        return {**own, "lanes": lanes, "obs": obs, "env": self.env.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken; the lanes begin new episodes where the environment was not saved."""
        self.generator.set_state(state["noise"])
        self.returns, self.lengths = list(state["returns"]), list(state["lengths"])
        self.steps = state.get("steps", 0)
        if "lanes" not in state:
            return
        self.env.load_state(state["env"])
        for name, value in state["lanes"].items():
            setattr(self, f"_{name}", value.to(self.env.device))
        obs = state["obs"]
        if not isinstance(obs, Tensor):
            from tensordict import TensorDict  # takes a second to import, and only structures need it

            obs = TensorDict(obs, batch_size=[self.env.lanes])
        self._obs = obs.to(self.env.device)

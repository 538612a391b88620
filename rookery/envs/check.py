"""The conformance suite of the stream convention: what our backends are tested with, and a user's own environment."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor

from rookery.envs.make import make_env
from rookery.envs.spec import Leaf, dtype_of, leaves, mask_of
from rookery.envs.vector import Obs, Step, VectorEnv

__all__ = ["RULES", "Finding", "Report", "check_env"]

RULES = {
    "spaces": "observation and action spaces have tensors of a fixed size",
    "runs": "reset and step raise nothing",
    "obs_form": "observations have the space's keys, shapes and dtypes, on the environment's device",
    "obs_in_space": "observations are within their space, and a mask allows an action",
    "finite": "observations and rewards are finite",
    "reward_form": "rewards are float32 [B]",
    "flags": "terminated, truncated and valid are bool [B], and no step is both terminated and truncated",
    "info": "info holds the same names in every step, each [B, ...]",
    "first_row": "the first step after a reset is valid in every lane",
    "autoreset": "valid is False in exactly the one call after a step that ended",
    "reset_rows": "rows that are not valid have reward 0 and no flags",
    "final_obs": "the observation of a step that ended is the final one",
    "time_limit": "no episode lasts longer than max_steps",
    "own_memory": "tensors handed out are never written again, and actions never at all",
    "same_seed": "the same seed and actions give the same stream",
    "other_seed": "another seed gives another stream",
    "lane_seeds": "no two lanes have the same stream by chance of their seeds",
    "lanes_apart": "the actions of one lane change nothing in the others",
    "ignored_action": "the action of a row that is not valid changes nothing",
    "saves_state": "after load_state the stream goes on exactly as after state",
    "render": "a picture is [H, W, 3] uint8",
    "close": "close twice is harmless",
}

# Where these are broken the stream is not read on, and streams are not compared: all else would follow from them.
UNREADABLE = {"spaces", "runs", "obs_form", "reward_form", "flags", "info"}
INCOMPARABLE = UNREADABLE | {"finite", "first_row", "autoreset", "reset_rows", "own_memory"}

REPLAY = 200  # steps of the streams that are compared with one another
LIMIT = 7  # max_steps of the copies that show what a limit does; episodes of most tasks last longer
SHORT = 6 * (LIMIT + 1)  # steps of the streams with that limit; to begin an episode costs an emulator many frames
KEPT = 8  # steps for which handed-out tensors are watched
SLACK = 1e-5  # of a bound, or absolute below 1: float32 arithmetic


@dataclass(frozen=True)
class Finding:
    """What became of one rule."""

    rule: str
    ok: bool  # True for a rule that was skipped
    skipped: str | None  # why it could not be checked
    message: str  # what was seen, where, and what to do; for a rule that holds, the rule


@dataclass(frozen=True)
class Report:
    """All rules in order; `str(report)` is a table."""

    title: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def __getitem__(self, rule: str) -> Finding:
        return next(finding for finding in self.findings if finding.rule == rule)

    def __str__(self) -> str:
        width = max(map(len, RULES))
        lines = []
        for finding in self.findings:
            word = "skip" if finding.skipped else "ok  " if finding.ok else "FAIL"
            lines.append(f"  {word}  {finding.rule:{width}}  {finding.skipped or finding.message}")
        broken = sum(not finding.ok for finding in self.findings)
        skipped = sum(finding.skipped is not None for finding in self.findings)
        kept = len(self.findings) - broken - skipped
        return "\n".join([f"{self.title}: {kept} rules kept, {broken} broken, {skipped} not checked", *lines])


def check_env(
    env: str | VectorEnv | gymnasium.Env | Callable[..., gymnasium.Env],
    lanes: int = 3,
    steps: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Play an environment with random actions and see which rules of the stream convention it keeps.

    Args:
        env: an id, a Gymnasium environment (which has one lane) or what makes one; or a VectorEnv, whose own number
            of lanes counts. It is closed in the end.
        steps: of the longest stream; some rules need episodes that end within it.
        options: for `make_env`, such as `workers=2`.

    Raises:
        ValueError: for fewer than 10 steps, or what `make_env` refuses.
    """
    if steps < 10:
        raise ValueError(f"steps={steps} shows little of the stream; use 10 or more, better 1000.")
    lanes = 1 if isinstance(env, gymnasium.Env) else lanes
    check = _Check(make_env(env, lanes, seed=seed, **options), steps, seed)
    title = f"{check.env.spec.id} on backend {check.env.spec.backend}, {check.env.lanes} lanes, {steps} steps"
    short = None
    try:
        if check.spaces():
            check.stream()
        if not check.failed.keys() & INCOMPARABLE:
            short = _limited(env, lanes, seed, options)
            check.replays(short)
        check.drawing(env, **{**options, "render": True})
    finally:
        check.closing()
        if short is not None:
            short.close()
    return Report(title, check.findings())


def _limited(env: Any, lanes: int, seed: int, options: dict[str, Any]) -> VectorEnv | None:
    """A copy that truncates after LIMIT steps, if it comes from an id."""
    if not isinstance(env, str):
        return None
    try:
        return make_env(env, lanes, seed=seed, **{**options, "max_steps": LIMIT})
    except (ValueError, TypeError, RuntimeError):
        return None  # it takes no limit


class _Policy:
    """Random actions that a mask allows; the same seed and observations give the same ones."""

    def __init__(self, env: VectorEnv, seed: int, shared: bool = False) -> None:
        self.env, self.shared = env, shared  # shared: one action for all lanes
        self.generator = torch.Generator().manual_seed(seed)
        self.found = leaves(env.spec.action_space)

    def __call__(self, obs: Obs) -> Obs:
        if () in self.found:
            return self._sample(self.found[()], mask_of(obs))
        drawn = {key: self._sample(leaf, None) for key, leaf in self.found.items()}
        action = TensorDict({}, batch_size=[self.env.lanes], device=self.env.device)
        for key, values in drawn.items():
            action[key] = values
        return action

    def _sample(self, leaf: Leaf, mask: Tensor | None) -> Tensor:
        rows = 1 if self.shared else self.env.lanes
        noise = torch.rand((rows, *(leaf.shape or ())), generator=self.generator)
        if isinstance(leaf, spaces.Discrete) and mask is not None and mask.shape[1:].numel() == leaf.n:
            scores = torch.rand((rows, int(leaf.n)), generator=self.generator).to(mask.device) + 1.0
            return (scores * mask).argmax(-1)
        if isinstance(leaf, spaces.Box):
            low, high = (torch.as_tensor(np.clip(edge, -1e3, 1e3).astype(np.float32)) for edge in (leaf.low, leaf.high))
            unbounded = (low <= -1e3) | (high >= 1e3)
            values = torch.where(unbounded, noise * 2.0 - 1.0, low + noise * (high - low))
        elif isinstance(leaf, spaces.MultiBinary):
            values = noise < 0.5
        else:
            values = noise * torch.as_tensor(leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec)
        return values.to(dtype_of(leaf)).expand(self.env.lanes, *noise.shape[1:]).contiguous().to(self.env.device)


class _Row(NamedTuple):
    before: Obs  # what the action answers
    ended: Tensor  # [B] bool: the step before ended
    action: Obs
    step: Step


Act = Callable[[Obs, Tensor], Obs]  # from an observation and which lanes have just ended


def _play(env: VectorEnv, seed: int | None, steps: int, act: Act) -> Iterator[_Row]:
    obs = env.reset(seed)
    yield from _go_on(env, obs, torch.zeros(env.lanes, dtype=torch.bool, device=env.device), steps, act)


def _go_on(env: VectorEnv, obs: Obs, ended: Tensor, steps: int, act: Act) -> Iterator[_Row]:
    for _ in range(steps):
        action = act(obs, ended)
        step = env.step(action)
        yield _Row(obs, ended, action, step)
        obs, ended = step.obs, _ended(step)


class _Check:
    """Collects what was found, rule by rule."""

    def __init__(self, env: VectorEnv, steps: int, seed: int) -> None:
        self.env, self.steps, self.seed = env, steps, seed
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.held: set[str] = set()

    def broken(self) -> bool:
        """Whether a row was such that no more can be read from the stream."""
        return bool(self.failed.keys() & UNREADABLE)

    def fail(self, rule: str, message: str) -> None:
        self.failed.setdefault(rule, message)

    def hold(self, *rules: str) -> None:
        self.held.update(rules)

    def findings(self) -> list[Finding]:
        found = []
        first = next(iter(self.failed), None)
        for rule, demand in RULES.items():
            skipped = None
            if rule not in self.failed and rule not in self.held:
                skipped = self.skipped.get(rule, f"mend {first} first" if first else "nothing showed it")
            found.append(Finding(rule, rule not in self.failed, skipped, self.failed.get(rule, demand)))
        return found

    @contextlib.contextmanager
    def guarded(self, rule: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a user's environment raises is a finding
            said, _, trace = f"{type(error).__name__}: {error}".partition("\n")
            places = re.findall(r'File "(?:.*[/\\])?(.+?)", line (\d+)', trace)
            self.fail(rule, said + (f" ({places[-1][0]}, line {places[-1][1]})" if places else ""))

    def spaces(self) -> bool:
        spec = self.env.spec
        for name, space in (("observation", spec.obs_space), ("action", spec.action_space)):
            try:
                leaves(space)
            except ValueError as error:
                self.fail("spaces", f"the {name} space: {error}")
        self.hold("spaces")
        return "spaces" not in self.failed

    def stream(self) -> None:
        """One long stream, each row looked at once."""
        watch = _Watch(self)
        with self.guarded("runs"):
            policy = _Policy(self.env, self.seed)
            for row in _play(self.env, self.seed, self.steps, lambda obs, ended: watch.acting(policy(obs), obs)):
                watch.row(row)
                if self.broken():
                    return
            self.hold("runs")
        watch.close()

    # --- streams that are compared ----------------------------------------------------------------------------------

    def replays(self, short: VectorEnv | None) -> None:
        """Play the same again with one thing changed; on the copy with many episode ends if there is one."""
        env = self.env if short is None else short
        steps = min(self.steps, REPLAY if short is None else SHORT)
        if short is not None:
            with self.guarded("time_limit"):
                self._limit(short)

        def play(seed: int, act: Act) -> list[_Row]:
            return list(_play(env, seed, steps, act))

        with self.guarded("same_seed"):
            first = play(self.seed, self._acts(env))
            difference = _difference(first, play(self.seed, self._acts(env)))
            if difference:
                advice = "reset(seed) must seed all that is random"
                self.fail("same_seed", f"seed {self.seed} twice: {difference}; {advice}.")
            self.hold("same_seed")
            self._seeds(env, play)
            if difference:
                for rule in ("lanes_apart", "ignored_action"):
                    self.skipped[rule] = "the stream cannot be repeated (same_seed)"
                return
            with self.guarded("lanes_apart"):
                self._apart(env, first, play)
            if "lanes_apart" not in self.failed:
                with self.guarded("ignored_action"):
                    self._ignored(env, first, play)
        with self.guarded("saves_state"):
            self._saves(env, steps)

    def _acts(self, env: VectorEnv, seed: int = 0, shared: bool = False) -> Act:
        policy = _Policy(env, self.seed + seed, shared)
        return lambda obs, ended: policy(obs)

    def _seeds(self, env: VectorEnv, play: Callable[[int, Act], list[_Row]]) -> None:
        """Lanes act alike here, so that whatever differs is chance."""
        ours, others = (play(seed, self._acts(env, shared=True)) for seed in (self.seed, self.seed + 1))
        differ = _difference(ours, others) is not None
        twins = [
            (one, two) for one in range(env.lanes) for two in range(one) if all(_alike(row, one, two) for row in ours)
        ]
        chance = len(twins) < env.lanes * (env.lanes - 1) // 2 or _starts_differ(ours)
        if differ:
            self.hold("other_seed")
        elif chance:
            advice = "reset(seed) must use its seed"
            self.fail("other_seed", f"seeds {self.seed} and {self.seed + 1} give the same {len(ours)} steps; {advice}.")
        else:
            self.skipped["other_seed"] = "nothing in it seems to be random"
        if env.lanes == 1 or not (differ or chance):
            self.skipped["lane_seeds"] = "one lane only" if env.lanes == 1 else "nothing in it seems to be random"
            return
        if twins:
            one, two = twins[0]
            self.fail("lane_seeds", f"lanes {two} and {one} are the same for {len(ours)} steps; seed each lane apart.")
        self.hold("lane_seeds")

    def _apart(self, env: VectorEnv, first: list[_Row], play: Callable[[int, Act], list[_Row]]) -> None:
        if env.lanes == 1:
            self.skipped["lanes_apart"] = "one lane only"
            return
        last = torch.arange(env.lanes, device=env.device) == env.lanes - 1
        usual, other = self._acts(env), self._acts(env, 1)
        changed = play(self.seed, lambda obs, ended: _mix(last, other(obs, ended), usual(obs, ended)))
        difference = _difference(first, changed, ~last)
        if difference:
            advice = "keep the lanes' state and random numbers apart"
            self.fail("lanes_apart", f"other actions in lane {env.lanes - 1} only: {difference}; {advice}.")
        self.hold("lanes_apart")

    def _ignored(self, env: VectorEnv, first: list[_Row], play: Callable[[int, Act], list[_Row]]) -> None:
        if not any(bool(row.ended.any()) for row in first):
            self.skipped["ignored_action"] = f"no episode ended within {len(first)} steps"
            return
        usual, other = self._acts(env), self._acts(env, 1)
        changed = play(self.seed, lambda obs, ended: _mix(ended, other(obs, ended), usual(obs, ended)))
        difference = _difference(first, changed)
        if difference:
            advice = "the call after an ended step only begins the new episode"
            self.fail("ignored_action", f"other actions in rows that are not valid: {difference}; {advice}.")
        self.hold("ignored_action")

    def _saves(self, env: VectorEnv, steps: int) -> None:
        if not env.spec.saves_state:
            self.skipped["saves_state"] = "spec.saves_state is False"
            return
        *_, row = _play(env, self.seed, steps // 2 + 1, self._acts(env))
        last, ended = row.step.obs, _ended(row.step)
        saved = env.state()
        for name, value in saved.items():
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                self.fail("saves_state", f"state()[{name!r}] is {_looks(value)}; give tensors on the CPU.")
                return
        ours = list(_go_on(env, last, ended, steps, self._acts(env, 1)))
        env.reset(self.seed + 1)
        env.load_state(saved)
        difference = _difference(ours, list(_go_on(env, last, ended, steps, self._acts(env, 1))))
        if difference:
            advice = "state() must hold all that decides the future, as copies"
            self.fail("saves_state", f"after load_state: {difference}; {advice}.")
        self.hold("saves_state")

    def _limit(self, short: VectorEnv) -> None:
        """A copy with a limit of a few steps beside one that goes on: the same, to the last observation."""
        watch = _Watch(self, short)
        for row in _play(short, self.seed, SHORT // 2 + 1, self._acts(short)):
            watch.row(row)
        watch.close()
        if self.broken():
            return
        ours, longer = (list(_play(env, self.seed, LIMIT, self._acts(env))) for env in (short, self.env))
        going = torch.stack([_ended(row.step) for row in longer]).any(0).logical_not()
        if not bool(going.any()) or _difference(ours[:-1], longer[:-1], going):
            return  # nothing to compare with: shorter episodes, or observations that tell the time left
        self.hold("final_obs")
        differs = going & ~_same(ours[-1].step.obs, longer[-1].step.obs)
        if bool(differs.any()):
            self.fail(
                "final_obs",
                f"lane {int(differs.int().argmax())}, step {LIMIT}, cut off by max_steps={LIMIT}: the observation is "
                "not the one that the same steps give without the limit; return the final observation.",
            )

    # --- the rest ---------------------------------------------------------------------------------------------------

    def drawing(self, made_of: Any, **options: Any) -> None:
        """Draw, by a copy that is built for it, where it is known how one is made."""
        known = isinstance(made_of, str) or callable(made_of)
        try:
            copy = contextlib.closing(make_env(made_of, 1, **options)) if known else contextlib.nullcontext(self.env)
            with copy as env:
                env.reset()
                picture = env.render()
        except Exception as error:  # not every environment can draw
            self.skipped["render"] = str(error).splitlines()[0] if str(error) else type(error).__name__
            return
        good = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
        if not good or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            self.fail("render", f"render() gives {_looks(picture)}; give a numpy array [H, W, 3] uint8.")
        self.hold("render")

    def closing(self) -> None:
        with self.guarded("close"):
            self.env.close()
            self.env.close()
            self.hold("close")


@dataclass
class _Endings:
    """What the observations around episode ends look like, and inside episodes."""

    ends: int = 0
    as_before: int = 0  # the ended step's observation is that of the step before
    as_next: int = 0  # ... is the first of the next episode
    begun: int = 0  # next episodes seen
    inside: int = 0  # steps that did not end
    changed: int = 0  # ... and changed the observation
    where: str = ""


class _Watch:
    """Looks at each row of a stream as it comes."""

    def __init__(self, check: _Check, env: VectorEnv | None = None) -> None:
        self.check, self.env = check, env or check.env
        spec, device = self.env.spec, self.env.device
        self.leaves = leaves(spec.obs_space)
        self.bounds = {key: _bounds(leaf, device) for key, leaf in self.leaves.items()}
        self.time = 0
        self.age = torch.zeros(self.env.lanes, dtype=torch.int64, device=device)  # valid steps of the episode
        self.reached = False  # an episode has lasted max_steps
        self.names: list[str] | None = None
        self.endings = _Endings()
        self.kept: deque[tuple[str, Tensor, Tensor]] = deque()  # what was handed out, and what it was then
        self.sent: list[tuple[Tensor, Tensor]] = []

    def fail(self, rule: str, lane: Tensor | int | None, message: str) -> None:
        place = "" if lane is None else f"lane {lane if isinstance(lane, int) else int(lane.int().argmax())}, "
        self.check.fail(rule, f"{place}step {self.time}: {message}")

    def acting(self, action: Obs, obs: Obs) -> Obs:
        """Note the action on its way in, and the reset's observation before the first."""
        if not self.time:
            self._observation(obs)
            self._keep("reset's obs", obs)
        self.sent = [(tensor, tensor.clone()) for tensor in _tensors(action)]
        return action

    def row(self, row: _Row) -> None:
        self.time += 1
        if any(not _equal(tensor, then) for tensor, then in self.sent):
            self.fail("own_memory", None, "step() wrote into the action it was given; copy it first.")
        self._forms(row.step)
        self._observation(row.step.obs)
        if self.check.broken():
            return
        self._values(row.step)
        self._convention(row)
        self._endings(row)
        for name in Step._fields[:5]:
            self._keep(f"{name} of step {self.time}", getattr(row.step, name))

    def _keep(self, name: str, value: Obs) -> None:
        self.kept.extend((name, tensor, tensor.clone()) for tensor in _tensors(value))
        while len(self.kept) > KEPT * (4 + len(self.leaves)):
            self._compare(*self.kept.popleft())

    def _compare(self, name: str, tensor: Tensor, then: Tensor) -> None:
        if not _equal(tensor, then):
            self.fail("own_memory", None, f"a later step wrote into the {name}; hand out new tensors each time.")

    def _forms(self, step: Step) -> None:
        lanes, device = self.env.lanes, self.env.device
        for name, value in zip(Step._fields[1:5], step[1:5], strict=True):
            rule, dtype = ("reward_form", torch.float32) if name == "reward" else ("flags", torch.bool)
            if not _fits(value, (lanes,), dtype, device):
                self.fail(rule, None, f"{name} is {_looks(value)}; expected {_form((lanes,), dtype, device)}.")
        names = sorted(step.info)
        if self.names is None:
            self.names = names
        if names != self.names:
            self.fail("info", None, f"info has {names}, and had {self.names} before; give the same names every step.")
        for name, value in step.info.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (lanes,) or value.device != device:
                self.fail("info", None, f"info[{name!r}] is {_looks(value)}; expected a tensor [{lanes}, ...].")

    def _observation(self, obs: Obs) -> None:
        lanes, device = self.env.lanes, self.env.device
        found = _by_key(obs)
        if found.keys() != self.leaves.keys():
            has, says = (sorted(".".join(key) or "one tensor" for key in keys) for keys in (found, self.leaves))
            self.fail("obs_form", None, f"obs has {has}; obs_space says {says}: give the same keys.")
            return
        for key, leaf in self.leaves.items():
            name, value, shape = ".".join(("obs", *key)), found[key], (lanes, *(leaf.shape or ()))
            if _fits(value, shape, dtype_of(leaf), device):
                self._numbers(name, leaf, value.reshape(lanes, -1), *self.bounds[key])
            else:
                wanted = _form(shape, dtype_of(leaf), device)
                self.fail("obs_form", None, f"{name} is {_looks(value)}; its space says {wanted}.")
        mask = mask_of(obs)
        if mask is not None and not bool(mask.flatten(1).any(1).all()):
            self.fail("obs_in_space", ~mask.flatten(1).any(1), "action_mask allows no action; allow at least one.")

    def _numbers(self, name: str, leaf: Leaf, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Whether the rows `[B, N]` of one leaf are finite and within `low` and `high` `[N]`."""
        finite = rows.isfinite().all(1)
        if not bool(finite.all()):
            self.fail("finite", ~finite, f"{name} has NaN or infinite numbers; find where they come from.")
        outside = (rows < low) | (rows > high)
        if bool(outside.any()):
            lane, place = (int(index) for index in outside.nonzero()[0])
            number = rows[lane, place].item()
            self.fail("obs_in_space", lane, f"{name}, number {place}, is {number:g}, outside {leaf}; widen the space.")

    def _values(self, step: Step) -> None:
        finite = step.reward.isfinite()
        if not bool(finite.all()):
            self.fail("finite", ~finite, f"reward {step.reward[~finite][0].item()}; find where it comes from.")
        both = step.terminated & step.truncated
        if bool(both.any()):
            self.fail("flags", both, "terminated and truncated at once; an episode that terminated was not cut off.")

    def _convention(self, row: _Row) -> None:
        step = row.step
        if self.time == 1:
            if not bool(step.valid.all()):
                self.fail("first_row", ~step.valid, "valid is False in the first step after reset(); apply the action.")
        elif not torch.equal(step.valid, ~row.ended):
            lane = int((step.valid == row.ended).int().argmax())
            seen = (
                f"the step before ended, and valid is {bool(step.valid[lane])}"
                if bool(row.ended[lane])
                else "valid is False though the step before did not end"
            )
            advice = "return the final observation with the ended step, and begin the new episode on the next call"
            self.fail("autoreset", lane, f"{seen}; {advice}, with valid False.")
        flagged = ~step.valid & ((step.reward != 0) | step.terminated | step.truncated)
        if bool(flagged.any()):
            lane = int(flagged.int().argmax())
            seen = f"reward {step.reward[lane].item():g}, terminated {bool(step.terminated[lane])}"
            seen += f", truncated {bool(step.truncated[lane])}"
            self.fail("reset_rows", lane, f"{seen} in a row that is not valid; give 0 and no flags there.")
        self._limit(row, self.env.spec.max_steps)

    def _limit(self, row: _Row, limit: int | None) -> None:
        self.age = (self.age * ~row.ended + 1) * row.step.valid
        if limit is None:
            return
        late = (self.age >= limit) & ~_ended(row.step)
        self.reached |= bool((self.age >= limit).any())
        if bool(late.any()):
            age = int(self.age[late][0])
            self.fail(
                "time_limit", late, f"{age} steps and no end, with max_steps={limit}; truncate, or mend the spec."
            )

    def _endings(self, row: _Row) -> None:
        """Count how often final observations look like their neighbours."""
        seen, step = self.endings, row.step
        still = _same(row.before, step.obs)
        ended = _ended(step)
        inside = step.valid & ~ended
        seen.ends += int(ended.sum())
        seen.as_before += int((ended & still).sum())
        seen.begun += int((row.ended & ~step.valid).sum())
        seen.as_next += int((row.ended & ~step.valid & still).sum())
        seen.inside += int(inside.sum())
        seen.changed += int((inside & ~still).sum())
        if bool(ended.any()) and not seen.where:
            seen.where = f"lane {int(ended.int().argmax())}, step {self.time}"

    def close(self) -> None:
        while self.kept:
            self._compare(*self.kept.popleft())
        check, seen = self.check, self.endings
        if not self.time:
            return  # nothing was seen
        check.hold("obs_form", "obs_in_space", "finite", "reward_form", "flags", "info", "first_row", "own_memory")
        if seen.begun:
            check.hold("autoreset", "reset_rows")
        elif not seen.ends:
            for rule in ("autoreset", "reset_rows"):
                check.skipped.setdefault(rule, f"no episode ended within {self.time} steps")
        limit = self.env.spec.max_steps
        if self.reached:
            check.hold("time_limit")
        elif "time_limit" not in check.skipped:
            why = "spec.max_steps is None" if limit is None else f"no episode of {self.time} steps lasted {limit}"
            check.skipped["time_limit"] = why
        self._final()

    def _final(self) -> None:
        check, seen = self.check, self.endings
        if seen.begun < 3 or seen.changed * 2 <= seen.inside:
            check.skipped["final_obs"] = "too few episodes, or observations that rarely change, to tell"
            return
        check.hold("final_obs")
        advice = "return the one that its action led to"
        if seen.as_next == seen.begun:
            other = "the first of the next episode"
            check.fail("final_obs", f"{seen.where}, and at every other end: the last observation is {other}; {advice}.")
        # The last step may change nothing to see, but where all others do, and there are many, one was left out.
        if seen.as_before == seen.ends and seen.inside >= 3 * seen.ends and seen.changed >= 0.9 * seen.inside:
            other = "the one before the last step"
            check.fail("final_obs", f"{seen.where}, and at every other end: the last observation is {other}; {advice}.")


# --- comparing --------------------------------------------------------------------------------------------------------


def _by_key(obs: Any) -> dict[tuple[str, ...], Any]:
    if not isinstance(obs, TensorDict):
        return {(): obs}
    items = obs.items(include_nested=True, leaves_only=True)
    return {(key,) if isinstance(key, str) else key: value for key, value in items}


def _tensors(value: Obs) -> list[Tensor]:
    return list(_by_key(value).values())


def _equal(one: Tensor, two: Tensor) -> bool:
    """The same numbers; NaN equals itself."""
    return bool(((one == two) | ((one != one) & (two != two))).all())


def _same(one: Obs, two: Obs) -> Tensor:
    """Which lanes are equal, `[B]` bool."""
    pairs = zip(_tensors(one), _tensors(two), strict=True)
    return torch.stack([(a == b).flatten(1).all(1) if a.dim() > 1 else a == b for a, b in pairs]).all(0)


def _alike(row: _Row, one: int, two: int) -> bool:
    """Whether two lanes saw and got the same in this row."""
    columns = [*_tensors(row.before), *_tensors(row.step.obs), *row.step[1:5]]
    return all(torch.equal(column[one], column[two]) for column in columns)


def _starts_differ(rows: list[_Row]) -> bool:
    """Whether episodes begin with different observations."""
    starts = [rows[0].before, *(row.step.obs for row in rows if not bool(row.step.valid.any()))]
    return any(not bool(_same(one, two).all()) for one, two in pairwise(starts))


def _ended(step: Step) -> Tensor:
    """In which lanes an episode ended, `[B]` bool."""
    return (step.terminated | step.truncated) & step.valid


def _difference(ours: list[_Row], theirs: list[_Row], lanes: Tensor | None = None) -> str | None:
    """Where two streams first differ, in these lanes `[B]` bool (None: in any)."""
    for time, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        pairs = [("obs before", one.before, two.before)] if time == 0 else []
        pairs += [(name, getattr(one.step, name), getattr(two.step, name)) for name in Step._fields[:5]]
        for name, a, b in pairs:
            differs = ~_same(a, b) if lanes is None else ~_same(a, b) & lanes
            if bool(differs.any()):
                return f"lane {int(differs.int().argmax())}, step {time + 1}: {name} differs"
    return None


def _mix(mask: Tensor, yes: Obs, no: Obs) -> Obs:
    """Lane by lane `yes` where the mask `[B]` is set, else `no`."""
    if isinstance(no, Tensor):
        assert isinstance(yes, Tensor), "both of one space"
        return torch.where(mask.view(-1, *(1,) * (yes.dim() - 1)), yes, no)
    mixed, others = TensorDict({}, batch_size=no.batch_size, device=no.device), _by_key(no)
    for key, value in _by_key(yes).items():
        mixed[key] = _mix(mask, value, others[key])
    return mixed


def _bounds(leaf: Leaf, device: torch.device) -> tuple[Tensor, Tensor]:
    """The least and greatest number of each place, flat, with room for rounding."""
    if isinstance(leaf, spaces.Box):
        low, high = (torch.as_tensor(edge.astype(np.float64)).flatten() for edge in (leaf.low, leaf.high))
        room = SLACK if leaf.dtype.kind == "f" else 0.0
        low, high = low - room * low.abs().clamp(min=1.0), high + room * high.abs().clamp(min=1.0)
    elif isinstance(leaf, spaces.MultiBinary):
        low, high = torch.zeros(1), torch.ones(1)
    else:
        high = torch.as_tensor(leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec).flatten() - 1
        low = torch.zeros_like(high)
    return low.to(device), high.to(device)


def _fits(value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    if not isinstance(value, Tensor):
        return False
    place = value.device.type == device.type and (device.index is None or value.device.index == device.index)
    return value.shape == shape and value.dtype == dtype and place


def _form(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"


def _looks(value: Any) -> str:
    if isinstance(value, Tensor):
        return _form(tuple(value.shape), value.dtype, value.device)
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__

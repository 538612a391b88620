"""The conformance suite passes on every backend, and each way to break the convention is caught by its own rule."""

from __future__ import annotations

import re
from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch
from faulty_envs import Counter, Nest, Words
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor

from rookery.envs.check import RULES, Report, check_env
from rookery.envs.make import make_env
from rookery.envs.spec import EnvSpec
from rookery.envs.tensor import TENSOR_ENVS
from rookery.envs.transforms import transform
from rookery.envs.vector import Obs, Step, VectorEnv


class Walk(VectorEnv):
    """A random walk on floats that keeps the convention; its subclasses below do not.

    Ends where it goes below 0, and is cut off after 12 steps.
    """

    device = torch.device("cpu")
    saves_state = True

    def __init__(self, lanes: int = 3) -> None:
        self.lanes = lanes
        self.spec = EnvSpec(
            "Walk-v0",
            "own",
            spaces.Box(-20.0, 40.0, (2,), np.float32),
            spaces.Discrete(3),
            max_steps=12,
            saves_state=self.saves_state,
        )
        self.generator = torch.Generator()

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def noise(self) -> Tensor:
        return torch.rand(self.lanes, generator=self.generator)

    def observe(self) -> Tensor:
        return torch.stack([self.place, self.steps.float()], -1)

    def reset(self, seed: int | None = None) -> Obs:
        if seed is not None:
            self.seed(seed)
        self.place, self.steps = self.noise() * 3.0, torch.zeros(self.lanes)
        self.ended = torch.zeros(self.lanes, dtype=torch.bool)
        return self.observe()

    def step(self, action: Obs) -> Step:
        over, noise = self.ended, self.noise()
        self.place = torch.where(over, noise * 3.0, self.place + (action - 1.0) * 2.0 + noise - 0.5)
        self.steps = torch.where(over, 0.0, self.steps + 1.0)
        terminated = (self.place < 0.0) & ~over
        truncated = (self.steps >= 12) & ~terminated
        self.ended = terminated | truncated
        return Step(self.observe(), torch.where(over, 0.0, noise), terminated, truncated, ~over, {})

    def state(self) -> dict[str, Tensor]:
        tensors = {"place": self.place, "steps": self.steps, "ended": self.ended}
        return {**{k: v.clone() for k, v in tensors.items()}, "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.place, self.steps, self.ended = (state[name].clone() for name in ("place", "steps", "ended"))
        self.generator.set_state(state["generator"])

    def render(self) -> np.ndarray:
        return np.zeros((4, 4, 3), np.uint8)


class SameStepAutoreset(Walk):
    """The observation of the ended step is the next episode's first, and no call is spent on the reset."""

    def step(self, action: Obs) -> Step:
        step = super().step(action)
        self.place = torch.where(self.ended, self.noise() * 3.0, self.place)
        self.steps = torch.where(self.ended, 0.0, self.steps)
        self.ended = torch.zeros_like(self.ended)
        return step._replace(obs=self.observe())


class NoFinalObservation(Walk):
    """The new episode's first observation already comes with the ended step, and again with the reset."""

    saves_state = False

    def step(self, action: Obs) -> Step:
        step = super().step(action)
        upcoming = torch.rand(self.lanes, generator=torch.Generator().set_state(self.generator.get_state())) * 3.0
        first = torch.stack([upcoming, torch.zeros(self.lanes)], -1)
        return step._replace(obs=torch.where(self.ended.unsqueeze(-1), first, step.obs))


class StaleFinalObservation(Walk):
    """The ended step repeats the observation before it."""

    saves_state = False

    def reset(self, seed: int | None = None) -> Obs:
        self.last = super().reset(seed)
        return self.last

    def step(self, action: Obs) -> Step:
        step = super().step(action)
        step = step._replace(obs=torch.where(self.ended.unsqueeze(-1), self.last, step.obs))
        self.last = step.obs
        return step


class BothFlags(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(terminated=step.terminated | step.truncated)


class Nan(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(obs=torch.where(step.obs[:, 1:] == 5, torch.nan, step.obs))


class InfiniteReward(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(reward=torch.where(self.steps == 4, torch.inf, step.reward))


class RewardAtReset(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(reward=torch.where(step.valid, step.reward, 1.0))


class FlagAtReset(Walk):
    """Says truncated twice: with the last step, and with the reset."""

    def step(self, action: Obs) -> Step:
        before = self.ended
        step = super().step(action)
        return step._replace(truncated=step.truncated | before)


class InvalidFirstRow(Walk):
    def reset(self, seed: int | None = None) -> Obs:
        obs = super().reset(seed)
        self.ended = torch.ones_like(self.ended)
        return obs


class OneBuffer(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.zeros(self.lanes, 2)

    def observe(self) -> Tensor:
        return self.buffer.copy_(super().observe())


class RewardBuffer(Walk):
    """Two buffers in turn: only a look two steps later shows it."""

    def reset(self, seed: int | None = None) -> Obs:
        self.buffers = torch.zeros(2, self.lanes)
        self.turn = 0
        return super().reset(seed)

    def step(self, action: Obs) -> Step:
        self.turn ^= 1
        step = super().step(action)
        return step._replace(reward=self.buffers[self.turn].copy_(step.reward))


class WritesAction(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        action.fill_(0)
        return step


class GlobalRandomness(Walk):
    def noise(self) -> Tensor:
        return torch.rand(self.lanes)


class ConstantSeed(Walk):
    def seed(self, seed: int) -> None:
        self.generator.manual_seed(7)


class TwinLanes(Walk):
    def noise(self) -> Tensor:
        return torch.rand(1, generator=self.generator).expand(self.lanes)


class NoiseByAction(Walk):
    """One generator that lanes use in turn, as often as their actions want."""

    def step(self, action: Obs) -> Step:
        torch.rand(int(action.sum()) + 1, generator=self.generator)
        return super().step(action)


class ActsAtReset(Walk):
    """The action of the invalid row is applied to the new episode."""

    def step(self, action: Obs) -> Step:
        over = self.ended
        step = super().step(action)
        self.place = torch.where(over, self.place + action, self.place)
        return step._replace(obs=self.observe())


class Float64Reward(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(reward=step.reward.double())


class ColumnReward(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(reward=step.reward.unsqueeze(-1))


class Float64Observation(Walk):
    def observe(self) -> Tensor:
        return super().observe().double()


class WrongKeys(Walk):
    def observe(self) -> Tensor:
        return TensorDict({"place": super().observe()}, batch_size=[self.lanes])


class IntegerFlags(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(terminated=step.terminated.int())


class OutOfSpace(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.spec = EnvSpec("Walk-v0", "own", spaces.Box(-5, 5, (2,), np.float32), spaces.Discrete(3), max_steps=12)


class Endless(Walk):
    """Says 8 steps and allows 12."""

    saves_state = False

    def __init__(self) -> None:
        super().__init__()
        self.spec = EnvSpec("Walk-v0", "own", self.spec.obs_space, self.spec.action_space, max_steps=8)


class ForgetsGenerator(Walk):
    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state({**state, "generator": self.generator.get_state()})


class StateAliases(Walk):
    """Steps in place, and hands out its own tensors as the state."""

    def step(self, action: Obs) -> Step:
        steps, place = self.steps, self.place
        step = super().step(action)
        self.steps, self.place = steps.copy_(self.steps), place.copy_(self.place)
        return step

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "steps": self.steps, "place": self.place}


class StateOfNumbers(Walk):
    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "round": 3}


class ShortInfo(Walk):
    def step(self, action: Obs) -> Step:
        return super().step(action)._replace(info={"power": torch.zeros(self.lanes - 1)})


class ChangingInfo(Walk):
    def step(self, action: Obs) -> Step:
        step = super().step(action)
        return step._replace(info={"late": step.reward} if bool((self.steps > 3).any()) else {})


class FloatPicture(Walk):
    def render(self) -> np.ndarray:
        return np.zeros((4, 4, 3))


class ClosesOnce(Walk):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True


class Raises(Walk):
    def step(self, action: Obs) -> Step:
        if bool((self.steps == 6).any()):
            raise ZeroDivisionError("the wheel came off")
        return super().step(action)


CAUGHT: list[tuple[Callable[[], VectorEnv], str, str]] = [
    (SameStepAutoreset, "autoreset", r"lane \d, step \d+: the step before ended, and valid is True"),
    (NoFinalObservation, "final_obs", "the first of the next episode"),
    (StaleFinalObservation, "final_obs", "the one before the last step"),
    (BothFlags, "flags", r"lane \d, step \d+: terminated and truncated at once"),
    (Nan, "finite", r"lane \d, step \d+: obs has NaN"),
    (InfiniteReward, "finite", "reward inf"),
    (RewardAtReset, "reset_rows", r"lane \d, step \d+: reward 1, terminated False"),
    (FlagAtReset, "reset_rows", "truncated True"),
    (InvalidFirstRow, "first_row", "valid is False in the first step"),
    (OneBuffer, "own_memory", "a later step wrote into the reset's obs"),
    (RewardBuffer, "own_memory", "a later step wrote into the reward of step 1"),
    (WritesAction, "own_memory", "wrote into the action"),
    (GlobalRandomness, "same_seed", "seed 0 twice: lane 0, step 1: obs before differs"),
    (ConstantSeed, "other_seed", "seeds 0 and 1 give the same"),
    (TwinLanes, "lane_seeds", "lanes 0 and 1 are the same"),
    (NoiseByAction, "lanes_apart", "other actions in lane 2 only: lane 0"),
    (ActsAtReset, "ignored_action", "obs differs"),
    (Float64Reward, "reward_form", r"reward is float64 \[3\] on cpu; expected float32 \[3\]"),
    (ColumnReward, "reward_form", r"float32 \[3, 1\]"),
    (Float64Observation, "obs_form", r"obs is float64 \[3, 2\]"),
    (WrongKeys, "obs_form", r"\['place'\]; obs_space says \['one tensor'\]"),
    (IntegerFlags, "flags", "terminated is int32"),
    (OutOfSpace, "obs_in_space", r"obs, number 1, is 6, outside Box"),
    (Endless, "time_limit", "8 steps and no end, with max_steps=8"),
    (ForgetsGenerator, "saves_state", "after load_state: lane 0, step 1"),
    (StateAliases, "saves_state", "as copies"),
    (StateOfNumbers, "saves_state", r"state\(\)\['round'\] is int"),
    (ShortInfo, "info", r"info\['power'\] is float32 \[2\]"),
    (ChangingInfo, "info", "same names every step"),
    (FloatPicture, "render", r"float64 \[4, 4, 3\]"),
    (ClosesOnce, "close", "RuntimeError: already closed"),
    (Raises, "runs", "ZeroDivisionError: the wheel came off"),
]


@pytest.mark.parametrize(("broken", "rule", "message"), CAUGHT, ids=[case[0].__name__ for case in CAUGHT])
def test_each_fault_is_caught_by_its_rule(broken: Callable[[], VectorEnv], rule: str, message: str) -> None:
    report = check_env(broken(), steps=200)
    assert not report.ok
    assert [finding.rule for finding in report.findings if not finding.ok] == [rule], str(report)
    assert re.search(message, report[rule].message)
    assert f"FAIL  {rule}" in str(report)


def not_checked(report: Report) -> set[str]:
    return {finding.rule for finding in report.findings if finding.skipped}


def test_a_sound_environment_keeps_every_rule() -> None:
    report = check_env(Walk(), steps=300)
    assert report.ok, str(report)
    assert not not_checked(report)
    assert [finding.rule for finding in report.findings] == list(RULES)
    assert "22 rules kept, 0 broken, 0 not checked" in str(report)


@pytest.mark.parametrize("id", TENSOR_ENVS)
def test_tensor_environments(id: str) -> None:
    report = check_env(f"tensor:{id}", steps=60)
    assert report.ok, str(report)
    constant = {"Probe1-v0", "Probe3-v0", "Probe4-v0", "DeepSea-v0"}
    allowed = {"other_seed", "lane_seeds"} if id in constant else set()
    if id.startswith("Probe") and id != "ProbeMask-v0":
        allowed |= {"time_limit", "final_obs"}
    assert not_checked(report) <= allowed, str(report)


ENVPOOL = ["CartPole-v1", "HalfCheetah-v5", "LunarLander-v3", "Pendulum-v1", "MiniGrid-Empty-Random-5x5-v0"]


@pytest.mark.parametrize("id", [*ENVPOOL, "FetchReach-v4", "Pong-v5"])
def test_envpool_environments(id: str) -> None:
    pytest.importorskip("envpool")
    options = {"noop_max": 5} if id == "Pong-v5" else {}  # an episode begins sooner
    report = check_env(f"envpool:{id}", lanes=2, steps=60, **options)
    assert report.ok, str(report)
    assert not_checked(report) <= {"saves_state", "render"}, str(report)


@pytest.mark.parametrize("workers", [0, 2])
def test_gym_environments(workers: int) -> None:
    report = check_env("gym:CartPole-v1", steps=100, workers=workers)
    assert report.ok, str(report)
    assert not_checked(report) <= {"saves_state", "render"}, str(report)


@pytest.mark.parametrize("source", [Nest, Counter, gymnasium.make("CartPole-v1")], ids=["Nest", "Counter", "object"])
def test_own_gymnasium_environments(source: object) -> None:
    report = check_env(source, steps=100)
    assert report.ok, str(report)
    assert report["first_row"].skipped is None


def test_a_space_without_tensors_is_refused_as_it_is_made() -> None:
    with pytest.raises(ValueError, match="Text"):
        check_env(Words, steps=100)


def test_an_own_environment_that_fails_is_a_finding() -> None:
    report = check_env(lambda: Counter("nan"), steps=100)
    assert "lane 0, step 2" in report["runs"].message
    assert not report.ok
    assert report["ignored_action"].skipped == "mend runs first"


@pytest.mark.parametrize(
    ("id", "asked"),
    [
        ("tensor:Catch-v0", {"frame_stack": 4, "clip_reward": True}),
        ("tensor:Pendulum-v1", {"frame_stack": 3, "scale_reward": 0.1}),
        ("tensor:ProbeTuple-v0", {"scale_reward": 2.0}),
        ("envpool:Pendulum-v1", {"frame_stack": 2}),
        ("gym:CartPole-v1", {"frame_stack": 4, "clip_reward": True}),
    ],
)
def test_transformed_environments(id: str, asked: dict) -> None:
    options = {"max_steps": 9} if "Pendulum" in id else {}
    report = check_env(transform(make_env(id, 3, **options), **asked), steps=80)
    assert report.ok, str(report)
    assert report["saves_state"].skipped is None or not id.startswith("tensor:")


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="use 10 or more"):
        check_env("CartPole-v1", steps=9)


def test_bounds_that_are_too_narrow_do_not_stop_the_rest() -> None:
    report = check_env(OutOfSpace(), steps=100)
    assert report["same_seed"].skipped is None
    assert report["ignored_action"].skipped is None


def test_an_own_environment_takes_no_limit() -> None:
    with pytest.raises(ValueError, match=r"gymnasium\.wrappers\.TimeLimit"):
        make_env(Counter, max_steps=3)

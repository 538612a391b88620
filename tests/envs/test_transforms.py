"""Transforms keep the stream convention, and each does exactly its one thing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from rookery.data.unroll import frames_to_stacks
from rookery.envs.goals import DenseGoal
from rookery.envs.make import make_env
from rookery.envs.spec import EnvSpec
from rookery.envs.tensor import make_tensor_env
from rookery.envs.transforms import ClipReward, FrameStack, RescaleAction, ScaleReward, Transform, transform
from rookery.envs.vector import Obs, Step, VectorEnv

LANES = 3


class Scripted(VectorEnv):
    """Plays back given frames `[N, B, ...]`, rewards and ends; remembers the last action."""

    device = torch.device("cpu")

    def __init__(self, frames: Tensor, ended: Tensor, space: spaces.Space, action_space: spaces.Space) -> None:
        self.frames, self.ended, self.lanes = frames, ended, frames.shape[1]
        self.spec = EnvSpec("Scripted-v0", "own", space, action_space)

    def reset(self, seed: int | None = None) -> Obs:
        self.time = 0
        return self.frames[0].clone()

    def step(self, action: Obs) -> Step:
        self.action = action
        self.time += 1
        ended, before = self.ended[self.time], self.ended[self.time - 1]
        none = torch.zeros_like(ended)
        reward = torch.tensor([-3.0, 0.5, 2.0])[: self.lanes] * ~before
        return Step(self.frames[self.time].clone(), reward, ended, none, ~before, {})


def scripted(shape: tuple[int, ...], dtype: type, rows: int, seed: int, lanes: int = LANES) -> Scripted:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 256, (rows, lanes, *shape), generator=generator)
    frames = numbers.to(torch.uint8) if dtype is np.uint8 else numbers / 255
    ended = torch.rand((rows, lanes), generator=generator) < 0.3
    for time in range(1, rows):
        ended[time] &= ~ended[time - 1]  # the row after an end begins an episode
    ended[0] = False
    high = 255 if dtype is np.uint8 else 1.0
    return Scripted(frames, ended, spaces.Box(0, high, shape, dtype), spaces.Discrete(2))


@pytest.mark.parametrize("wrap", [lambda env: ClipReward(env), lambda env: ScaleReward(env, 0.5)])
def test_rewards_of_other_goals_are_changed_alike(wrap: Callable[[VectorEnv], VectorEnv]) -> None:
    """So that hindsight does not mix two rewards; the spec goes to other processes."""
    env = make_tensor_env("BitFlip-v0", LANES)
    env.spec = replace(env.spec, goal_reward=DenseGoal())
    spec = pickle.loads(pickle.dumps(wrap(env).spec))
    achieved, desired = torch.zeros(3, 1), torch.tensor([[0.0], [0.8], [4.0]])
    expected = [0.0, -0.8, -1.0] if isinstance(wrap(env), ClipReward) else [0.0, -0.4, -2.0]
    assert spec.goal_reward(achieved, desired).tolist() == pytest.approx(expected)


def stacked_axis(stacks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[N, B, K, *F]` as FrameStack shows it."""
    if len(shape) == 3 and shape[2] < shape[0]:
        return stacks.movedim(2, -2).flatten(-2)
    return stacks.flatten(2, 3) if len(shape) in (1, 3) else stacks


@given(
    shape=st.sampled_from([(2, 4, 4), (5, 4, 2), (3, 5), (4,), ()]),
    dtype=st.sampled_from([np.uint8, np.float32]),
    frames=st.integers(1, 5),
    rows=st.integers(1, 14),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=50, deadline=None)
def test_stacks_are_those_of_single_frames_stored_once(
    shape: tuple[int, ...], dtype: type, frames: int, rows: int, seed: int
) -> None:
    inner = scripted(shape, dtype, rows, seed)
    env = FrameStack(inner, frames)
    seen = [env.reset()] + [env.step(torch.zeros(LANES, dtype=torch.int64)).obs for _ in range(rows - 1)]

    start = torch.cat([torch.ones(1, LANES, dtype=torch.bool), inner.ended[:-1]])
    history = torch.full((frames - 1, *inner.frames.shape[1:]), 77).to(inner.frames.dtype)  # hidden by `start`
    begun = torch.cat([torch.zeros(frames - 1, LANES, dtype=torch.bool), start])
    view, mask = frames_to_stacks(torch.cat([history, inner.frames]), begun, frames)
    expected = torch.where(mask.view(*mask.shape, *[1] * len(shape)), view, 0)

    assert torch.equal(torch.stack(seen), stacked_axis(expected, shape))
    assert torch.equal(env.newest(torch.stack(seen)), inner.frames)
    for obs in seen:
        assert obs.dtype == inner.frames.dtype
        assert obs.shape[1:] == env.spec.obs_space.shape
        assert env.spec.obs_space.contains(obs[0].numpy())


def test_a_stack_may_be_written_into() -> None:
    env = FrameStack(scripted((2,), np.float32, 4, 0), 3)
    again = FrameStack(scripted((2,), np.float32, 4, 0), 3)
    env.reset().fill_(9)
    again.reset()
    for _ in range(3):
        ours, theirs = (each.step(torch.zeros(LANES, dtype=torch.int64)).obs for each in (env, again))
        assert torch.equal(ours, theirs)
        ours.fill_(9)


@pytest.mark.parametrize(("id", "frames"), [("ProbeDict-v0", 4), ("Catch-v0", 0)])
def test_what_cannot_be_stacked_is_refused(id: str, frames: int) -> None:
    with pytest.raises(ValueError, match=r"one Box|use 1 or more"):
        FrameStack(make_tensor_env(id, 2), frames)


def test_rewards_are_clipped_scaled_and_kept_raw() -> None:
    clipped = transform(scripted((1,), np.float32, 6, 1), scale_reward=0.4, clip_reward=True)
    clipped.reset()
    for _ in range(5):
        step = clipped.step(torch.zeros(LANES, dtype=torch.int64))
        expected = torch.tensor([-1.0, 0.2, 0.8]) * step.valid
        torch.testing.assert_close(step.reward, expected, rtol=0, atol=1e-7)
        assert torch.equal(step.info["raw_reward"], torch.tensor([-3.0, 0.5, 2.0]) * step.valid)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda env: ClipReward(env, 1.0, 2.0), "low <= 0 <= high"),
        (lambda env: ScaleReward(env, 0.0), "positive factor"),
        (lambda env: ScaleReward(env, float("inf")), "positive factor"),
    ],
)
def test_senseless_reward_changes_are_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(scripted((1,), np.float32, 2, 0))


@given(low=st.floats(-1e3, 1e3, width=32), width=st.floats(0.015625, 1e3, width=32), action=st.floats(-2, 2, width=32))
@settings(max_examples=50, deadline=None)
def test_actions_are_mapped_exactly_at_the_edges_and_stay_inside(low: float, width: float, action: float) -> None:
    inner = scripted((1,), np.float32, 9, 0)
    box = spaces.Box(np.float32(low), np.float32(low) + np.float32(width), (2,), np.float32)
    inner.spec = EnvSpec("Scripted-v0", "own", inner.spec.obs_space, box)
    env = RescaleAction(inner)
    assert env.spec.action_space == spaces.Box(-1.0, 1.0, (2,), np.float32)
    env.reset()

    def mapped(value: float) -> Tensor:
        given = torch.full((LANES, 2), value)
        env.step(given)
        assert (given == value).all(), "the caller's action was written into"
        return inner.action

    lowest, highest = torch.as_tensor(box.low), torch.as_tensor(box.high)
    assert (mapped(-1.0) == lowest).all()
    assert (mapped(-7.0) == lowest).all()
    assert (mapped(1.0) == highest).all()
    assert (mapped(7.0) == highest).all()
    here = mapped(action)
    assert ((here >= lowest) & (here <= highest)).all()
    expected = box.low.astype(np.float64) + (np.clip(action, -1, 1) + 1) / 2 * (box.high.astype(np.float64) - box.low)
    np.testing.assert_allclose(here[0].numpy(), expected, rtol=0, atol=3e-7 * max(1.0, abs(low) + width))


def test_a_box_of_minus_one_to_one_passes_unchanged() -> None:
    env = scripted((1,), np.float32, 3, 0)
    env.spec = EnvSpec("Scripted-v0", "own", env.spec.obs_space, spaces.Box(-1, 1, (1,), np.float32))
    wrapped = RescaleAction(env)
    wrapped.reset()
    wrapped.step(torch.tensor([[1e-9], [0.3], [-5.0]]))
    assert torch.equal(env.action, torch.tensor([[1e-9], [0.3], [-1.0]]))


def test_only_bounded_boxes_are_rescaled_inside_structures() -> None:
    env = scripted((1,), np.float32, 3, 0)
    inner = spaces.Dict(
        {
            "turn": spaces.Box(0.0, 10.0, (1,), np.float32),
            "free": spaces.Box(-np.inf, 5.0, (1,), np.float32),
            "pair": spaces.Tuple((spaces.Discrete(3), spaces.Box(-2.0, 0.0, (1,), np.float32))),
        }
    )
    env.spec = EnvSpec("Scripted-v0", "own", env.spec.obs_space, inner)
    wrapped = transform(env)
    outer = wrapped.spec.action_space
    unit = spaces.Box(-1, 1, (1,), np.float32)
    assert (outer["turn"], outer["free"], outer["pair"][1]) == (unit, inner["free"], unit)
    assert list(outer) == list(inner)
    ones, turn = torch.ones(LANES, 1), torch.zeros(LANES, 1)
    pair = {"0": torch.full((LANES,), 2), "1": ones.clone()}
    action = TensorDict({"turn": turn, "free": 9 * ones, "pair": pair}, batch_size=[LANES])
    wrapped.reset()
    wrapped.step(action)
    got = env.action
    assert (got["turn"] == 5).all()
    assert (got["free"] == 9).all()
    assert (got["pair", "0"] == 2).all()
    assert (got["pair", "1"] == 0).all()
    assert (action["turn"] == 0).all()
    assert (action["pair", "1"] == 1).all(), "the caller's action was written into"


def test_transform_adds_only_what_is_asked() -> None:
    env = make_tensor_env("CartPole-v1", 2)
    assert transform(env) is env
    env = transform(make_tensor_env("Pendulum-v1", 2), frame_stack=3, clip_reward=True, scale_reward=0.1)
    kinds = []
    while isinstance(env, Transform):
        kinds.append(type(env))
        env = env.env
    assert kinds == [FrameStack, ClipReward, ScaleReward, RescaleAction]


def stream(env: VectorEnv, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        step = env.step(torch.randint(0, 3, (env.lanes,), generator=generator))
        found += [step.obs, step.reward, step.valid]
    return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_a_saved_state_goes_on_exactly() -> None:
    env, other = (transform(make_tensor_env("Catch-v0", LANES), frame_stack=4, clip_reward=True) for _ in range(2))
    env.reset(3)
    stream(env, 11, 0)
    saved = env.state()
    expected = stream(env, 25, 1)
    other.reset(9)
    other.load_state(saved)
    assert same(stream(other, 25, 1), expected)
    other.load_state(saved)  # loading it took copies
    assert same(stream(other, 25, 1), expected)


def test_a_state_of_other_transforms_is_refused() -> None:
    four, three = (FrameStack(make_tensor_env("Catch-v0", 2), frames) for frames in (4, 3))
    with pytest.raises(ValueError, match=r"frames\.2.*same environment, transforms and lanes"):
        three.load_state(four.state())
    with pytest.raises(ValueError, match=r"'ended' where FrameStack of Catch-v0 has nothing"):
        four.load_state(make_tensor_env("Catch-v0", 2).state())


def test_settle_goes_on_in_the_same_tensors() -> None:
    """As after each replay of a captured graph: the tensors of the capture hold the present."""
    env, plain = (FrameStack(ClipReward(make_tensor_env("Catch-v0", LANES)), 4) for _ in range(2))
    for each in (env, plain):
        each.reset(5)
    assert env.generator is env.env.generator
    carry = env.carry()
    for round in range(8):
        steps = 1 + round % 3
        assert same(stream(env, steps, round), stream(plain, steps, round))
        env.settle(carry)
        now = env.carry()
        assert all(now[name] is carry[name] for name in carry)


def test_graph_support_is_there_only_where_the_environment_has_it() -> None:
    assert not any(hasattr(ClipReward(scripted((1,), np.float32, 2, 0)), name) for name in ("generator", "carry"))
    assert not hasattr(FrameStack(scripted((1,), np.float32, 2, 0)), "settle")


@pytest.mark.parametrize("backend", ["tensor", "envpool", "gym"])
def test_the_time_limit_is_the_backends(backend: str) -> None:
    env = make_env(f"{backend}:Pendulum-v1", 2, max_steps=3)
    assert env.spec.max_steps == 3
    env.reset()
    steps = [env.step(torch.zeros(2, 1)) for _ in range(7)]
    assert [bool(step.truncated.all()) for step in steps] == [False, False, True, False, False, False, True]
    assert [bool(step.valid.all()) for step in steps] == [True, True, True, False, True, True, True]
    env.close()
    endless = make_env(f"{backend}:Pendulum-v1", 1, max_steps=None)
    assert endless.spec.max_steps is None
    endless.reset()
    assert not any(endless.step(torch.zeros(1, 1)).truncated.any() for _ in range(210))
    endless.close()


def test_a_limit_that_envpool_would_ignore_is_refused() -> None:
    pytest.importorskip("envpool")
    with pytest.raises(ValueError, match="CliffWalking-v1 on EnvPool is never cut off"):
        make_env("envpool:CliffWalking-v1", 1, max_steps=7)
    make_env("envpool:CliffWalking-v1", 1, max_steps=None).close()
    cut = make_env("gym:CliffWalking-v1", 1, max_steps=2)  # the advice
    cut.reset(0)
    assert [bool(cut.step(torch.zeros(1, dtype=torch.int64)).truncated) for _ in range(2)] == [False, True]

"""Rewards of goals: equal to what the environment itself gave, on every step, and to what is worked out by hand."""

from __future__ import annotations

import math
from multiprocessing.reduction import ForkingPickler
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rookery.envs.goals import ComputedGoal, DenseGoal, PoseGoal, SparseGoal, has_goals
from rookery.envs.gym import GymEnv
from rookery.envs.tensor import make_tensor_env
from rookery.envs.vector import VectorEnv


def actions(env: VectorEnv, obs: Any, generator: torch.Generator) -> Tensor:
    """Half of the lanes head for their goal, the others act at random, so that goals are reached and missed."""
    space = env.spec.action_space
    assert isinstance(space, spaces.Box)
    action = 2 * torch.rand((env.lanes, *space.shape), generator=generator) - 1
    toward = obs["desired_goal"] - obs["achieved_goal"]
    count = min(3, toward.shape[-1])
    if "Hand" not in env.spec.id:
        action[::2, :count] = (8 * toward[::2, :count]).clamp(-1, 1)
    return action


def rolled(env: VectorEnv, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all valid steps: the environment's reward, the reward worked out again, and whether it was a success."""
    assert env.spec.goal_reward is not None
    generator, obs, rows = torch.Generator().manual_seed(0), env.reset(), []
    for _ in range(steps):
        step = env.step(actions(env, obs, generator))
        obs = step.obs
        again = env.spec.goal_reward(obs["achieved_goal"], obs["desired_goal"])
        success = step.info["is_success" if "is_success" in step.info else "success"]
        rows.append(torch.stack([step.reward, again, success.float()])[:, step.valid])
    env.close()
    reward, again, success = torch.cat(rows, -1)
    return reward, again, success


# Thresholds so wide that these actions meet goals and miss them, where the environment's own are met by skill only.
@pytest.mark.parametrize(
    ("id", "options"),
    [
        ("FetchReach-v4", {}),
        ("FetchReachDense-v4", {}),
        ("FetchPush-v4", {"distance_threshold": 0.15}),
        ("FetchSlide-v4", {"distance_threshold": 0.35}),
        ("FetchPickAndPlace-v4", {"distance_threshold": 0.2}),
        ("HandReach-v3", {"distance_threshold": 0.12}),
        ("HandReachDense-v3", {"distance_threshold": 0.12}),
        ("PointMaze_UMaze-v3", {}),
        ("PointMaze_UMazeDense-v3", {}),
        ("HandManipulateBlock-v1", {"distance_threshold": 0.06, "rotation_threshold": 3.0}),
        ("HandManipulateBlockRotateZ-v1", {"rotation_threshold": 1.5}),
        ("HandManipulateEggFull-v1", {"distance_threshold": 0.05, "rotation_threshold": 3.0}),
    ],
)
def test_rewards_of_envpool_are_reproduced(id: str, options: dict[str, Any]) -> None:
    pytest.importorskip("envpool")
    from rookery.envs.envpool import EnvPoolEnv

    reward, again, success = rolled(EnvPoolEnv(id, 8, seed=3, threads=1, **options), 52)
    torch.testing.assert_close(again, reward, atol=1e-6, rtol=0)
    assert 0 < success.mean() < 1, "this test has to see goals reached and missed"
    if "Dense" not in id:
        assert torch.equal(success > 0, reward == reward.max())


@pytest.mark.parametrize(
    ("id", "goal"),
    [
        ("FetchReach-v4", SparseGoal(0.05)),
        ("FetchPush-v4", SparseGoal(0.05)),
        ("HandReach-v3", SparseGoal(0.01)),
        ("PointMaze_Large-v3", SparseGoal(0.45, 1.0, 0.0)),
        ("HandManipulateBlockRotateZ-v1", PoseGoal(math.inf, 0.1)),
        ("HandManipulateEgg-v1", PoseGoal(0.01, 0.1)),
        ("FetchSlideDense-v4", DenseGoal()),
        ("HandManipulatePen-v1", None),
        ("HandManipulateBlockDense-v1", None),
        ("FrankaKitchen-v1", None),
        ("AdroitHandPen-v1", None),
        ("Ant-v5", None),
    ],
)
def test_goals_of_envpool(id: str, goal: Any) -> None:
    pytest.importorskip("envpool")
    from rookery.envs.envpool import EnvPoolEnv

    env = EnvPoolEnv(id, 1, threads=1)
    assert env.spec.goal_reward == goal
    env.close()


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 4.0))
@settings(max_examples=30, deadline=None)
def test_distances_in_straight_lines(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    achieved, desired = rng.normal(size=(2, 5, 3))
    far = np.array([math.dist(a, d) for a, d in zip(achieved, desired, strict=True)])
    assume((np.abs(far - threshold) > 1e-6).all())
    pair = torch.from_numpy(achieved), torch.from_numpy(desired)
    assert SparseGoal(threshold)(*pair).tolist() == [0.0 if d <= threshold else -1.0 for d in far]
    assert SparseGoal(threshold, 1.0, 0.0)(*pair).tolist() == [float(d <= threshold) for d in far]
    np.testing.assert_allclose(DenseGoal()(*pair), -far)
    np.testing.assert_allclose(DenseGoal(exponential=True)(*pair), np.exp(-far))


def test_the_threshold_itself_is_near_enough() -> None:
    achieved = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.1]])
    assert SparseGoal(5.0)(achieved, torch.zeros(3, 2)).tolist() == [0.0, 0.0, -1.0]
    assert SparseGoal(0.0)(achieved, achieved.clone()).tolist() == [0.0] * 3


def test_poses_by_hand() -> None:
    """A turn by φ about any axis has the real part cos φ/2."""
    turns = torch.tensor([0.0, 0.09, 0.11, 0.09])
    achieved = torch.zeros(4, 7)
    achieved[:, 3], achieved[:, 5] = (turns / 2).cos(), (turns / 2).sin()
    achieved[3, :3] = 0.01  # 0.0173 away
    desired = torch.tensor([[0.0, 0, 0, 1, 0, 0, 0]]).expand(4, 7)
    assert PoseGoal(0.01, 0.1)(achieved, desired).tolist() == [0, 0, -1, -1]
    assert PoseGoal(math.inf, 0.1)(achieved, desired).tolist() == [0, 0, -1, 0]
    assert PoseGoal(0.01, math.inf)(achieved, desired).tolist() == [0, 0, 0, -1]


class Line(gymnasium.Env):
    """Walk on a line to a place that is drawn for each episode."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    place = spaces.Box(-9.0, 9.0, (1,), np.float64)
    observation_space = spaces.Dict({"observation": place, "achieved_goal": place, "desired_goal": place})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.at, self.goal = np.zeros(1), self.np_random.uniform(-1, 1, 1)
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        self.at = np.clip(self.at + 0.3 * action, -2, 2)
        reward = float(self.compute_reward(self.at, self.goal, {}))
        return self.seen(), reward, False, False, {"is_success": reward > -0.5}

    def seen(self) -> dict[str, np.ndarray]:
        return {"observation": self.at, "achieved_goal": self.at, "desired_goal": self.goal}

    def compute_reward(self, achieved: Any, desired: Any, info: dict[str, Any]) -> Any:
        far = np.abs(achieved - desired)[..., 0]
        return np.where(far > 0.25, -1.0 - far, 0.0)


class Alone(Line):
    """Its rewards are of one pair of goals only."""

    def compute_reward(self, achieved: Any, desired: Any, info: dict[str, Any]) -> Any:
        return -float(np.abs(achieved - desired).sum())


@pytest.mark.parametrize("workers", [0, 2])
def test_rewards_of_gymnasium_are_its_own(workers: int) -> None:
    reward, again, success = rolled(GymEnv(Line, 4, seed=1, workers=workers), 30)
    torch.testing.assert_close(again, reward)
    assert torch.equal(success > 0, reward == 0)
    assert 0 < success.mean() < 1


def test_a_reward_that_is_none_of_batches_is_refused() -> None:
    goal = GymEnv(Alone, 1).spec.goal_reward
    assert goal is not None
    with pytest.raises(ValueError, match=r"gave \[\] for 3 goals; let it take goals \[3, 1\] and give rewards \[3\]"):
        goal(torch.zeros(3, 1), torch.zeros(3, 1))


@pytest.mark.parametrize(
    "goal", [SparseGoal(0.1), DenseGoal(), PoseGoal(0.1, 0.2), ComputedGoal(Line().compute_reward)]
)
def test_goals_are_data(goal: Any) -> None:
    """They travel to another process, and are the same there."""
    twin = ForkingPickler.loads(ForkingPickler.dumps(goal))
    achieved, desired = torch.rand(2, 6, 7)
    assert torch.equal(twin(achieved, desired), goal(achieved, desired))


def test_where_there_are_goals() -> None:
    place = spaces.Box(0.0, 1.0, (2,))
    both = {"achieved_goal": place, "desired_goal": place}
    assert has_goals(spaces.Dict({**both, "observation": place}))
    assert not has_goals(spaces.Dict({"desired_goal": place}))
    assert not has_goals(spaces.Dict({**both, "achieved_goal": spaces.Dict({"kettle": place})}))
    assert not has_goals(place)


def toward(obs: Any) -> Tensor:
    """The first bit that is not as desired; the first of all where all are."""
    return (obs["observation"] != obs["desired_goal"]).float().argmax(-1)


@pytest.mark.parametrize("bits", [1, 2, 7])
def test_bit_flip_is_solved_in_as_many_steps_as_bits_differ(bits: int) -> None:
    env = make_tensor_env("BitFlip-v0", 64, bits=bits)
    obs: Any = env.reset(seed=0)
    goal = env.spec.goal_reward
    assert goal is not None
    for _ in range(3):
        distance = (obs["observation"] - obs["desired_goal"]).abs().sum(-1)
        first = obs["desired_goal"]
        for count in range(1, bits + 1):
            step = env.step(toward(obs))
            obs = step.obs
            assert torch.equal(obs["desired_goal"], first)
            assert torch.equal(goal(obs["achieved_goal"], obs["desired_goal"]), step.reward)
            # From its goal a lane steps away and back: it is there after every second step.
            there = (count >= distance) & ((count - distance) % 2 == 0)
            assert torch.equal(step.reward, there.float() - 1)
            reached = (count >= distance) & ((distance > 0) | (count >= 2))
            assert torch.equal(step.info["is_success"], reached)
            assert not step.terminated.any()
            assert step.truncated.all() == (count == bits)
        step = env.step(toward(obs))
        assert not step.valid.any()
        assert not step.info["is_success"].any()
        obs = step.obs


def test_bit_flip_draws_bits_and_goals_uniformly() -> None:
    obs: Any = make_tensor_env("BitFlip-v0", 4096, bits=3).reset(seed=1)
    both = torch.cat([obs["observation"], obs["desired_goal"]], -1).long()
    counts = (both * 2 ** torch.arange(6)).sum(-1).bincount(minlength=64)
    assert float(((counts - 64) ** 2 / 64).sum()) < 103.4  # χ² of 63 degrees of freedom at 0.1 %

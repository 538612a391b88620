"""The five classic control tasks against Gymnasium's own, step by step from the same states."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from rookery.envs.tensor import TensorEnv, make_tensor_env

# Per environment, the lowest and highest of each state number to start comparisons from: wide enough to reach every
# clip, wall, wrap, end and goal.
RANGES = {
    "CartPole-v1": ([-2.5, -3, -0.22, -3], [2.5, 3, 0.22, 3]),
    "Acrobot-v1": ([-np.pi, -np.pi, -12.5, -28], [np.pi, np.pi, 12.5, 28]),
    "MountainCar-v0": ([-1.2, -0.07], [0.6, 0.07]),
    "MountainCarContinuous-v0": ([-1.2, -0.07], [0.6, 0.07]),
    "Pendulum-v1": ([-20, -8], [20, 8]),
}
TOLERANCE = {"Acrobot-v1": (5e-4, 5e-4)}  # four stages at up to 28 rad/s amplify the rounding
LANES = 8
classic = pytest.mark.parametrize("id", RANGES)


def oracles(id: str) -> list[gymnasium.Env]:
    envs = [gymnasium.make(id).unwrapped for _ in range(LANES)]
    for env in envs:
        env.reset(seed=0)
    return envs


def place(oracle: gymnasium.Env, physics: torch.Tensor) -> None:
    """Put Gymnasium's environment into a state of ours."""
    oracle.state = physics.numpy().astype(np.float64)
    if hasattr(oracle, "steps_beyond_terminated"):
        oracle.steps_beyond_terminated = None


def scatter(env: TensorEnv, low: list[float], high: list[float], rng: np.random.Generator) -> None:
    """Begin new episodes in random states from the whole range."""
    env.reset()
    physics = torch.tensor(rng.uniform(low, high, (LANES, len(low))), dtype=torch.float32)
    env.load_state(env.state() | {"state.physics": physics})


def draw_actions(env: TensorEnv, rng: np.random.Generator) -> torch.Tensor:
    space = env.spec.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.from_numpy(rng.integers(0, space.n, LANES))
    # beyond the bounds too: clipping is part of the dynamics
    return torch.tensor(rng.uniform(1.5 * space.low, 1.5 * space.high, (LANES, 1)), dtype=torch.float32)


@classic
def test_every_step_equals_gymnasium(id: str) -> None:
    env, others, rng = make_tensor_env(id, LANES, max_steps=None), oracles(id), np.random.default_rng(0)
    env.reset(seed=0)
    ends = 0
    for count in range(240):
        if count % 12 == 0:
            scatter(env, *RANGES[id], rng)
        action, before = draw_actions(env, rng), env.state()["state.physics"]
        step = env.step(action)
        for lane in np.flatnonzero(step.valid):
            place(others[lane], before[lane])
            chosen = action[lane].item() if action.ndim == 1 else action[lane].numpy()
            obs, reward, terminated, _, _ = others[lane].step(chosen)
            np.testing.assert_allclose(step.obs[lane].numpy(), obs, *TOLERANCE.get(id, (2e-5, 2e-6)))
            assert step.reward[lane].item() == pytest.approx(float(reward), rel=1e-5, abs=1e-5)
            assert bool(step.terminated[lane]) == terminated
            ends += terminated
    assert ends > 10 or id == "Pendulum-v1"


@classic
def test_whole_episodes_equal_gymnasium(id: str) -> None:
    """Without putting the states together again: same observations and the same last step."""
    env, rng = make_tensor_env(id, LANES), np.random.default_rng(1)
    obs = env.reset(seed=2)
    others = oracles(id)
    for lane, other in enumerate(others):
        place(other, env.state()["state.physics"][lane])
    running = np.ones(LANES, bool)
    for _ in range(100):
        action = draw_actions(env, rng)
        step = env.step(action)
        for lane in np.flatnonzero(running):
            chosen = action[lane].item() if action.ndim == 1 else action[lane].numpy()
            obs, reward, terminated, _, _ = others[lane].step(chosen)
            np.testing.assert_allclose(step.obs[lane].numpy(), obs, rtol=1e-3, atol=1e-4)
            assert step.reward[lane].item() == pytest.approx(float(reward), rel=1e-3, abs=1e-3)
            assert bool(step.terminated[lane]) == terminated
            running[lane] = not terminated
    assert not running.all() or id != "CartPole-v1"


@classic
def test_spaces_limits_and_thresholds_are_gymnasiums(id: str) -> None:
    spec, theirs = make_tensor_env(id, 1).spec, gymnasium.spec(id)
    env = gymnasium.make(id)
    assert spec.obs_space == env.observation_space
    assert spec.action_space == env.action_space
    assert spec.max_steps == theirs.max_episode_steps
    assert spec.reward_threshold == theirs.reward_threshold


@classic
def test_resets_are_distributed_as_gymnasiums(id: str) -> None:
    """Two-sample comparison of each number of the state: same range and mean over 300 and 20,000 resets."""
    env, other = make_tensor_env(id, 20_000), gymnasium.make(id).unwrapped
    env.reset(seed=0)
    ours = env.state()["state.physics"].numpy()
    theirs = np.array([(other.reset(seed=seed), other.state)[1] for seed in range(300)])
    spread = ours.max(0) - ours.min(0)
    assert (theirs.min(0) >= ours.min(0) - 0.002 * spread - 1e-6).all()
    assert (theirs.max(0) <= ours.max(0) + 0.002 * spread + 1e-6).all()
    assert (theirs.max(0) - theirs.min(0) >= 0.95 * spread).all()
    np.testing.assert_allclose(theirs.mean(0), ours.mean(0), atol=0.08 * spread.max())


@classic
def test_the_time_limit_truncates(id: str) -> None:
    env = make_tensor_env(id, 2, max_steps=4)
    env.reset(seed=0)
    action = torch.zeros((2, *env.spec.action_space.shape), dtype=torch.float32)
    action = action.long() if isinstance(env.spec.action_space, gymnasium.spaces.Discrete) else action
    flags = torch.stack([env.step(action).truncated for _ in range(9)])
    assert flags[:, 0].nonzero().flatten().tolist() == [3, 8]  # five calls an episode: four steps and the new beginning


def test_terminated_wins_over_the_time_limit() -> None:
    env = make_tensor_env("CartPole-v1", LANES, max_steps=1)
    env.reset(seed=0)
    env.load_state(env.state() | {"state.physics": torch.tensor([[3.0, 0, 0, 0]]).repeat(LANES, 1)})
    step = env.step(torch.zeros(LANES, dtype=torch.int64))
    assert step.terminated.all()
    assert not step.truncated.any()

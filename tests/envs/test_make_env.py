"""make_env picks backends, names what is near, and the backends agree about an id's dynamics."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rookery.envs.gym import GymEnv
from rookery.envs.make import TENSOR_FROM, OnDevice, env_ids, make_env, pick
from rookery.envs.vector import VectorEnv


def backend(*args, **kwargs):
    env = make_env(*args, **kwargs)
    env.close()
    return env.spec.backend


@pytest.fixture
def envpool():
    return pytest.importorskip("envpool")


def test_fastest_backend(envpool):
    assert backend("CartPole-v1", 8) == "envpool"
    assert backend("CartPole-v1", TENSOR_FROM["CartPole-v1"]) == "tensor"
    assert backend("DeepSea-v0", 1) == "tensor"
    assert backend("HalfCheetah-v5", 1) == "envpool"


def test_gym_where_nobody_else_has_it():
    gymnasium.register("OnlyHere-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    try:
        assert backend("OnlyHere-v0", 2) == "gym"
    finally:
        del gymnasium.registry["OnlyHere-v0"]


@pytest.mark.parametrize("wanted", ["tensor", "envpool", "gym"])
def test_forced_backend(wanted, envpool):
    env = make_env(f"{wanted}:CartPole-v1", 3, seed=1, render=True)
    assert env.spec.backend == wanted
    assert env.spec.id == "CartPole-v1"
    assert env.spec.max_steps == 500
    assert env.spec.reward_threshold == 475
    assert env.reset().shape == (3, 4)
    assert env.render().shape[2] == 3


@pytest.mark.parametrize("wanted", ["tensor", "envpool", "gym"])
def test_seed(wanted, envpool):
    first, again, other = (make_env(f"{wanted}:CartPole-v1", 3, seed=seed).reset() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_objects():
    env = GymEnv("CartPole-v1", 2)
    assert make_env(env) is env
    own = gymnasium.make("CartPole-v1").unwrapped
    assert make_env(own).lanes == 1
    assert make_env(type(own), 2).spec.backend == "own"


@pytest.mark.parametrize(
    ("id", "sentence"),
    [
        ("CartPol-v1", "no backend has .*'CartPol-v1'; nearest: CartPole-v1"),
        ("tensor:CartPol-v1", "CartPole-v1"),
        ("gym:CartPol-v1", "Gymnasium has no .*nearest: CartPole-v"),
        ("qqqq", "nearest: "),
    ],
)
def test_unknown_ids_name_the_nearest(id, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_env(id)


def test_ids():
    ids = env_ids()
    assert len(ids) == len(set(ids))
    assert set(env_ids("tensor")) | set(env_ids("gym")) <= set(ids)
    assert "DeepSea-v0" in env_ids("tensor")
    assert "CartPole-v1" in env_ids("gym")
    with pytest.raises(ValueError, match="none of tensor, envpool, gym"):
        env_ids("brax")


def test_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match="use 'cpu'"):
        make_env("gym:CartPole-v1", 2, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_observations_arrive_on_the_device():
    env = make_env("gym:CartPole-v1", 2, device="cuda")
    assert env.reset().device.type == "cuda"
    step = env.step(torch.zeros(2, dtype=torch.int64, device="cuda"))
    assert all(column.device.type == "cuda" for column in step[:-1])


def test_on_device_hands_everything_on():
    inner, plain = GymEnv("CartPole-v1", 2, seed=1), GymEnv("CartPole-v1", 2, seed=1)
    env = OnDevice(inner, "cpu")
    assert env.spec is inner.spec
    assert torch.equal(env.reset(), plain.reset())
    action = torch.tensor([0, 1])
    for _ in range(30):
        got, want = env.step(action), plain.step(action)
        assert all(torch.equal(a, b) for a, b in zip(got[:-1], want[:-1], strict=True))


def lean(obs: torch.Tensor, env: VectorEnv) -> torch.Tensor:
    """A fixed policy that depends on the observation: push the way the last velocity goes."""
    last = obs[:, -1]
    if isinstance(env.spec.action_space, spaces.Box):
        return torch.sign(last)[:, None] * 0.5
    return torch.where(last > 0, env.spec.action_space.n - 1, 0)


def episodes(env: VectorEnv, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of the episodes that end within `steps`."""
    obs = env.reset()
    total, length, found = torch.zeros(env.lanes), torch.zeros(env.lanes), []
    for _ in range(steps):
        step = env.step(lean(obs, env))
        obs = step.obs
        total, length = total + step.reward, length + step.valid
        ended = step.terminated | step.truncated
        found += zip(total[ended].tolist(), length[ended].tolist(), strict=True)
        total[ended], length[ended] = 0.0, 0.0
    returns, lengths = zip(*found, strict=True)
    return np.array(returns), np.array(lengths)


@pytest.mark.parametrize(
    ("id", "lanes", "steps"),
    [("CartPole-v1", 16, 500), ("MountainCar-v0", 32, 201), ("Pendulum-v1", 32, 201), ("Acrobot-v1", 16, 500)],
)
def test_same_dynamics_as_gymnasium(id, lanes, steps, envpool):
    """Means over a fixed policy's episodes differ by at most 4 standard errors (in the tail by chance: 1 in 10,000)."""
    (ours, ours_length), (theirs, theirs_length) = (
        episodes(make_env(f"{name}:{id}", lanes, seed=11), steps) for name in ("envpool", "gym")
    )
    assert len(ours) > 20
    for a, b in ((ours, theirs), (ours_length, theirs_length)):
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) <= 4 * error + 1e-6, (a.mean(), b.mean(), error)


def test_pick_says_which_backend_make_env_takes(envpool):
    assert pick("CartPole-v1", 8) == "envpool:CartPole-v1"
    assert pick("CartPole-v1", TENSOR_FROM["CartPole-v1"]) == "tensor:CartPole-v1"
    for named in ("gym:CartPole-v1", "gymnasium.envs.classic_control:CartPoleEnv", "some_module:Name-v0"):
        assert pick(named, 1000) == named
    with pytest.raises(ValueError, match=r"no backend .* 'CartPol-v1'; nearest: CartPole"):
        pick("CartPol-v1", 8)


def test_a_backend_for_many_lanes_is_picked_without_importing_envpool():
    words = "import sys; from rookery.envs.make import pick; pick('CartPole-v1', 64); print('envpool' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout.strip() == "False"


def test_compiled_acting_picks_the_tensor_backend_at_any_number_of_lanes() -> None:
    assert pick("CartPole-v1", 1, compile=True) == "tensor:CartPole-v1"
    assert pick("CartPole-v1", 1) != "tensor:CartPole-v1"
    assert pick("gym:CartPole-v1", 1, compile=True) == "gym:CartPole-v1"

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
from rookery.envs.vector import EnvError, VectorEnv


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


@pytest.mark.parametrize(
    ("source", "name", "sentence"),
    [
        ("nope", "Mine", r"'%s' cannot be imported: NameError: name 'nope' is not defined; mend it\."),
        ("nope", "Mine-v0", r"'%s' cannot be imported: NameError"),
        ("import nope", "Mine", r"No module named 'nope'; run where it is, or install it\."),
        ("from abc import ABC\nclass Mine: ...", "Nope", r"the module '%s' has no 'Nope'; it has: Mine\."),
    ],
)
def test_a_module_that_does_not_help_is_told(source, name, sentence, tmp_path, monkeypatch):
    module = f"own_{abs(hash((source, name)))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=sentence.replace("%s", module)):
        make_env(f"{module}:{name}")


def test_an_envpool_that_is_broken_is_not_taken_for_absent(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "envpool", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "envpool.py").write_text("import glibc_of_another_age")
    with pytest.raises(EnvError, match="cannot be imported: No module named 'glibc_of_another_age'; mend or uninstall"):
        env_ids("envpool")
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert env_ids("envpool") == []


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


def ends(env: VectorEnv, steps: int) -> np.ndarray:
    """Return, length and last observation `[2 + D]` of each episode of random actions that ends within `steps`."""
    space, generator = env.spec.action_space, torch.Generator().manual_seed(len(env.spec.backend))
    total, length, found = torch.zeros(env.lanes), torch.zeros(env.lanes), []
    env.reset()
    for _ in range(steps):
        noise = torch.rand((env.lanes, *space.shape), generator=generator)
        low, high = (0, space.n) if isinstance(space, spaces.Discrete) else map(torch.tensor, (space.low, space.high))
        action = low + noise * (high - low)
        step = env.step(action.long() if isinstance(space, spaces.Discrete) else action)
        total, length = total + step.reward, length + step.valid
        ended = step.terminated | step.truncated
        obs = step.obs if isinstance(step.obs, torch.Tensor) else torch.zeros(env.lanes, 0)
        found.append(torch.cat([total[:, None], length[:, None], obs.reshape(env.lanes, -1)], 1)[ended])
        total[ended], length[ended] = 0.0, 0.0
    env.close()
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize(
    ("id", "lanes", "steps", "max_steps"),
    [
        *(("LunarLander-v3", 16, 200, None), ("MountainCarContinuous-v0", 32, 51, 50), ("FrozenLake-v1", 64, 60, None)),
        *(("Blackjack-v1", 128, 20, None), ("HalfCheetah-v5", 16, 41, 20), ("Hopper-v5", 16, 60, None)),
        *(("InvertedPendulum-v5", 16, 60, None), ("Reacher-v5", 16, 51, None), ("Catch-v0", 64, 50, None)),
    ],
)
def test_same_dynamics_under_random_actions(id, lanes, steps, max_steps, envpool):
    """As above, against Gymnasium or, where it has no such id, the tensor backend; for observations 5 errors."""
    limit = {} if max_steps is None else {"max_steps": max_steps}
    other = "gym" if id in env_ids("gym") else "tensor"
    ours, theirs = (ends(make_env(f"{name}:{id}", lanes, seed=11, **limit), steps) for name in ("envpool", other))
    assert min(len(ours), len(theirs)) > 15
    columns = min(ours.shape[1], theirs.shape[1])  # Blackjack's observations are a vector, and a tuple
    ours, theirs = ours[:, :columns], theirs[:, :columns]
    error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= [4, 4, *[5] * (len(error) - 2)] * error + 1e-6).all()


def test_same_steps_where_nothing_is_random(envpool):
    ours, theirs = (make_env(f"{name}:CliffWalking-v1", 2, seed=1) for name in ("envpool", "gym"))
    assert torch.equal(ours.reset(), theirs.reset())
    for action in torch.randint(0, 4, (300, 2), generator=torch.Generator().manual_seed(0)):
        for a, b in zip(ours.step(action)[:-1], theirs.step(action)[:-1], strict=True):
            assert torch.equal(a, b)


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

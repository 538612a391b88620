"""The Gymnasium backend, in place and in workers: streams, every space, and all the ways an environment can fail."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from faulty_envs import Counter, Nest, Shades, Tally, Words
from gymnasium import spaces

from rookery.envs import gym_worker
from rookery.envs.gym import GymEnv, gym_ids
from rookery.envs.make import pick
from rookery.envs.spec import dtype_of, leaves
from rookery.envs.vector import EnvError

ROOT = Path(__file__).parents[2]


def rollout(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    actions = [torch.randint(0, 3, (env.lanes,), generator=generator) for _ in range(steps)]
    return [env.step(action) for action in actions]


def flat(env, steps=20):
    """Everything that left an environment, as one tensor."""
    first = env.reset()
    rows = [torch.cat([s.obs, torch.stack(s[1:5], 1).float()], 1) for s in rollout(env, steps)]
    return torch.cat([first.flatten(), torch.stack(rows).flatten()])


@pytest.fixture
def make():
    made = []

    def build(*args, **kwargs):
        made.append(GymEnv(*args, **kwargs))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_convention(make, workers):
    env = make(Counter, 3, workers=workers, info=["power"])
    first = env.reset()
    assert first.dtype == torch.float32
    assert first[:, 0].tolist() == [0, 0, 0]
    steps = rollout(env, 9)
    for t, step in enumerate(steps):
        place = t % 4  # three steps, then the row that begins a new episode
        assert step.obs[:, 0].tolist() == [[1, 2, 3, 0][place]] * 3, "the final observation is 3, the next a first one"
        assert step.valid.tolist() == [place != 3] * 3
        assert step.terminated.tolist() == [place == 2] * 3
        assert not step.truncated.any()
        if place == 3:
            assert not step.reward.any()
    power = torch.stack([step.info["power"][0] for step in steps])
    assert power[[0, 3, 4]].tolist() == [0.5, 1.0, 0.5]
    assert power[1:3].isnan().all()


@pytest.mark.parametrize("workers", [0, 2])
def test_info_is_of_the_step_that_it_came_with(make, workers):
    """Lanes whose episodes end at different times each tell of their own step, and of 0 where a new episode begins."""
    env = make(Tally, 5, seed=2, workers=workers, info=["step"])
    env.reset()
    expected = torch.zeros(5)
    for step in rollout(env, 40):
        expected = torch.where(step.valid, expected + 1, 0.0)
        assert torch.equal(step.info["step"].float(), expected)
        assert torch.equal(step.obs[:, 0], expected)
    assert len(set(expected.tolist())) > 1, "the lanes are in step, so that this shows little"


def test_discrete_counts_from_zero(make):
    env = make(Counter, 3)
    env.reset()
    assert env.spec.action_space == spaces.Discrete(3)
    assert env.step(torch.tensor([0, 1, 2])).reward.tolist() == [-1, 0, 1]


def test_workers_give_the_same_streams(make):
    streams = [flat(make(Counter, 5, seed=4, workers=workers)) for workers in (0, 2)]
    assert torch.equal(*streams)


def test_seeds(make):
    first = flat(make(Counter, 2, seed=4))
    env = make(Counter, 2, seed=4)
    assert torch.equal(first, flat(env))
    assert not torch.equal(first, flat(env)), "a reset without a seed goes on"
    assert not torch.equal(first, flat(make(Counter, 2, seed=5)))
    assert torch.equal(make(Counter, 2, seed=9).reset(), env.reset(seed=9))


def test_who_ended_by_itself_was_not_cut_off(make):
    """Gymnasium's TimeLimit says both of a step that ends by itself when the time is over."""
    env = make(lambda: gymnasium.wrappers.TimeLimit(Counter(), 3))
    env.reset()
    steps = [env.step(torch.zeros(1, dtype=torch.int64)) for _ in range(3)]
    assert [bool(step.terminated) for step in steps] == [False, False, True]
    assert not any(bool(step.truncated) for step in steps)


def test_time_limit_truncates(make):
    env = make("Pendulum-v1", 2, max_episode_steps=4)
    env.reset()
    steps = [env.step(torch.zeros(2, 1)) for _ in range(6)]
    assert torch.stack([step.truncated for step in steps])[:, 0].tolist() == [False] * 3 + [True] + [False] * 2
    assert not torch.stack([step.terminated for step in steps]).any()
    assert env.spec.max_steps == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_nested_spaces(make, workers):
    env = make(Nest, 2, workers=workers)
    obs = env.reset()
    for key, leaf in leaves(env.spec.obs_space).items():
        assert obs[key].shape == (2, *leaf.shape)
        assert obs[key].dtype == dtype_of(leaf)
    action = obs["did"].clone()
    action["move"] = torch.tensor([0, 3])
    action["gears"] = torch.tensor([[2, 0], [0, 4]])
    action["knob"] = torch.tensor([[0], [4]])
    action["grip", "0"] = torch.tensor([[True, False, True], [False, False, True]])
    seen = env.step(action).obs["did"]
    assert seen["knob"].tolist() == [[5], [9]], "a count as an action, a box as an observation"
    for key in set(leaves(env.spec.action_space)) - {("knob",)}:
        assert torch.equal(seen[key], action[key])


def test_tensors_are_the_callers_to_keep(make):
    env = make(Counter, 2)
    env.reset()
    steps = rollout(env, 3)
    assert [step.obs[0, 0].item() for step in steps] == [1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("raise", r"Counter, lane 0, step 2: raised ZeroDivisionError: the wheel came off\n(.|\n)*in step"),
        ("nan", r"Counter, lane 0, step 2: returned NaN or an infinite number in observation: \[ *2\. +nan\]"),
        ("reward", r"Counter, lane 0, step 2: returned NaN or an infinite number in reward: inf"),
        ("shape", r"Counter, lane 0, step 2: returned observation of shape \(1,\), but its space has shape \(2,\)"),
        ("reset", r"Counter, lane 0, in reset: raised RuntimeError: no power"),
    ],
)
def test_faults_name_lane_and_step(make, workers, fault, sentence):
    env = make(Counter, 3, workers=workers, fault=fault)

    def until_it_fails():
        env.reset()
        rollout(env, 3)

    with pytest.raises(EnvError, match=sentence):
        until_it_fails()
    with pytest.raises(EnvError, match="closed"):
        env.reset()


class Four(Counter):
    """Of Gym's old interface."""

    def step(self, action):
        return super().step(action)[:4]


def test_a_step_of_four_values_is_named(make):
    env = make(Four)
    env.reset()
    with pytest.raises(EnvError, match=r"lane 0, step 1: returned 4 values; return obs, reward, terminated, trunc"):
        env.step(torch.zeros(1, dtype=torch.int64))


def test_fault_in_a_later_lane_names_it(make):
    made = iter([Counter(), Counter("raise"), Counter()])
    env = make(lambda: next(made), 3)
    env.reset()
    with pytest.raises(EnvError, match="lane 1, step 2"):
        rollout(env, 3)


def test_a_worker_whose_parent_has_gone_on_says_nothing(monkeypatch):
    """As one does that fails after another has."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # it ignores Ctrl-C, in its own process
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    layout = gym_worker.fields(Counter.observation_space, Counter.action_space, 1, 0)
    memory = bytearray(gym_worker.size(layout))
    gym_worker.serve(gym_worker.Maker(Counter, {"gravity": 3}), layout, memory, 0, 1, 0, {"render": False}, theirs)


def test_hung_worker_is_named(make):
    env = make(Counter, 2, workers=2, timeout=8.0, fault="hang")
    env.reset()
    env._share.timeout = 0.5
    begun = time.monotonic()
    with pytest.raises(EnvError, match=r"lane 0, step 2: worker 0 \(process \d+, lanes 0 to 0\) hangs .* 0\.5 s"):
        rollout(env, 3)
    assert time.monotonic() - begun < 8
    assert not any(process.is_alive() for process in env._share.processes)


@pytest.mark.parametrize("cause", ["kill", "exit"])
def test_dead_worker_is_named(make, cause):
    env = make(Counter, 4, workers=2, fault="exit" if cause == "exit" else None)
    env.reset()
    if cause == "kill":
        os.kill(env._share.processes[1].pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(EnvError, match=r"worker 1 .*SIGKILL" if cause == "kill" else r"worker 0 .*code 3"):
        rollout(env, 3)
    assert time.monotonic() - begun < 8
    assert not any(process.is_alive() for process in env._share.processes)


def test_close_leaves_no_process(make):
    env = make(Counter, 2, workers=2)
    env.reset()
    processes = env._share.processes
    env.close()
    env.close()
    assert [process.exitcode for process in processes] == [0, 0]


ORPHANS = """
import time
from rookery.envs.gym import GymEnv

if __name__ == "__main__":
    env = GymEnv("CartPole-v1", 2, workers=2)
    env.reset()
    print(*(process.pid for process in env._share.processes), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_nothing_outlives_a_killed_parent(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    shared = Path("/dev/shm")
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    mapped = {path.name for path in shared.glob("*")}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 8
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert not [name for name in mapped if f"{parent.pid}" in name], "the common memory has no name to leave behind"


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_render(make):
    for workers in (0, 1):
        env = make(Counter, 1, workers=workers, render=True)
        env.reset()
        rollout(env, 2)
        picture = env.render()
        assert picture.shape == (4, 5, 3)
        assert (picture == 2).all()
        shades = make(Shades, 1, workers=workers, render=True)
        shades.reset()
        rollout(shades, 2)
        assert shades.render().dtype == np.uint8
        assert (shades.render() == 51).all()  # 0.2 of 255
    with pytest.raises(RuntimeError, match="render=True"):
        make(Counter, 1).render()


def test_sources(make):
    env = make(Counter(), 1)
    assert env.spec.backend == "own"
    assert env.spec.id == "Counter"
    rollout_after_reset = env.reset()
    assert rollout_after_reset.shape == (1, 2)
    assert make("CartPole-v1", 1).spec.reward_threshold == 475
    assert "MountainCar-v0" in gym_ids()


def test_a_namespace_is_registered_by_the_package_that_declares_it(make, tmp_path, monkeypatch):
    """As MinAtar is; nothing is imported for an id of another namespace."""
    (tmp_path / "counters.py").write_text(
        "import gymnasium\n\ndef register():\n    gymnasium.register('Counters/Three-v0', 'faulty_envs:Counter')\n"
    )
    (tmp_path / "counters-1.dist-info").mkdir()
    (tmp_path / "counters-1.dist-info" / "entry_points.txt").write_text("[gymnasium.envs]\nCounters=counters:register")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ValueError, match="no environment 'Others/Three-v0'"):
            make("Others/Three-v0")
        assert "counters" not in sys.modules
        assert pick("Counters/Three-v0", 1) == "gym:Counters/Three-v0"
        for workers in (0, 1):
            assert make("Counters/Three-v0", 2, workers=workers).reset()[:, 0].tolist() == [0, 0]
    finally:
        gymnasium.registry.pop("Counters/Three-v0", None)
        sys.modules.pop("counters", None)


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (("CartPol-v1",), {}, "nearest: CartPole-v"),
        ((Counter(), 2), {}, "one Counter object is one lane"),
        ((7,), {}, "7 makes no environment"),
        ((list,), {}, "without `reset`"),
        ((Words,), {}, "Text at the top has no fixed-size tensor"),
        ((Counter, 2), {"workers": 3}, r"use 0 \(in place\) to 2"),
        ((Counter, 0), {}, "lanes=0"),
        ((lambda: Counter(), 1), {"workers": 1}, "define it at the top of a module"),
    ],
)
def test_refusals(arguments, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        GymEnv(*arguments, **settings)


def test_failing_to_be_made_is_named():
    with pytest.raises(EnvError, match="lane 0, could not be made: TypeError"):
        GymEnv(Counter, 1, gravity=3)


def test_action_of_a_wrong_shape(make):
    env = make(Counter, 2)
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(2,\)"):
        env.step(torch.zeros(3, dtype=torch.int64))

"""The EnvPool backend: the stream convention, seeds, spaces, asynchronous lanes, refusals."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict

from rookery.envs.spec import dtype_of, leaves
from rookery.envs.vector import EnvError

pytest.importorskip("envpool")
from rookery.envs.envpool import EnvPoolEnv, envpool_ids


def some_actions(env, seed=0):
    """Random actions in the action space, forever."""
    rng, space = np.random.default_rng(seed), env.spec.action_space
    while True:
        if isinstance(space, spaces.Box):
            low, high = np.maximum(space.low, -1), np.minimum(space.high, 1)
            yield torch.from_numpy(rng.uniform(low, high, (env.lanes, *space.shape)).astype(np.float32))
        else:
            high = space.n if isinstance(space, spaces.Discrete) else space.nvec
            yield torch.from_numpy(rng.integers(0, high, (env.lanes, *space.shape)))


def rollout(env, steps, seed=0):
    actions = some_actions(env, seed)
    return [env.step(next(actions)) for _ in range(steps)]


def assert_in_form(env, obs):
    for key, leaf in leaves(env.spec.obs_space).items():
        value = obs[key] if key else obs
        assert value.shape == (env.lanes, *leaf.shape)
        assert value.dtype == dtype_of(leaf)


# One id of each kind of spaces: boxes, images, goals, discrete, nested with masks, stale rewards at resets.
@pytest.mark.parametrize(
    ("id", "steps"),
    [
        ("CartPole-v1", 100),
        ("Pendulum-v1", 410),
        ("FrozenLake-v1", 100),
        ("FetchReach-v4", 51),
        ("MiniGrid-Empty-5x5-v0", 210),
        ("PendulumSwingup-v1", 1002),
        ("BallInCupCatch-v1", 5),
        ("BinPack-v2", 30),
        ("HalfCheetah-v5", 5),
        ("LunarLander-v3", 200),
    ],
)
def test_stream_convention(id, steps):
    env = EnvPoolEnv(id, lanes=2, seed=1)
    assert_in_form(env, env.reset())
    ended, ends = torch.zeros(2, dtype=torch.bool), 0
    for step in rollout(env, steps):
        assert_in_form(env, step.obs)
        assert torch.equal(step.valid, ~ended), "a row is invalid exactly where the row before it ended"
        assert step.reward.dtype == torch.float32
        assert not step.reward[~step.valid].any()
        assert not (step.terminated | step.truncated)[~step.valid].any()
        assert not (step.terminated & step.truncated).any()
        ended = step.terminated | step.truncated
        ends += int(ended.sum())
    assert ends or steps < 10, "this test has to see an episode end"


def test_final_observation_is_the_true_next_one():
    env = EnvPoolEnv("CartPole-v1", lanes=4)
    env.reset()
    finals = [step.obs[step.terminated] for step in rollout(env, 100)]
    beyond = torch.cat(finals).abs() > torch.tensor([2.4, torch.inf, 12 * torch.pi / 180, torch.inf])
    assert len(beyond) > 5
    assert beyond.any(1).all()


def test_observation_after_an_end_is_a_first_one():
    env = EnvPoolEnv("CartPole-v1", lanes=4)
    env.reset()
    firsts = torch.cat([step.obs[~step.valid] for step in rollout(env, 100)])
    assert len(firsts) > 5
    assert (firsts.abs() <= 0.05).all()


def test_time_limit_truncates():
    env = EnvPoolEnv("Pendulum-v1", lanes=2, max_episode_steps=7)
    env.reset()
    truncated = torch.stack([step.truncated for step in rollout(env, 15)])
    assert env.spec.max_steps == 7
    assert truncated.nonzero()[:, 0].tolist() == [6, 6, 14, 14]  # 7 steps, 1 reset, 7 steps


def test_tensors_are_the_callers_to_keep():
    env = EnvPoolEnv("CartPole-v1", lanes=3)
    env.reset()
    steps = rollout(env, 60)
    copies = [[column.clone() for column in step[:-1]] for step in steps]
    rollout(env, 200, seed=5)
    for step, copy in zip(steps, copies, strict=True):
        assert all(torch.equal(column, kept) for column, kept in zip(step[:-1], copy, strict=True))
    steps[-1].valid.zero_()
    steps[-1].obs.zero_()
    assert rollout(env, 1)[0].obs.any()


def test_same_seed_same_stream():
    def stream(env, **reset):
        return [env.reset(**reset), *(torch.cat([s.obs, s.reward[:, None]], 1) for s in rollout(env, 50))]

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    env = EnvPoolEnv("CartPole-v1", lanes=3, seed=7)
    first = stream(env)
    assert equal(first, stream(EnvPoolEnv("CartPole-v1", lanes=3, seed=7, threads=2)))
    assert equal(first, stream(env, seed=7))
    assert not equal(first, stream(env))
    other = stream(env, seed=8)
    assert not equal(first, other)
    # Neighbouring seeds share no lane.
    assert len(torch.cat([first[0], other[0]]).unique(dim=0)) == 6


def test_asynchronous_lanes_give_the_same_streams():
    plain, eager = EnvPoolEnv("CartPole-v1", lanes=4, seed=3), EnvPoolEnv("CartPole-v1", lanes=4, seed=3, batch_size=2)
    assert torch.equal(plain.reset(), eager.reset())
    actions = some_actions(plain)
    chosen = [next(actions) for _ in range(60)]
    expected = [plain.step(action) for action in chosen]
    eager.send(chosen[0])
    at = torch.zeros(4, dtype=torch.int64)  # how far each lane is
    for _ in range(2 * 59):
        step, lanes = eager.recv()
        for row, lane in enumerate(lanes.tolist()):
            wanted = expected[at[lane]]
            for got, want in zip(step[:-1], wanted[:-1], strict=True):
                assert torch.equal(got[row], want[lane])
        at[lanes] += 1
        more = lanes[at[lanes] < 59]
        if len(more):
            eager.send(torch.stack([chosen[at[lane]][lane] for lane in more]), more)
    assert at.tolist() == [59] * 4
    last = eager.step(chosen[59])
    assert torch.equal(last.obs, expected[59].obs)
    assert torch.equal(last.valid, expected[59].valid)


def test_asynchronous_misuse_is_refused():
    env = EnvPoolEnv("CartPole-v1", lanes=4, batch_size=2)
    zeros = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(EnvError, match=r"reset\(\) first"):
        env.send(zeros)
    env.reset()
    with pytest.raises(EnvError, match="0 were sent"):
        env.recv()
    env.send(zeros)
    with pytest.raises(EnvError, match="not ready"):
        env.send(zeros[:1], torch.tensor([2]))


def test_pong():
    env = EnvPoolEnv("Pong-v5", lanes=2)
    assert env.spec.frame_skip == 4
    assert env.spec.max_steps == 27000
    obs = env.reset()
    assert obs.shape == (2, 4, 84, 84)
    steps = rollout(env, 20)
    assert set(steps[-1].info) == {"lives"}
    assert torch.equal(steps[-1].obs[:, :3], steps[-2].obs[:, 1:]), "frames are stacked oldest first"
    picture = env.render()
    assert picture.shape == (84, 84, 3)
    assert np.array_equal(picture[..., 0], steps[-1].obs[0, -1].numpy())


def test_render():
    env = EnvPoolEnv("CartPole-v1", lanes=2, render=True)
    env.reset()
    before = env.render()
    rollout(env, 8)
    assert before.shape == (400, 600, 3)
    assert before.dtype == np.uint8
    assert (before != env.render()).any()


def test_mujoco_draws_or_says_why_not():
    """Without OpenGL MuJoCo would end the process; a sentence has to come instead."""
    env = EnvPoolEnv("HalfCheetah-v5", lanes=1, render=True)
    env.reset()
    try:
        drawn, said = env.render().any(), ""
    except RuntimeError as error:
        drawn, said = False, str(error)
    assert drawn or "for want of OpenGL" in said


def test_info():
    assert set(rollout_info("Pong-v5", reward_clip=True)) == {"lives", "reward"}
    assert set(rollout_info("HalfCheetah-v5", info=("x_position",))) == {"x_position"}
    assert {"x_position", "reward_run"} <= set(rollout_info("HalfCheetah-v5", info=True))


def rollout_info(id, **settings):
    env = EnvPoolEnv(id, lanes=2, **settings)
    env.reset()
    info = rollout(env, 1)[0].info
    assert all(len(value) == 2 for value in info.values())
    return info


def test_spec():
    spec = EnvPoolEnv("HalfCheetah-v5", lanes=1).spec
    assert spec.reward_threshold == 4800
    assert spec.obs_space.dtype == np.float32
    assert spec.frame_skip == 1, "MuJoCo's substeps are not frames"
    assert isinstance(EnvPoolEnv("BinPack-v2", lanes=1).spec.action_space, spaces.MultiDiscrete)


def test_structured_observation():
    env = EnvPoolEnv("BinPack-v2", lanes=2)
    obs = env.reset()
    assert isinstance(obs, TensorDict)
    assert obs["action_mask"].dtype == torch.bool
    assert obs["ems", "x1"].shape == (2, 40)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("CartPol-v1", 1), "nearest: CartPole-v"),
        (("ConnectFour-v1", 1), "several players"),
        (("CartPole-v1", 0), "lanes=0"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EnvPoolEnv(*arguments)


def test_refused_settings():
    with pytest.raises(ValueError, match=r"no setting 'gravity'; it has: .*max_episode_steps"):
        EnvPoolEnv("CartPole-v1", 1, gravity=3)
    with pytest.raises(ValueError, match="does not divide lanes=4"):
        EnvPoolEnv("CartPole-v1", 4, batch_size=3)
    with pytest.raises(ValueError, match="negative"):
        EnvPoolEnv("CartPole-v1", 4, seed=-1)
    env = EnvPoolEnv("CartPole-v1", 4)
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(4, 1\); expected \(4,\)"):
        env.step(torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="render=True"):
        env.render()
    env.close()
    env.close()
    with pytest.raises(EnvError, match="closed"):
        env.reset()


def test_nan_names_lane_and_step(monkeypatch):
    env = EnvPoolEnv("CartPole-v1", 3)
    env.reset()
    rollout(env, 4)

    class Broken:
        def __init__(self, pool):
            self.pool = pool

        def _send(self, values):
            self.pool._send(values)

        def _recv(self):
            values = self.pool._recv()
            values[env._leaves[0].at][1, 2] = np.nan
            return values

    monkeypatch.setattr(env, "_pool", Broken(env._pool))
    with pytest.raises(EnvError, match=r"CartPole-v1, lane 1, step 5: returned NaN .* in obs"):
        rollout(env, 1)


def test_ids():
    ids = envpool_ids()
    assert len(ids) > 1000
    assert {"CartPole-v1", "Pong-v5", "HalfCheetah-v5"} <= set(ids)

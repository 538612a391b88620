"""The environments without an oracle: their best returns by a scripted policy, and the probes' known answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from rookery.envs.spec import mask_of
from rookery.envs.tensor import TensorEnv, make_tensor_env
from rookery.envs.vector import Obs

Policy = Callable[[Any], Obs]


def returns(env: TensorEnv, policy: Policy, steps: int, seed: int = 0) -> Tensor:
    """The returns of all episodes that ended within `steps` calls; fails if there is none."""
    obs, running, finished = env.reset(seed=seed), torch.zeros(env.lanes), []
    for _ in range(steps):
        step = env.step(policy(obs))
        running = torch.where(step.valid, running + step.reward, 0.0)
        finished.append(running[step.terminated | step.truncated])
        obs = step.obs
    result = torch.cat(finished)
    assert len(result) > 0
    return result


def uniform(env: TensorEnv, count: int) -> Policy:
    generator = torch.Generator().manual_seed(0)
    return lambda obs: torch.randint(0, count, (env.lanes,), generator=generator)


def test_catch_by_following_the_ball() -> None:
    env = make_tensor_env("Catch-v0", 64)

    def follow(board: Tensor) -> Tensor:
        paddle = board[:, -1].argmax(-1)
        ball = board[:, :-1].sum(1).argmax(-1)
        falling = board[:, :-1].flatten(1).any(-1)
        return torch.where(falling, torch.sign(ball - paddle), 0) + 1

    first = env.reset(seed=0)
    assert first.shape == (64, 10, 5)
    assert torch.equal(first[:, -1].argmax(-1), torch.full((64,), 2)), "the paddle starts in the middle"
    assert torch.equal(first[:, 0].sum(-1), torch.ones(64)), "the ball starts in the top row"
    assert set(first[:, 0].argmax(-1).tolist()) == {0, 1, 2, 3, 4}
    assert (returns(env, follow, 40) == 1).all()
    stay = returns(env, lambda obs: torch.ones(64, dtype=torch.int64), 400)
    assert set(stay.tolist()) == {-1.0, 1.0}
    assert stay.mean() == pytest.approx(-0.6, abs=0.06)  # one column in five
    env.reset(seed=0)
    ends = [int(env.step(torch.ones(64, dtype=torch.int64)).terminated.sum()) for _ in range(10)]
    assert ends == [0] * 8 + [64, 0]


def test_catch_puts_ball_and_paddle_together_when_caught() -> None:
    env = make_tensor_env("Catch-v0", 32)
    obs = env.reset(seed=0)
    for _ in range(9):
        step = env.step(torch.ones(32, dtype=torch.int64))
        obs = step.obs
    caught = step.reward > 0
    assert caught.any()
    assert torch.equal(obs.flatten(1).sum(-1) == 1, caught)


def test_deep_sea_optimum_is_0_99() -> None:
    env = make_tensor_env("DeepSea-v0", 3, size=8, seed=5)

    def right(obs: Tensor) -> Tensor:
        row, column = obs.flatten(1).argmax(-1) // 8, obs.flatten(1).argmax(-1) % 8
        return env.right_action[row, column]

    assert set(env.right_action.flatten().tolist()) == {0, 1}, "which action is right differs between cells"
    torch.testing.assert_close(returns(env, right, 30), torch.full((9,), 0.99))
    torch.testing.assert_close(returns(env, lambda obs: 1 - right(obs), 30), torch.zeros(9))


def test_deep_sea_mapping_is_the_seeds() -> None:
    first, same, other = (make_tensor_env("DeepSea-v0", 1, seed=seed) for seed in (1, 1, 2))
    first.reset(seed=9)
    assert torch.equal(first.right_action, same.right_action)
    assert not torch.equal(first.right_action, other.right_action)


def test_deep_sea_uniform_success_rate() -> None:
    env = make_tensor_env("DeepSea-v0", 2048, size=4)
    found = returns(env, uniform(env, 2), 20) > 0.5
    assert found.float().mean() == pytest.approx(2**-4, abs=0.01)
    step = env.reset(seed=0), [env.step(torch.zeros(2048, dtype=torch.int64)) for _ in range(4)]
    assert step[1][-1].terminated.all()
    assert not step[1][-1].obs.any(), "below the board nothing is shown"


@pytest.mark.parametrize("length", [1, 2, 7])
def test_memory_chain_rewards_the_bit_of_the_start(length: int) -> None:
    env = make_tensor_env("MemoryChain-v0", 64, length=length)
    cue = torch.zeros(64)

    def remember(obs: Tensor) -> Tensor:
        cue.copy_(torch.where(obs[:, 2] != 0, obs[:, 2], cue))
        return (cue > 0).long()

    first = env.reset(seed=0)
    assert set(first[:, 2].tolist()) == {-1.0, 1.0}
    assert set(first[:, 0].tolist()) == {1.0}
    assert (returns(env, remember, 4 * (length + 1)) == 1).all()
    assert returns(env, uniform(env, 2), 60 * (length + 1)).mean() == pytest.approx(0, abs=0.06)
    env.reset(seed=0)
    shown = [env.step(torch.zeros(64, dtype=torch.int64)).obs for _ in range(length)]
    assert not torch.stack(shown)[..., 2].any(), "the bit is shown once"
    asked = torch.stack([first, *shown])[:, 0, 1]
    assert asked.nonzero().flatten().tolist() == [length - 1]


def test_tmaze_by_remembering_the_cue() -> None:
    env = make_tensor_env("TMaze-v0", 32, length=6)
    cue = torch.zeros(32)

    def remember(obs: Tensor) -> Tensor:
        cue.copy_(torch.where(obs[:, 0] != 0, obs[:, 0], cue))
        return torch.where(obs[:, 2] > 0, 1 - cue.long(), 1)  # up is 0 and down is 2

    first = env.reset(seed=1)
    assert set(first[:, 0].tolist()) == {-1.0, 1.0}
    optimal = returns(env, remember, 8 * 4)
    assert len(optimal) == 32 * 4, "seven steps and a new beginning"
    assert (optimal == 1).all()
    blind = returns(env, lambda obs: torch.where(obs[:, 2] > 0, 0, 1), 8 * 20)
    assert set(blind.tolist()) == {-1.0, 1.0}
    assert blind.mean() == pytest.approx(0, abs=0.1)
    env.reset(seed=0)
    torch.testing.assert_close(env.step(torch.full((32,), 3)).reward, torch.full((32,), -0.1))


def walk(board: np.ndarray) -> int:
    """The first move of a shortest way to the nearest key, or to the goal if none is left; `[5, H, W]` of 0 and 1."""
    wall, key, door, goal, agent = board.astype(bool)
    target = key if key.any() else goal
    start = tuple(np.argwhere(agent)[0])
    queue, seen = deque([(start, -1)]), {start}
    while queue:
        (row, column), first = queue.popleft()
        if target[row, column] and first >= 0:
            return first
        for move, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            cell = (row + down, column + right)
            if cell not in seen and not wall[cell] and not door[cell]:
                seen.add(cell)
                queue.append((cell, first if first >= 0 else move))
    return -1


@pytest.mark.parametrize(
    "options", [{}, {"rooms": 4, "room_width": 2, "room_height": 11}, {"rooms": 1}, {"rooms": 3, "room_width": 1}]
)
def test_key_door_is_solved_by_shortest_ways(options: dict[str, int]) -> None:
    """Every layout can be solved, by fetching keys one after the other; the reward comes at the goal alone."""
    env = make_tensor_env("KeyDoor-v0", 16, **options)
    obs = env.reset(seed=0)
    keys = options.get("rooms", 2) - 1
    assert torch.equal(obs[:, 1].flatten(1).sum(-1), torch.full((16,), float(keys)))
    assert torch.equal(obs[:, 2].flatten(1).sum(-1), torch.full((16,), float(keys)))
    assert not (obs[:, 4] * obs[:, 1:4].sum(1)).any(), "the agent starts on a cell of its own"
    assert not (obs[:, 0] * obs[:, 1:].sum(1)).any(), "nothing lies in a wall"
    assert keys == 0 or len({row.numpy().tobytes() for row in obs}) == 16, "layouts differ"
    done = torch.zeros(16, dtype=torch.bool)
    for _ in range(150):
        moves = torch.tensor([0 if over else walk(board) for board, over in zip(obs.numpy(), done, strict=True)])
        assert (moves >= 0).all(), "some key or goal cannot be reached"
        step = env.step(moves)
        obs, done = step.obs, done | step.terminated
        assert torch.equal(step.reward, step.terminated.float())
        if done.all():
            break
    assert done.all()


def test_key_door_mask_names_the_moves_that_change_something() -> None:
    """A move is masked exactly if the agent would stay; so walls and shut doors are, and open doors are not."""
    env = make_tensor_env("KeyDoor-v0", 256, masked=True)
    generator = torch.Generator().manual_seed(0)
    obs = env.reset(seed=0)
    for _ in range(60):
        mask = mask_of(obs)
        assert mask.dtype == torch.bool
        assert mask.any(-1).all()
        action = torch.randint(0, 4, (256,), generator=generator)
        step = env.step(action)
        stayed = (step.obs["board"][:, 4] == obs["board"][:, 4]).flatten(1).all(-1)
        allowed = mask.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(stayed[step.valid], ~allowed[step.valid])
        obs = step.obs


def test_key_door_opens_only_with_its_key() -> None:
    env = make_tensor_env("KeyDoor-v0", 512, rooms=3)
    obs, generator = env.reset(seed=0), torch.Generator().manual_seed(1)
    for _ in range(40):
        step = env.step(torch.randint(0, 4, (512,), generator=generator))
        count = step.obs[:, 1:3].flatten(2).sum(-1)
        assert torch.equal(count[:, 0], count[:, 1]), "as many doors are shut as keys lie about"
        assert not (step.obs[:, 4] * step.obs[:, 2]).any(), "nobody stands in a shut door"
        obs = step.obs
    assert (obs[:, 1].flatten(1).sum(-1) < 2).any()


def test_key_door_window_is_the_board_around_the_agent() -> None:
    full, part = make_tensor_env("KeyDoor-v0", 64), make_tensor_env("KeyDoor-v0", 64, view=5, planes="uint8")
    whole, window = full.reset(seed=3), part.reset(seed=3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        padded = torch.zeros((64, 5, whole.shape[2] + 4, whole.shape[3] + 4))
        padded[:, 0] = 1
        padded[:, :, 2:-2, 2:-2] = whole
        for lane in range(64):
            row, column = whole[lane, 4].nonzero()[0].tolist()
            expected = padded[lane, :, row : row + 5, column : column + 5]
            assert torch.equal(window[lane], (expected * 255).to(torch.uint8))
        action = torch.randint(0, 4, (64,), generator=generator)
        whole, window = full.step(action).obs, part.step(action).obs


def one(lanes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(lanes, dtype=dtype)


def majority(obs: TensorDict) -> Tensor:
    """Whether most leaves of ProbeDict vote 1."""
    votes = obs["choice"] + (obs["inner", "bytes"][:, 3] == 255) + (obs["pair", "0"][:, 0] > 0)
    return votes + obs["pair", "1"][:, 1] + obs["counts"][:, 1] // 2 > 2


ANSWERS: dict[str, tuple[Policy, float]] = {
    "Probe1-v0": (lambda obs: one(16), 1.0),
    "Probe3-v0": (lambda obs: one(16), 1.0),
    "Probe4-v0": (lambda obs: one(16), 1.0),
    "Probe5-v0": (lambda obs: (obs[:, 0] > 0).long(), 1.0),
    "ProbeMultiDiscrete-v0": (lambda obs: torch.stack((obs[:, :2].argmax(-1), obs[:, 2:].argmax(-1)), -1), 1.0),
    "ProbeMultiBinary-v0": (lambda obs: obs.clone(), 1.0),
    "ProbeBox-v0": (lambda obs: obs.clone(), 0.0),
    "ProbeTuple-v0": (
        lambda obs: TensorDict({"0": (obs[:, 0] > 0).long(), "1": obs[:, 1:].clone()}, batch_size=[16]),
        1.0,
    ),
    "ProbeMask-v0": (lambda obs: obs["action_mask"].long().argmax(-1), 1.0),
    "ProbeDict-v0": (lambda obs: majority(obs).long(), 1.0),
    "ProbeDictBox-v0": (lambda obs: majority(obs).unsqueeze(-1) * 2.0 - 1.0, 1.0),
    "ProbeImageBox-v0": (lambda obs: obs[:, 0, 0, :1] / 127.5 - 1, 0.0),
}


@pytest.mark.parametrize("id", ANSWERS)
def test_probes_reward_the_known_answer(id: str) -> None:
    policy, best = ANSWERS[id]
    got = returns(make_tensor_env(id, 16), policy, 44)
    torch.testing.assert_close(got, torch.full_like(got, best))


def test_probe_values() -> None:
    """Probe 2 rewards what it shows; probe 3 rewards the second step; probes 4 and 5 punish the other action."""
    env = make_tensor_env("Probe2-v0", 64)
    obs = env.reset(seed=0)
    assert set(obs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(env.step(one(64)).reward, obs[:, 0])

    env = make_tensor_env("Probe3-v0", 2)
    assert not env.reset(seed=0).any()
    first, second = env.step(one(2)), env.step(one(2))
    assert (first.reward.tolist(), first.terminated.tolist(), first.obs.tolist()) == ([0, 0], [False] * 2, [[1], [1]])
    assert (second.reward.tolist(), second.terminated.tolist()) == ([1, 1], [True] * 2)

    for id, wrong in (("Probe4-v0", lambda obs: one(64) * 0), ("Probe5-v0", lambda obs: (obs[:, 0] < 0).long())):
        assert (returns(make_tensor_env(id, 64), wrong, 4) == -1).all()


def test_probe_final_observations_would_have_a_value() -> None:
    """So that bootstrapping through `terminated` shows: the final observation of a one-step probe is its first one."""
    for id in ("Probe1-v0", "Probe2-v0", "Probe4-v0", "Probe5-v0", "ProbeBox-v0"):
        env = make_tensor_env(id, 8)
        first = env.reset(seed=0)
        action = torch.zeros((8, *env.spec.action_space.shape), dtype=torch.int64)
        step = env.step(action.float() if id == "ProbeBox-v0" else action)
        assert step.terminated.all()
        assert torch.equal(step.obs, first)


def test_probe_mask_punishes_a_masked_action_and_changes() -> None:
    env = make_tensor_env("ProbeMask-v0", 256)
    obs = env.reset(seed=0)
    for _ in range(5):
        mask = mask_of(obs)
        assert mask.any(-1).all()
        step = env.step((~mask).long().argmax(-1))  # action 0 where all are allowed
        broke = ~mask.all(-1) & step.valid
        assert broke.any()
        assert (step.reward[broke] == -1).all()
        assert torch.equal(step.terminated, broke)
        assert not torch.equal(mask_of(step.obs), mask)
        obs = step.obs
    masked_out = (~mask_of(obs)).float().mean()
    assert masked_out == pytest.approx(31 / 64, abs=0.05)  # half, but for the one action always allowed

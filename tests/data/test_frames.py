"""Stacks rebuilt from single frames are EnvPool's and FrameStack's own, in every kind of episode."""

from __future__ import annotations

import pytest
import torch

from rookery.data.plan import ReplayPlan
from rookery.data.replay import ReplayBuffer
from rookery.envs.make import make_env
from rookery.envs.tensor import make_tensor_env
from rookery.envs.transforms import FrameStack
from rookery.envs.vector import VectorEnv


def replayed(env: VectorEnv, stack: int, steps: int, unroll: int) -> ReplayBuffer:
    """Play at random into a buffer that keeps all, and check every stack it gives."""
    generator, lanes = torch.Generator().manual_seed(0), env.lanes
    plan = ReplayPlan(capacity=steps * lanes, batch=8, learning_starts=1)
    buffer, obs, seen = ReplayBuffer(plan, lanes, stack=stack), env.reset(0), []
    for _ in range(steps // unroll):
        rows: dict[str, list] = {"obs": [obs], "action": []}
        for _ in range(unroll):
            action = torch.randint(env.spec.action_space.n, (lanes,), generator=generator)
            step = env.step(action)
            for name, value in {"obs": step.obs, "action": action, **step.columns()}.items():
                rows.setdefault(name, []).append(value)
        buffer.insert({name: torch.stack(values) for name, values in rows.items()})
        seen += rows["obs"][:-1]
        obs = rows["obs"][-1]
    valid, stacks = buffer._ring.columns["valid",].view(-1), torch.stack([*seen, obs])
    batch = buffer.sample(400)
    row, lane = batch["index"] // lanes, batch["index"] % lanes
    assert torch.equal(batch["obs"], stacks[row, lane])
    assert torch.equal(batch["next_obs"], stacks[row + 1, lane])
    assert len(buffer) == int(valid[: steps // unroll * unroll * lanes].sum()), "every valid row can be drawn"
    return buffer


@pytest.mark.parametrize("options", [{"max_steps": 9}, {"max_steps": 60, "episodic_life": True}])
def test_stacks_of_envpool(options: dict) -> None:
    """A reset repeats the first frame; a lost life (about every 24 steps at random) goes on with the frames before."""
    pytest.importorskip("envpool")
    env = make_env("envpool:Breakout-v5", 2, seed=3, **options)
    buffer = replayed(env, stack=4, steps=90, unroll=6)
    assert buffer._ring.columns["obs",].shape[2:] == (1, 84, 84), "a frame is stored once"
    env.close()


def test_stacks_of_our_own() -> None:
    """Zeros before the first frame, and frames of a vector along its one dimension."""
    replayed(FrameStack(make_tensor_env("CartPole-v1", 3, "cpu"), 3), stack=3, steps=120, unroll=5)


def test_what_is_no_stack_is_refused() -> None:
    obs = torch.rand(3, 2, 4, 5)
    flags = {name: torch.zeros(3, 2, dtype=torch.bool) for name in ("terminated", "truncated")}
    rows = {"obs": obs, "action": torch.zeros(3, 2), "reward": torch.zeros(3, 2), **flags}
    rows["valid"] = torch.ones(3, 2, dtype=torch.bool)
    buffer = ReplayBuffer(ReplayPlan(capacity=100, batch=4, learning_starts=1), 2, stack=4)
    with pytest.raises(ValueError, match=r"row 0 of lane 0 is not the one .* no stack of 4 frames.*; use stack=1"):
        buffer.insert(rows)
    with pytest.raises(ValueError, match=r"obs is of shape \[3, 2\], and stack=4 takes one tensor \[T\+1, B, 4·C"):
        buffer.insert({**rows, "obs": obs[..., 0, 0]})
    assert len(buffer) == 0

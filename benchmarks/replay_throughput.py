"""Replay beside TorchRL's and Stable-Baselines3's on the same cores and the same work: samples and inserts a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import begin, child, chosen, finish, interleaved, machine, parser, ratios, spread, table

NOTES = """Each number is the median over the rounds, with the least and the greatest, of calls a second; ratios are
taken within a round. Every variant is a process of its own, pinned to the same cores with as many torch threads, and
they take turns. A call is one batch drawn (`sample`), one batch of 512 drawn by priority and its priorities changed
(`update`), or one insert; `[1, 8]` is one row of 8 lanes. All buffers are full: 1M rows of 17 + 6 floats in 8 lanes, or
stacks of 4 Atari frames. What a batch holds differs: ours and TorchRL's give observation and next observation, action,
reward and the rest as tensors, Stable-Baselines3's (SB3) too, from numpy. TorchRL is given transitions with both
observations, flat, in a `LazyTensorStorage`, as its SAC example does. "–" is what did not run, or is not offered: SB3
has no priorities."""

OURS, PEERS = "ours", ("torchrl", "SB3")
OBS, ACTION = 17, 6

# Case: what is called, samples or (rows, lanes), and the aim in calls a second.
CASES: dict[str, tuple[str, Any, float | None]] = {
    "uniform sample of 256": ("sample", 256, 13_000),
    "uniform sample of 512": ("sample", 512, None),
    "prioritised sample of 512 and update": ("update", 512, 5_000),
    "insert [1, 8]": ("insert", (1, 8), 12_500),
    "insert [128, 8]": ("insert", (128, 8), None),
    "Atari, sample of 32 stacks": ("atari", 32, None),
}


def rate(call: Callable[[], Any], seconds: float) -> float:
    """Calls a second."""
    call()
    calls, began = 0, time.perf_counter()
    while (gone := time.perf_counter() - began) < seconds:
        call()
        calls += 1
    return calls / gone


def unroll(rows: int, lanes: int, obs: Any, action: Any) -> dict[str, Any]:
    """Rows that go on with what they ended with, so that they can be inserted again and again."""
    import torch

    obs[-1] = obs[0]
    flags = {name: torch.zeros(rows + 1, lanes, dtype=torch.bool) for name in ("terminated", "truncated")}
    reward = torch.rand(rows + 1, lanes)
    return {"obs": obs, "action": action, "reward": reward, **flags, "valid": ~flags["truncated"]}


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from rookery.data.plan import ReplayPlan
    from rookery.data.replay import ReplayBuffer

    kind, size, capacity = spec["call"], spec["size"], spec["capacity"]
    plan = ReplayPlan(capacity, 256, 1, alpha=0.6 if kind == "update" else 0.0)
    buffer = ReplayBuffer(plan, 8, stack=4 if kind == "atari" else 1)
    rows = 100
    if kind == "atari":
        frames = torch.randint(1, 255, (rows + 1, 8, 1, 84, 84), dtype=torch.uint8)
        frames[-4:] = frames[:1]  # the last stack is the first one again
        obs = torch.cat([frames[[max(t - back, 0) for t in range(rows + 1)]] for back in (3, 2, 1, 0)], 2)
        action = torch.zeros(rows + 1, 8, dtype=torch.int64)
    else:
        obs, action = torch.rand(rows + 1, 8, OBS), torch.rand(rows + 1, 8, ACTION)
    filling = unroll(rows, 8, obs, action)
    for _ in range(capacity // (rows * 8) + 2):
        buffer.insert(filling)
    if kind == "insert":
        count, lanes = size
        start = filling["obs"][:1]
        more = torch.cat([start, torch.rand(count, lanes, OBS)])
        given = unroll(count, lanes, more, torch.rand(count + 1, lanes, ACTION))
        return {"rate": rate(lambda: buffer.insert(given), spec["seconds"])}
    priorities = torch.rand(size)

    def update() -> None:
        buffer.prioritise(buffer.sample(size, 0.4)["index"], priorities)

    return {"rate": rate(update if kind == "update" else lambda: buffer.sample(size), spec["seconds"])}


def torchrl(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

    kind, size, capacity = spec["call"], spec["size"], spec["capacity"]
    shape, dtype = ((4, 84, 84), torch.uint8) if kind == "atari" else ((OBS,), torch.float32)

    def transitions(count: int) -> TensorDict:
        obs = torch.zeros(count, *shape, dtype=dtype)
        flags = {name: torch.zeros(count, 1, dtype=torch.bool) for name in ("terminated", "truncated", "done")}
        following = {"observation": obs, "reward": torch.rand(count, 1), **flags}
        whole = {"observation": obs, "action": torch.rand(count, ACTION), "next": following}
        return TensorDict(whole, batch_size=[count])

    storage = LazyTensorStorage(capacity)
    batch = size if isinstance(size, int) else 256
    if kind == "update":
        buffer = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage, batch_size=batch)
    else:
        buffer = TensorDictReplayBuffer(storage=storage, batch_size=batch)
    some = transitions(min(1_000, capacity))
    for _ in range(capacity // len(some)):
        buffer.extend(some)
    if kind == "insert":
        given = transitions(size[0] * size[1])
        return {"rate": rate(lambda: buffer.extend(given), spec["seconds"])}
    priorities = torch.rand(batch)

    def update() -> None:
        buffer.update_priority(buffer.sample()["index"], priorities)

    return {"rate": rate(update if kind == "update" else buffer.sample, spec["seconds"])}


def sb3(spec: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    kind, size, capacity = spec["call"], spec["size"], spec["capacity"]
    if kind == "atari":
        obs_space, act_space = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)
    else:
        obs_space, act_space = spaces.Box(-1, 1, (OBS,)), spaces.Box(-1, 1, (ACTION,))
    # One copy of stacks instead of two, for memory's sake: its option, which fits no other handling of time limits.
    lean = {"optimize_memory_usage": True, "handle_timeout_termination": False} if kind == "atari" else {}
    buffer = ReplayBuffer(capacity, obs_space, act_space, device="cpu", n_envs=8, **lean)
    obs, action = np.zeros((8, *obs_space.shape), obs_space.dtype), np.zeros((8, *(act_space.shape or (1,))))
    step = (obs, obs, action, np.zeros(8), np.zeros(8), [{}] * 8)
    for _ in range(capacity // 8):
        buffer.add(*step)
    if kind == "insert":

        def insert() -> None:
            for _ in range(size[0]):
                buffer.add(*step)

        return {"rate": rate(insert, spec["seconds"])}
    return {"rate": rate(lambda: buffer.sample(size), spec["seconds"])}


def measured(spec: dict[str, Any], cores: list[int]) -> dict[str, Any]:
    """A child's result; what does not run, or is not installed, is noted and left out."""
    try:
        return child(__file__, spec, cores)
    except RuntimeError as error:
        if spec["kind"] == OURS:
            raise
        return {"rate": float("nan"), "error": str(error).rpartition(" | ")[2]}  # not where its files lie


def rows_of(name: str, found: dict[str, list[dict[str, Any]]], aim: float | None) -> list[list[str]]:
    """One case's rows of the table."""
    rates = {who: [each["rate"] for each in results] for who, results in found.items()}
    rows = []
    for who, values in rates.items():
        ran = all(value == value for value in values)
        versus = f"{ratios(rates[OURS], values):.2f}" if ran and who != OURS else ""
        goal = f"≥ {aim:,.0f}" if aim and who == OURS else ""
        rows.append([name, who, f"{spread(values):,.0f}" if ran else "–", versus, goal])
    return rows


def main() -> None:
    """Run every case."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--cases", default="", help="only cases whose names contain one of these: 'uniform;Atari'")
    flags.add_argument("--only", default="", help="only variants whose names contain one of these: 'ours;SB3'")
    args = begin(flags, {OURS: ours, "torchrl": torchrl, "SB3": sb3})
    about, cases, rows = machine(args.cores), {}, []
    for name, (call, size, aim) in chosen(CASES, args.cases).items():
        capacity = 10_000 if args.smoke else 100_000 if call == "atari" else 1_000_000
        spec = {"call": call, "size": size, "capacity": capacity, "seconds": 0.05 if args.smoke else 1.0}
        who = [each for each in (OURS, *PEERS) if not (each == "SB3" and call == "update")]
        print(name, flush=True)
        cases[name] = interleaved(
            chosen({each: {**spec, "kind": each} for each in who}, args.only),
            args.rounds,
            lambda spec, _: measured(spec, args.cores),
            lambda result: f"{result['rate']:>10,.0f} calls/s",
        )
        rows += rows_of(name, cases[name], aim)
    head = ["case", "who", "calls/s", "ours × it", "aim"]
    finish(args, "replay_throughput", about, {"cases": cases}, "Replay throughput", table(head, rows), NOTES)


if __name__ == "__main__":
    main()

"""Replay of 1M Atari frames: the memory that it takes, with and without priorities."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from common import begin, child, finish, interleaved, machine, parser, spread, table

NOTES = """A replay for 8 lanes of 84×84 bytes a frame is filled to its capacity by unrolls of stacks of 4 frames of
noise, so that every page of memory is touched. Each variant is a process of its own. `columns` is the size of the
replay's tensors, the sums of priorities among them; `resident` is what filling it adds to the memory of a process that
filled a small one before; `whole process` has the interpreter and PyTorch in it. A GB is 10⁹ bytes."""

LANES, STACK, SIDE, ROWS = 8, 4, 84, 100  # rows of an unroll
AIM = 7.5  # GB
CASES: dict[str, dict[str, Any]] = {
    "uniform, n = 1": {},
    "prioritised, n = 3": {"alpha": 0.6, "n_step": 3},
}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Fill a small replay, then a whole one."""
    import torch

    from rookery.data.plan import ReplayPlan
    from rookery.data.replay import ReplayBuffer

    frames = torch.randint(1, 255, (ROWS + 1, LANES, 1, SIDE, SIDE), dtype=torch.uint8)
    frames[-STACK:] = frames[:1]  # the last stack is the first one again, so that the unroll goes on with itself
    past = [[max(row - back, 0) for row in range(ROWS + 1)] for back in reversed(range(STACK))]
    flags = {name: torch.zeros(ROWS + 1, LANES, dtype=torch.bool) for name in ("terminated", "truncated")}
    unroll = {
        "obs": torch.cat([frames[rows] for rows in past], 2),
        "action": torch.zeros(ROWS + 1, LANES, dtype=torch.int64),
        "reward": torch.rand(ROWS + 1, LANES),
        **flags,
        "valid": ~flags["truncated"],
    }

    def filled(capacity: int) -> ReplayBuffer:
        buffer = ReplayBuffer(ReplayPlan(capacity, 32, 1, **spec["plan"]), LANES, stack=STACK)
        while buffer.fill < 1:
            buffer.insert(unroll)
        assert buffer.sample(32)["obs"].shape[-3:] == (STACK, SIDE, SIDE)
        return buffer

    filled(4_000)
    before, began = resident(), time.perf_counter()
    buffer = filled(spec["capacity"])
    columns = {".".join(key): column.nbytes for key, column in buffer._ring.columns.items()}
    if buffer._tree is not None:
        columns["sums of priorities"] = sum(level.nbytes for level in (*buffer._tree.levels, buffer._tree.top))
    return {
        "columns": columns,
        "bytes": sum(columns.values()),
        "resident": resident() - before,
        "whole": resident(),
        "samples": len(buffer),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Fill each kind of replay, and write what it takes."""
    args = begin(parser(__doc__ or "", rounds=1), {"memory": memory})
    capacity, about = 10_000 if args.smoke else 1_000_000, machine(args.cores)
    found = interleaved(
        {name: {"kind": "memory", "plan": plan, "capacity": capacity} for name, plan in CASES.items()},
        args.rounds,
        lambda spec, _: child(__file__, spec, args.cores),
        lambda result: f"{result['resident'] / 1e9:>6.2f} GB",
    )
    sizes = {
        name: [f"{spread([each[what] / 1e9 for each in rounds]).median:.2f}" for what in ("bytes", "resident", "whole")]
        for name, rounds in found.items()
    }
    head = [f"{capacity:,} frames", "columns, GB", "resident, GB", "whole process, GB", "aim, GB"]
    all_columns = {column: None for rounds in found.values() for column in rounds[0]["columns"]}
    parts = [
        [column, *(f"{rounds[0]['columns'].get(column, 0) / capacity:.2f}" for rounds in found.values())]
        for column in all_columns
    ]
    whole = table(head, [[name, *each, f"≤ {AIM}"] for name, each in sizes.items()])
    finish(
        args,
        "replay_memory",
        about,
        {"capacity": capacity, "cases": found},
        "Memory of replay",
        whole,
        table(["bytes a row", *found], parts),
        NOTES,
    )


if __name__ == "__main__":
    main()

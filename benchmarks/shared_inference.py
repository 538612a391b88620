"""Who chooses actions: each actor, one role for all, or one role while half of the lanes step."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from common import begin, child, finish, interleaved, machine, parser, ratios, spread, table
from gymnasium import spaces
from torch import Tensor, nn

NOTES = """IMPALA on the local runtime; steps/s are those learnt from, in the last two thirds of a run. "Sleeping": a
step of the environment sleeps 0.25 ms a lane and the network 0.25 ms a row (in the learner not at all), so that nothing
but waiting is measured; 16 lanes an actor, unrolls of 64, a layer of 16 units. "Pong": EnvPool's Pong-v5, Nature
network, bf16, unrolls of 20. Ratios are to actors that choose for themselves, round by round."""

QUIET = {"device": "cpu", "threads": 1, "quiet": True, "sinks": (), "eval_every": 10**9, "eval_episodes": 1}
INFERENCE: dict[str, dict[str, Any]] = {
    "own": {},
    "shared": {"inference": "shared"},
    "shared, double buffer": {"inference": "shared", "double_buffer": True},
}
EACH = 2.5e-4  # seconds that a lane's step and a row's inference sleep


class Sleepy(gymnasium.Env):
    """Sleeps in each step."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        time.sleep(EACH)
        self.steps += 1
        return np.zeros(4, np.float32), 1.0, False, self.steps == 50, {}


class Slow(nn.Linear):
    """A layer that sleeps for each row, where it does not learn."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            time.sleep(EACH * x.shape[0])
        return super().forward(x).relu()


def slow(spec: Any) -> nn.Module:
    return Slow(4, 16)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Steps/s of a run."""
    import rookery
    from rookery.runs.metrics import read

    settings = {**QUIET, "runtime": "local", "actors": spec["actors"], **INFERENCE[spec["inference"]]}
    settings |= {"network": slow} if spec["sleeps"] else {}
    settings |= {"log_every": spec["steps"] // 30, **spec["settings"]}
    env = "shared_inference:Sleepy" if spec["sleeps"] else "Pong-v5"
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train("impala", env, run_dir=Path(folder) / "run", steps=spec["steps"], **settings)
        rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner" and "seconds" in row]
        summary = run.summary
    first, last = rows[len(rows) // 3], rows[-1]
    rate = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
    return {"steps_per_second": rate, "limit": summary["bottleneck"]["limit"], "cores_busy": summary["cores_busy"]}


def main() -> None:
    """Sleeping environment and network, then Pong."""
    flags = parser(__doc__ or "", rounds=3)
    args = begin(flags, {"train": train})
    about, found, sections = machine(args.cores), {}, []
    cases: dict[str, Any] = {
        "sleeping, 1 actor": {"actors": 1, "sleeps": True, "steps": 12_000, "settings": {"envs": 16, "unroll": 64}},
        "Pong, 1 actor": {"actors": 1, "sleeps": False, "steps": 60_000, "settings": {"envs": 32}},
        "Pong, 2 actors": {"actors": 2, "sleeps": False, "steps": 60_000, "settings": {"envs": 32}},
    }
    for name, case in cases.items():
        case |= {"steps": 3_000} if args.smoke else {}
        case["settings"] |= {"hidden": (16,)} if case["sleeps"] else {}
        print(name)
        found[name] = interleaved(
            {how: {"kind": "train", "inference": how, **case} for how in INFERENCE},
            args.rounds,
            lambda spec, number: child(__file__, spec, args.cores),
            lambda result: f"{result['steps_per_second']:>8,.0f} steps/s, {result['limit']}",
        )
        rates = {how: [run["steps_per_second"] for run in runs] for how, runs in found[name].items()}
        rows = [
            [
                how,
                f"{spread(each):,.0f}",
                f"{ratios(each, rates['own']):.2f}",
                f"{statistics.median(run['cores_busy'] for run in found[name][how]):.2f}",
                found[name][how][0]["limit"],
            ]
            for how, each in rates.items()
        ]
        head = ["actions are chosen", "steps/s", "ratio", "cores busy", "limit"]
        sections.append(f"### {name}\n\n{table(head, rows)}")
    finish(args, "shared_inference", about, {"cases": found}, "Shared inference", "\n\n".join(sections), NOTES)


if __name__ == "__main__":
    main()

"""IMPALA with processes beside serial PPO on Pong, on the same cores, and what the learner's time goes into."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import begin, child, finish, interleaved, machine, parser, ratios, spread, table

NOTES = """Pong-v5 on EnvPool, Nature network, bf16, compiled. PPO is inline, its tuned settings (8 lanes, 128 rows, 3
passes over 4 minibatches), with one torch thread or as many as there are cores; IMPALA is on the local runtime, each
process with one thread, 2 actors of 16 lanes, an update for each unroll of 10 rows. Steps/s are those learnt from, in
the last two thirds of a run; the ratio is to PPO with one thread, round by round. The learner is busy while it does not
wait; "processor" is the share of its time that it had a core. IMPALA learns from each step once, PPO three times: this
is what a run costs, not the speed of equal work."""

QUIET = {"device": "cpu", "compile": True, "quiet": True, "sinks": (), "eval_every": 10**9, "eval_episodes": 1}
IMPALA = {"runtime": "local", "actors": 2, "envs": 16, "unroll": 10, "threads": 1}


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Steps/s of a run, and the learner's account."""
    import rookery
    from rookery.runs.metrics import read

    settings = {**QUIET, **spec["own"], "steps": spec["steps"], "log_every": spec["steps"] // 30}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train(spec["system"], "Pong-v5", run_dir=Path(folder) / "run", **settings)
        rows = read(run.path / "metrics.jsonl")
    learnt = [row for row in rows if row["role"] == "learner" and "seconds" in row]
    first, last = learnt[len(learnt) // 3], learnt[-1]
    accounts = [row["measured"] for row in rows if row["role"] == "runtime" and row["step"] >= first["step"]]
    learner = [each["roles"]["learner 0"] for each in accounts]
    return {
        "steps_per_second": (last["step"] - first["step"]) / (last["seconds"] - first["seconds"]),
        "learner_busy": statistics.fmean(each["busy"] for each in learner),
        "learner_processor": statistics.fmean(each.get("processor", each["busy"]) for each in learner),
        "cores_busy": statistics.fmean(each["cores_busy"] for each in accounts),
    }


def main() -> None:
    """Three ways in turn."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--steps", type=int, default=60_000, help="of PPO with one thread; twice as many of the others")
    args = begin(flags, {"train": train})
    about, steps = machine(args.cores), 3_000 if args.smoke else args.steps
    ppo = {"kind": "train", "system": "ppo"}
    variants = {
        "PPO, inline, 1 thread": {**ppo, "steps": steps, "own": {"threads": 1}},
        f"PPO, inline, {len(args.cores)} threads": {**ppo, "steps": 2 * steps, "own": {"threads": len(args.cores)}},
        "IMPALA, local, 2 actors": {"kind": "train", "system": "impala", "steps": 2 * steps, "own": IMPALA},
    }
    found = interleaved(
        variants,
        args.rounds,
        lambda spec, _: child(__file__, spec, args.cores),
        lambda result: f"{result['steps_per_second']:>7,.0f} steps/s, learner busy {result['learner_busy']:.0%}",
    )
    serial = [each["steps_per_second"] for each in next(iter(found.values()))]
    rows = []
    for name, runs in found.items():
        rates = [each["steps_per_second"] for each in runs]
        shares = [
            f"{statistics.median(each[part] for each in runs):.0%}" for part in ("learner_busy", "learner_processor")
        ]
        cores = f"{statistics.median(each['cores_busy'] for each in runs):.2f}"
        rows.append([name, f"{spread(rates):,.0f}", f"{ratios(rates, serial):.2f}", *shares, cores])
    head = ["who", "steps/s", "times serial PPO", "learner busy", "processor", "cores busy"]
    finish(args, "impala_throughput", about, {"results": found}, "IMPALA on Pong", table(head, rows), NOTES)


if __name__ == "__main__":
    main()

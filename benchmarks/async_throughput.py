"""Asynchronous PPO with two actors beside Sample Factory: steps/s on the same environment, network and cores.

Sample Factory needs an older Gymnasium than Rookery does, so it lives in an environment of its own:

    python3.11 -m venv peer && peer/bin/pip install -c constraints.txt torch && peer/bin/pip install sample-factory
    python benchmarks/async_throughput.py --cores 0,1 --peer peer/bin/python
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from common import begin, child, chosen, finish, interleaved, machine, parser, ratios, spread, table

NOTES = """Steps/s are those learnt from, between the first and the last row that a side logs in a run of its own
processes, so without start-up. Both sides: `actors` processes with `lanes` environments each, one learner, unrolls of
32 steps, batches of one unroll of every lane, one epoch, actor and critic on one MLP of 64 and 64 tanh units, Adam, one
torch thread a process, all processes on the same cores. Ours corrects by V-trace; Sample Factory's own V-trace ends
with an error here (2.1.1), so it runs without, which is less work. Sample Factory 2's APPO otherwise has its defaults
(double-buffered sampling). "ours, gym" steps the same Gymnasium environments one by one as Sample Factory does; "ours"
takes the backend that Rookery picks for the id."""

CASES = {
    "CartPole, 2 × 16 lanes": {"env": "CartPole-v1", "actors": 2, "lanes": 16, "steps": 400_000},
    "CartPole, 2 × 64 lanes": {"env": "CartPole-v1", "actors": 2, "lanes": 64, "steps": 800_000},
}
UNROLL = 32
FPS = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\].*Total num frames: (\d+)")


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`appo` on the local runtime."""
    import rookery
    from rookery.runs.metrics import read

    settings = {"actors": spec["actors"], "envs": spec["lanes"], "steps": spec["steps"] * spec["times"]}
    settings |= {"unroll": UNROLL, "minibatches": 1, "epochs": 1, "compile": spec["compile"], "runtime": "local"}
    settings |= {"eval_every": 10**9, "eval_episodes": 1, "threads": 1, "device": "cpu", "sinks": (), "quiet": True}
    settings |= {"normalize_reward": False, "normalize_obs": False}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train("appo", spec["backend"] + spec["env"], run_dir=Path(folder) / "run", **settings)
        rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner"]
    first, last = rows[len(rows) // 10], rows[-1]
    return _result(last["step"] - first["step"], last["seconds"] - first["seconds"])


def sample_factory(spec: dict[str, Any]) -> dict[str, Any]:
    """Its example for Gymnasium's environments, in its own Python; what it logs every few seconds is read."""
    with tempfile.TemporaryDirectory() as folder:
        batch = spec["actors"] * spec["lanes"] * UNROLL
        settings = {"algo": "APPO", "env": spec["env"], "experiment": "run", "train_dir": folder, "device": "cpu"}
        settings |= {"num_workers": spec["actors"], "num_envs_per_worker": spec["lanes"], "worker_num_splits": 2}
        settings |= {"rollout": UNROLL, "recurrence": 1, "batch_size": batch, "num_epochs": 1, "use_rnn": False}
        settings |= {
            "nonlinearity": "tanh",
            "normalize_input": False,
            "normalize_returns": False,
            "with_vtrace": False,
            "async_rl": True,
        }
        settings |= {"serial_mode": False, "train_for_env_steps": spec["steps"]}
        words = [f"--{name}={value}" for name, value in settings.items()]
        words += ["--encoder_mlp_layers", "64", "64"]
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [spec["peer"], "-m", "sf_examples.train_gym_env", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=spec["limit"])
    seen = [
        (datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f"), int(frames))
        for when, frames in FPS.findall(done.stderr + done.stdout)
    ]
    seen = [(when, frames) for when, frames in seen if frames]
    if done.returncode or len(seen) < 2:
        raise RuntimeError(f"Sample Factory ended with status {done.returncode}: {done.stderr[-2000:]}")
    (began, before), (ended, after) = seen[0], seen[-1]
    return _result(after - before, (ended - began).total_seconds())


def _result(steps: int, seconds: float) -> dict[str, Any]:
    return {"steps": steps, "seconds": seconds, "steps_per_second": steps / seconds}


def main() -> None:
    """Every case, the sides in turn."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--peer", help="a Python that has Sample Factory; without, ours runs alone")
    flags.add_argument("--cases", default="", help="parts of the cases' names, with semicolons between")
    args = begin(flags, {"ours": ours, "peer": sample_factory})
    about, cases = machine(args.cores), chosen(CASES, args.cases)
    found, rows = {}, []
    for name, case in cases.items():
        case |= {"limit": 120 if args.smoke else 900}  # seconds: it waits for ever where one of its processes fails
        case = {**case, "steps": 20_000, "times": 1} if args.smoke else {**case, "times": 4}
        variants = {
            "ours": {"kind": "ours", **case, "backend": "", "compile": False},
            "ours, compiled": {"kind": "ours", **case, "backend": "", "compile": True},
            "ours, gym": {"kind": "ours", **case, "backend": "gym:", "compile": False},
        }
        if args.peer:
            variants["Sample Factory"] = {"kind": "peer", **case, "peer": str(Path(args.peer).absolute())}
        print(name)
        results = interleaved(
            variants,
            args.rounds,
            lambda spec, _: child(__file__, spec, args.cores),
            lambda result: f"{result['steps_per_second']:,.0f} steps/s",
        )
        found[name] = {"settings": case, "results": results}
        rates = {who: [each["steps_per_second"] for each in rounds] for who, rounds in results.items()}
        theirs = rates.get("Sample Factory")
        for who, each in rates.items():
            rows.append([name, who, f"{spread(each):,.0f}", f"{ratios(each, theirs):.2f}" if theirs else ""])
    head = ["case", "who", "steps/s", "times Sample Factory's"]
    finish(args, "async_throughput", about, {"cases": found}, "Asynchronous PPO", table(head, rows), NOTES)


if __name__ == "__main__":
    main()

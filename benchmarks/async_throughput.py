"""Asynchronous PPO with two actors beside Sample Factory: steps/s on the same environment, network and cores.

Sample Factory needs an older Gymnasium than Rookery does, so it lives in an environment of its own:

    python3.11 -m venv peer && peer/bin/pip install -c constraints.txt torch && peer/bin/pip install sample-factory
    python benchmarks/async_throughput.py --cores 0,1 --peer peer/bin/python
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from common import begin, chosen, finish, machine, parser, ratios, spread, table
from kept import keeping, keeps, told

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
LIMIT = 900.0  # seconds a run may take: Sample Factory waits for ever where one of its processes fails
GRACE = 60.0  # seconds more, until a run that has not ended by itself is killed
PEERS = ("sample-factory", "torch", "numpy", "gymnasium")  # on its side
VERSIONS = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {PEERS}}}))"
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
        status, said = _ended(command, environment, spec["limit"])
        _, versions = _ended([spec["peer"], "-c", VERSIONS], environment, spec["limit"])
    seen = [(datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f"), int(frames)) for when, frames in FPS.findall(said)]
    seen = [(when, frames) for when, frames in seen if frames]
    if status or len(seen) < 2:
        raise RuntimeError(f"Sample Factory ended with status {status}: {said[-2000:]}")
    (began, before), (ended, after) = seen[0], seen[-1]
    result = _result(after - before, (ended - began).total_seconds())
    return {**result, "versions": json.loads(versions.splitlines()[-1])}


def _ended(command: list[str], environment: dict[str, str], limit: float) -> tuple[int, str]:
    """The status that a command ends with, and what it said; whom it has started ends with it.

    Raises:
        RuntimeError: if it takes more than `limit` seconds.
    """
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = run.wait(limit)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"Sample Factory has not ended after {limit:g} s.") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        said.seek(0)
        return status, said.read()


def _result(steps: int, seconds: float) -> dict[str, Any]:
    return {"steps": steps, "seconds": seconds, "steps_per_second": steps / seconds}


def main() -> None:
    """Every case, the sides in turn."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--peer", help="a Python that has Sample Factory; without, ours runs alone")
    flags.add_argument("--cases", default="", help="parts of the cases' names, with semicolons between")
    keeping(flags, "async_throughput")
    args = begin(flags, {"ours": ours, "peer": sample_factory})
    about, cases = machine(args.cores), chosen(CASES, args.cases)
    limit = 120.0 if args.smoke else LIMIT
    found, rows, failed, versions = {}, [], [], {}
    for name, case in cases.items():
        case = {**case, "steps": 20_000, "times": 1} if args.smoke else {**case, "times": 4}
        variants = {
            "ours": {"kind": "ours", **case, "backend": "", "compile": False},
            "ours, compiled": {"kind": "ours", **case, "backend": "", "compile": True},
            "ours, gym": {"kind": "ours", **case, "backend": "gym:", "compile": False},
        }
        if args.peer:
            peer = str(Path(args.peer).absolute())
            variants["Sample Factory"] = {"kind": "peer", **case, "peer": peer, "limit": limit}
        print(name)
        results, left = keeps(
            __file__, variants, args, lambda run: f"{run['steps_per_second']:,.0f} steps/s", limit + GRACE
        )
        found[name] = {"settings": case, "results": results}
        failed += [f"{name}, {each}" for each in left]
        rates = {who: {run["seed"]: run["steps_per_second"] for run in runs} for who, runs in results.items()}
        theirs = rates.get("Sample Factory", {})
        versions |= results.get("Sample Factory", [{}])[0].get("versions", {})
        for who, each in rates.items():
            both = [seed for seed in each if seed in theirs]
            times = f"{ratios([each[seed] for seed in both], [theirs[seed] for seed in both]):.2f}" if both else ""
            rows.append([name, who, f"{spread([*each.values()]):,.0f}", times, len(each)])
    head = ["case", "who", "steps/s", "times Sample Factory's", "rounds"]
    other = [f"On its side: {', '.join(' '.join(each) for each in versions.items())}."] if versions else []
    text = [table(head, rows), NOTES, *other, *told(failed)]
    result = {"cases": found, "versions_of_peer": versions, "failed": failed}
    finish(args, "async_throughput", about, result, "Asynchronous PPO", *text)


if __name__ == "__main__":
    main()

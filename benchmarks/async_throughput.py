"""Asynchronous PPO with two actors beside Sample Factory: steps/s on the same environment, network and cores.

Sample Factory needs an older Gymnasium than Rookery does, so it lives in an environment of its own:

    python3.11 -m venv peer && peer/bin/pip install -c constraints.txt torch
    peer/bin/pip install sample-factory envpool==0.8.4 "shimmy<2"
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
processes, so without start-up; frames skipped count for neither side. Both sides: two processes of actors with so many
environments each, one learner, unrolls of 32 steps, one epoch, Adam, one torch thread a process, all processes on the
same cores; actor and critic on one MLP of 64 and 64 tanh units, on Pong on the Nature network. Sample Factory's batch
is one unroll of every lane; ours is one of every lane of an actor, so that it makes twice the updates. Ours corrects by
V-trace; Sample Factory's own V-trace ends with an error here (2.1.1), so it runs without, which is less work. Its APPO
otherwise has the defaults of its examples (on CartPole double-buffered sampling). On CartPole "ours, gym" steps the
same Gymnasium environments one by one as Sample Factory does; "ours" takes the backend that Rookery picks for the id.
On Pong both step EnvPool's."""

CARTPOLE = {"ours": {}, "ours, compiled": {"compile": True}, "ours, gym": {"backend": "gym:"}}
PONG = {"ours": {}, "ours, compiled": {"compile": True}, "ours, compiled, bf16": {"compile": True, "precision": "bf16"}}
CASES: dict[str, dict[str, Any]] = {
    "CartPole, 2 × 16 lanes": {"env": "CartPole-v1", "lanes": 16, "steps": 400_000, "times": 4, "ways": CARTPOLE},
    "CartPole, 2 × 64 lanes": {"env": "CartPole-v1", "lanes": 64, "steps": 800_000, "times": 4, "ways": CARTPOLE},
    "Pong, 2 × 16 lanes": {"env": "Pong-v5", "lanes": 16, "steps": 40_000, "times": 1, "ways": PONG},
}
ACTORS = 2
UNROLL = 32
LIMIT = 900.0  # seconds a run may take: Sample Factory waits for ever where one of its processes fails
GRACE = 60.0  # seconds more, until a run that has not ended by itself is killed
PEERS = ("sample-factory", "torch", "numpy", "gymnasium", "envpool")  # on its side
VERSIONS = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {PEERS}}}))"
FPS = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\].*Total num frames: (\d+)")


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`appo` on the local runtime."""
    import rookery
    from rookery.runs.metrics import read

    settings = {"actors": ACTORS, "envs": spec["lanes"], "steps": spec["steps"] * spec["times"], "runtime": "local"}
    settings |= {"unroll": UNROLL, "minibatches": 1, "epochs": 1, "compile": spec["compile"]}
    settings |= {"precision": spec["precision"]}
    settings |= {"eval_every": 10**9, "eval_episodes": 1, "threads": 1, "device": "cpu", "sinks": (), "quiet": True}
    settings |= {"normalize_reward": False, "normalize_obs": False}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train("appo", spec["backend"] + spec["env"], run_dir=Path(folder) / "run", **settings)
        rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner"]
    first, last = rows[len(rows) // 10], rows[-1]
    return _result(last["step"] - first["step"], last["seconds"] - first["seconds"])


def sample_factory(spec: dict[str, Any]) -> dict[str, Any]:
    """Its examples for Gymnasium's and EnvPool's environments, in its own Python; what it logs is read."""
    with tempfile.TemporaryDirectory() as folder:
        example = "envpool.atari.train_envpool_atari" if spec["env"] == "Pong-v5" else "train_gym_env"
        settings = {"algo": "APPO", "experiment": "run", "train_dir": folder, "device": "cpu", "async_rl": True}
        settings |= {"train_for_env_steps": spec["steps"], "serial_mode": False, "summaries_use_frameskip": False}
        settings |= {"num_workers": ACTORS, "rollout": UNROLL, "batch_size": ACTORS * spec["lanes"] * UNROLL}
        settings |= {"num_epochs": 1, "num_batches_per_epoch": 1, "recurrence": 1, "use_rnn": False}
        settings |= {"normalize_input": False, "normalize_returns": False, "with_vtrace": False}
        if example == "train_gym_env":
            settings |= {"env": spec["env"], "num_envs_per_worker": spec["lanes"], "worker_num_splits": 2}
            settings |= {"nonlinearity": "tanh"}
        else:
            settings |= {"env": "atari_pong", "num_envs_per_worker": 1, "env_agents": spec["lanes"]}
        words = [f"--{name}={value}" for name, value in settings.items()]
        words += ["--encoder_mlp_layers", "64", "64"]  # of observations that are no pictures
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [spec["peer"], "-m", f"sf_examples.{example}", *words]
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
        case = {**case, "steps": case["steps"] // 20, "times": 1} if args.smoke else case
        ways, same = case["ways"], {part: case[part] for part in ("env", "lanes", "steps", "times")}
        plain = {"kind": "ours", **same, "backend": "", "compile": False, "precision": "float32"}
        variants = {who: {**plain, **way} for who, way in ways.items()}
        if args.peer:
            peer = str(Path(args.peer).absolute())
            variants["Sample Factory"] = {"kind": "peer", **same, "peer": peer, "limit": limit}
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

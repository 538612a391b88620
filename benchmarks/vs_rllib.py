"""PPO, APPO and IMPALA beside RLlib on the same cores: steps/s, and seconds from process start to a return.

RLlib wants an older Gymnasium than Rookery does, so it lives in an environment of its own:

    python3.11 -m venv peer && peer/bin/pip install -c constraints.txt torch
    peer/bin/pip install "ray[rllib]==2.60.0" ale-py opencv-python-headless
    python benchmarks/vs_rllib.py --cores 0,1 --peer peer/bin/python
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from common import ROOT, begin, chosen, finish, interleaved, machine, parser, ratios, spread, table
from peers import RLLIB_EXAMPLES, make_rllib

NOTES = """Every run is a process of its own with all that it starts, pinned to the same cores, taking turns; round by
round all have the same seed. The clock runs from the start of that process, imports and the start of Ray included.
The rule is the same for all: the threshold is reached when the mean return of the last {episodes} training episodes
(whole rows of a log, the policy as it explores) is at least that of the case. A run is ended, with all its processes,
once it has got there and has trained for {measured:g} s; or at its deadline, and then it is "not reached", which
counts as the deadline in a ratio, so that the ratio is at most (<) what is written. Steps are actions applied (for
RLlib those sampled, learnt from or not); steps/s are taken over the last four fifths of a run's rows, without start-up.

"equal": two actors, batches of 1,024 steps, the same learning rate, losses and networks, on both sides: PPO 4 passes
over minibatches of 256, APPO 4 passes over a batch (RLlib's circular buffer), IMPALA one; "compiled": with
`torch.compile` on our side, whose seconds count. "example": RLlib's settings
for that environment in its own examples, with two runners. "recipe": ours for it, with the budget that belongs to it;
on Pong compiled. RLlib has its new API stack, and a processor declared for each of its actors, however many cores there
are: with fewer it waits for ever (two runners and a learner of IMPALA want three). Its workers have the priority of
the rest, in place of a lower one, and its asynchronous algorithms tell of their returns each second, in place of each
tenth. It writes no logs; ours writes what any run leaves behind. Pong is ale-py in RLlib's own wrappers there,
EnvPool's here; 4 frames of 84 × 84 ("example": 64 × 64) and the Nature network, in bf16 here where the processor has
the instructions. "×": steps/s of ours over those of RLlib with equal settings, or of our recipe over those of its
example. "share": of the time of whichever of RLlib's variants was the quicker. "first steps": when a side first says
that it has made any, after an iteration, or {log_every} steps of ours. Aims: × ≥ 5, share ≤ 0.33."""

EPISODES, MEASURED = 20, 15.0  # whose mean counts; seconds that are trained at least
SMOKE = {"episodes": 0, "measured": 4.0}  # no threshold
ERROR = re.compile(r"[\w.]+(Error|Exception|Exit)\b")  # begins the last line of a traceback; the first says most
LOOK = 0.2  # seconds between two looks at a run
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
HEAD = ["case, return", "who", "steps/s", "×", "reached after, s", "first steps after, s", "share"]


class Game(NamedTuple):
    """An environment, when it counts as learnt, and what both sides are set to there."""

    ours: str  # its id here, and in RLlib's part
    theirs: str
    threshold: float
    deadline: float  # seconds of a run
    lr: float
    entropy_coef: float
    model: dict[str, Any]
    log_every: int  # steps
    recipe: dict[str, Any]  # beside what the recipe's file has


TANH = {"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh", "vf_share_layers": False}
NATURE = {"conv_filters": [[32, 8, 4], [64, 4, 2], [64, 3, 1]], "conv_activation": "relu", "vf_share_layers": True}
NATURE |= {"head_fcnet_hiddens": [512], "head_fcnet_activation": "relu"}
GAMES = {
    "CartPole": Game("CartPole-v1", "CartPole-v1", 450.0, 240.0, 1e-3, 0.0, TANH, 4_096, {}),
    "Pong": Game("Pong-v5", "ALE/Pong-v5", 18.0, 180.0, 5e-4, 0.01, NATURE, 1_024, {"compile": True, "threads": 1}),
}
SYSTEMS = {"PPO": "ppo", "APPO": "appo", "IMPALA": "impala"}

# Our name of each setting, RLlib's, and the value.
COMMON: dict[str, tuple[str, float]] = {
    "gamma": ("gamma", 0.99),
    "value_coef": ("vf_loss_coeff", 0.5),
    "max_grad_norm": ("grad_clip", 0.5),
}
CLIPPED: dict[str, tuple[str, float]] = {**COMMON, "lam": ("lambda_", 0.95), "clip": ("clip_param", 0.2)}
PAIRS = {
    "ppo": {**CLIPPED, "epochs": ("num_epochs", 4)},
    "appo": {**CLIPPED, "epochs": ("circular_buffer_iterations_per_batch", 4)},
    "impala": COMMON,
}
# A batch is 1,024 steps: of both actors where they wait for newer weights, else of whichever has one.
SHAPE = {"ppo": (8, 64), "appo": (16, 64), "impala": (16, 64)}  # lanes of an actor, steps of an unroll
OURS = {"ppo": {"minibatches": 4}, "appo": {"minibatches": 1}, "impala": {}}
THEIRS: dict[str, dict[str, Any]] = {
    "ppo": {"minibatch_size": 256, "use_kl_loss": False, "vf_clip_param": 1e9},  # ours has neither
    "appo": {},
    "impala": {},
}


def variants_of(system: str, game: Game, runtimes: list[str], peer: str | None) -> dict[str, dict[str, Any]]:
    """Who runs in a case, by name."""
    (lanes, unroll), pairs = SHAPE[system], PAIRS[system]
    found: dict[str, dict[str, Any]] = {}
    if peer:
        theirs = {"kind": "rllib", "python": peer, "system": system, "env": game.theirs, "runners": 2}
        training = dict(pairs.values()) | THEIRS[system]
        training |= {"lr": game.lr, "entropy_coeff": game.entropy_coef, "train_batch_size_per_learner": 1024}
        training |= {"grad_clip_by": "global_norm"}
        equal = {"lanes": lanes, "fragment": unroll, "training": training, "model": game.model, "pixels": 84}
        found["RLlib, equal"] = {**theirs, **equal}
        found["RLlib, example"] = {**theirs, **RLLIB_EXAMPLES[system, game.theirs]}
    settings = {name: value for name, (_, value) in pairs.items()} | OURS[system]
    settings |= {"lr": game.lr, "entropy_coef": game.entropy_coef, "anneal": False, "steps": 10**9}
    settings |= {"actors": 2, "envs": lanes, "unroll": unroll, "normalize_reward": False}
    for runtime in runtimes:
        ours = {"kind": "ours", "system": system, "env": game.ours, "log_every": game.log_every}
        found[f"ours {runtime}, equal"] = {**ours, "own": {**settings, "runtime": runtime}}
        found[f"ours {runtime}, equal, compiled"] = {**ours, "own": {**settings, "runtime": runtime, "compile": True}}
        found[f"ours {runtime}, recipe"] = {**ours, "own": {**game.recipe, "runtime": runtime}}
    return found


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train`; its own metrics log is what is looked at."""
    import rookery

    process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
    settings = {**spec["own"], "seed": spec["seed"], "device": "cpu", "quiet": True, "log_every": spec["log_every"]}
    settings |= {"eval_every": 10**9, "eval_episodes": 1}
    rookery.train(spec["system"], spec["env"], run_dir=Path(spec["folder"]) / "run", **settings)
    return {}


def train_rllib(spec: dict[str, Any]) -> dict[str, Any]:
    """RLlib's `train` for ever, with a row before the first call and after each."""
    process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["HOME"] = spec["folder"]  # else each run leaves a folder behind
    algorithm = make_rllib(spec)
    with (Path(spec["folder"]) / "rows.jsonl").open("w") as log:
        row = {"seconds": time.time() - spec["began"], "steps": 0, "episodes": 0, "mean": 0.0}
        while True:
            print(json.dumps(row), file=log, flush=True)
            found = algorithm.train().get("env_runners", {})
            row = {**row, "seconds": time.time() - spec["began"], "episodes": 0}
            # The asynchronous ones begin with calls in which nothing has arrived: a key is missing, or its value NaN.
            if (steps := found.get("num_env_steps_sampled_lifetime", 0)) > 0:
                row |= {"steps": int(steps)}
            if (ended := found.get("num_episodes", 0)) > 0:
                row |= {"episodes": int(ended), "mean": float(found["episode_return_mean"])}


def rows_of(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Seconds since the process began, steps, and the episodes that ended since the row before with their mean.

    The first row is of when training begins.
    """
    if spec["kind"] == "rllib":
        path = folder / "rows.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
    from rookery.runs.metrics import read

    config, path = (folder / "run" / name for name in ("config.json", "metrics.jsonl"))
    if not config.exists():
        return []
    began = config.stat().st_mtime - spec["began"]  # it is written just before training begins
    rows, ended, total = [{"seconds": began, "steps": 0, "episodes": 0, "mean": 0.0}], 0, 0.0
    for row in read(path) if path.exists() else []:
        if "episode_return" in row:
            ended, total = ended + row["episodes"], total + row["episodes"] * row["episode_return"]
        elif row["role"] == "learner" and "seconds" in row:
            counted = {"episodes": ended, "mean": total / max(1, ended)}
            rows.append({"seconds": began + row["seconds"], "steps": row["step"], **counted})
            ended, total = 0, 0.0
    return rows


def reached(rows: list[dict[str, Any]], threshold: float, episodes: int) -> float:
    """Seconds until the mean return of the last so many episodes (whole rows) is the threshold; infinite if never."""
    for last in range(len(rows)):
        ended, total = 0, 0.0
        for row in reversed(rows[: last + 1]):
            if ended >= episodes:
                break
            ended, total = ended + row["episodes"], total + row["episodes"] * row["mean"]
        if ended >= episodes and (not episodes or total >= threshold * ended):
            return rows[last]["seconds"]
    return math.inf


def measure(spec: dict[str, Any], cores: list[int]) -> dict[str, Any]:
    """One run in a process group of its own, until it is through with the case, ends, or is at its deadline."""
    with tempfile.TemporaryDirectory(prefix="vs") as name:  # short: sockets lie below it
        folder, rule = Path(name), spec["rule"]
        spec = {**spec, "folder": name, "cores": cores, "began": time.time()}
        rows: list[dict[str, Any]] = []
        with (folder / "said").open("wb") as said:
            words = [spec.get("python", sys.executable), __file__, "--child", json.dumps(spec)]
            process = subprocess.Popen(words, env=environment(), stdout=said, stderr=said, start_new_session=True)
            try:
                while process.poll() is None and time.time() - spec["began"] < rule["deadline"]:
                    time.sleep(LOOK)
                    rows = rows_of(spec, folder)
                    trained = rows[-1]["seconds"] - rows[0]["seconds"] if rows and rows[-1]["steps"] else 0.0
                    if trained >= rule["measured"] and reached(rows, rule["threshold"], rule["episodes"]) < math.inf:
                        break
                status = process.poll()
            finally:
                end(process)
        rows = rows_of(spec, folder)
        told = (folder / "said").read_text(errors="replace").splitlines()
    errors = [line for line in told if ERROR.match(line)] or told[-1:]
    return result_of(rows, rule, f"failed with status {status}: {errors[0] if errors else ''}" if status else None)


def environment() -> dict[str, str]:
    """Of a run: nothing of another cluster's, and threads as each side sets them itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "MKL_"))}
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **own, "RAY_worker_niceness": "0"}  # else Ray's workers give way to whatever else runs


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run and whatever it has started, in whichever session that is by now: orphans have become ours."""
    process.kill()
    process.wait()
    while left := children():
        for each in left:
            os.kill(each, signal.SIGKILL)
        for each in left:
            os.waitpid(each, 0)


def process_control(what: int, value: int) -> None:
    """prctl(2): a run ends when this process does, and who loses his own parent there becomes a child of this one."""
    ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def children() -> list[int]:
    """Processes whose parent this one is."""
    return [int(each) for part in Path("/proc/self/task").glob("*/children") for each in part.read_text().split()]


def result_of(rows: list[dict[str, Any]], rule: dict[str, Any], failure: str | None) -> dict[str, Any]:
    """What is kept of a run."""
    first, last = (rows[len(rows) // 5], rows[-1]) if rows else ({}, {})
    seconds = last["seconds"] - first["seconds"] if rows else 0.0
    return {
        "steps_per_second": (last["steps"] - first["steps"]) / seconds if seconds else math.nan,
        "reached": reached(rows, rule["threshold"], rule["episodes"]),
        "first": next((row["seconds"] for row in rows if row["steps"]), math.inf),
        "failure": failure,
        "steps": last.get("steps", 0),
        "last_mean": last.get("mean"),
        "rows": rows[:: max(1, len(rows) // 100)],
    }


def shown(result: dict[str, Any]) -> str:
    """A run in a line."""
    return (
        f"{result['steps_per_second']:>9,.0f} steps/s, {result['steps']:,} steps, the first told of after "
        f"{result['first']:.1f} s, threshold after {result['reached']:.1f} s {result['failure'] or ''}"
    )


def rows_of_table(case: str, rule: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A case's rows."""
    deadline = rule["deadline"]
    rates = {who: [each["steps_per_second"] for each in found] for who, found in results.items()}
    times = {who: [min(each["reached"], deadline) for each in found] for who, found in results.items()}
    theirs = [found for who, found in times.items() if who.startswith("RLlib")]
    rows = []
    for who, found in results.items():
        failures = [each["failure"] for each in found if each["failure"]]
        other = "RLlib, example" if who.endswith("recipe") else "RLlib, equal"
        mine = who.startswith("ours") and other in rates
        times_theirs = f"{ratios(rates[who], rates[other]):.2f}" if mine and not math.isnan(sum(rates[other])) else ""
        there = [each["reached"] for each in found if each["reached"] <= deadline]
        after = f"{spread(there):.1f}" if there else ""
        if len(there) < len(found):
            never = f"not reached within {deadline:g} s"
            after = f"{after}, {len(found) - len(there)} of {len(found)} {never}" if there else never
        share = ""
        if mine and len(there) == len(found):
            best = [min(round_) for round_ in zip(*theirs, strict=True)]
            share = ("< " if deadline in best else "") + f"{ratios(times[who], best):.3f}"
        rows.append([case, who, failures[0][:60] if failures else f"{spread(rates[who]):,.0f}", times_theirs, after])
        rows[-1] += [f"{spread([each['first'] for each in found]):.1f}", share]
    return rows


def refuse_unknown(runtimes: list[str]) -> None:
    """Say which runtimes there are, if one is asked for that is not."""
    from rookery.settings import Options

    having = get_args(get_type_hints(Options)["runtime"])
    for runtime in runtimes:
        if runtime not in having:
            raise SystemExit(f"--runtimes has {runtime!r}, which Rookery has not; use some of {', '.join(having)}.")


def peer_versions(python: str) -> dict[str, str]:
    """Of what decides RLlib's speed."""
    names = ("ray", "torch", "numpy", "gymnasium", "ale-py")
    words = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    done = subprocess.run([python, "-c", words], capture_output=True, text=True, check=True)
    return {f"{name} (RLlib's)": version for name, version in json.loads(done.stdout).items()}


def main() -> None:
    """Every case, the sides in turn."""
    flags = parser((__doc__ or "").splitlines()[0], rounds=3)
    flags.add_argument("--peer", help="a Python that has RLlib; without, ours runs alone")
    flags.add_argument("--runtimes", default="local", help="ours: some of inline, local, ray, with commas between")
    flags.add_argument("--cases", default="", help="only cases whose names contain one of these: 'CartPole PPO;IMPALA'")
    flags.add_argument("--only", default="", help="only variants whose names contain one of these: 'RLlib;equal'")
    flags.add_argument("--deadline", type=float, help="seconds of a run, in place of each case's own")
    args = begin(flags, {"ours": train_ours, "rllib": train_rllib})
    runtimes = args.runtimes.split(",")
    refuse_unknown(runtimes)
    peer = str(Path(args.peer).absolute()) if args.peer else None
    process_control(PR_SET_CHILD_SUBREAPER, 1)
    about, found, rows = machine(args.cores), {}, []
    told = " or ".join(f"{game.log_every:,}" for game in GAMES.values())
    notes = NOTES.format(episodes=EPISODES, measured=MEASURED, log_every=told)
    about["versions"] |= peer_versions(peer) if peer else {}
    every = {f"{game} {name}": (system, GAMES[game]) for game in GAMES for name, system in SYSTEMS.items()}
    for name, (system, game) in chosen(every, args.cases).items():
        rule = {"threshold": game.threshold, "deadline": args.deadline or game.deadline}
        rule |= SMOKE if args.smoke else {"episodes": EPISODES, "measured": MEASURED}
        print(name, flush=True)
        variants = chosen(variants_of(system, game, runtimes, peer), args.only)
        results = interleaved(
            variants,
            args.rounds,
            lambda spec, number, rule=rule: measure({**spec, "rule": rule, "seed": number}, args.cores),
            shown,
        )
        settings = {who: {key: each for key, each in spec.items() if key != "python"} for who, spec in variants.items()}
        found[name] = {"rule": rule, "variants": settings, "results": results}
        rows += rows_of_table(f"{name}, {game.threshold:g}", rule, results)
        finish(args, "vs_rllib", about, {"cases": found}, "Beside RLlib", table(HEAD, rows), notes)


if __name__ == "__main__":
    main()

"""PPO beside Stable-Baselines3 on the same cores and the same work: trained steps a second."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import child, cores_of, entry, header, interleaved, machine, parser, ratios, spread, table, write

NOTES = """Each number is the median over the rounds, with the least and the greatest; ratios are taken within a round.
Every variant is a process of its own, pinned to the same core with as many torch threads, and they take turns.
Speeds are of training as a user runs it, after start-up and warm-up: ours is `rookery.train` with its metrics log and
TensorBoard events, without evaluations in the measured part, and counts actions applied (rows in which a lane only
resets do not count); Stable-Baselines3's is `model.learn` without logger or callbacks. Start-up is from the start of
the process to the end of the first updates (`first` iterations), compilation included. Both sides use the hyperparameters of the case; on
images ours chooses bf16 for the trunk where the processor has the instructions (`float32`: it was told not to)."""

COMMON = {"lr": 2.5e-4, "gamma": 0.99, "lam": 0.95, "clip": 0.2, "entropy_coef": 0.01, "value_coef": 0.5}
COMMON |= {"max_grad_norm": 0.5, "epochs": 4}
SB3_NAMES = {
    "lr": "learning_rate",
    "gamma": "gamma",
    "lam": "gae_lambda",
    "clip": "clip_range",
    "entropy_coef": "ent_coef",
    "value_coef": "vf_coef",
    "max_grad_norm": "max_grad_norm",
    "epochs": "n_epochs",
}

# An iteration is an unroll of T steps in every lane and all epochs on it: `first` of them belong to the start-up, up to
# `warmup` are left out, `iterations` are measured. `aim` is the ratio to Stable-Baselines3 that is aimed at.
CASES: dict[str, dict[str, Any]] = {
    "CartPole, 8 lanes": {
        **{"env": "CartPole-v1", "envs": 8, "unroll": 128, "minibatch": 256, "aim": 3.0},
        **{"first": 5, "warmup": 20, "iterations": 100},
    },
    "CartPole, 64 lanes": {
        **{"env": "CartPole-v1", "envs": 64, "unroll": 128, "minibatch": 2048, "aim": 5.0},
        **{"first": 1, "warmup": 5, "iterations": 25},
    },
    "Pong, 8 lanes": {
        **{"env": "Pong-v5", "envs": 8, "unroll": 128, "minibatch": 256, "aim": 2.0},
        **{"first": 1, "warmup": 2, "iterations": 8},
    },
}
SMOKE = {"unroll": 16, "minibatch": 64, "first": 1, "warmup": 1, "iterations": 2}


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train`, and its speed from the rows of its own metrics log."""
    import rookery
    from rookery.runs.metrics import read

    batch = spec["envs"] * spec["unroll"]
    algorithm = rookery.PPO(
        **spec["hyper"], unroll=spec["unroll"], minibatches=batch // spec["minibatch"], anneal=False, clip_value=False
    )
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train(
            algorithm,
            spec["env"],
            steps=batch * (spec["warmup"] + spec["iterations"]),
            envs=spec["envs"],
            seed=spec["seed"],
            device="cpu",
            threads=len(spec["cores"]),
            log_every=batch * spec["first"],
            eval_every=10**12,  # never: one evaluation, of one episode, follows after the end
            eval_episodes=1,
            quiet=True,
            run_dir=Path(folder) / "run",
            **spec["options"],
        )
        began = (run.path / "config.json").stat().st_mtime  # written just before training begins
        rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner"]
        backend, precision = run.summary["backend"], run.config["options"]["precision"]
    warm = next(row for row in rows if row["step"] >= 0.9 * batch * spec["warmup"])
    seconds, steps = rows[-1]["seconds"] - warm["seconds"], rows[-1]["step"] - warm["step"]
    speed = {"steps_per_second": steps / seconds, "steps": steps, "seconds": seconds}
    return {**speed, "startup": began - spec["began"] + rows[0]["seconds"], "backend": backend, "precision": precision}


def train_sb3(spec: dict[str, Any]) -> dict[str, Any]:
    """Stable-Baselines3's `learn`: once to have begun, once to warm up, once to measure."""
    from peers import make_sb3

    batch = spec["envs"] * spec["unroll"]
    hyper = {SB3_NAMES[name]: value for name, value in spec["hyper"].items()}
    model = make_sb3({**spec, "hyper": {**hyper, "n_steps": spec["unroll"], "batch_size": spec["minibatch"]}})
    model.learn(batch * spec["first"])
    startup = time.time() - spec["began"]
    if spec["warmup"] > spec["first"]:
        model.learn(batch * (spec["warmup"] - spec["first"]), reset_num_timesteps=False)
    before, began = model.num_timesteps, time.perf_counter()
    model.learn(batch * spec["iterations"], reset_num_timesteps=False)
    seconds, steps = time.perf_counter() - began, model.num_timesteps - before
    backend = "EnvPool behind VecEnv" if spec["envpool"] else type(model.env).__name__
    speed = {"steps_per_second": steps / seconds, "steps": steps, "seconds": seconds}
    return {**speed, "startup": startup, "backend": backend, "precision": "float32"}


def variants_of(case: dict[str, Any], cores: list[int]) -> dict[str, dict[str, Any]]:
    """Who runs in a case, by name: the peer in its usual stack and on EnvPool, ours eager and compiled."""
    from rookery.envs.make import make_env

    env = make_env(case["env"], case["envs"])
    picked, images = env.spec.backend, len(env.spec.obs_space.shape or ()) > 1
    env.close()
    peer, mine = {**case, "kind": "sb3"}, {**case, "kind": "ours"}
    found = {"SB3": {**peer, "envpool": False}, "SB3 on EnvPool": {**peer, "envpool": True}}
    backends = {f"ours on {picked} (as picked)": case["env"]}
    if picked != "tensor" and not images:
        backends["ours on tensor"] = f"tensor:{case['env']}"
    for name, id in backends.items():
        found[name] = {**mine, "env": id, "options": {}}
        if images and len(cores) == 1:
            found[f"{name}, float32"] = {**mine, "env": id, "options": {"precision": "float32"}}
        found[f"{name}, compiled"] = {**mine, "env": id, "options": {"compile": True}}
    return found


def rows_of(name: str, case: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A case's rows of the table."""
    speeds = {who: [each["steps_per_second"] for each in found] for who, found in results.items()}
    rows = []
    for who, found in results.items():
        versus = [f"{ratios(speeds[who], speeds[peer]):.2f}" for peer in ("SB3", "SB3 on EnvPool")]
        aim = f"≥ {case['aim']:g}" if who.startswith("ours") else ""
        startup = f"{spread([each['startup'] for each in found]):.1f}"
        how = f"{found[0]['backend']}, {found[0]['precision']}"
        rows.append([name, who, how, f"{spread(speeds[who]):,.0f}", *versus, aim, startup])
    return rows


def main() -> None:
    """Run every case."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--cases", default="", help="only the cases whose names contain one of these, as 8 lanes,Pong")
    args = flags.parse_args()
    if args.child:
        entry(args.child, {"ours": train_ours, "sb3": train_sb3})
        return
    cores, rounds = cores_of(args.cores), 1 if args.smoke else args.rounds
    about, rows, found = machine(cores), [], {}
    for name, case in CASES.items():
        if not any(part in name for part in args.cases.split(",")):
            continue
        case = {**case, "hyper": COMMON, **(SMOKE if args.smoke else {})}
        print(name, flush=True)
        results = interleaved(
            variants_of(case, cores),
            rounds,
            lambda spec, number: child(__file__, {**spec, "seed": number}, cores),
            lambda result: f"{result['steps_per_second']:>9,.0f} steps/s, start-up {result['startup']:.1f} s",
        )
        rows += rows_of(name, case, results)
        found[name] = {"settings": case, "results": results}
    head = ["case", "who", "environments", "steps/s", "× SB3", "× SB3 on EnvPool", "aim × SB3", "start-up, s"]
    lines = [f"- {name}: `{each['settings']}`" for name, each in found.items()]
    smoke = "**A smoke run: these numbers mean nothing.**\n\n" if args.smoke else ""
    text = f"# PPO throughput\n\n{smoke}{header(about)} Rounds: {rounds}.\n\n{table(head, rows)}\n\n{NOTES}\n\n"
    result = {"smoke": args.smoke, "rounds": rounds, "machine": about, "cases": found, "command": sys.argv}
    write(args.out, "ppo_throughput", result, text + "\n".join(lines))


if __name__ == "__main__":
    main()

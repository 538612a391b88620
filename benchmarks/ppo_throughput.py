"""PPO beside Stable-Baselines3 on the same cores and the same work: trained steps a second."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import begin, child, chosen, finish, interleaved, machine, parser, ratios, spread, table

NOTES = """Each number is the median over the rounds, with the least and the greatest; ratios are taken within a
round. Every variant is a process of its own, pinned to the same cores with as many torch threads, and they take
turns. Speeds are of training as a user runs it, after start-up and warm-up: ours is `rookery.train` with its metrics
log and TensorBoard events, without evaluations in the measured part, and counts actions applied (a row in which a
lane only resets does not count); Stable-Baselines3's (SB3) is `model.learn` without logger or callbacks, on
Gymnasium's CartPole, and for Pong on ale-py in its own `make_atari_env` with OpenCV and 4 stacked frames. Start-up is
from the start of the process to the end of the `first` iterations, compilation included, which later rounds find
cached. Hyperparameters are equal, constant over the run, with two 2×64 tanh networks or one Nature CNN; on images
ours takes bf16 for the trunk where the processor has the instructions ("float32": it was told not to), on vectors only
where it is told to ("bf16")."""

PEERS = ("SB3", "SB3 on EnvPool")

# Our name of each hyperparameter, theirs, and the value.
HYPER: dict[str, tuple[str, float]] = {
    "lr": ("learning_rate", 2.5e-4),
    "gamma": ("gamma", 0.99),
    "lam": ("gae_lambda", 0.95),
    "clip": ("clip_range", 0.2),
    "epochs": ("n_epochs", 4),
    "entropy_coef": ("ent_coef", 0.01),
    "value_coef": ("vf_coef", 0.5),
    "max_grad_norm": ("max_grad_norm", 0.5),
}


class Case(NamedTuple):
    """Work to be done. An iteration is an unroll in every lane and all epochs on it."""

    env: str
    envs: int
    unroll: int  # T
    minibatch: int  # samples
    first: int  # iterations that belong to the start-up
    warmup: int  # iterations before those that are measured, the first included
    iterations: int  # that are measured
    aim: float  # ratio to SB3


CASES = {
    "CartPole, 8 lanes": Case("CartPole-v1", 8, 128, 256, first=5, warmup=20, iterations=100, aim=3.0),
    "CartPole, 64 lanes": Case("CartPole-v1", 64, 128, 2048, first=1, warmup=5, iterations=25, aim=5.0),
    "Pong, 8 lanes": Case("Pong-v5", 8, 128, 256, first=1, warmup=2, iterations=8, aim=2.0),
}
SMOKE = {"unroll": 16, "minibatch": 64, "first": 1, "warmup": 1, "iterations": 2}


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train`, and its speed from the rows of its own metrics log."""
    import rookery
    from rookery.runs.metrics import read

    batch = spec["envs"] * spec["unroll"]
    hyper = {name: value for name, (_, value) in HYPER.items()}
    algorithm = rookery.PPO(
        **hyper, unroll=spec["unroll"], minibatches=batch // spec["minibatch"], anneal=False, clip_value=False
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
    hyper = {**dict(HYPER.values()), "n_steps": spec["unroll"], "batch_size": spec["minibatch"]}
    model = make_sb3({**spec, "hyper": hyper})
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


def variants_of(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Who runs in a case, by name: the peer in its usual stack and on EnvPool, ours eager and compiled."""
    from rookery.envs.make import make_env

    env = make_env(case["env"], case["envs"])
    picked, images = env.spec.backend, len(env.spec.obs_space.shape or ()) > 1
    env.close()
    found = {name: {**case, "kind": "sb3", "envpool": name != "SB3"} for name in PEERS}
    mine = {**case, "kind": "ours"}
    found["ours eager"] = {**mine, "options": {}}
    found["ours compiled"] = {**mine, "options": {"compile": True}}
    if images:
        found["ours eager float32"] = {**mine, "options": {"precision": "float32"}}
    else:
        found["ours bf16 compiled"] = {**mine, "options": {"compile": True, "precision": "bf16"}}
        if picked != "tensor":
            tensor = {**mine, "env": f"tensor:{case['env']}"}
            found["ours eager on tensor"] = {**tensor, "options": {}}
            found["ours compiled on tensor"] = {**tensor, "options": {"compile": True}}
    return found


def rows_of(name: str, case: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A case's rows of the table."""
    speeds = {who: [each["steps_per_second"] for each in found] for who, found in results.items()}
    rows = []
    for who, found in results.items():
        versus = [f"{ratios(speeds[who], speeds[peer]):.2f}" if peer in speeds else "" for peer in PEERS]
        aim = f"≥ {case['aim']:g}" if who.startswith("ours") else ""
        startup = f"{spread([each['startup'] for each in found]):.1f}"
        how = f"{found[0]['backend']}, {found[0]['precision']}"
        rows.append([name, who, how, f"{spread(speeds[who]):,.0f}", *versus, aim, startup])
    return rows


def run_cases(args: Any) -> dict[str, Any]:
    """Every case that was asked for: its settings, and its results by variant."""
    found = {}
    for name, case in chosen(CASES, args.cases).items():
        settings = {**case._asdict(), **(SMOKE if args.smoke else {})}
        print(name, flush=True)
        results = interleaved(
            chosen(variants_of(settings), args.only),
            args.rounds,
            lambda spec, number: child(__file__, {**spec, "seed": number}, args.cores),
            lambda result: f"{result['steps_per_second']:>9,.0f} steps/s, start-up {result['startup']:.1f} s",
        )
        found[name] = {"settings": settings, "results": results}
    return found


def settings_of(case: dict[str, Any]) -> str:
    """A case's settings in a line."""
    flat = {**case, **{name: value for name, (_, value) in HYPER.items()}}
    return " ".join(f"{name}={value}" for name, value in flat.items() if name != "aim")


def main() -> None:
    """Run every case."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--cases", default="", help="only cases whose names contain one of these: '8 lanes;Pong'")
    flags.add_argument("--only", default="", help="only variants whose names contain one of these: 'SB3;eager'")
    args = begin(flags, {"ours": train_ours, "sb3": train_sb3})
    about = machine(args.cores)
    found = run_cases(args)
    head = ["case", "who", "environments", "steps/s", *(f"× {peer}" for peer in PEERS), "aim × SB3", "start-up, s"]
    rows = [row for name, each in found.items() for row in rows_of(name, each["settings"], each["results"])]
    lines = "\n".join(f"- {name}: `{settings_of(each['settings'])}`" for name, each in found.items())
    result = {"hyper": HYPER, "cases": found}
    finish(args, "ppo_throughput", about, result, "PPO throughput", table(head, rows), NOTES, lines)


if __name__ == "__main__":
    main()

"""DQN, SAC and TD3 beside Stable-Baselines3 on the same cores and the same work: steps a second, learning included."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import begin, child, chosen, finish, interleaved, machine, parser, ratios, spread, table

NOTES = """Each number is the median over the rounds, with the least and the greatest; ratios are taken within a
round. Every variant is a process of its own, pinned to the same cores with as many torch threads, and they take
turns. Measured is the run as a user starts it, from the end of the warm-up on: `rookery.train` with its metrics log,
without evaluations, and Stable-Baselines3's (SB3) `model.learn` without logger or callbacks, in its usual stack of
environments. Hyperparameters are equal: the updates a step, the batch, the networks, the optimiser. On images ours
takes bf16 where the processor has the instructions. Compiled runs pay for the compilation during the warm-up."""


class Case(NamedTuple):
    """Work to be done."""

    system: str
    env: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    warmup: int  # steps, those before learning starts included
    steps: int  # that are measured
    aim: float = 2.0  # ratio to SB3


CONTINUOUS = (
    {"lr": 3e-4, "batch": 256, "capacity": 100_000, "learning_starts": 200, "tau": 0.005, "updates_per_step": 1.0},
    {
        "learning_rate": 3e-4,
        "batch_size": 256,
        "buffer_size": 100_000,
        "learning_starts": 200,
        "tau": 0.005,
        "train_freq": 1,
        "gradient_steps": 1,
        "policy_kwargs": {"net_arch": [256, 256]},
    },
)
CARTPOLE = (  # the settings of RL Baselines3 Zoo
    {
        "lr": 2.3e-3,
        "batch": 64,
        "capacity": 100_000,
        "learning_starts": 1_000,
        "unroll": 256,
        "updates_per_step": 0.5,
        "target_period": 5,
        "tau": 1.0,
        "hidden": (256, 256),
        "max_grad_norm": 10.0,
    },
    {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1_000,
        "train_freq": 256,
        "gradient_steps": 128,
        "target_update_interval": 10,
        "policy_kwargs": {"net_arch": [256, 256]},
    },
)
ATARI = (
    {"lr": 1e-4, "batch": 32, "capacity": 20_000, "learning_starts": 1_000, "updates_per_step": 0.25, "unroll": 4},
    {"learning_rate": 1e-4, "batch_size": 32, "buffer_size": 20_000, "learning_starts": 1_000, "train_freq": 4},
)

CASES = {
    "SAC HalfCheetah": Case("sac", "HalfCheetah-v5", *CONTINUOUS, warmup=600, steps=2_000),
    "TD3 HalfCheetah": Case("td3", "HalfCheetah-v5", *CONTINUOUS, warmup=600, steps=2_000),
    "DQN CartPole": Case("dqn", "CartPole-v1", *CARTPOLE, warmup=3_072, steps=10_240),
    "DQN Pong": Case("dqn", "Pong-v5", *ATARI, warmup=1_400, steps=4_000),
}
SMOKE = {"warmup": 1_100, "steps": 200}


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train`, and its speed from the rows of its own metrics log."""
    import rookery
    from rookery.runs.metrics import read
    from rookery.systems import find

    algorithm = find(spec["system"]).algorithm_class()(**{**spec["ours"], "hidden": tuple(spec["hidden"])})
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train(
            algorithm,
            spec["env"],
            steps=spec["warmup"] + spec["steps"],
            envs=1,
            seed=spec["seed"],
            device="cpu",
            threads=len(spec["cores"]),
            log_every=max(1, spec["warmup"] // 4),
            eval_every=10**12,  # never: one evaluation, of one episode, follows after the end
            eval_episodes=1,
            save_replay=False,
            quiet=True,
            run_dir=Path(folder) / "run",
            **spec["options"],
        )
        rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner"]
        backend, precision = run.summary["backend"], run.config["options"]["precision"]
    warm = next(row for row in rows if row["step"] >= spec["warmup"])
    seconds, steps = rows[-1]["seconds"] - warm["seconds"], rows[-1]["step"] - warm["step"]
    speed = {"steps_per_second": steps / seconds, "steps": steps, "seconds": seconds}
    updates = (rows[-1]["updates"] - warm["updates"]) / steps
    return {**speed, "updates_per_step": updates, "backend": backend, "precision": precision}


def train_sb3(spec: dict[str, Any]) -> dict[str, Any]:
    """Stable-Baselines3's `learn`: once to warm up, once to measure."""
    import stable_baselines3
    import torch
    from peers import ATARI as IMAGES
    from peers import vec_env

    torch.set_num_threads(len(spec["cores"]))
    lanes = vec_env(spec["env"], 1, spec["seed"])
    policy = "CnnPolicy" if spec["env"] in IMAGES else "MlpPolicy"
    kind = getattr(stable_baselines3, spec["system"].upper())
    model = kind(policy, lanes, seed=spec["seed"], device="cpu", verbose=0, **spec["theirs"])
    model.learn(spec["warmup"])
    before, updates, began = model.num_timesteps, model._n_updates, time.perf_counter()
    model.learn(spec["steps"], reset_num_timesteps=False)
    seconds, steps = time.perf_counter() - began, model.num_timesteps - before
    speed = {"steps_per_second": steps / seconds, "steps": steps, "seconds": seconds}
    done = (model._n_updates - updates) / steps
    return {**speed, "updates_per_step": done, "backend": type(model.env).__name__, "precision": "float32"}


def main() -> None:
    """Run every case."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--cases", default="", help="only cases whose names contain one of these: 'SAC;Pong'")
    args = begin(flags, {"ours": train_ours, "sb3": train_sb3})
    about, found, rows = machine(args.cores), {}, []
    for name, case in chosen(CASES, args.cases).items():
        hidden = case.theirs.get("policy_kwargs", {}).get("net_arch", [256, 256])
        settings = {**case._asdict(), "hidden": hidden, **(SMOKE if args.smoke else {})}
        variants = {
            "SB3": {**settings, "kind": "sb3"},
            "ours eager": {**settings, "kind": "ours", "options": {"precision": "float32"}},
            "ours compiled": {**settings, "kind": "ours", "options": {"precision": "float32", "compile": True}},
            "ours bf16 eager": {**settings, "kind": "ours", "options": {"precision": "bf16"}},
            "ours bf16 compiled": {**settings, "kind": "ours", "options": {"precision": "bf16", "compile": True}},
        }
        print(name, flush=True)
        results = interleaved(
            variants,
            args.rounds,
            lambda spec, number: child(__file__, {**spec, "seed": number}, args.cores),
            lambda result: (
                f"{result['steps_per_second']:>9,.1f} steps/s, {result['updates_per_step']:.2f} updates a step"
            ),
        )
        found[name] = {"settings": settings, "results": results}
        speeds = {who: [each["steps_per_second"] for each in runs] for who, runs in results.items()}
        for who, runs in results.items():
            how = f"{runs[0]['backend']}, {runs[0]['precision']}"
            aim = f"≥ {case.aim:g}" if who != "SB3" else ""
            versus, often = f"{ratios(speeds[who], speeds['SB3']):.2f}", f"{runs[0]['updates_per_step']:.2f}"
            rows.append([name, who, how, often, f"{spread(speeds[who]):,.0f}", versus, aim])
    head = ["case", "who", "environments", "updates a step", "steps/s", "× SB3", "aim"]
    lines = "\n".join(f"- {name}: `{each['settings']['ours']}`" for name, each in found.items())
    title, result = "Off-policy throughput", {"cases": found}
    finish(args, "offpolicy_throughput", about, result, title, table(head, rows), NOTES, lines)


if __name__ == "__main__":
    main()

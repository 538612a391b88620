"""SAC and TD3 beside Stable-Baselines3 on MuJoCo: the return of 20 greedy episodes after equal steps, over seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import RESULTS, begin, child, finish, machine, parser, table

NOTES = """A score is the mean return of 20 greedy episodes with the last weights; a cell is the mean over seeds with
its 95 % interval (Student's t over seeds). Both learn from equal steps in one environment, with the same settings:
learning from step 100 on, one update a step, batches of 256, two layers of 256, Adam at 3e-4, and for TD3 Gaussian
noise of deviation 0.1 on actions. Not the defaults are of ours the start (1,000), and of Stable-Baselines3's TD3 the
step size (1e-3), the layers (400 and 300) and the noise (none); all else is each side's default. Runs are processes of
their own, pinned to the same core, one after the other; each is kept in `--runs`, so that an interrupted benchmark goes
on.
"""

SYSTEMS = ("sac", "td3")
ENVS = ("HalfCheetah-v5", "Hopper-v5")
STARTS = {"sac": 100, "td3": 100}  # steps before learning, as in Stable-Baselines3's defaults


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train` with the algorithm's defaults, compiled, in float32."""
    import rookery
    from rookery.systems import find

    algorithm = find(spec["system"]).algorithm_class()(learning_starts=STARTS[spec["system"]])
    options = {"steps": spec["steps"], "envs": 1, "seed": spec["seed"], "device": "cpu", "threads": 1}
    options |= {"eval_every": spec["steps"] // 10, "save_replay": False, "sinks": (), "compile": True}
    run = rookery.train(algorithm, spec["env"], quiet=True, run_dir=spec["folder"], **options)
    return {"score": run.summary["eval_return_mean"], "seconds": run.summary["seconds"]}


def train_sb3(spec: dict[str, Any]) -> dict[str, Any]:
    """`model.learn` with the algorithm's defaults, but ours where TD3's differ."""
    import time

    import stable_baselines3
    import torch
    from peers import vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(1)
    kind = getattr(stable_baselines3, spec["system"].upper())
    settings = {"batch_size": 256, "policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1, "gradient_steps": 1}
    settings |= {"learning_rate": 3e-4, "learning_starts": STARTS[spec["system"]]}
    env = vec_env(spec["env"], 1, spec["seed"])
    if spec["system"] == "td3":
        actions = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, 0.1))
    model = kind("MlpPolicy", env, seed=spec["seed"], device="cpu", **settings)
    began = time.perf_counter()
    model.learn(spec["steps"])
    seconds = time.perf_counter() - began
    returns, _ = evaluate_policy(model, vec_env(spec["env"], 1, spec["seed"] + 1000), 20, return_episode_rewards=True)
    return {"score": float(np.mean(returns)), "seconds": seconds}


def interval(scores: list[float]) -> str:
    """The mean with its 95 % interval by Student's t; of one score, itself."""
    mean, reach = common.interval(scores)
    if math.isnan(reach):
        return f"{mean:,.0f}"
    return f"{mean:,.0f} ({mean - reach:,.0f} to {mean + reach:,.0f})"


def finished(spec: dict[str, Any], runs: Path, cores: list[int]) -> dict[str, Any]:
    """The result of this run, from its file or from running it now."""
    name = f"{spec['kind']}_{spec['system']}_{spec['env']}_{spec['steps']}_s{spec['seed']}"
    path = runs / f"{name}.json"
    if not path.exists():
        done = child(__file__, {**spec, "folder": str(runs / name)}, cores, timeout=6 * 3600)
        path.write_text(json.dumps(done))
    return json.loads(path.read_text())


def main() -> None:
    """Run what is missing, ours and theirs in turn; print and write the table."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--steps", type=int, default=200_000)
    flags.add_argument("--systems", nargs="*", default=SYSTEMS)
    flags.add_argument("--envs", nargs="*", default=ENVS)
    flags.add_argument("--runs", type=Path, default=RESULTS.parent.parent / "runs" / "offpolicy")
    args = begin(flags, {"ours": train_ours, "sb3": train_sb3})
    about, steps = machine(args.cores), 1_000 if args.smoke else args.steps
    args.runs.mkdir(parents=True, exist_ok=True)
    found, rows = [], []
    for system in args.systems:
        for env in args.envs:
            scores: dict[str, list[float]] = {"ours": [], "sb3": []}
            for seed in range(args.rounds):
                for kind in scores:
                    spec = {"kind": kind, "system": system, "env": env, "steps": steps, "seed": seed}
                    done = finished(spec, args.runs, args.cores)
                    scores[kind].append(done["score"])
                    found.append({**spec, **done})
                    print(f"  {kind:<5} {system} {env} seed {seed}: {done['score']:,.0f} in {done['seconds']:,.0f} s")
            rows.append([env, system, f"{steps:,}", *map(interval, scores.values()), len(scores["ours"])])
    head = ["environment", "system", "steps", "ours", "Stable-Baselines3", "seeds"]
    finish(args, "offpolicy_learning", about, {"runs": found}, "Off-policy learning", table(head, rows), NOTES)


if __name__ == "__main__":
    main()

"""SAC and TD3 beside Stable-Baselines3 on MuJoCo: the return of greedy episodes after equal steps, over seeds."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import RESULTS, begin, finish, machine, parser, table
from kept import keeping, keeps, told

NOTES = """A score is the mean of a run's last 5 evaluations of 10 greedy episodes each, which lie in the last quarter
of its steps: one evaluation may give a fifth of what the one before gave, on both sides (docs/notes.md, 2026-11-23).
A cell is the mean over seeds with its 95 % interval (Student's t). Both learn from equal steps in one environment,
with the same settings: learning after 10,000 random steps, as is usual on MuJoCo, one update a step, batches of 256,
two layers of 256, Adam at 3e-4, and for TD3 Gaussian noise of deviation 0.1 on actions. The start is no default
(1,000 here, 100 there), nor are, of Stable-Baselines3's TD3, the step size (1e-3), the layers (400 and 300) and the
noise (none); all else is each side's default. With 100 random steps runs of both collapsed. Runs are processes of
their own, pinned to the same core, one after the other; each is kept in `--runs` with its evaluations and its
processor, so that an interrupted benchmark goes on.
"""

SYSTEMS = ("sac", "td3")
ENVS = ("HalfCheetah-v5", "Hopper-v5")
START = 10_000  # random steps before learning
NAMES, COLOURS = {"ours": "ours", "sb3": "Stable-Baselines3"}, {"ours": "tab:blue", "sb3": "tab:orange"}
EVALUATIONS, LAST, EPISODES = 20, 5, 10  # of a run; of those, how many make its score; of each


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train` with the algorithm's defaults, compiled, in float32."""
    import rookery
    from rookery.runs.metrics import read
    from rookery.systems import find

    algorithm = find(spec["system"]).algorithm_class()(learning_starts=spec["start"])
    options = {"steps": spec["steps"], "envs": 1, "seed": spec["seed"], "device": "cpu", "threads": 1}
    options |= {"eval_every": spec["steps"] // EVALUATIONS, "eval_episodes": EPISODES}
    options |= {"save_replay": False, "sinks": (), "compile": True}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train(algorithm, spec["env"], quiet=True, run_dir=f"{folder}/run", **options)
        rows = [row for row in read(run.path / "metrics.jsonl") if "eval_return_mean" in row]
        found = [(row["step"], row["eval_return_mean"]) for row in rows]
        return scored(spec["steps"], found, run.summary["seconds"])


def train_sb3(spec: dict[str, Any]) -> dict[str, Any]:
    """`model.learn` with the algorithm's defaults, but ours where TD3's differ."""
    import time

    import stable_baselines3
    import torch
    from peers import vec_env
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(1)
    kind = getattr(stable_baselines3, spec["system"].upper())
    settings = {"batch_size": 256, "policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1, "gradient_steps": 1}
    settings |= {"learning_rate": 3e-4, "learning_starts": spec["start"]}
    env = vec_env(spec["env"], 1, spec["seed"])
    if spec["system"] == "td3":
        actions = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, 0.1))
    model = kind("MlpPolicy", env, seed=spec["seed"], device="cpu", **settings)
    every, apart = spec["steps"] // EVALUATIONS, vec_env(spec["env"], 1, spec["seed"] + 1000)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        judge = EvalCallback(apart, eval_freq=every, n_eval_episodes=EPISODES, log_path=folder, verbose=0)
        model.learn(spec["steps"], callback=judge)
    pairs = zip(judge.evaluations_timesteps, judge.evaluations_results, strict=True)
    found = [(step, float(np.mean(returns))) for step, returns in pairs]
    return scored(spec["steps"], found, time.perf_counter() - began)


def scored(steps: int, evaluations: list[tuple[int, float]], seconds: float) -> dict[str, Any]:
    """The result of a run, by the step and the mean return of each of its evaluations."""
    last = [mean for step, mean in evaluations if step > steps - LAST * (steps // EVALUATIONS)]
    if len(last) != LAST:
        raise RuntimeError(f"a run was evaluated at {[step for step, _ in evaluations]}, not {LAST} times at its end.")
    return {"score": float(np.mean(last)), "evaluations": evaluations, "seconds": seconds}


def draw(found: dict[str, list[dict[str, Any]]], pairs: list[tuple[str, str]], path: Path) -> None:
    """Evaluations over steps, a panel for each pair that has any: every seed thin, the mean of all thick."""
    from rookery.runs.plots import figure_of, save

    pairs = [(system, env) for system, env in pairs if any(f"{kind} {system} {env}" in found for kind in NAMES)]
    figure = figure_of(4.6 * len(pairs), 3.6)
    for panel, (system, env) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for kind, colour in COLOURS.items():
            kept = [each["evaluations"] for each in found.get(f"{kind} {system} {env}", [])]
            runs = [[(step / 1000, value) for step, value in run] for run in kept]
            for run in runs:
                panel.plot(*zip(*run, strict=True), color=colour, alpha=0.35, linewidth=0.8)
            if runs:
                least = min(map(len, runs))  # the first evaluation may be missing, before anything was learnt
                mean = np.mean([[value for _, value in run[-least:]] for run in runs], axis=0)
                panel.plot([step for step, _ in runs[0][-least:]], mean, color=colour, label=NAMES[kind])
        panel.set(
            title=f"{system.upper()}, {env}", xlabel="thousand steps", ylabel=f"return of {EPISODES} greedy episodes"
        )
        panel.legend()
    save(figure, path)


def main() -> None:
    """Run what is missing, ours and theirs in turn; print and write the table."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--steps", type=int, default=200_000)
    flags.add_argument("--systems", nargs="*", default=SYSTEMS)
    flags.add_argument("--envs", nargs="*", default=ENVS)
    keeping(flags, "offpolicy_learning", RESULTS / "kept")
    args = begin(flags, {"ours": train_ours, "sb3": train_sb3})
    about, (steps, start) = machine(args.cores), (1_000, 100) if args.smoke else (args.steps, START)
    pairs = [(system, env) for env in args.envs for system in args.systems]
    variants = {
        f"{kind} {system} {env}": {
            "kind": kind,
            "system": system,
            "env": env,
            "steps": steps,
            "start": start,
            "evaluations": EVALUATIONS,
        }
        for system, env in pairs
        for kind in NAMES
    }
    found, failed = keeps(__file__, variants, args, show, limit=6 * 3600)
    rows = []
    for system, env in pairs:
        of = {kind: found.get(f"{kind} {system} {env}", []) for kind in NAMES}
        rows.append([env, system, f"{steps:,}", *map(cell, of.values())])
    parts = (table(["environment", "system", "steps", *NAMES.values()], rows), NOTES, *told(failed))
    path = finish(args, "offpolicy_learning", about, {"runs": found}, "Off-policy learning", *parts)
    draw(found, pairs, path.with_suffix(".png"))


def show(result: dict[str, Any]) -> str:
    """What is printed of a run that is done."""
    return f"{result['score']:,.0f} in {result['seconds']:,.0f} s"


def cell(results: list[dict[str, Any]]) -> str:
    """The mean score with its 95 % interval by Student's t, and of how many seeds; of one seed, its score."""
    if not results:
        return "not run"
    mean, reach = common.interval([each["score"] for each in results])
    if math.isnan(reach):
        return f"{mean:,.0f} (1 seed)"
    return f"{mean:,.0f} ({mean - reach:,.0f} to {mean + reach:,.0f}; {len(results)} seeds)"


if __name__ == "__main__":
    main()

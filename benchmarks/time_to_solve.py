"""CartPole-v1 from process start to solved, beside Stable-Baselines3 with its published tuned settings: seconds."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import begin, child, chosen, finish, interleaved, machine, parser, ratios, spread, table

ENV, SOLVED, EPISODES, EVERY, BUDGET = "CartPole-v1", 475.0, 20, 5_000, 100_000  # EVERY and BUDGET are steps
SMOKE = {"solved": 5.0, "every": 256, "budget": 1024}

# RL Baselines3 Zoo, hyperparams/ppo.yml, CartPole-v1; "lin_x" is a step size that falls linearly from x to 0.
ZOO = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
ZOO_ENVS, ZOO_LINEAR = 8, {"learning_rate": 0.001, "clip_range": 0.2}

COLUMNS = {
    "seconds": "solved after, s",
    "imports": "imports, s",
    "until_training": "before training, s",
    "cpu": "processor time, s",
}

NOTES = f"""Whole processes, pinned to the same cores, taking turns; round by round both have the same seed. The clock
runs from the start of the process, imports included, until training has returned. The rule is the same for both:
every {EVERY:,} steps the greedy policy plays {EPISODES} episodes, one in each of {EPISODES} lanes, and training ends
when their mean return is at least {SOLVED:g}; a run that has not got there after {BUDGET:,} steps never did. Ours
(`rookery.train("ppo", "{ENV}", stop_at={SOLVED:g})` with our recipe, eager) also writes what a run leaves behind:
config, metrics, TensorBoard events, checkpoints, a final evaluation of {EPISODES} new episodes, summary.
Stable-Baselines3 (SB3) writes nothing; it runs `EvalCallback` with `StopTrainingOnRewardThreshold`. Its evaluation
lanes are {EPISODES} as ours are, which is kinder to it than the single one that is its default ("SB3, 1 evaluation
lane")."""


def train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`rookery.train` until it is solved."""
    import rookery

    train = rookery.train
    imported = time.time() - spec["began"]
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            "ppo",
            ENV,
            steps=spec["budget"],
            seed=spec["seed"],
            stop_at=spec["solved"],
            eval_every=spec["every"],
            eval_episodes=EPISODES,
            quiet=True,
            run_dir=Path(folder) / "run",
        )
        seconds = time.time() - spec["began"]
        began = (run.path / "config.json").stat().st_mtime  # written just before training begins
        summary, config = run.summary, run.config
    reached = summary["steps"] < spec["budget"] or summary["eval_return_mean"] >= spec["solved"]
    return {
        "seconds": seconds if reached else float("inf"),
        "imports": imported,
        "until_training": began - spec["began"],
        "steps": summary["steps"],
        "final": summary["eval_return_mean"],
        "settings": {**config["algorithm"], "envs": config["options"]["envs"], "backend": summary["backend"]},
    }


def train_sb3(spec: dict[str, Any]) -> dict[str, Any]:
    """Stable-Baselines3's `learn` with its own callbacks for this."""
    from peers import make_sb3, vec_env
    from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold

    imported = time.time() - spec["began"]
    hyper = ZOO | {name: linear(value) for name, value in ZOO_LINEAR.items()}
    model = make_sb3({"env": ENV, "envs": ZOO_ENVS, "seed": spec["seed"], "cores": spec["cores"], "hyper": hyper})
    lanes = vec_env(ENV, spec["eval_lanes"], spec["seed"] + 1)
    enough = StopTrainingOnRewardThreshold(spec["solved"])
    check = EvalCallback(
        lanes, enough, n_eval_episodes=EPISODES, eval_freq=spec["every"] // ZOO_ENVS, verbose=0, warn=False
    )
    until_training = time.time() - spec["began"]
    model.learn(spec["budget"], callback=check)
    seconds = time.time() - spec["began"]
    reached = check.best_mean_reward >= spec["solved"]
    return {
        "seconds": seconds if reached else float("inf"),
        "imports": imported,
        "until_training": until_training,
        "steps": model.num_timesteps,
        "final": float(check.last_mean_reward),
    }


def linear(first: float) -> Any:
    """A schedule that falls from `first` to 0 with the share of the run that is ahead."""
    return lambda ahead: first * ahead


def main() -> None:
    """Run both, in turns."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--only", default="", help="only variants whose names contain one of these: 'ours;evaluation'")
    args = begin(flags, {"ours": train_ours, "sb3": train_sb3})
    rule = SMOKE if args.smoke else {"solved": SOLVED, "every": EVERY, "budget": BUDGET}
    variants = {
        "SB3": {**rule, "kind": "sb3", "eval_lanes": EPISODES},
        "SB3, 1 evaluation lane": {**rule, "kind": "sb3", "eval_lanes": 1},
        "ours": {**rule, "kind": "ours"},
    }
    about = machine(args.cores)
    results = interleaved(
        chosen(variants, args.only),
        args.rounds,
        lambda spec, number: child(__file__, {**spec, "seed": number}, args.cores),
        lambda result: (
            f"{result['seconds']:6.1f} s, {result['until_training']:.1f} s of them before training, "
            f"{result['steps']:,} steps"
        ),
    )
    seconds = {who: [each["seconds"] for each in found] for who, found in results.items()}
    rows = []
    for who, found in results.items():
        columns = [f"{spread([each[name] for each in found]):.1f}" for name in COLUMNS]
        share = f"{ratios(seconds[who], seconds['SB3']):.2f}" if "SB3" in seconds else ""
        steps = f"{spread([each['steps'] for each in found]):,.0f}"
        rows.append([who, *columns, steps, share, "≤ 0.33" if who == "ours" else ""])
    head = ["who", *COLUMNS.values(), "steps", "share of SB3's time", "aim"]
    ours = results["ours"][0]["settings"] if "ours" in results else "not run"
    settings = f"- ours: `{ours}`\n- SB3: `n_envs={ZOO_ENVS} {ZOO} linear {ZOO_LINEAR}`"
    result = {"rule": rule, "results": results}
    finish(args, "time_to_solve", about, result, "Time to solve CartPole-v1", table(head, rows), NOTES, settings)


if __name__ == "__main__":
    main()

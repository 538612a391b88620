"""Ape-X with more actors at the same number of updates: how often a grid with a key and a door is solved."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import begin, chosen, finish, machine, over_seeds, parser, table

UPDATES = 3_000
STEPS = 5_000  # of each actor
ARMS: dict[str, dict[str, Any]] = {
    "1 actor, ladder": {"actors": 1},
    "4 actors, ladder": {"actors": 4},
    "16 actors, ladder": {"actors": 16},
    "16 actors, ε = 0.4": {"actors": 16, "epsilon": 0.4, "ladder": 0.0},
    "16 actors, ε = 0.1": {"actors": 16, "epsilon": 0.1, "ladder": 0.0},
}
FIRST = 10  # seed
NOTES = f"""KeyDoor-v0: two rooms of 3 × 5, a new layout each episode, +1 at the goal within 60 steps and nothing
before. Each actor has one lane and makes {STEPS:,} steps; the learner makes the same {UPDATES:,} updates of 64 samples
(less those owed for the steps before learning starts), however many actors there are, three-step, prioritised, double
and dueling; inline. A cell is the share of 20 greedy episodes that reach the goal with the last weights, the mean over
seeds and each seed's. Environment, budget and step size were chosen on seed 0, which is not in the table. Horgan et al.
2018, section 4, have more actors explore more and the ladder beside single values of ε."""


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One run; up to four actors' lanes are stepped by one, on the same rungs of the ladder."""
    import rookery

    actors = spec["actors"]
    steps = spec["steps"] * actors
    settings = {
        "actors": max(1, actors // 4),
        "envs": min(actors, 4),
        "steps": steps,
        "seed": spec["seed"],
        **spec["own"],
    }
    settings |= {"batch": 64, "capacity": 50_000, "learning_starts": 1_000, "updates_per_step": spec["updates"] / steps}
    settings |= {"lr": 5e-4, "hidden": (128, 128), "target_period": 200, "unroll": 10, "eval_every": steps}
    settings |= {"env_options": {"max_steps": 60}, "device": "cpu", "threads": 1, "quiet": True, "sinks": ()}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train("apex", "tensor:KeyDoor-v0", run_dir=Path(folder) / "run", save_replay=False, **settings)
        updates = run.saved()["run"]["roles"]["learner_0"]["counts"]["updates"]
        return {"score": run.summary["eval_return_mean"], "updates": updates, "steps": run.summary["steps"]}


def main() -> None:
    """Every arm over the same seeds."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--updates", type=int, default=UPDATES)
    flags.add_argument("--arms", default="", help="parts of the arms' names, with semicolons between")
    args = begin(flags, {"train": train})
    updates, steps = (100, 1_100) if args.smoke else (args.updates, STEPS)
    about = machine(args.cores)
    variants = {
        name: {
            "kind": "train",
            "actors": arm["actors"],
            "own": {key: value for key, value in arm.items() if key != "actors"},
            "updates": updates,
            "steps": steps,
        }
        for name, arm in chosen(ARMS, args.arms).items()
    }
    found = over_seeds(
        __file__,
        variants,
        args,
        FIRST,
        lambda result: f"{result['score']:>5.2f} after {result['updates']:,} updates",
    )
    rows = []
    for name, runs in found.items():
        scores = [run["score"] for run in runs]
        mean = f"{statistics.mean(scores):.2f} ({', '.join(f'{score:.2f}' for score in scores)})"
        counts = [f"{statistics.median(run[each] for run in runs):,.0f}" for each in ("updates", "steps")]
        rows.append([name, *counts, mean])
    text = table(["actors", "updates", "steps", "goal reached"], rows)
    finish(args, "apex_exploration", about, {"updates": updates, "results": found}, "Ape-X exploration", text, NOTES)


if __name__ == "__main__":
    main()

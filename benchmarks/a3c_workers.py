"""A3C on CartPole-v1 with 1 to 8 workers: steps of all of them together until it is solved, over several seeds."""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, begin, finish, interval, machine, parser, table
from kept import keeping, keeps, told

ENV, GOAL, EVERY, BUDGET = "CartPole-v1", 475.0, 2_500, 300_000  # EVERY and BUDGET are steps
AIM = 1.25  # most times the steps of one worker
LIMIT = 1_200.0  # seconds a run may take
SMOKE = {"goal": 8.0, "every": 256, "budget": 1_024}


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One run, until an evaluation reaches the goal."""
    import rookery
    from rookery.runs.metrics import read

    settings = {"learners": spec["workers"], "runtime": spec["runtime"], "seed": spec["seed"], "stop_at": spec["goal"]}
    settings |= {"steps": spec["budget"], "eval_every": spec["every"], "eval_episodes": 20, "deadline": 120.0}
    settings |= {"device": "cpu", "threads": 1, "quiet": True, "sinks": ()}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train("a3c", ENV, run_dir=Path(folder) / "run", **settings)
        rows, summary = read(run.path / "metrics.jsonl"), run.summary
    seen = [(row["step"], row["eval_return_mean"]) for row in rows if row["role"] == "evaluator"]
    reached = [step for step, mean in seen if mean >= spec["goal"]]
    return {
        "steps": reached[0] if reached else None,
        "after": summary["eval_return_mean"],  # of the weights it ended with, on episodes of their own
        "lag": (summary["policy_lag"] or {"mean": 0.0})["mean"],
        "seconds": summary["seconds"],
        "evaluations": seen,
    }


def ratio(many: list[float], one: list[float]) -> tuple[float, float, float]:
    """That of the means, with the ends of its 95 % interval: by the delta method on its logarithm, and Student's t."""
    from scipy.stats import t

    middle = statistics.mean(many) / statistics.mean(one)
    if min(len(many), len(one)) < 2:
        return middle, math.nan, math.nan
    variance = sum(statistics.variance(each) / len(each) / statistics.mean(each) ** 2 for each in (many, one))
    reach = t.ppf(0.975, min(len(many), len(one)) - 1) * variance**0.5
    return middle, middle * math.exp(-reach), middle * math.exp(reach)


def draw(steps: dict[int, list[float]], path: Path) -> None:
    """Steps over workers: each seed a dot, the mean with its interval, and what the aim allows."""
    from rookery.runs.plots import figure_of, save

    figure = figure_of(6.4, 4.0)
    axes = figure.add_subplot()
    places = list(range(len(steps)))
    for place, runs in zip(places, steps.values(), strict=True):
        axes.plot([place] * len(runs), runs, "o", color="0.7", markersize=4)
    means, reaches = zip(*map(interval, steps.values()), strict=True)
    axes.errorbar(places, means, [0.0 if math.isnan(each) else each for each in reaches], fmt="o-", capsize=4)
    axes.axhline(AIM * means[0], color="0.4", linestyle="--", label=f"{AIM:g} times the first mean")
    axes.set_xticks(places, [str(workers) for workers in steps])
    axes.set(xlabel="workers", ylabel="steps of all workers", title=f"A3C on {ENV}, until solved")
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, path)


def row(name: str, runs: list[dict[str, Any]], steps: list[float], first: list[float], goal: float) -> list[str]:
    """A line of the table."""
    (mean, reach), (middle, low, high) = interval(steps), ratio(steps, first)
    return [
        name,
        f"{mean:,.0f}" + ("" if math.isnan(reach) else f" ± {reach:,.0f}"),
        f"{middle:.2f}" + ("" if steps is first or math.isnan(low) else f" ({low:.2f} to {high:.2f})"),
        f"{min(steps):,.0f} to {max(steps):,.0f}",
        f"{sum(run['steps'] is not None for run in runs)} of {len(runs)}",
        f"{sum(run['after'] >= goal for run in runs)} of {len(runs)}",
        f"{statistics.mean(run['lag'] for run in runs):.1f}",
    ]


def main() -> None:
    """Every number of workers over the same seeds."""
    flags = parser(__doc__ or "", rounds=10)
    flags.add_argument("--workers", default="1,2,4,8", help="numbers of workers, the first to compare with")
    flags.add_argument("--runtime", choices=("local", "inline"), default="local")
    keeping(flags, "a3c_workers", RESULTS / "kept")
    args = begin(flags, {"train": train})
    about = machine(args.cores)
    rule = SMOKE if args.smoke else {"goal": GOAL, "every": EVERY, "budget": BUDGET}
    variants = {
        f"{workers} worker{'s' if workers > 1 else ''}": {
            "kind": "train",
            "workers": workers,
            "runtime": args.runtime,
            **rule,
        }
        for workers in map(int, args.workers.split(","))
    }
    found, failed = keeps(__file__, variants, args, lambda run: f"{run['steps']} steps, {run['seconds']:.0f} s", LIMIT)
    steps = {name: [float(run["steps"] or rule["budget"]) for run in runs] for name, runs in found.items()}
    first = next(iter(steps.values()))
    rows = [row(name, runs, steps[name], first, rule["goal"]) for name, runs in found.items()]
    head = ["who", "steps until solved", "of the first's", "least to most", "solved", "solved again", "lag"]
    notes = f"""The recipe of `rookery train a3c {ENV} --runtime {args.runtime}`, all processes on the same cores; a
round is a seed, from 0 on. Steps are those of all workers together at the first evaluation, one every
{rule["every"]:,} steps, whose 20 greedy episodes have a mean return of {rule["goal"]:g} or more, which ends the run
(`stop_at`); a run that has not got there counts with its budget of {rule["budget"]:,}. Means have 95 % intervals by
Student's t over seeds; a ratio is of means, its interval by the delta method on its logarithm. "Solved again" are runs
whose last weights, up to an evaluation later, reach it on 20 other episodes too. The lag is the mean number of updates
by others between a gradient's weights and its step. The aim is a ratio of at most {AIM:g}."""
    text = [table(head, rows), notes, *told(failed)]
    result = {"rule": rule, "runtime": args.runtime, "results": found, "failed": failed}
    path = finish(args, "a3c_workers", about, result, f"A3C's workers on {ENV}", *text)
    draw({variants[name]["workers"]: each for name, each in steps.items()}, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

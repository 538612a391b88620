"""Gorila on CartPole-v1 with a slow bundle, bundles that die, and nonsense: with its safeguards and without."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import RESULTS, begin, chosen, finish, machine, parser, table
from kept import keeping, keeps, told

from rookery.algorithms.dqn import DQN
from rookery.runtimes.words import Graph
from rookery.systems import recipe
from rookery.topologies import parameter_server

SLOW = 0.5  # seconds more for each gradient of bundle 0
KILLS = 20.0  # seconds between kills
POISON = 0.01  # share of gradients whose rewards are a thousand times what they were
SAFE = {"max_delay": 20, "outliers": 30.0}
BARE = {"max_delay": 0, "outliers": 0.0}
ARMS: dict[str, dict[str, float]] = {
    "clean": {},
    "slow": {"slow": SLOW},
    "dying": {"kills": KILLS},
    "poisoned": {"poison": POISON},
    "all": {"slow": SLOW, "kills": KILLS, "poison": POISON},
}
COUNTS = ("updates", "stale", "outliers", "restarts", "lost")
GOAL = 475.0
EVAL_EVERY = 2_000  # steps
LIMIT = 1_800.0  # seconds a run may take
NOTES = f"""Four bundles and two shards, each a process; the settings of `rookery train gorila CartPole-v1` but the
safeguards, which are max_delay=20 and outliers=30, or off. Slow: bundle 0 sleeps {SLOW * 1000:g} ms a gradient. Dying:
every {KILLS:g} s a bundle chosen at random is killed (SIGKILL), and begins again at once. Poisoned: with probability
{POISON:g} the rewards of a batch of samples are multiplied by 1000, in every bundle. All: slow, dying and poisoned. The
return is that of 20 greedy episodes at the end, of each seed, "second half" the mean of the
evaluations in the run's second half; "reached" is the updates of the server at the first evaluation of {GOAL:g} or
more, and "held" whether all later ones were. Stale and outliers are gradients dropped, of all bundles; restarts are of
processes, and lost what they were at. A round is a seed, from 0 on; these columns are medians over seeds."""


@dataclasses.dataclass(frozen=True)
class Faulty(DQN):
    """DQN on a machine that is slow, and sometimes computes nonsense."""

    slow: float = 0.0  # seconds
    poison: float = 0.0  # probability

    def noise(self, net: Any, batch: Any, generator: Any) -> Any:
        import torch

        time.sleep(self.slow)
        drawn = super().noise(net, batch, generator)
        poisoned = bool(torch.rand((), generator=generator) < self.poison)
        return {**drawn, "reward": 1_000 * batch["reward"]} if poisoned else drawn


async def learner(role: Any, setting: Any, poison: float, slow: float, **more: Any) -> None:
    """A bundle of which the first is slow."""
    known = {each.name: getattr(setting.algorithm, each.name) for each in dataclasses.fields(DQN)}
    algorithm = Faulty(**known, poison=poison, slow=slow if role.index == 0 else 0.0)
    await parameter_server.learner(role, dataclasses.replace(setting, algorithm=algorithm), **more)


def faulty(wire: Any, **faults: float) -> Any:
    """The topology with such bundles."""

    def wired(
        setting: Any, seed: int, actors: int = 1, shards: int = 1, max_delay: int = 0, outliers: float = 0.0
    ) -> Graph:
        graph: Graph = wire(setting, seed, actors, shards, max_delay, outliers)
        graph.roles = [
            dataclasses.replace(spec, function=learner, args={**spec.args, **faults})
            if spec.name == "learner"
            else spec
            for spec in graph.roles
        ]
        return graph

    return wired


def kill(seed: int, every: float, over: threading.Event) -> None:
    """Kill a bundle at random every so many seconds."""
    lots = random.Random(seed)
    while not over.wait(every):
        bundles = [process for process in multiprocessing.active_children() if process.name.startswith("learner")]
        if bundles:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(lots.choice(sorted(bundles, key=lambda each: each.name)).pid, signal.SIGKILL)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One run, and what its metrics say."""
    import rookery
    from rookery.runs.metrics import read

    faults = ARMS[spec["arm"]]
    parameter_server.wire = faulty(
        parameter_server.wire, poison=faults.get("poison", 0.0), slow=faults.get("slow", 0.0)
    )
    settings = {"actors": 4, "shards": 2, "seed": spec["seed"], "runtime": "local", **(SAFE if spec["safe"] else BARE)}
    settings |= {"device": "cpu", "threads": 1, "deadline": 120.0, "quiet": True, "sinks": ()}
    settings |= {"eval_every": EVAL_EVERY} | ({"steps": spec["steps"]} if spec["steps"] else {})
    over, every = threading.Event(), faults.get("kills", 0.0)
    killer = threading.Thread(target=kill, args=(spec["seed"], spec["kills"] or every, over), daemon=True)
    with tempfile.TemporaryDirectory() as folder:
        if every:
            killer.start()
        try:
            run = rookery.train("gorila", "CartPole-v1", run_dir=Path(folder) / "run", **settings)
        finally:
            over.set()
        return measured(read(run.path / "metrics.jsonl"), run.summary)


def measured(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the table."""
    updates, evaluations, outliers = 0, [], {}
    for row in rows:
        updates = row.get("updates", updates) if row["role"] == "shard" else updates
        if "outlier_dropped" in row:
            outliers[row["index"]] = row["outlier_dropped"]
        if row["role"] == "evaluator":
            evaluations.append((row["step"], updates, row["eval_return_mean"]))
    since = [update for _, update, score in evaluations if score >= GOAL]
    stale = [row["stale_dropped"] for row in rows if "stale_dropped" in row]
    return {
        "score": summary["eval_return_mean"],
        "late": statistics.mean(score for step, _, score in evaluations if step > summary["steps"] / 2),
        "reached": since[0] if since else None,
        "held": bool(since) and all(score >= GOAL for _, update, score in evaluations if update >= since[0]),
        "evaluations": evaluations,
        "updates": updates,
        "stale": stale[-1] if stale else 0,
        "outliers": sum(outliers.values()),
        "restarts": sum("restarted" in row for row in rows),
        "lost": sum(row["dropped"] for row in rows if "restarted" in row),
        "seconds": summary["seconds"],
    }


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Returns over the server's updates, an arm a panel: each seed's, and their median."""
    from rookery.runs.plots import figure_of, save

    arms = list(dict.fromkeys(name.split(", ")[0] for name in found))
    figure = figure_of(3.2 * len(arms), 3.2)
    for place, arm in enumerate(arms):
        axes = figure.add_subplot(1, len(arms), place + 1)
        for which, colour in (("safe", "tab:blue"), ("bare", "tab:orange")):
            curves = [list(zip(*run["evaluations"], strict=True)) for run in found.get(f"{arm}, {which}", [])]
            for _, updates, scores in curves:
                axes.plot(updates, scores, color=colour, alpha=0.25, linewidth=1)
            updates, scores = (
                [statistics.median(seeds) for seeds in zip(*(curve[axis] for curve in curves), strict=False)]
                for axis in (1, 2)
            )
            axes.plot(updates, scores, color=colour, linewidth=2, label=which)
        axes.axhline(GOAL, color="0.4", linestyle="--", linewidth=1)
        axes.set(title=arm, xlabel="updates", ylim=(0, 510), ylabel="" if place else "return")
    figure.axes[0].legend(loc="lower right")
    save(figure, path)


def main() -> None:
    """Every arm, with safeguards and without."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--steps", type=int, default=0, help="0 takes the recipe's")
    flags.add_argument("--only", default="", help="parts of the names of those to run, separated by semicolons")
    keeping(flags, "gorila_chaos", RESULTS / "kept")
    args = begin(flags, {"train": train})
    about, steps, kills = machine(args.cores), 3_000 if args.smoke else args.steps, 6.0 if args.smoke else 0.0
    variants = {
        f"{arm}, {'safe' if safe else 'bare'}": {
            "kind": "train",
            "arm": arm,
            "safe": safe,
            "steps": steps,
            "kills": kills,
            "recipe": recipe("gorila", "CartPole-v1"),  # so that runs of another one are not taken for this one's
        }
        for arm in ARMS
        for safe in (True, False)
    }
    found, failed = keeps(
        __file__,
        chosen(variants, args.only),
        args,
        lambda run: f"{run['score']:>6.1f}, reached {run['reached']}, {run['updates']} updates, {run['seconds']:.0f} s",
        LIMIT,
    )
    rows = []
    for name, runs in found.items():
        scores, late = ([run[each] for run in runs] for each in ("score", "late"))
        reached = [run["reached"] for run in runs if run["reached"] is not None]
        counts = [f"{statistics.median(run[each] for run in runs):g}" for each in COUNTS]
        rows.append(
            [
                *name.split(", "),
                f"{statistics.mean(scores):.0f} ({', '.join(f'{score:.0f}' for score in scores)})",
                f"{statistics.mean(late):.0f} ({', '.join(f'{score:.0f}' for score in late)})",
                f"{statistics.median(reached):g} ({len(reached)} of {len(runs)})" if reached else "never",
                f"{sum(run['held'] for run in runs)} of {len(runs)}",
                *counts,
            ]
        )
    head = ["arm", "safeguards", "return", "second half", "reached", "held", *COUNTS]
    text = [table(head, rows), NOTES, *told(failed)]
    result = {"steps": steps, "results": found, "failed": failed}
    path = finish(args, "gorila_chaos", about, result, "Gorila under faults", *text)
    draw(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""IMPALA on Catch-v0 with a policy lag forced on its actor: V-trace beside the uncorrected loss, over seeds."""

from __future__ import annotations

import statistics
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import begin, finish, machine, over_seeds, parser, table

LAGS = (0, 4, 16, 64)
LR = 3e-3  # large, so that weights of some updates ago are others
NOTES = """The actor acts with the weights of so many updates ago (as many as there are, at the start); everything else
is equal: 32 lanes, unrolls of 20 steps, a step size of 0.003, IMPALA's other defaults, inline. A cell is the mean over
seeds of the return of 20 greedy episodes with the last weights, with each seed's; 1 is the best there is, -1 the worst.
Steps, step size and environment were chosen on seeds 0 and 1, which are not in the table. Espeholt et al. 2018, section
5.2.2, compare the same two losses."""
FIRST = 10  # seed


class Lagged:
    """Weights as they were `lag` versions ago."""

    def __init__(self, weights: Any, lag: int) -> None:
        self.weights, self.seen = weights, deque(maxlen=lag + 1)

    async def latest(self) -> Any:
        newest = await self.weights.latest()
        if not self.seen or newest.version > self.seen[-1].version:
            self.seen.append(newest)
        return self.seen[0]


def lagged(lag: int) -> Callable[..., Any]:
    """`wire` of actors–learner with one actor that lags, and a queue of one slot, which adds no lag of its own."""
    from rookery.runtimes.words import Graph
    from rookery.topologies.actors_learner import actor, learner

    async def lagging(role: Any, setting: Any, weights: Any, unrolls: Any) -> None:
        await actor(role, setting, Lagged(weights, lag), unrolls)

    def wire(setting: Any, seed: int, actors: int) -> Graph:
        graph = Graph(seed)
        words = {"weights": graph.word("weights", "weights"), "unrolls": graph.word("queue", "unrolls", each=1)}
        graph.role(lagging, setting=setting, **words)
        graph.role(learner, setting=setting, count=1, ends_run=True, **words)
        return graph

    return wire


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One run, and the lag that was measured in it."""
    import rookery
    from rookery.runs.metrics import read
    from rookery.topologies import actors_learner

    actors_learner.wire = lagged(spec["lag"])
    del actors_learner.check  # of numbers that it does not take
    settings = {"steps": spec["steps"], "seed": spec["seed"], "correction": spec["correction"], "lr": LR, "unroll": 20}
    settings |= {"actors": 1, "envs": 32, "device": "cpu", "threads": 1, "quiet": True, "sinks": ()}
    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train("impala", "tensor:Catch-v0", run_dir=Path(folder) / "run", **settings)
        lags = [row["policy_lag"] for row in read(run.path / "metrics.jsonl") if "policy_lag" in row]
        return {"score": run.summary["eval_return_mean"], "lag": statistics.median(lags)}


def main() -> None:
    """Every lag with and without correction."""
    flags = parser(__doc__ or "", rounds=5)
    flags.add_argument("--steps", type=int, default=640_000)
    args = begin(flags, {"train": train})
    about, steps = machine(args.cores), 2_000 if args.smoke else args.steps
    corrections = ("vtrace", "none")
    variants = {
        f"{correction}, lag {lag}": {"kind": "train", "lag": lag, "correction": correction, "steps": steps}
        for lag in LAGS
        for correction in corrections
    }
    found = over_seeds(
        __file__,
        variants,
        args,
        FIRST,
        lambda result: f"{result['score']:>6.2f}, lag {result['lag']:g}",
    )
    rows = []
    for lag in LAGS:
        cells, measured = [], 0.0
        for correction in corrections:
            runs = found[f"{correction}, lag {lag}"]
            scores, measured = [run["score"] for run in runs], statistics.median(run["lag"] for run in runs)
            cells.append(f"{statistics.mean(scores):.2f} ({', '.join(f'{score:.1f}' for score in scores)})")
        rows.append([lag, f"{measured:g}", *cells])
    text = table(["lag", "measured", "V-trace", "uncorrected"], rows)
    finish(args, "policy_lag", about, {"steps": steps, "results": found}, "Policy lag", text, NOTES)


if __name__ == "__main__":
    main()

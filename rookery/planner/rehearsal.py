"""Short runs of the real thing on this machine, by which measured costs are corrected.

What is measured of a role alone is less than it takes in a run: there it finds caches that others have filled, and
cores that have to wake before it is answered.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

from rookery import trial
from rookery.planner.costs import Cluster, Costs, Work
from rookery.planner.roles import simulate
from rookery.planner.simulation import Forecast
from rookery.runs.account import KEEPER, kind_of
from rookery.settings import Options
from rookery.systems import System
from rookery.topologies.setting import Setting
from rookery.trial import Trial

__all__ = ["corrected", "rehearse"]

ROUNDS, TINY = 3, 1e-4  # of fitting the wait for an answer, and the change to begin with, in seconds


def rehearse(system: System, options: Options, setting: Setting, shards: int) -> dict[int, Trial]:
    """Runs of some seconds, with as few actors (of hogwild: workers) as can be, and with one a core."""
    kind = "actors" if "actors" in system.takes else "learners"
    runs = {}
    for number in sorted({shards, math.ceil(Cluster().cores / shards) * shards}):
        sized: Any = {kind: number}
        runs[number] = trial.measure(system, replace(options, **sized), setting)
    return runs


def corrected(work: Work, costs: Costs, runs: dict[int, Trial]) -> Costs:
    """With the processor time that roles took in runs, by number of actors, and as long a wait for an answer."""
    factors: dict[str, list[float]] = defaultdict(list)
    for number, run in runs.items():
        simulated = of_a_step(simulate(work, costs, number))
        for kind, seconds in taken(run).items():
            if simulated.get(kind, 0.0) > 0 < seconds:
                factors[kind].append(seconds / simulated[kind])
    slower = {kind: math.exp(sum(map(math.log, found)) / len(found)) for kind, found in factors.items()}
    return waiting(work, replace(costs, slower=slower), *min(runs.items()))


def taken(run: Trial) -> dict[str, float]:
    """Seconds of a core for each step, by kind of role; what learns on a GPU is left out."""
    cores: dict[str, float] = defaultdict(float)
    for name, role in run.account["roles"].items():
        cores[kind_of(name)] += role.get("processor", 0.0)
    cores[KEEPER] = run.account["cores_busy"] - sum(cores.values())
    if run.options.device != "cpu":
        cores.pop("learner", None)
    return {kind: each / run.steps_per_second for kind, each in cores.items()}


def of_a_step(found: Forecast) -> dict[str, float]:
    """The same, of a simulation."""
    return {kind: cores / found.steps_per_second for kind, cores in found.processor.items()}


def waiting(work: Work, costs: Costs, number: int, run: Trial) -> Costs:
    """Such a `hop` that the simulation is as fast as a run was, by Newton's method; as it is if that has no part."""
    for _ in range(ROUNDS):
        least = 1 / simulate(work, costs, number).steps_per_second
        more = 1 / simulate(work, replace(costs, hop=costs.hop + TINY), number).steps_per_second
        if more - least < 1e-3 * TINY / (work.rows * work.lanes):
            break
        change = (1 / run.steps_per_second - least) / (more - least) * TINY
        costs = replace(costs, hop=max(0.0, costs.hop + change))
    return costs

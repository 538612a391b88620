"""How a system would run on a cluster: what its roles' work costs, and a simulation of who waits for whom."""

from __future__ import annotations

from typing import Any

from rookery.planner.costs import Cluster, Costs, Work
from rookery.planner.probes import measure
from rookery.planner.report import as_json, draw, show
from rookery.planner.roles import simulate
from rookery.planner.simulation import Forecast
from rookery.settings import resolve

__all__ = ["Cluster", "Costs", "Forecast", "Work", "as_json", "draw", "forecasts", "measure", "show", "simulate"]


def forecasts(
    system: str, env: Any, actors: str, cluster: Cluster | None = None, **settings: Any
) -> tuple[Work, Costs, list[Forecast]]:
    """Measure a system's costs here, and simulate it with so many actors (of hogwild: workers).

    Args:
        actors: numbers with commas between.
        settings: as `rookery.train` takes them: fields of `Options` and of the algorithm.

    Raises:
        ValueError: for what cannot be trained, or not planned.
    """
    numbers = [int(each) if each.strip().isdigit() else 0 for each in actors.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"actors={actors!r} is no list of numbers from 1 on; use such as 1,16,256.")
    name, algorithm, options = resolve(system, env, settings)
    work, costs = measure(name, algorithm, env, options, numbers)
    return work, costs, [simulate(work, costs, number, cluster) for number in numbers]

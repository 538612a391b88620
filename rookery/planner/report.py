"""Forecasts as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rookery.planner.costs import Cluster, Costs, Work
from rookery.runs.account import KEEPER
from rookery.runs.plots import figure_of, save

if TYPE_CHECKING:
    from rookery.planner.simulation import Forecast

__all__ = ["as_json", "draw", "show"]

STEPS, LAG, GREY = "#2563eb", "#ea580c", "#6b7280"


def as_json(work: Work, costs: Costs, cluster: Cluster, forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """Everything that was measured, asked and found."""
    parts: dict[str, Any] = {"work": work, "costs": costs, "cluster": cluster}
    found: dict[str, Any] = {name: dataclasses.asdict(part) for name, part in parts.items()}
    return {**found, "forecasts": [dataclasses.asdict(each) for each in forecasts]}


def show(costs: Costs, forecasts: Sequence[Forecast]) -> Iterator[str]:
    """Lines: what was measured, a row a forecast, and why each is as it is."""
    micro = {name: getattr(costs, name) * 1e6 for name in ("environment", "inference", "asleep", "message", "answer")}
    yield "µs: " + ", ".join(f"{name} {value:,.0f}" for name, value in micro.items() if value)
    yield "update: " + ", ".join(f"{seconds * 1e3:,.2f} ms of {size:g}" for size, seconds in costs.update)
    if costs.slower:
        factors = ", ".join(f"{kind} {factor:.2f}" for kind, factor in costs.slower.items())
        yield f"times as long in a run: {factors}; an answer {costs.hop * 1e6:,.0f} µs later"
    kinds = [kind for kind in forecasts[0].busy if kind != KEEPER]
    names = ["actors", "hosts", "steps/s", "linear", "updates/s", "lag", "most", *(f"{kind} busy" for kind in kinds)]
    rows = [[*names, *["price of 1M"] * (forecasts[0].price > 0), "limit"]]
    for each, share in zip(forecasts, _of_linear(forecasts), strict=True):
        cells = [f"{each.actors}", f"{each.hosts}", f"{each.steps_per_second:,.0f}", f"{share:.0%}"]
        cells += [f"{each.updates_per_second:,.1f}", f"{each.lag:.1f}", f"{each.lag_max}"]
        cells += [f"{each.busy[kind]:.0%}" for kind in kinds] + [f"{each.price:.4f}"] * (each.price > 0)
        rows.append([*cells, each.limit])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    yield from (f"{each.actors}: {each.because}" for each in forecasts)


def _of_linear(forecasts: Sequence[Forecast]) -> list[float]:
    """Steps/s, of as many times those of the first."""
    alone = forecasts[0].steps_per_second / forecasts[0].actors
    return [each.steps_per_second / (each.actors * alone) for each in forecasts]


def _short(number: float) -> str:
    """Three digits of it."""
    return f"{number / 1e3:,.3g}k" if number >= 1e3 else f"{number:.3g}"


def draw(forecasts: Sequence[Forecast], title: str, path: Path) -> Path:
    """Throughput and lag over the number of actors."""
    figure = figure_of(8.0, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    actors = [each.actors for each in forecasts]
    steps = [each.steps_per_second for each in forecasts]
    linear = [pace / share for pace, share in zip(steps, _of_linear(forecasts), strict=True)]
    top.plot(actors, linear, "--", color=GREY, lw=1.2, label="linear")
    top.plot(actors, steps, "o-", color=STEPS, lw=2, ms=5, label="simulated")
    for each in forecasts:
        top.annotate(
            f"{_short(each.steps_per_second)}\n{each.limit}",
            (each.actors, each.steps_per_second),
            xytext=(0, -25),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREY,
        )
    top.set_yscale("log")
    top.margins(y=0.2)
    top.set_ylabel("environment steps a second")
    top.set_title(title, fontsize=12, fontweight="bold", loc="left")
    bottom.plot(actors, [each.lag_max for each in forecasts], "s:", color=LAG, lw=1.2, ms=8, mfc="none", label="most")
    bottom.plot(actors, [each.lag for each in forecasts], "o-", color=LAG, lw=2, ms=5, label="mean")
    bottom.set_ylabel("policy lag, versions")
    bottom.set_xlabel("actors")
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.set_xscale("log", base=2)
        axes.set_xticks(actors, [str(number) for number in actors])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.legend(loc="best", frameon=False, fontsize=8)
    return save(figure, path)

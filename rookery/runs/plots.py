"""Learning curves as pictures: one run with all it measured, or several with an interval over their seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rookery.runs.folder import RunFolder
from rookery.runs.metrics import RUNTIME, MetricsError, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

__all__ = ["figure_of", "interval", "plot_run", "plot_runs", "save", "smooth", "title"]

Series = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps in order, and a value at each

GRID = 300  # points of a smoothed curve
WINDOW = 0.03  # the part of a curve's length that its moving mean covers
EPISODES = 4000  # most single episodes drawn
PANELS = 9  # most small panels
COLUMNS = 3
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777")
GREY = "#6b7280"
NOT_PANELS = {"step", "index", "seconds"}
# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom; beyond these the normal's 1.96 is within 4 %.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def smooth(series: Series, grid: NDArray[np.float64], window: float) -> NDArray[np.float64]:
    """The mean of the values in the `window` steps up to each point of `grid`, else the last value before it.

    A point before the first value is NaN. It looks only backwards, so a curve never rises before the agent does.
    """
    steps, values = series
    total = np.concatenate([[0.0], np.cumsum(values)])
    after = np.searchsorted(steps, grid, side="right")
    before = np.minimum(np.searchsorted(steps, grid - window, side="right"), np.maximum(after - 1, 0))
    count = after - before
    return np.where(count > 0, (total[after] - total[before]) / np.maximum(count, 1), np.nan)


def interval(curves: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean over seeds of `curves`, `[seeds, points]`, and half the width of its 95 % t-interval (0 for one)."""
    seeds = len(curves)
    mean = curves.mean(axis=0)
    if seeds == 1:
        return mean, np.zeros_like(mean)
    quantile = STUDENT[seeds - 2] if seeds - 2 < len(STUDENT) else 1.96
    return mean, quantile * curves.std(axis=0, ddof=1) / math.sqrt(seeds)


def plot_run(run: str | Path) -> Path:
    """Draw a run's return, evaluations, losses and speed over its steps; returns `plots/learning_curve.png`.

    Raises:
        RunFolderError: if `run` is no run.
        MetricsError: if it has measured nothing yet.
    """
    folder = RunFolder.open(run)
    rows = _rows(folder)
    panels = _panels(rows)
    height = math.ceil(len(panels) / COLUMNS)
    figure = figure_of(9.6, 4.2 + 1.75 * height)
    grid = figure.add_gridspec(1 + height, COLUMNS, height_ratios=[4.0] + [1.6] * height)
    top = _axes(figure, grid[0, :], named=not panels)
    _draw_return(top, rows)
    top.set_title(title(folder), fontsize=12, fontweight="bold", loc="left")
    for place, ((role, name), series) in enumerate(panels.items()):
        axes = _axes(figure, grid[1 + place // COLUMNS, place % COLUMNS], named=place + COLUMNS >= len(panels))
        axes.sharex(top)
        _draw_panel(axes, series, COLOURS[2] if name == "steps_per_second" else COLOURS[0])
        words = "steps per second" if name == "steps_per_second" else name.replace("_", " ")
        axes.set_title(words if role == "learner" else f"{words} ({role})", fontsize=9, loc="left")
    return save(figure, folder.plots / "learning_curve.png")


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw several runs together: a panel an environment, in it a curve a system, the mean over its seeds with the
    95 % interval of that mean, on the steps that all of its seeds have reached; returns `out`, a `.png`.

    Raises RunFolderError and MetricsError as `plot_run` does, and ValueError if there are no runs.
    """
    if not runs:
        raise ValueError("There are no runs to plot; name at least one run folder.")
    groups: dict[str, dict[str, list[Series]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        folder = RunFolder.open(run)
        config = folder.read_config()
        groups[str(config.get("env", "?"))][str(config.get("system", "?"))].append(_curve(folder))
    systems = sorted({system for env in groups.values() for system in env})
    colours = {system: COLOURS[place % len(COLOURS)] for place, system in enumerate(systems)}
    columns = min(COLUMNS, len(groups))
    height = math.ceil(len(groups) / columns)
    figure = figure_of(max(6.4, 4.4 * columns), 4.0 * height)
    grid = figure.add_gridspec(height, columns)
    for place, (env, members) in enumerate(sorted(groups.items())):
        axes = _axes(figure, grid[place // columns, place % columns], named=place + columns >= len(groups))
        for system, series in sorted(members.items()):
            _draw_group(axes, system, series, colours[system])
        axes.set_title(env, fontsize=11, fontweight="bold", loc="left")
        axes.set_ylabel("episode return")
        axes.legend(loc="best", frameon=False, fontsize=8)
    figure.supxlabel("shaded: 95 % t-interval of the mean over seeds", x=0.99, ha="right", fontsize=8, color=GREY)
    return save(figure, Path(out))


def figure_of(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty picture, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, dpi=120, facecolor="white")


def save(figure: Figure, path: Path) -> Path:
    """Write it as PNG, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{path.name}")
    try:
        figure.savefig(aside, format="png")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _axes(figure: Figure, place: SubplotSpec, named: bool) -> Axes:
    """A panel whose horizontal axis counts steps (50k, 2M), and says so if `named`."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes = figure.add_subplot(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if named:
        axes.set_xlabel("environment steps", fontsize=9)
    return axes


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    rows = read(folder.metrics)
    if not rows:
        raise MetricsError(f"{folder.metrics} has no rows to plot; train the run for longer.")
    return rows


def _series(rows: Sequence[Mapping[str, Any]], name: str, role: str | None = None) -> Series:
    """What the rows (of one role) say of `name`, in the order of steps, without what is missing."""
    found = [(r["step"], r[name]) for r in rows if role in (None, r.get("role")) and r.get(name) is not None]
    steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def _curve(folder: RunFolder) -> Series:
    """A run's episodes, or its evaluations where it reports no episodes."""
    rows = _rows(folder)
    for name in ("episode_return", "eval_return_mean"):
        series = _series(rows, name)
        if len(series[0]):
            return series
    raise MetricsError(f"{folder.metrics} has neither episodes nor evaluations; train the run for longer.")


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Series]:
    """The small panels by (role, name): losses first, speed last, what episodes and evaluations have not at all."""
    names = {
        (str(row.get("role")), name)
        for row in rows
        if row.get("role") not in ("actor", "evaluator", RUNTIME)
        for name, value in row.items()
        if name not in NOT_PANELS and isinstance(value, (int, float))
    }
    ordered = sorted(names, key=lambda key: (key[0] != "learner", "loss" not in key[1], key[1]))
    speed = [key for key in ordered if key[1] == "steps_per_second"][:1]
    others = [key for key in ordered if key[1] != "steps_per_second"][: PANELS - len(speed)]
    return {key: _series(rows, key[1], key[0]) for key in others + speed}


def title(folder: RunFolder) -> str:
    """What was run."""
    config = folder.read_config()
    return f"{config.get('system', '?')} on {config.get('env', '?')}, seed {config.get('seed', '?')}"


def _grid(*series: Series) -> tuple[NDArray[np.float64], float]:
    """Points over the steps that every series covers, and the window of the moving mean in steps."""
    first, last = max(steps[0] for steps, _ in series), min(steps[-1] for steps, _ in series)
    return np.linspace(min(first, last), last, GRID), WINDOW * last


def _draw_return(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    episodes = _series(rows, "episode_return")
    if len(episodes[0]):
        some = slice(None, None, math.ceil(len(episodes[0]) / EPISODES))
        size = 5 if len(episodes[0]) < EPISODES // 4 else 3
        axes.plot(episodes[0][some], episodes[1][some], ".", ms=size, mew=0, alpha=0.3, color=COLOURS[0])
        grid, window = _grid(episodes)
        axes.plot(grid, smooth(episodes, grid, window), lw=2, color=COLOURS[0], label="episodes, moving mean")
    steps, mean = _series(rows, "eval_return_mean")
    if len(steps):
        spread = _series([row for row in rows if row.get("eval_return_mean") is not None], "eval_return_std")
        axes.plot(steps, mean, "o-", ms=4, lw=1.2, color=COLOURS[1], label="evaluation, mean ± std over episodes")
        if len(spread[0]) == len(steps):
            axes.fill_between(steps, mean - spread[1], mean + spread[1], color=COLOURS[1], alpha=0.18, lw=0)
    axes.set_ylabel("episode return")
    if len(episodes[0]) or len(steps):
        axes.legend(loc="best", frameon=False, fontsize=8)


def _draw_panel(axes: Axes, series: Series, colour: str) -> None:
    steps, values = series
    grid, window = _grid(series)
    axes.plot(steps, values, lw=0.6, alpha=0.3, color=colour)
    axes.plot(grid, smooth(series, grid, window), lw=1.4, color=colour)


def _draw_group(axes: Axes, system: str, series: Sequence[Series], colour: str) -> None:
    grid, window = _grid(*series)
    mean, half = interval(np.stack([smooth(one, grid, window) for one in series]))
    count = "1 seed" if len(series) == 1 else f"{len(series)} seeds"
    axes.plot(grid, mean, lw=2, color=colour, label=f"{system} ({count})")
    axes.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.18, lw=0)

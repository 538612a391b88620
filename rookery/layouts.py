"""Which layout is fastest here: a few are tried for seconds each.

A layout is where the same work is done: how many actors share the lanes, in which processes, who computes actions, with
how many threads. What an update learns from stays as it is: the lanes altogether, the learners, and every setting of
the algorithm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rookery.algorithms.base import Algorithm, Refused
from rookery.run import layout
from rookery.runs.files import reason
from rookery.settings import Options
from rookery.systems import System
from rookery.topologies.setting import Setting
from rookery.trial import LAYOUT_SECONDS, Trial, attempt

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["fastest", "rows", "shown"]

NEAR = 0.95  # of the fastest: the first that reaches it is kept, for times vary, and what is simpler is tried first
CHOICES = ("runtime", "actors", "envs", "inference", "double_buffer", "threads")  # options that make a layout

Show = Callable[[list[Trial], Options | None], None]


def fastest(
    system: System,
    algorithm: Algorithm,
    options: Options,
    make_setting: Callable[[Options], Setting],
    splits: bool,
    show: Show,
) -> tuple[Options, list[Trial]]:
    """Try layouts, that of `options` first, and each kind of choice on the best of those before; gives the best.

    Args:
        make_setting: what the roles of a run with such options are built from.
        splits: whether the environment can be made with another number of lanes.
        show: takes the trials so far, the last of which has yet to be made, and in the end the best.

    Raises:
        Exception: the first layout's, if none runs.
    """
    trials: dict[Options, Trial] = {}
    counts, best = shares(system, algorithm, options) if splits else [options.actors], options
    for vary in (_places, _inferences, _threads):
        for each in vary(best, counts):
            if each not in trials and (splits or not each.double_buffer) and _fits(system, algorithm, each):
                show([*trials.values(), Trial(each)], None)
                trials[each] = attempt(system, each, make_setting)
        enough = NEAR * max(trial.steps_per_second for trial in trials.values())
        best = next(each for each, trial in trials.items() if trial.steps_per_second >= enough)
    show(list(trials.values()), best)
    if (error := trials[best].error) is not None:
        raise error
    return best, list(trials.values())


def shares(system: System, algorithm: Algorithm, options: Options) -> list[int]:
    """Numbers of actors that the lanes can be shared out among; only the given one, where others change an update."""
    # An actor's lanes are the batch where it learns, as bundles do, and where an update has some unrolls, as IMPALA's.
    if "actor" not in system.module.__all__ or vars(algorithm.plan).get("unrolls"):
        return [options.actors]
    lanes, cores = options.actors * options.envs, len(os.sched_getaffinity(0))
    near = {min(max(1, count), lanes) for count in (1, cores // 2, cores, 2 * cores)}
    return sorted({options.actors, *(max(each for each in range(1, most + 1) if lanes % each == 0) for most in near)})


def _places(options: Options, counts: list[int]) -> Iterator[Options]:
    yield options
    for count in (counts[0], options.actors):  # one, unless several learners share out the actors
        yield _split(options, count, runtime="inline")
    for count in counts:
        yield _split(options, count, runtime="local")


def _inferences(options: Options, counts: list[int]) -> Iterator[Options]:
    """Many actors gain most by it, whoever was best without."""
    for double_buffer in (False, True):
        yield _split(options, counts[-1], runtime="local", inference="shared", double_buffer=double_buffer)


def _threads(options: Options, counts: list[int]) -> Iterator[Options]:
    yield replace(options, threads=1)


def _split(options: Options, actors: int, **choices: Any) -> Options:
    split = replace(options, actors=actors, envs=options.actors * options.envs // actors, **choices)
    return replace(split, threads=min(options.threads, split.cores_each)) if split.runtime == "local" else split


def _fits(system: System, algorithm: Algorithm, options: Options) -> bool:
    with contextlib.suppress(Refused):
        layout(system, algorithm, options)
        return True
    return False


def rows(trials: list[Trial], best: Options | None) -> list[dict[str, Any]]:
    """Trials as JSON has them."""
    found = []
    for trial in trials:
        row: dict[str, Any] = {name: getattr(trial.options, name) for name in CHOICES}
        row |= {"steps_per_second": trial.steps_per_second, "kept": trial.options == best}
        row |= {name: trial.bottleneck[name] for name in ("limit", "because") if trial.bottleneck}
        found.append(row if trial.error is None else {**row, "failed": reason(trial.error)})
    return found


@contextlib.contextmanager
def shown(quiet: bool) -> Iterator[Show]:
    """What shows trials, as a table that grows; where there is no terminal, once it is whole."""
    if quiet:
        yield lambda trials, best: None
        return
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        yield lambda trials, best: live.update(_picture(trials, best), refresh=True)
    if not live.console.is_terminal:
        live.console.print()  # the end of the table's last line


def _picture(trials: list[Trial], best: Options | None) -> RenderableType:
    from rich.console import Group
    from rich.table import Column, Table

    names = ("runtime", "actors × envs", "inference", "threads", "steps/s", "limit", "")
    columns = [Column(name, no_wrap=True, justify="right" if name == "steps/s" else "left") for name in names]
    table = Table(*columns, title=f"Layouts, {LAYOUT_SECONDS:g} s each", box=None)
    failures: dict[str, None] = {}  # in order, each once
    for trial, row in zip(trials, rows(trials, best), strict=True):
        pace = f"{trial.steps_per_second:,.0f}" if trial.steps_per_second else "failed" if trial.error else "..."
        inference = row["inference"] + ", double buffer" * row["double_buffer"]
        place = (row["runtime"], f"{row['actors']} × {row['envs']}", inference, str(row["threads"]))
        table.add_row(*place, pace, row.get("limit", ""), "kept" * row["kept"], style="bold" if row["kept"] else None)
        failures |= {f"failed: {row['failed']}.": None} if "failed" in row else {}
    return Group(table, *failures)

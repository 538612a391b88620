"""A throwaway run of some seconds, which is measured and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rookery.interrupts import raise_if_heard
from rookery.run import layout, threads
from rookery.runs.account import account, since
from rookery.runtimes.inline import Inline
from rookery.runtimes.local import Local
from rookery.settings import Options
from rookery.systems import System
from rookery.topologies.setting import Setting

__all__ = ["LAYOUT_SECONDS", "Trial", "attempt", "measure"]

LAYOUT_SECONDS = 4.0  # that are measured
SETTLING = 1.0  # seconds of learning before that
PATIENCE = 120.0  # seconds for all of it, in which processes start and functions are compiled
STORED = 1_000  # steps in replay from which on it learns, at most


@dataclass(frozen=True)
class Trial:
    """Options, and how a run with them did."""

    options: Options
    steps_per_second: float = 0.0
    account: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: Exception | None = None  # why there was nothing to measure

    @property
    def bottleneck(self) -> dict[str, str]:
        """As in the account."""
        return self.account.get("bottleneck", {})


def attempt(system: System, options: Options, make_setting: Callable[[Options], Setting]) -> Trial:
    """Measure a run; what goes wrong is its result, and nobody is warned of it."""
    log = logging.getLogger("rookery")
    log.disabled = True
    try:
        return measure(system, options, make_setting(options))
    except Exception as error:  # of roles, environments or memory, whatever it is
        for each in filter(None, (error, error.__cause__)):
            traceback.clear_frames(each.__traceback__)  # they hold networks and environments
        return Trial(options, error=error)
    finally:
        log.disabled = False
        gc.collect()
        torch.cuda.empty_cache()


def measure(system: System, options: Options, setting: Setting) -> Trial:
    """Run without evaluations, the end of a budget, and long filling of replay, until it was measured.

    Raises:
        TimeoutError: if that takes too long.
    """
    algorithm: Any = setting.algorithm
    if "learning_starts" in vars(algorithm):
        least = max(STORED, 2 * options.actors * options.envs * algorithm.plan.sequence)
        algorithm = replace(algorithm, learning_starts=min(algorithm.learning_starts, least))
    setting = replace(setting, algorithm=algorithm, total_steps=sys.maxsize, eval_every=0)
    graph = system.module.wire(setting, options.seed, **layout(system, algorithm, options))
    inline = options.runtime == "inline"
    runtime = Inline(_unheard) if inline else Local(_unheard, threads=options.threads, failures=1)
    watch = Stopwatch(runtime.measured)
    with threads(options.threads), contextlib.suppress(Over):
        runtime.run(graph, watch.between)
    return Trial(options, watch.pace, watch.account)


def _unheard(*_row: Any) -> None:
    """Nobody reads the rows of a trial."""


class Over(Exception):
    """It was measured. Raised, since a runtime that is asked to stop hands over its state, replay included."""


class Stopwatch:
    """Measures from one change of the steps to another, after some time of learning, and then ends the run.

    Args:
        measured: a runtime's.
    """

    def __init__(self, measured: Callable[[], dict[str, Any]]) -> None:
        self.measured, self.pace = measured, 0.0
        self.account: dict[str, Any] = {}
        self._steps, self._latest = 0, time.monotonic() + PATIENCE
        self._learns: float | None = None  # since when
        self._first: tuple[float, int, dict[str, Any]] | None = None  # time, steps, what was measured so far

    def between(self, steps: int, _snapshot: Any) -> bool:
        """After each round of a runtime."""
        raise_if_heard()
        now, before, self._steps = time.monotonic(), self._steps, steps
        if now > self._latest:
            raise TimeoutError(f"it could not be measured within {PATIENCE:g} s")
        if steps == before:
            return False
        if self._learns is None:
            learnt = any(role["activities"].get("learning") for role in self.measured()["roles"].values())
            self._learns = now if learnt else None
        elif self._first is None:
            if now - self._learns >= SETTLING:
                self._first = now, steps, self.measured()
        elif now - self._first[0] >= LAYOUT_SECONDS:
            began, least, measured = self._first
            self.pace = (steps - least) / (now - began)
            self.account = account(since(self.measured(), measured))
            raise Over
        return False

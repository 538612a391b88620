"""What a run shows while it goes on: a live display on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rookery.runs.metrics import RUNTIME, LastReturns, succeeded

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Progress", "sparkline"]

REDRAW = 0.15  # seconds between two pictures of the live display
LINE = 5.0  # seconds between two plain lines
WINDOW = 10.0  # seconds over which steps/s is measured
POINTS = 30  # points of the sparkline, over the whole run
VALUES = 6  # most of a learner's values that are shown
BARS = "▁▂▃▄▅▆▇█"
HIDDEN = {"step", "role", "index", "seconds", "steps_per_second"}


def sparkline(values: Sequence[float]) -> str:
    """The values as bars of eight heights, the lowest and the highest of them as the ends; e.g. `▁▃▅█`."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


class Progress:
    """Follows a run's rows. `update` only remembers them, and draws when the last picture is old enough."""

    def __init__(self, total_steps: int, quiet: bool = False, start: int = 0, stream: TextIO | None = None) -> None:
        """
        Args:
            total_steps: the step at which the run is over.
            quiet: show nothing.
            start: the step at which this part of the run begins, where it is resumed.
            stream: where to write, standard output by default; live only if it is a terminal.
        """
        self.total = total_steps
        self.step = start
        self._stream = stream or sys.stdout
        self._returns = LastReturns()
        self._evaluation: Mapping[str, Any] = {}
        self._learner: Mapping[str, Any] = {}
        self._runtime: Mapping[str, Any] = {}
        self._restarts = self._lost = 0  # of roles that died, and units of work with them
        self._history: list[float] = []  # the mean return at equal distances of steps
        self._next_point = start
        now = time.monotonic()
        self._times: deque[tuple[float, int]] = deque()  # from the first step on: before, processes are being started
        self._live = self._open() if not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb" else None
        self._every = REDRAW if self._live else LINE
        self._due = float("inf") if quiet else now + self._every
        self._news = True  # since the last line

    def goes_on(self, returns: Collection[float], evaluation: Mapping[str, Any]) -> None:
        """Begin with the last episodes and the last evaluation from before a resume."""
        if returns:
            self._returns.take({"episode_return": sum(returns) / len(returns), "episodes": len(returns)})
        self._evaluation = evaluation

    def update(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics: `step`, `role`, `index` and values."""
        if row["step"] > self.step:
            self.step = row["step"]
        now = time.monotonic()
        if not self._times and row["role"] not in (RUNTIME, "evaluator"):
            self._times.append((now, self.step))
        role = row["role"]
        if role == "learner" and row["index"] == 0:
            self._learner = row
        elif role == "evaluator":
            self._evaluation = row
        elif role == RUNTIME and "measured" in row:
            self._runtime = row
        elif role == RUNTIME and "restarted" in row:
            self._restarts, self._lost = self._restarts + 1, self._lost + row["dropped"]
        self._returns.take(row)
        self._news = True
        if now >= self._due:
            self._due = now + self._every
            self._show(now)

    def close(self) -> None:
        """Show the final state and give the terminal back; harmless when called twice."""
        if self._due != float("inf") and self._news:
            self._show(time.monotonic())
        self._due = float("inf")
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()
            self._live = None

    def _open(self) -> Any:
        from rich.console import Console
        from rich.live import Live

        live = Live(console=Console(file=self._stream), auto_refresh=False, transient=False)
        live.start()
        return live

    def _show(self, now: float) -> None:
        try:
            self._draw(now)
        except (OSError, ValueError):
            self._due = float("inf")  # the reader has gone away (`| head`); the run goes on unseen

    def _draw(self, now: float) -> None:
        self._news = False
        if self._times:
            self._times.append((now, self.step))
        while len(self._times) > 2 and now - self._times[1][0] > WINDOW:
            self._times.popleft()
        if self._returns.episodes and self.step >= self._next_point:
            self._history.append(self._returns.mean)
            self._next_point = self.step + max(1, self.total // POINTS)
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            return
        parts = [f"{self._count()} steps ({self._share():.0%})", *self._pace()]
        parts += [*self._scores(), *self._values(), *self._load(), *self._deaths()]
        print("  ".join(parts), file=self._stream, flush=True)

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        first = Table.grid(padding=(0, 2))
        first.add_row(
            ProgressBar(total=max(1, self.total), completed=min(self.step, self.total), width=30),
            f"[bold]{self._share():.0%}[/]",
            f"{self._count()} steps",
            *self._pace(),
        )
        scores = Text("   ".join(self._scores()), style="bold")
        if len(self._history) > 1:
            scores.append(f"   {sparkline(self._history)}", style="green")
        lines = [Text("   ".join(each), style="dim") for each in (self._values(), self._load()) if each]
        return Group(first, scores, *lines, *(Text(each, style="red") for each in self._deaths()))

    def _share(self) -> float:
        return min(1.0, self.step / self.total) if self.total > 0 else 1.0

    def _count(self) -> str:
        return f"{self.step:,}/{self.total:,}"

    def _pace(self) -> list[str]:
        """Steps/s over the last seconds, and the time left at that pace."""
        if not self._times:
            return []
        (then, before), (now, after) = self._times[0], self._times[-1]
        pace = (after - before) / (now - then) if now > then else 0.0
        if pace <= 0:
            return []
        return [f"{pace:,.0f} steps/s", f"{_clock(max(0, self.total - self.step) / pace)} left"]

    def _scores(self) -> list[str]:
        parts = [str(self._returns)] if self._returns.episodes else []
        mean, std = (self._evaluation.get(name) for name in ("eval_return_mean", "eval_return_std"))
        if mean is not None:
            spread = f" ± {std:.1f}" if std is not None else ""
            parts.append(f"evaluation {mean:.1f}{spread}{succeeded(self._evaluation)}")
        return parts

    def _load(self) -> list[str]:
        """How busy roles and how full words are, and what limits the run; of several processes only."""
        measured = self._runtime.get("measured", {})
        if measured.get("processes", 1) == 1:
            return []
        shares = {name: value for name, value in self._runtime.items() if isinstance(value, float)}
        busy = {name[:-5]: value for name, value in shares.items() if name.endswith("_busy")}
        if not any(busy.values()):
            return []  # nobody has told of any work yet
        fill = [f"{name[:-5]} {value:.0%} full" for name, value in shares.items() if name.endswith("_fill")]
        lag = [f"lag {self._learner['policy_lag']:.1f}"] if "policy_lag" in self._learner else []
        named = ", ".join(f"{name} {value:.0%}" for name, value in busy.items())
        return [f"busy: {named}", *fill, *lag, f"limit: {measured['bottleneck']['limit']}"]

    def _deaths(self) -> list[str]:
        """How often roles were started again, and how many units of work were lost by that."""
        counts = ((self._restarts, "restart"), (self._lost, "unit"))
        parts = [f"{count:,} {what}{'s' if count > 1 else ''}" for count, what in counts if count]
        return [", ".join(parts) + (" dropped" if self._lost else "")] if parts else []

    def _values(self) -> list[str]:
        shown = [
            f"{name} {value:.4g}"
            for name, value in self._learner.items()
            if name not in HIDDEN and isinstance(value, (int, float))
        ]
        return shown[:VALUES]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

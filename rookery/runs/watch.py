"""A run live in the terminal, from its folder alone: roles as boxes, the words between them, flows, and what limits."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rookery.runs.account import condensed, kind_of
from rookery.runs.folder import RunFolder
from rookery.runs.metrics import RUNTIME, LastReturns, Tail, succeeded
from rookery.runs.scene import Arrow, Scene, amount, overview, scene

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console, RenderableType

__all__ = ["Watched", "watch"]

EVERY = 1.0  # seconds between two looks at the folder
WINDOW = 10.0  # seconds over which steps/s is measured
WIDE, NARROW = 30, 32  # characters of a role and of a word
STYLES = {
    "environment": "green",
    "environment and inference": "green",
    "inference": "cyan",
    "learning": "blue",
    "evaluation": "magenta",
    "transfer": "yellow",
}


class Watched:
    """What a run's folder says, read on from where it was read last."""

    def __init__(self, folder: RunFolder) -> None:
        """Raises RunFolderError if there is no run."""
        self.folder, self.config = folder, folder.read_config()
        self.found: dict[str, Any] | None = None  # the newest account
        self.step = 0
        self.ended = False
        self.restarts: Counter[str] = Counter()  # by role
        self.dropped: Counter[str] = Counter()  # units by reason
        self.undone: Counter[str] = Counter()  # versions by word
        self.reason = ""  # of the last restart
        self.places: dict[str, str | None] = {}  # of roles on a cluster, the host
        self._first: Mapping[str, Any] | None = None  # row
        self._learner: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._returns = LastReturns()
        self._pace: deque[tuple[float, int]] = deque([(0.0, 0)])  # seconds and steps
        self._tail = Tail(folder.metrics)

    def look(self) -> None:
        """Take in what is new. Raises RunFolderError and MetricsError if the folder is damaged."""
        rows = self._tail.rows()
        if rows and rows[0] == self._first:  # the log was cut back, and comes anew
            for counted in (self.restarts, self.dropped, self.undone, self._returns):
                counted.clear()
        self._first = self._first or next(iter(rows), None)
        self.step = max((row["step"] for row in rows), default=self.step)
        for row in rows:
            if row.get("role") == RUNTIME:
                self._take(row)
            elif row.get("role") == "learner" and row.get("index") == 0:
                self._learner = row
                self._follow(row)
            elif row.get("role") == "evaluator":
                self._evaluation = row
            self._returns.take(row)
        self.ended = self.folder.ended
        if self.ended and "flows" in (summary := self.folder.read_summary()):
            self.found = condensed(summary)

    def _follow(self, row: Mapping[str, Any]) -> None:
        """Keep the last seconds of a learner's rows; it may have died, and gone back."""
        if row["step"] < self._pace[-1][1]:
            self._pace.clear()
        self._pace.append((row.get("seconds", 0.0), row["step"]))
        while self._pace[-1][0] - self._pace[0][0] > WINDOW and len(self._pace) > 2:
            self._pace.popleft()

    def _take(self, row: Mapping[str, Any]) -> None:
        """A row of the runtime: of a death, of a place, or what was measured since the row before."""
        if "placed" in row:
            self.places[row["placed"]] = row["host"]
        if "restarted" in row:
            self.restarts[row["restarted"]] += 1
            self.reason = f"{row['restarted']}, {row['reason']}" if "reason" in row else ""
        if "fell_back" in row:
            self.undone[row["word"]] += row["undone"]
        if "measured" in row:
            self.found = row["measured"]
            self.dropped.update(row["measured"].get("dropped", {}))

    def _lag(self) -> tuple[float, int] | None:
        """Mean and greatest, of the last row; once it is over, of the whole run."""
        if self.ended and (whole := self.folder.read_summary().get("policy_lag")):
            return whole["mean"], whole["max"]
        return (row["policy_lag"], row["policy_lag_max"]) if "policy_lag" in (row := self._learner) else None

    def deaths(self) -> list[str]:
        """Which roles were started again, how often and why; units dropped, by reason; versions undone, by word."""
        named = (("restarted", self.restarts), ("dropped", self.dropped), ("undone", self.undone))
        lines = [f"{what}: " + ", ".join(f"{of} {n:,}" for of, n in counts.items()) for what, counts in named if counts]
        return [*lines, *([f"the last: {self.reason}"] if self.reason else [])]

    def hosts(self) -> list[str]:
        """Which roles are on which host of a cluster, and which have no place, a line each."""
        at: dict[str | None, list[str]] = {}
        for role, host in self.places.items():
            at.setdefault(host, []).append(role)
        named = sorted((host, roles) for host, roles in at.items() if host is not None)
        lines = [f"{host}: {', '.join(roles)}" for host, roles in named]
        return [*lines, *([f"without a place: {', '.join(at[None])}"] if None in at else [])]

    def status(self) -> str:
        """How far it has come, how fast it is and how good, in a line."""
        budget = self.config.get("options", {}).get("steps")
        parts = [f"{self.step:,}/{budget:,} steps" if budget else f"{self.step:,} steps"]
        (before, least), (now, step) = self._pace[0], self._pace[-1]
        parts += [f"{(step - least) / (now - before):,.0f} steps/s"] if now > before and not self.ended else []
        parts += [str(self._returns)] if self._returns.episodes else []
        evaluated, lag = self._evaluation.get("eval_return_mean"), self._lag()
        parts += [f"evaluation {evaluated:.1f}{succeeded(self._evaluation)}"] if evaluated is not None else []
        parts += [f"policy lag {lag[0]:.1f}, at most {lag[1]}"] if lag is not None else []
        if self.ended:
            return "  ".join(["over", *parts])
        age = time.time() - self.folder.metrics.stat().st_mtime if self.folder.metrics.exists() else 0.0
        return "  ".join([*parts, *([f"last heard of {age:.0f} s ago"] if age > 15 else [])])


def watch(run: str | Path, once: bool = False, stream: TextIO | None = None) -> None:
    """Show a run until it is over; once where it is over, where that is wished, or where there is no terminal.

    Raises:
        RunFolderError, MetricsError: if there is no run, or it is damaged.
    """
    from rich.console import Console
    from rich.live import Live

    watched, console = Watched(RunFolder.open(run)), Console(file=stream)
    watched.look()
    if once or watched.ended or not console.is_terminal:
        console.print(picture(watched, console))
        return
    with Live(picture(watched, console), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not watched.ended:
            time.sleep(EVERY)
            watched.look()
            live.update(picture(watched, console), refresh=True)


def picture(watched: Watched, console: Console) -> RenderableType:
    """One frame."""
    from rich.console import Group
    from rich.text import Text

    config = watched.config
    head = Text(f"{config.get('system', '?')} on {config.get('env', '?')}, seed {config.get('seed', '?')}", "bold")
    lines: list[RenderableType] = [head, Text(watched.status())]
    found = watched.found
    if found is None:
        return Group(*lines, Text("nothing measured yet", style="dim"))
    limit, places = found["bottleneck"], scene(found)
    lines += [Text(overview(found), style="dim"), _columns(found, places, console.width)]
    lines += [Text(f"limit: {limit['limit']}", style="bold dark_orange"), Text(limit["because"]), Text(limit["change"])]
    lines += [Text(line, style="dim") for line in watched.hosts()]
    return Group(*lines, *(Text(line, style="red") for line in watched.deaths()))


def _columns(found: Mapping[str, Any], places: Scene, width: int) -> RenderableType:
    """Roles and words from left to right where there is room, else one below the other."""
    from rich.console import Group
    from rich.table import Table

    limiting = found["bottleneck"]["role"]
    columns: list[RenderableType] = []
    for roles, words in zip(places.roles, places.words, strict=True):
        columns.append(
            Group(*(_role(name, found["roles"][name], bool(limiting) and kind_of(name) == limiting) for name in roles))
        )
        if words:
            columns.append(Group(*(_word(name, found["words"][name], places.of(name)) for name in words)))
    if WIDE * len(places.roles) + NARROW * (len(columns) - len(places.roles)) > width:
        return Group(*columns)
    table = Table.grid(padding=(0, 1))
    table.add_row(*columns)
    return table


def _role(name: str, role: Mapping[str, Any], limits: bool) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    room, bar = WIDE - 4, Text()
    for activity, style in STYLES.items():
        bar.append("█" * round(room * role.get(activity, 0.0)), style)
    bar.truncate(room)
    bar.append("░" * (room - len(bar)), "dim")
    work = [f"{activity} {role[activity]:.0%}" for activity in STYLES if role.get(activity, 0.0) >= 0.005]
    waits = [f"{word} {share:.0%}" for word, share in role["waiting"].items() if share >= 0.005]
    lines = [bar, Text(", ".join(work) or "no work yet"), Text("waits: " + (", ".join(waits) or "never"), style="dim")]
    if "steps_per_second" in role:
        lines.append(Text(f"{amount(role['steps_per_second'])} steps/s"))
    style = "dark_orange" if limits else ""
    return Panel(Group(*lines), title=f"[bold]{name}[/]  busy {role['busy']:.0%}", width=WIDE, border_style=style)


def _word(name: str, word: Mapping[str, Any], arrows: list[Arrow]) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    lines = [Text(word["kind"], style="dim")] if word["kind"] != name else []
    if "fill" in word:
        part = round(10 * word["fill"])
        lines.append(Text("▮" * part + "▯" * (10 - part) + f" {word['fill']:.0%} full"))
    if "samples_per_insert" in word:
        lines.append(Text(f"{amount(word['samples_per_insert'])} samples an insert"))
    flows = [f"{arrow.role} → {arrow.rate}" if arrow.gives else f"→ {arrow.role} {arrow.rate}" for arrow in arrows]
    lines += map(Text, flows)
    return Panel(Group(*lines), title=f"[bold]{name}[/]", width=NARROW, border_style="cyan")

"""`metrics.jsonl`: one JSON object a line, the run's source of truth; every plot and summary can be made from it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rookery.runs.files import reason, write_text

__all__ = ["FIRST", "RUNTIME", "LastReturns", "MetricsError", "MetricsLog", "Tail", "plain", "read", "succeeded"]

FIRST = ("step", "role", "index")  # these keys come first in every line, the others follow by name
RUNTIME = "runtime"  # the role whose rows depend on the clock: how many there are, when, and what they say


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: NaN and infinities become None, a 0-d tensor or numpy scalar a Python number."""
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LastReturns:
    """The mean return of the last episodes, from whole rows: as many as hold 100 episodes, or all there are."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, int]] = deque()  # mean, and of how many
        self.episodes = 0

    def take(self, row: Mapping[str, Any]) -> None:
        """A row that may tell of an episode, or of the mean over several (`episodes`)."""
        if (value := row.get("episode_return")) is None:
            return
        self._rows.append((value, row.get("episodes", 1)))
        self.episodes += self._rows[-1][1]
        while self.episodes - self._rows[0][1] >= 100:
            self.episodes -= self._rows.popleft()[1]

    @property
    def mean(self) -> float:
        return sum(value * count for value, count in self._rows) / max(1, self.episodes)

    def clear(self) -> None:
        self._rows.clear()
        self.episodes = 0

    def __str__(self) -> str:
        return f"return {self.mean:.1f} (last {self.episodes} episodes)"


class MetricsError(RuntimeError):
    """The log cannot be written, or is damaged; says where and what to do."""


class MetricsLog:
    """Appends rows to a file, each handed to the system before `append` returns.

    A process that is killed loses at most the line it was writing: `read` passes over such a torn last line, and
    opening the log for writing cuts it off. NaN and infinities are stored as null, because strict JSON has neither.
    Keys are in a fixed order, so that equal runs give equal files.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` to append, made if it is missing. Raises MetricsError."""
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        self.rows = sum(row.get("role") != RUNTIME for _, row in _lines(self.path))  # without the runtime's

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row: `step` (int) and whatever scalars else.

        Raises:
            MetricsError: if the disk does not take it; a line half written is taken back, earlier ones are intact.
        """
        names = sorted(row, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
        line = json.dumps({name: plain(row[name]) for name in names}, allow_nan=False, separators=(",", ":"))
        data = line.encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            while written < len(data):  # a disk that fills up takes a part first and refuses the rest
                written += self._file.write(data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise self._unwritable(error) from error
        self.rows += row.get("role") != RUNTIME

    def truncate_after(self, step: int, rows: int | None = None, due: float = math.inf) -> None:
        """Drop what came after the checkpoint at `step`, as a resume from there must: it will write that again.

        That is every row later than `step`, and what follows the first `rows`, if that is known: asynchronous roles
        write rows of earlier steps. Evaluations stay that are of steps before the next one that is `due`.

        Raises MetricsError; the log is then as it was.
        """
        kept, number, left = [], 0, 0
        for line, row in _lines(self.path):
            counts = row.get("role") != RUNTIME
            early = rows is None or number < rows or (row.get("role") == "evaluator" and row["step"] < due)
            if early and row["step"] <= step:
                kept.append(line)
                left += counts
            number += counts
        try:
            write_text(self.path, b"".join(kept).decode())
            replaced = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        self._file.close()
        self._file, self.rows = replaced, left

    def close(self) -> None:
        """Wait until the rows are on the disk, and close the file; harmless when called twice."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _unwritable(self, error: OSError) -> MetricsError:
        return MetricsError(f"{self.path} could not be written: {reason(error)}; free some space and resume the run.")


def succeeded(evaluation: Mapping[str, Any]) -> str:
    """How often its goals were reached, where that is known, to follow what else is said of an evaluation."""
    share = evaluation.get("eval_success")
    return "" if share is None else f", success {share:.0%}"


class Tail:
    """A log that another process may be writing, read on from where it was read last."""

    def __init__(self, path: Path) -> None:
        self.path, self._read, self._at = path, 0, b""

    def rows(self) -> list[dict[str, Any]]:
        """The rows since the last call; all of them anew where the log was cut back since, as a resume does.

        Raises MetricsError as `read` does.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, self._read - len(self._at)))
            if size < self._read or file.read(len(self._at)) != self._at:
                self._read, self._at = file.seek(0), b""
            found = []
            for line, row in _parsed(self.path, file):
                found.append(row)
                self._read, self._at = self._read + len(line), line
        return found


def read(path: Path) -> list[dict[str, Any]]:
    """Every row of a log, in order; a torn last line is left out, and a log that is missing has none.

    Raises:
        MetricsError: if a line other than the last is not a row, naming the line.
    """
    return [row for _, row in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line with its row."""
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from _parsed(path, file)


def _parsed(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step")
        except (ValueError, RecursionError):
            shown = line[:80].decode(errors="replace").strip()
            raise MetricsError(
                f"{path}, line {number}, is not a row with a step: {shown!r}; remove that line."
            ) from None
        yield line, row


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end, in blocks from the back: a log may be large."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < end:
            file.truncate(position)

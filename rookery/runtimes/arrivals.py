"""The order in which a run's messages arrived, as a file: what is needed, beside the seed, to repeat it."""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from pathlib import Path

import numpy as np

__all__ = [
    "DIED",
    "KEPT",
    "MESSAGE",
    "MOVED",
    "PAUSE",
    "RELENT",
    "RESUME",
    "TURN",
    "Arrivals",
    "Replayed",
    "begin",
    "pieces",
]

log = logging.getLogger("rookery")

# What happens; an event is the number of a role, times 8, plus one of these.
MESSAGE, KEPT, DIED, TURN, RELENT, PAUSE, RESUME, MOVED = range(8)
BETWEEN = (PAUSE, RESUME, MOVED)  # turns
# Between two writes, unless the state is taken: what is lost with a killed process.
FLUSH, SECONDS = 4096, 1.0  # events, and seconds


class Arrivals:
    """Writes events down, packed. Where they cannot be written there is no record any more, and the run goes on."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._given_up = path, False
        self._file, self._pack = path.open("wb"), zlib.compressobj(6)
        self._events: list[int] = []
        self._flushed = time.monotonic()
        self._turns = False  # whether a turn began of which nothing is written yet

    def note(self, what: int, role: int = 0) -> None:
        """An event; a turn in which nothing happens is none."""
        if self._given_up:
            return
        if what == TURN:
            self._turns = True
            return
        if self._turns and what not in BETWEEN:
            self._turns = False
            self._events.append(TURN)
        self._events.append(role * 8 + what)
        late = len(self._events) >= FLUSH or time.monotonic() - self._flushed > SECONDS
        if what == RESUME or late:  # a checkpoint is not to be ahead of the record
            self.flush()

    def flush(self) -> None:
        """Put into the file what was noted."""
        packed = self._pack.compress(np.array(self._events, "<u2").tobytes())
        self._events.clear()
        self._flushed = time.monotonic()
        try:
            self._file.write(packed + self._pack.flush(zlib.Z_SYNC_FLUSH))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._given_up = True
        log.warning("%s could not be written: %s; this part of the run cannot be rerun.", self.path, error.strerror)
        with contextlib.suppress(OSError):
            self._file.close()  # which tries to write what it has once more
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if not self._given_up:
            self.flush()
        with contextlib.suppress(OSError):
            self._file.close()


def pieces(folder: Path) -> list[tuple[int, int, Path]]:
    """The records of a run and of each time that it was resumed, in order: first step, budget and file."""
    return sorted((*map(int, path.stem.split("-")), path) for path in folder.glob("*.bin"))  # type: ignore[misc]


def begin(folder: Path, step: int, budget: int) -> Arrivals:
    """The record of a run from that step on; one that begins no sooner is of what the run lost, and goes."""
    for first, _, path in pieces(folder):
        if first >= step:
            path.unlink()
    return Arrivals(folder / f"{step}-{budget}.bin")


class Replayed:
    """Reads them again, and checks that what happens is what happened."""

    def __init__(self, path: Path) -> None:
        try:
            data = zlib.decompressobj().decompress(path.read_bytes())
        except zlib.error as error:
            raise ValueError(f"{path} is damaged ({error}); the run cannot be repeated.") from None
        self.events = np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist()
        self.at = 0
        self._kept: dict[int, list[bool]] = {}  # of each role's messages since it began, which hand over its state
        for event in self.events:
            if event % 8 in (MESSAGE, KEPT):
                self._kept.setdefault(event // 8, []).append(event % 8 == KEPT)

    @property
    def next(self) -> int | None:
        """What happens next; None at the record's end."""
        return self.events[self.at] % 8 if self.at < len(self.events) else None

    def moved(self) -> list[int]:
        """The roles that were moved next, at once."""
        found = []
        while self.next == MOVED:
            found.append(self.events[self.at] // 8)
            self.at += 1
        return found

    def turn(self) -> list[tuple[int, int]]:
        """What happened in the next turn, as pairs of event and role."""
        found = []
        self.at += 1  # its beginning
        while self.next in (MESSAGE, KEPT, DIED, RELENT):
            found.append((self.events[self.at] % 8, self.events[self.at] // 8))
            self.at += 1
        return found

    def hands_over(self, role: int, message: int) -> bool:
        """Whether that message of a role, counted from the run's beginning, handed over its state."""
        kinds = self._kept.get(role, [])
        return message < len(kinds) and kinds[message]

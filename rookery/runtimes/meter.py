"""What a runtime measures: how each role spends its time, and what goes through each word.

At any time a role is at work, or waits for a word. What its work consists of is known to the part that it keeps, which
may say so by attributes: `seconds`, by activity; `steps`, so far, and `led`, those of them that others made; `dropped`,
units by reason.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from rookery.runtimes.boxes import nbytes

__all__ = ["Meter", "RoleMeter", "WordMeter", "told"]

WORK = ""  # in place of the word that is waited for
Told = dict[str, Any]


def told(part: Any) -> Told:
    """What a part says of the work that it did, as numbers."""
    return {
        "activities": dict(getattr(part, "seconds", {})),
        "steps": getattr(part, "steps", 0) - getattr(part, "led", 0),
        "dropped": dict(getattr(part, "dropped", {})),
    }


def combined(one: Told, two: Told, sign: int = 1) -> Told:
    """Sums of what stands under the same name, or differences."""
    names = one | two
    return {
        name: combined(one.get(name, {}), two.get(name, {}), sign)
        if isinstance(names[name], dict)
        else one.get(name, 0) + sign * two.get(name, 0)
        for name in names
    }


class RoleMeter:
    """A role's seconds at work and waiting, from its first turn on, and what it told of its work."""

    def __init__(self) -> None:
        self._told: Told = told(None)  # by the process that it runs in
        self._before: Told = told(None)  # by those that died
        self._seconds: dict[str, float] = defaultdict(float)  # by word
        self._worked = 0.0  # seconds, when it last told
        self._at: str | None = None  # the word that it waits for, or WORK
        self._since = 0.0
        self._deaths, self._reason = 0, ""

    def turn(self, to: str | None, now: float) -> None:
        """From now on it works, waits for a word, or does neither (None)."""
        if self._at is not None:
            self._seconds[self._at] += now - self._since
        self._at, self._since = to, now

    def tells(self, account: Told, now: float) -> None:
        """It says what its work was until now."""
        self.turn(self._at, now)
        self._told, self._worked = account, self._seconds[WORK]

    def dies(self, lost: int, reason: str, now: float) -> None:
        """Its process does, and so many units are lost; what it told stays true."""
        self.turn(None, now)
        self._deaths, self._reason = self._deaths + 1, reason
        self._before = combined(combined(self._before, self._told), {"dropped": {"died": lost}})
        self._told, self._seconds[WORK] = told(None), self._worked

    def measured(self, now: float) -> dict[str, Any]:
        """Its work as far as it told of it, and its waits until now."""
        self.turn(self._at, now)
        waiting = {word: seconds for word, seconds in self._seconds.items() if word != WORK}
        own = {"work": self._worked, "waiting": waiting, "restarts": self._deaths, "reason": self._reason}
        return {**own, "cpu": 0.0, **combined(self._before, self._told)}


class WordMeter:
    """Who gives how much to a word, who takes how much from it, and how full it is found."""

    def __init__(self, name: str, kind: str, runtime: Meter) -> None:
        self.name, self.kind, self._runtime = name, kind, runtime
        self._given: Counter[str] = Counter()  # units, by the role's name
        self._taken: Counter[str] = Counter()
        self._sizes: dict[str, float] = {}  # bytes of a unit that is given, or taken, as of the first
        self._begun = self._lost = self._back = 0  # units: lent to be filled, never given, taken and given back
        self._undone = {"undone": 0, "undone_steps": 0}  # versions, by their publisher's death
        self._asked = 0  # bytes of all that was asked of somebody: no two questions need be of one size
        self._looks, self._filled = 0, 0.0
        self._versions: dict[str, int] = {}

    def lends(self) -> None:
        """A role begins to fill a unit."""
        self._begun += 1

    def reclaims(self, lost: int, back: int) -> None:
        """Of a role that died: what it had not filled is lost, what it read is there again."""
        self._lost, self._back = self._lost + lost, self._back + back

    def falls_back(self, versions: int, steps: int) -> None:
        """Who published began again after a death: so many versions, which so many steps led to, are undone."""
        self._undone["undone"] += versions
        self._undone["undone_steps"] += steps

    def gives(self, units: int, value: Any = None) -> None:
        """The role whose turn it is gives so many units, which are in `value`."""
        if "given" not in self._sizes:
            self._sizes["given"] = nbytes(value) / max(1, units)
        self._given[self._runtime.who] += units

    def asks(self, size: int) -> None:
        """It gives one of so many bytes."""
        self._asked += size
        self._given[self._runtime.who] += 1

    def takes(self, units: int, value: Any = None) -> None:
        """The role whose turn it is takes so many, as they were given, or as they are in `value`."""
        if value is not None and "taken" not in self._sizes:
            self._sizes["taken"] = nbytes(value) / max(1, units)
        self._taken[self._runtime.who] += units

    def reads(self, version: int) -> None:
        """It reads that version, which counts if it is another than before."""
        if self._versions.get(self._runtime.who) != version:
            self._versions[self._runtime.who] = version
            self.takes(1)

    def looks(self, filled: int, made: int) -> None:
        """Somebody wants something out of so many slots, of which some are filled."""
        if made:
            self._looks, self._filled = self._looks + 1, self._filled + filled / made

    def measured(self, level: dict[str, float]) -> dict[str, Any]:
        counts = {"given": dict(self._given), "taken": dict(self._taken), "looks": self._looks, "filled": self._filled}
        given = self._sizes.get("given", self._asked / max(1, self._given.total()))
        sizes = {"given_bytes": given, "taken_bytes": self._sizes.get("taken", given)}  # of a unit
        return {"kind": self.kind, **sizes, **counts, **self._undone, **self._units(level), "level": level}

    def _units(self, level: dict[str, float]) -> dict[str, Any]:
        """What became of the units of a queue: those begun are the sum of the others."""
        if "untaken" not in level:
            return {}
        ends = {"taken": self._taken.total() - self._back, "lost": self._lost}
        still = {"unfinished": self._begun - self._lost - self._given.total(), "untaken": level["untaken"]}
        return {"units": {"begun": self._begun, **ends, **still}}


class Meter:
    """What the roles and words of a runtime do. The clock begins with the first role's first turn."""

    def __init__(self) -> None:
        self.who = ""  # the role whose turn it is
        self.keeper = 0.0  # seconds that the process of the words is busy with them and with checkpoints
        self._words: dict[str, WordMeter] = {}
        self._roles: dict[str, RoleMeter] = {}
        self._began: float | None = None
        self._cpu = time.process_time()

    def word(self, name: str, kind: str) -> WordMeter:
        return self._words.setdefault(name, WordMeter(name, kind, self))

    def role(self, name: str) -> RoleMeter:
        return self._roles.setdefault(name, RoleMeter())

    def begins(self, who: str) -> float:
        """It is a role's turn; gives the time."""
        self.who, now = who, time.perf_counter()
        if self._began is None:
            self._began, self.keeper, self._cpu = now, 0.0, time.process_time()
        return now

    def measured(self, words: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
        """All of it, as a nested dict of numbers that only grow.

        But for the words' kinds, sizes and levels, and the `reason` that a role last died for.
        """
        now = time.perf_counter()
        roles = {name: role.measured(now) for name, role in self._roles.items()}
        return {
            "seconds": 0.0 if self._began is None else now - self._began,
            "processes": processes,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "cpu": time.process_time() - self._cpu,  # seconds of processor time of this process
            "keeper": self.keeper,
            "roles": roles,
            "words": {name: word.measured(getattr(words.get(name), "level", {})) for name, word in self._words.items()},
        }

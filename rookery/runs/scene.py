"""A run's topology with what was measured in it: who stands where, and what the arrows between them say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rookery.runs.account import EVALUATOR, KEEPER, condensed, kind_of, plain
from rookery.runs.folder import RunFolder
from rookery.runs.metrics import RUNTIME, read

__all__ = ["Arrow", "Scene", "amount", "measured_of", "overview", "scene"]

# What goes in and out by kind of word; a queue is named after what it holds.
UNITS = {"weights": ("versions", "versions"), "replay": ("steps", "samples"), "calls": ("requests", "requests")}


class Arrow(NamedTuple):
    """What flows between a role and a word."""

    role: str
    word: str
    gives: bool  # the role to the word, rather than the other way
    rate: str  # in units
    size: str  # in bytes, "" where that is unknown


@dataclass
class Scene:
    """Columns of roles from left to right, as data goes, and the words in the gaps to the right of each."""

    roles: list[list[str]]
    words: list[list[str]]
    arrows: list[Arrow]

    def of(self, name: str) -> list[Arrow]:
        """The arrows of a role or a word."""
        return [arrow for arrow in self.arrows if name in (arrow.role, arrow.word)]


def measured_of(folder: RunFolder) -> dict[str, Any] | None:
    """The account of a run that is over, else the newest in its metrics; None if there is none.

    Raises:
        RunFolderError, MetricsError: if summary or metrics are damaged.
    """
    if folder.ended and "flows" in (summary := folder.read_summary()):
        return condensed(summary)
    rows = [row for row in read(folder.metrics) if row.get("role") == RUNTIME and "measured" in row]
    return rows[-1]["measured"] if rows else None


def scene(found: Mapping[str, Any]) -> Scene:
    """Who stands where: to the right of all who give to a queue or a replay are those who take from it.

    Who answers calls stands to the right of the first who asks: others ask from either side.
    """
    kinds = {name: word["kind"] for name, word in found["words"].items()}
    roles = [role for role in found["roles"] if role != KEEPER]
    arrows = [_arrow(flow, kinds) for flow in found["flows"]]
    arrows.sort(key=lambda arrow: (not arrow.gives, roles.index(arrow.role)))
    givers: dict[str, list[str]] = defaultdict(list)
    takers: dict[str, list[str]] = defaultdict(list)
    for arrow in arrows:
        (givers if arrow.gives else takers)[arrow.word].append(arrow.role)
    place = dict.fromkeys(roles, 0)
    for _ in roles:  # paths have no more words than that
        for word, kind in (each for each in kinds.items() if each[1] != "weights"):
            first = (min if kind == "calls" else max)((place[giver] + 1 for giver in givers[word]), default=0)
            for taker in set(takers[word]) - set(givers[word]):
                place[taker] = min(max(place[taker], first), len(roles) - 1)
    places = sorted(set(place.values()))
    columns: list[list[str]] = [[] for _ in places]
    gaps: list[list[str]] = [[] for _ in places]
    for role in sorted(roles, key=lambda role: kind_of(role) == EVALUATOR):
        columns[places.index(place[role])].append(role)
    for word, kind in sorted(kinds.items(), key=lambda item: item[1] == "weights"):
        near = (takers if kind == "weights" else givers)[word] or givers[word] or takers[word] or roles
        gaps[places.index(min(place[role] for role in near))].append(word)
    return Scene(columns, gaps, arrows)


def _arrow(flow: Mapping[str, Any], kinds: Mapping[str, str]) -> Arrow:
    gives = flow["to"] in kinds
    role, word = (flow["from"], flow["to"]) if gives else (flow["to"], flow["from"])
    unit = UNITS.get(kinds[word], (plain(word), plain(word)))[not gives]
    size = f"{amount(flow['bytes_per_second'], ' ')}B/s" if flow["bytes_per_second"] >= 1 else ""
    return Arrow(role, word, gives, f"{amount(flow['per_second'])} {unit}/s", size)


def amount(value: float, space: str = "") -> str:
    """A number in two or three digits: 0.12, 3.4, 56, 789, 1.23k, 34.5M."""
    for scale, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.0f}{space}{sign}" if value > 99.5 * scale else f"{value / scale:.3g}{space}{sign}"
    return (f"{value:.2g}" if value < 9.95 else f"{value:.0f}") + space


def overview(found: Mapping[str, Any]) -> str:
    """Processes and cores in a line."""
    keeper = found["roles"].get(KEEPER, {"busy": 0.0})["busy"]
    if found["processes"] == 1:
        return f"one process, in which roles take turns; {keeper:.0%} of its time goes into checkpoints"
    cores = f"{found['cores_busy']:.1f} of {found['cores']} cores in use"
    return f"{found['processes']} processes, {cores}; the one that keeps the words is busy {keeper:.0%}"

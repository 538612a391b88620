"""The picture of a run's topology: roles as boxes with how they spend their time, words between them, and flows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rookery.runs.account import kind_of
from rookery.runs.folder import RunFolder
from rookery.runs.plots import figure_of, save, title
from rookery.runs.scene import Arrow, Scene, amount, measured_of, overview, scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "plot_topology", "shares"]

COLOURS = {
    "environment": "#16a34a",
    "environment and inference": "#16a34a",
    "inference": "#0891b2",
    "learning": "#2563eb",
    "evaluation": "#9333ea",
    "transfer": "#ca8a04",
    "waiting": "#e5e7eb",
}
BLACK, GREY, LIMIT, WORD = "#111827", "#6b7280", "#ea580c", "#0f766e"

# Inches.
EDGE = 0.4
WIDTH, HEIGHT = 2.6, 1.2  # of a role, at least
PILL = (1.8, 0.68)  # of a word
STRAIGHT, BEND = 1.3, 0.55  # of an arrow: where its label stands, and on to the word
PORT = 0.46  # between the arrows of a role
APART = 0.4  # between roles
HEAD, FOOT = 0.95, 1.45


class Box(NamedTuple):
    """Where a role or a word is drawn, by its lower left corner; and its column, a gap half a column on."""

    x: float
    y: float
    width: float
    height: float
    column: float


def shares(role: Mapping[str, Any]) -> dict[str, float]:
    """A role's time by activity, waiting last."""
    work = {name: role[name] for name in COLOURS if name in role and name != "waiting"}
    return {**work, "waiting": max(0.0, 1 - role["busy"])}


def plot_topology(run: str | Path) -> Path | None:
    """Draw what was measured into `plots/topology.png`; None where nothing was.

    Raises:
        RunFolderError, MetricsError: if `run` is no run, or damaged.
    """
    folder = RunFolder.open(run)
    found = measured_of(folder)
    if found is None:
        return None
    places = scene(found)
    boxes, width, height = _placed(places)
    figure = figure_of(width, height, layout=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    _draw_frame(axes, title(folder), found, width, height)
    for arrow in places.arrows:
        _draw_arrow(axes, arrow, boxes, places)
    for name, box in boxes.items():
        if name in found["words"]:
            _draw_word(axes, name, found["words"][name], box)
        else:
            limits = bool(found["bottleneck"]["role"]) and kind_of(name) == found["bottleneck"]["role"]
            _draw_role(axes, name, found["roles"][name], box, limits)
    return save(figure, folder.plots / "topology.png")


def _placed(places: Scene) -> tuple[dict[str, Box], float, float]:
    """A box for each role and word, and the picture's width and height."""
    gap = 2 * (STRAIGHT + BEND) + PILL[0]
    roles = [{role: _role_height(places, role) for role in column} for column in places.roles]
    words = [dict.fromkeys(column, PILL[1]) for column in places.words]
    tall = max(sum(column.values()) + APART * (len(column) - 1) for column in roles)
    tall = max(tall, *(1.4 * len(column) for column in words))
    low = FOOT + 0.5 * any(_far(arrow, places) for arrow in places.arrows)
    boxes: dict[str, Box] = {}
    for column, heights in enumerate(roles):
        boxes |= _stacked(heights, EDGE + column * (WIDTH + gap), WIDTH, (low, tall), column)
        x = EDGE + column * (WIDTH + gap) + WIDTH + STRAIGHT + BEND
        boxes |= _stacked(words[column], x, PILL[0], (low, tall), column + 0.5)
    width = max(box.x + box.width for box in boxes.values()) + EDGE
    return boxes, max(width, 8.5), low + tall + HEAD


def _stacked(
    heights: dict[str, float], x: float, width: float, room: tuple[float, float], column: float
) -> dict[str, Box]:
    """Boxes one above the other, the first on top, spread over the room's height."""
    low, tall = room
    apart = (tall - sum(heights.values())) / max(1, len(heights))
    boxes, y = {}, low + tall - apart / 2
    for name, height in heights.items():
        boxes[name] = Box(x, y - height, width, height, column)
        y -= height + apart
    return boxes


def _role_height(places: Scene, role: str) -> float:
    return max(HEIGHT, PORT * len([arrow for arrow in places.of(role) if not _far(arrow, places)]) + 0.1)


def _far(arrow: Arrow, places: Scene) -> bool:
    """Whether other roles stand between the role and the word."""
    column = next(number for number, roles in enumerate(places.roles) if arrow.role in roles)
    gap = next(number for number, words in enumerate(places.words) if arrow.word in words)
    return gap not in (column - 1, column)


def _port(name: str, arrow: Arrow, side: int, boxes: dict[str, Box], places: Scene, apart: float) -> float:
    """The height at which an arrow touches a box: those of one side (1 is right) are in the order of their ends."""

    def other(each: Arrow) -> str:
        return each.word if name == each.role else each.role

    def middle(each: Arrow) -> float:
        return boxes[other(each)].y + boxes[other(each)].height / 2

    box = boxes[name]
    here = [each for each in places.of(name) if not _far(each, places)]
    here = [each for each in here if (boxes[other(each)].column > box.column) == (side > 0)]
    here.sort(key=lambda each: (-middle(each), not each.gives))
    return box.y + box.height / 2 + apart * ((len(here) - 1) / 2 - here.index(arrow))


def _draw_arrow(axes: Axes, arrow: Arrow, boxes: dict[str, Box], places: Scene) -> None:
    """From a role straight on, under its label, and then in a bend to the word; or the other way."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Outline

    role, word = boxes[arrow.role], boxes[arrow.word]
    if _far(arrow, places):
        low, x, end = FOOT + 0.1, role.x + role.width / 2, word.x + word.width / 2
        points, codes = [(x, role.y), (x, low), (end, low), (end, word.y)], [1, 2, 2, 2]
        label = (x + (0.75 if end > x else -0.75), low)
    else:
        side = 1 if word.column > role.column else -1
        x, end = role.x + role.width * (side > 0), word.x + word.width * (side < 0)
        y = _port(arrow.role, arrow, side, boxes, places, PORT)
        goal = _port(arrow.word, arrow, -side, boxes, places, min(0.2, 0.6 / len(places.of(arrow.word))))
        bend, half = x + side * STRAIGHT, side * BEND / 2
        points = [(x, y), (bend, y), (bend + half, y), (bend + half, goal), (end, goal)]
        codes, label = [1, 2, 4, 4, 4], (x + side * (STRAIGHT / 2 + 0.04), y)
    if not arrow.gives:
        points.reverse()
        codes = [codes[0], *reversed(codes[1:])]
    line = FancyArrowPatch(path=Outline(points, codes), arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0)
    line.set(linewidth=1.2, color=GREY, zorder=1)
    axes.add_patch(line)
    axes.text(label[0], label[1] + 0.04, arrow.rate, ha="center", va="bottom", fontsize=8, color=BLACK)
    axes.text(label[0], label[1] - 0.05, arrow.size, ha="center", va="top", fontsize=7, color=GREY)


def _draw_role(axes: Axes, name: str, role: Mapping[str, Any], box: Box, limits: bool) -> None:
    """A box with a bar of its time; a stack of them for several."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    edge = LIMIT if limits else GREY
    for up in (0.16, 0.08, 0.0) if " × " in name else (0.0,):
        corner, wide = (box.x + up, box.y + up), box.width - 2 * up
        outline = FancyBboxPatch(corner, wide, box.height, boxstyle="round,pad=0,rounding_size=0.08", zorder=2)
        outline.set(facecolor="white", edgecolor=edge, linewidth=2.4 if limits else 1.1)
        axes.add_patch(outline)
    left, middle, wide = box.x + 0.15, box.y + box.height / 2, box.width - 0.3
    axes.text(left, middle + 0.3, name, va="center", fontsize=11, fontweight="bold", color=BLACK)
    axes.text(left + wide, middle + 0.3, f"busy {role['busy']:.0%}", va="center", ha="right", fontsize=9, color=BLACK)
    x = left
    for activity, share in shares(role).items():
        part = wide * min(share, (left + wide - x) / wide)
        axes.add_patch(Rectangle((x, middle - 0.02), part, 0.15, facecolor=COLOURS[activity], zorder=3))
        x += part
    words = sorted(role["waiting"].items(), key=lambda item: -item[1])
    waits = ", ".join(f"{word} {share:.0%}" for word, share in words[:2] if share >= 0.005)  # as many as there is room
    lines = [f"{amount(role['steps_per_second'])} steps/s" if "steps_per_second" in role else ""]
    lines.append(f"waits for {waits}" if waits else "never waits")
    for place, line in enumerate(filter(None, lines)):
        axes.text(left, middle - 0.18 - 0.19 * place, line, va="center", fontsize=8, color=GREY, zorder=3)


def _draw_word(axes: Axes, name: str, word: Mapping[str, Any], box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    pill = FancyBboxPatch(
        (box.x, box.y), box.width, box.height, boxstyle=f"round,pad=0,rounding_size={box.height / 2}", zorder=2
    )
    pill.set(facecolor="#e7f3f1", edgecolor=WORD, linewidth=1.1)
    axes.add_patch(pill)
    levels = [f"{word['fill']:.0%} full"] if "fill" in word else []
    levels += [f"{amount(word['samples_per_insert'])} samples an insert"] if "samples_per_insert" in word else []
    x, y = box.x + box.width / 2, box.y + box.height / 2
    axes.text(x, y + 0.12, name, ha="center", va="center", fontsize=10, fontweight="bold", color=WORD)
    below = ", ".join(levels) or (word["kind"] if word["kind"] != name else "the newest version")
    axes.text(x, y - 0.13, below, ha="center", va="center", fontsize=7.5, color=GREY)


def _draw_frame(axes: Axes, name: str, found: Mapping[str, Any], width: float, height: float) -> None:
    """Title, what the colours mean, and what limits the run."""
    from matplotlib.patches import Rectangle

    axes.text(EDGE, height - 0.35, name, fontsize=13, fontweight="bold", va="center", color=BLACK)
    axes.text(EDGE, height - 0.63, overview(found), fontsize=9, va="center", color=GREY)
    limit, x = found["bottleneck"], EDGE
    used = [each for each in COLOURS if any(each in role for role in found["roles"].values())]
    for activity in used:
        axes.add_patch(Rectangle((x, 1.17), 0.14, 0.14, facecolor=COLOURS[activity]))
        axes.text(x + 0.2, 1.24, activity, fontsize=8, va="center", color=GREY)
        x += 0.45 + 0.075 * len(activity)
    axes.text(EDGE, 0.86, f"Limit: {limit['limit']}", fontsize=10, fontweight="bold", va="center", color=LIMIT)
    room = int((width - 2 * EDGE) / 0.066)
    lines = [*textwrap.wrap(limit["because"], room)[:2], *textwrap.wrap(limit["change"], room)[:2]]
    for place, line in enumerate(lines):
        axes.text(EDGE, 0.62 - 0.17 * place, line, fontsize=8.5, va="center", color=BLACK)

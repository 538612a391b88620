"""Small pictures for `render()`: canvases, boards of coloured cells, and bars for anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import ImageDraw

__all__ = [
    "AMBER",
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "PAPER",
    "RED",
    "Canvas",
    "bars",
    "board",
    "flatten",
]

Colour = tuple[int, int, int]
PAPER: Colour = (250, 249, 246)
INK: Colour = (45, 49, 58)
GREY: Colour = (203, 205, 210)
BLUE: Colour = (47, 111, 183)
RED: Colour = (200, 65, 60)
GREEN: Colour = (60, 145, 90)
AMBER: Colour = (226, 160, 45)


class Canvas:
    """A blank picture with Pillow's `draw` on it; `pixels()` gives it as `[H, W, 3]` uint8."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width, height), PAPER)
        self.draw: ImageDraw.ImageDraw = ImageDraw.Draw(self._image)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def pixels(self) -> np.ndarray:
        return np.array(self._image)


def board(colours: np.ndarray, shortest: int = 200) -> np.ndarray:
    """Cells `[rows, columns, 3]` uint8 as squares with a thin grid; the shorter side at least `shortest` pixels."""
    rows, columns, _ = colours.shape
    size = max(8, -(-shortest // min(rows, columns)))
    large = np.repeat(np.repeat(colours, size, axis=0), size, axis=1)
    large[::size] = large[:, ::size] = GREY
    # Video encoders want even sides.
    return np.ascontiguousarray(large[: large.shape[0] // 2 * 2, : large.shape[1] // 2 * 2])


def flatten(obs: Tensor | dict[str, Any], name: str = "") -> dict[str, np.ndarray]:
    """The first lane's leaves of a nested observation by dotted name, each as a flat row of float32."""
    if isinstance(obs, Tensor):
        return {name or "obs": obs[0].detach().cpu().float().reshape(-1).numpy()}
    return {key: row for child, leaf in obs.items() for key, row in flatten(leaf, f"{name}.{child}".strip(".")).items()}


def bars(title: str, rows: dict[str, np.ndarray]) -> np.ndarray:
    """One labelled row of bars a leaf; each row is scaled to its own largest magnitude, negative bars hang in red."""
    width, height = 320, max(200, 40 + 60 * len(rows))
    canvas = Canvas(width, height)
    canvas.draw.text((10, 10), title, fill=INK)
    for index, (name, values) in enumerate(rows.items()):
        middle = 65 + 60 * index
        canvas.draw.text((10, middle - 6), name[:14], fill=INK)
        canvas.draw.line((110, middle, width - 10, middle), fill=GREY)
        scale = max(1.0, float(np.abs(values).max(initial=0.0)))
        pitch = (width - 120) / max(1, len(values))
        for place, value in enumerate(values):
            left, tip = 110 + place * pitch, middle - 24 * float(value) / scale
            box = (left + 1, min(middle, tip), max(left + 2, left + pitch - 2), max(middle, tip))
            canvas.draw.rectangle(box, fill=BLUE if value >= 0 else RED)
    return canvas.pixels()

"""Videos: frames in, a file out that a decoder reads back with the right size, length and pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rookery.runs.video import write_video


def frames(height: int, width: int, count: int = 5) -> Iterator[np.ndarray]:
    """Each of one grey, brighter from frame to frame, with a red left column."""
    for index in range(count):
        frame = np.full((height, width, 3), index * 40, np.uint8)
        frame[:, 0] = (255, 0, 0)
        yield frame


@pytest.mark.parametrize(
    ("height", "width", "size"), [(210, 160, (320, 420)), (301, 399, (400, 302)), (10, 7, (182, 260))]
)
def test_mp4(tmp_path: Path, height: int, width: int, size: tuple[int, int]) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_video(tmp_path / "video" / "episode.1", frames(height, width), fps=10)
    assert path == tmp_path / "video" / "episode.1.mp4"
    reader = ffmpeg.read_frames(path)
    meta = next(reader)
    assert meta["size"] == size
    assert meta["fps"] == 10
    pictures = [np.frombuffer(data, np.uint8).reshape(size[1], size[0], 3).astype(int) for data in reader]
    assert len(pictures) == 5
    for index, picture in enumerate(pictures):
        assert abs(picture[20:-20, size[0] // 2 :].mean() - index * 40) < 6
    assert [entry.name for entry in path.parent.iterdir()] == ["episode.1.mp4"]


def test_gif_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path = write_video(tmp_path / "episode", frames(10, 10), fps=20)
    assert path == tmp_path / "episode.gif"
    with Image.open(path) as image:
        assert image.size == (260, 260)
        assert image.n_frames == 5
        assert image.info["duration"] == 50
        image.seek(4)
        assert image.convert("RGB").getpixel((200, 100)) == (160, 160, 160)
        assert image.convert("RGB").getpixel((10, 100)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "no frames"),
        ([np.zeros((8, 8, 3), np.float32)], r"Frame 0 is float32 \[8, 8, 3\]"),
        ([np.zeros((8, 8), np.uint8)], r"Frame 0 is uint8 \[8, 8\]"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], r"Frame 1 is uint8 \[8, 9, 3\]"),
        ([np.zeros((0, 8, 3), np.uint8)], "Frame 0"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, bad: list[np.ndarray], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / "v", bad)
    assert not list(tmp_path.iterdir())


def test_wrong_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "v", frames(8, 8), fps=0)

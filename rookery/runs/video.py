"""Pictures of an episode as a file: mp4 where there is ffmpeg, else gif."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["write_video"]

SIDE = 256  # pixels: a picture whose longer side is smaller is enlarged

Frame = NDArray[np.uint8]  # [H, W, 3]


def write_video(path: str | Path, frames: Iterable[Frame], fps: float = 30) -> Path:
    """Write the frames, each `[H, W, 3]` uint8 and all of one size, and return the file: `path` + `.mp4` or `.gif`.

    Frames are taken one by one, so they may be a generator. An existing video is replaced only by a finished one.

    Raises:
        ValueError: if there is no frame, or one has the wrong shape or dtype, naming it.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps} is no frame rate; use one above 0, e.g. 30.")
    prepared = _prepared(frames)
    first = next(prepared, None)
    if first is None:
        raise ValueError("There are no frames to write; render at least one step.")
    everything = chain([first], prepared)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".mp4" if _has_ffmpeg() else ".gif"
    target = path.with_name(path.name + suffix)
    aside = path.with_name(f".tmp-{path.name}{suffix}")
    try:
        (_write_mp4 if suffix == ".mp4" else _write_gif)(aside, everything, first.shape, fps)
        aside.replace(target)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return target


def _prepared(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Every frame checked, enlarged by a whole factor, and padded to even sides, which mp4's colours need."""
    size = None
    for index, frame in enumerate(frames):
        frame = np.asarray(frame)
        size = size or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != size or not frame.size:
            raise ValueError(
                f"Frame {index} is {frame.dtype} {list(frame.shape)}; a video needs uint8 [H, W, 3], all of one size."
            )
        factor = -(-SIDE // max(frame.shape[:2]))
        large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
        yield np.pad(large, ((0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)), mode="edge")


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def _write_mp4(path: Path, frames: Iterable[Frame], shape: tuple[int, ...], fps: float) -> None:
    import imageio_ffmpeg

    # yuv420p is what every player reads; the picture is scaled here already, so no block size is forced on it.
    writer = imageio_ffmpeg.write_frames(
        path, (shape[1], shape[0]), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=1, quality=7
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _write_gif(path: Path, frames: Iterable[Frame], shape: tuple[int, ...], fps: float) -> None:
    from PIL import Image

    images = (Image.fromarray(frame) for frame in frames)
    milliseconds = max(20, round(100 / fps) * 10)  # gif counts in 10 ms, and players slow down what is below 20
    next(images).save(path, format="GIF", save_all=True, append_images=images, duration=milliseconds, loop=0)

"""Small files written so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read_json", "reason", "sync", "write_json", "write_text"]


def reason(error: BaseException) -> str:
    """The error as a part of a sentence: the system's own words for an `OSError`, on one line, without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split()).rstrip(".")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: written aside, synced, renamed. On OSError the old content is still there."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any, strict: bool = True) -> None:
    """`write_text` of indented JSON, with `NaN` and `Infinity` as Python reads them only if not `strict`.

    Raises OSError, or TypeError and ValueError for what JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=not strict) + "\n")


def read_json(path: Path) -> Any:
    """A small JSON file's value. Raises OSError if it cannot be read and ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

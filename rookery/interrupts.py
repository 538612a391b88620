"""Ctrl-C that nothing swallows: libraries catch every exception in places, most of all while they are imported."""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["heed", "raise_if_heard"]

_heard = False


def heed() -> None:
    """From now on Ctrl-C is remembered beside what it does: raising `KeyboardInterrupt`, unless it does nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _hear)


def raise_if_heard() -> None:
    """For loops, and before what is long.

    Raises:
        KeyboardInterrupt: if there was a Ctrl-C, and whoever was at work then took it for an error of their own.
    """
    if _heard:
        raise KeyboardInterrupt


def _hear(number: int, frame: Any) -> None:
    global _heard
    _heard = True
    signal.default_int_handler(number, frame)

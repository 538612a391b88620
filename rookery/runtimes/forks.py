"""Processes for roles: forks of a server of their own, which like them is spared the signals to this process's group.

Not of multiprocessing's server, of which there is one in a process: what else is forked there would be deaf to Ctrl-C.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["SERVER", "SHELTERED", "preload", "started"]

SHELTERED = {signal.SIGINT, signal.SIGTERM}  # of which a process that is being started is spared
SERVER: Any = forkserver.ForkServer()  # type: ignore[attr-defined]
LAUNCH = threading.Lock()
FORKS = "forkserver" in multiprocessing.get_all_start_methods()  # else roles are spawned


def preload(modules: Iterable[str]) -> None:
    """Begin the server, which imports these, if there is none: a role is then a fork of it, 10 ms instead of 1.5 s."""
    SERVER.set_forkserver_preload([*modules])
    if FORKS:
        with _sheltered(), contextlib.suppress(OSError):  # then `started` tries again
            SERVER.ensure_running()


def started(target: Callable[..., None], args: tuple[Any, ...], name: str) -> BaseProcess:
    """A new process, a daemon, that runs `target`; the signals of `SHELTERED` are blocked there until it changes that.

    Raises:
        AttributeError, TypeError, pickle.PicklingError: `target` or `args` cannot be handed over.
        EOFError, OSError: there is no memory for it, or the server is dead; the next call begins another.
    """
    context: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    process: BaseProcess = context.Process(target=target, args=args, name=name, daemon=True)
    with _sheltered(), _own_server():
        process.start()
    return process


@contextlib.contextmanager
def _sheltered() -> Iterator[None]:
    """A process that is started here is spared the signals to this one's group; it can change that for itself."""
    resource_tracker.ensure_running()  # the server of forks begins it otherwise, and that lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SHELTERED)  # for one that came before, this may raise
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _own_server() -> Iterator[None]:
    """What multiprocessing starts here is a fork of `SERVER`."""
    with LAUNCH:
        usual = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = SERVER.connect_to_new_process
        try:
            yield
        finally:
            forkserver.connect_to_new_process = usual

"""A role on another host: it plays in a thread of a Ray actor, which carries what it says and what it is told."""

from __future__ import annotations

import copy
import os
import queue
import sys
import threading
import time
from typing import Any, NamedTuple

import torch

from rookery.runtimes.boxes import content
from rookery.runtimes.process import Link, live
from rookery.runtimes.words import RoleSpec

__all__ = ["BEGIN", "GROUPS", "Carried", "Seat"]

GROUPS = ("says", "told")  # calls, each with a thread of its own in a seat
BEGIN = 120.0  # seconds that a seat may take to begin
PAUSE = 1.0  # seconds that a seat waits for its role to say something
CUT_OFF = 30.0  # seconds without a call after which a seat knows that nobody hears it


class Carried(NamedTuple):
    """Part of a message that lies in Ray's object store, once for all who are told of it."""

    reference: Any


class SeatLink(Link):
    """A role's line, whose boxes are its own: what is in them travels."""

    def gives(self, box: Any) -> None:
        self.send("content", self.numbers[id(box)], content(box))


class Mail:
    """Both ends of a `Link` to a runtime that is elsewhere."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.heard: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def send(self, message: tuple[Any, ...]) -> None:
        self.said.put(copy.deepcopy(message))  # now, since the role goes on with what is in it

    def recv(self) -> tuple[Any, ...]:
        import ray

        message = self.heard.get()
        return tuple(ray.get(part.reference) if isinstance(part, Carried) else part for part in message)


class Seat:
    """A role and its mail; each incarnation of a role has another seat.

    Args:
        paths: where to find the modules that roles are of, as in the process that runs the graph.
    """

    def __init__(self, paths: list[str]) -> None:
        sys.path.extend(path for path in paths if path not in sys.path)
        self._mail, self._called = Mail(), time.monotonic()  # last
        self._patience = BEGIN  # until somebody has asked what the role says
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, spec: RoleSpec, seed: int, saved: dict[str, Any] | None, threads: int) -> None:
        """Play the role, with so many threads of torch."""
        torch.set_num_threads(threads)
        self._role = threading.Thread(target=live, args=(SeatLink(self._mail), spec, seed, saved), daemon=True)
        self._role.start()

    def told(self, *messages: tuple[Any, ...]) -> None:
        """Pass on what the runtime says."""
        for message in messages:
            self._mail.heard.put(message)

    def says(self) -> tuple[list[tuple[Any, ...]], bool]:
        """What the role has said since the last call, oldest first; and whether it is over."""
        self._called, self._patience, messages = time.monotonic(), CUT_OFF, []
        over = not self._role.is_alive()
        try:
            messages.append(self._mail.said.get(timeout=0 if over else PAUSE))
            while True:
                messages.append(self._mail.said.get_nowait())
        except queue.Empty:
            return messages, over

    def _watch(self) -> None:
        """End a seat that the runtime has lost sight of: the role has long been started again elsewhere."""
        while time.monotonic() - self._called < self._patience:
            time.sleep(PAUSE)
        os._exit(1)

"""A role in a process of its own: the four words as it sees them, each a message to the process that keeps them."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from rookery.runtimes.boxes import copied, fill, fits, packed, pour, unpacked
from rookery.runtimes.forks import SHELTERED
from rookery.runtimes.inline import restore, said
from rookery.runtimes.meter import Told, combined, told
from rookery.runtimes.words import Part, Published, RoleSpec, Stateful

__all__ = ["UNGUARDED", "Ended", "Link", "begun", "leave_if_imported", "live", "main"]

PR_SET_PDEATHSIG = 1  # of prctl(2)
SHARE = 0.01  # of a role's time that may go into handing over its state
UNGUARDED = 78  # exit status of a process whose script would train all over (EX_CONFIG of sysexits.h)
TELL = 0.25  # seconds between two accounts of a role's work


def leave_if_imported() -> None:
    """End this process where it only imports the script that its parent was started from.

    Processes that are not forked from the parent begin by that, and a script that trains outside of
    `if __name__ == "__main__":` would train all over in each of them.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)  # no traceback: the parent says what to do


@contextmanager
def _importing() -> Iterator[None]:
    """Whatever is imported here is by a process that begins: see `leave_if_imported`."""
    process: Any = multiprocessing.current_process()
    process._inheriting = True
    yield
    del process._inheriting


class Ended(BaseException):
    """The run is over: leave the role, closing what it holds."""


class Link:
    """A role's line to the runtime; it waits for answers, and hands over the role's state meanwhile."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.boxes: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}  # of boxes by their identity
        self.part: Stateful | None = None
        self._handed, self._took = time.monotonic(), 0.0  # when the state was last handed over, and how long that took
        self.published = False  # since the state was last to be handed over
        self._at_first, self._told = told(None), 0.0  # the part's account when it was kept; when it was last told
        self._cpu = 0.0  # seconds of processor time, when it was kept

    def send(self, *message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:  # the runtime is gone
            raise Ended from error

    def tell(self, word: str, what: str, *args: Any) -> None:
        self.send("tell", word, what, args)

    async def ask(self, word: str, what: str, *args: Any) -> Any:
        """Send a request and wait for its answer."""
        self.ends_unit(word, what)
        return self.aside(word, what, *args)

    def ends_unit(self, word: str, what: str) -> None:
        """Before the first request after something was published: the role has told of all that it did until then.

        Handed over any earlier, its state would hold work that is given out again should it die before it told.
        """
        if self.published:
            self.published = False
            self.hand_over(word if what == "sample" else None)

    def aside(self, word: str, what: str, *args: Any) -> Any:
        """`ask` for what is answered at once."""
        if time.monotonic() - self._told > TELL:
            self.account()
        self.send("ask", word, what, args)
        return self.hear("answer")

    def hear(self, wanted: str) -> Any:
        """Wait for a message; meanwhile take in boxes and give the role's state."""
        while True:
            try:
                kind, *rest = self.connection.recv()
            except (EOFError, OSError) as error:  # the runtime is gone
                raise Ended from error
            if kind == "box":
                self.know(*rest)
            elif kind == "content":
                number, content = rest
                fill(self.boxes[number], content)
            elif kind == "state":
                self.account()
                self.send("state", self.state())
            elif kind == "end":
                raise Ended
            if kind == wanted:
                return rest[0]

    def keep(self, part: Stateful) -> None:
        """Take the role's part, as it begins."""
        self.part, self._at_first, self._cpu = part, told(part), time.process_time()

    def account(self) -> None:
        """Say what the role's work was so far."""
        self._told = time.monotonic()
        account: Told = {**combined(told(self.part), self._at_first, -1), "cpu": time.process_time() - self._cpu}
        self.send("told", account)

    def know(self, number: int, box: Any) -> None:
        self.boxes[number], self.numbers[id(box)] = box, number

    def make(self, number: int, box: Any) -> Any:
        """A new box, which everybody else hears of through the runtime."""
        self.know(number, box)
        self.send("box", number, box)
        return box

    def gives(self, box: Any) -> None:
        """What is in a box is for others to see: they do, where they share its memory."""

    def state(self) -> dict[str, Any] | None:
        """The role's state, packed."""
        return None if self.part is None else packed(self.part.state())

    def hand_over(self, learnt: str | None = None) -> None:
        """Give the role's state in case that it dies, as often as a small share of its time allows.

        Args:
            learnt: the replay whose samples the role has learnt from altogether.
        """
        began = time.monotonic()
        if self.part is None or began - self._handed < self._took / SHARE:
            return
        self.send("kept", self.state(), learnt)
        self._handed = time.monotonic()
        self._took = self._handed - began


class LinkedQueue:
    """`Queue` as a role sees it."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        number = await self.link.ask(self.name, "slot", index)
        return self.link.boxes[number] if number in self.link.boxes else self.link.make(number, make())

    def put(self, slot: Any) -> None:
        self.link.gives(slot)
        self.link.tell(self.name, "put", self.link.numbers[id(slot)])

    async def get(self, count: int) -> list[Any]:
        numbers = await self.link.ask(self.name, "get", count)
        return [self.link.boxes[number] for number in numbers]

    def release(self, slots: list[Any]) -> None:
        self.link.tell(self.name, "release", [self.link.numbers[id(slot)] for slot in slots])


class LinkedWeights:
    """`Weights` as a role sees it: values stay as they are until the role asks for newer ones."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name

    def publish(self, version: int, values: Any, steps: int) -> None:
        link = self.link
        number = link.aside(self.name, "box")
        if number in link.boxes and fits(link.boxes[number], values):
            pour(values, link.boxes[number])
            link.gives(link.boxes[number])
        else:
            link.make(number, copied(values))
        link.tell(self.name, "publish", version, number, steps)
        link.published = True

    async def newer_than(self, version: int, steps: int = 0) -> Published:
        version, number, steps = await self.link.ask(self.name, "newer_than", version, steps)
        return Published(version, self.link.boxes[number], steps)

    async def latest(self) -> Published:
        version, number, steps = await self.link.ask(self.name, "latest")
        return Published(version, self.link.boxes[number], steps)


class LinkedReplay:
    """`Replay` as a role sees it; samples stay as they are until the role asks for the next."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name
        self.inserts = link.aside(name, "count")

    async def slot(self, make: Callable[[], Any], items: int, writer: int = 0) -> Any:
        number, self.inserts = await self.link.ask(self.name, "slot", items, writer)
        return self.link.boxes[number] if number in self.link.boxes else self.link.make(number, make())

    def insert(self, slot: Any, count: int, writer: int = 0) -> None:
        self.inserts += count
        self.link.gives(slot)
        self.link.tell(self.name, "insert", self.link.numbers[id(slot)], count, writer)

    async def sample(self, count: int, most: int = 1, **how: Any) -> Any:
        number, self.inserts = await self.link.ask(self.name, "sample", count, most, how)
        return self.link.boxes[number]

    def prioritise(self, index: Any, priorities: Any) -> None:
        self.link.tell(self.name, "prioritise", packed(index), packed(priorities))


class LinkedAnswer:
    """What somebody asked, and the answer once it is there."""

    def __init__(self, link: Link, name: str, number: int) -> None:
        self.link, self.name, self.number = link, name, number

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self._wait())

    @types.coroutine
    def _wait(self) -> Generator[Any, Any, Any]:
        return (yield from self.link.ask(self.name, "answer", self.number))


class LinkedCalls:
    """`Calls` as a role sees it."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        number = await self.link.ask(self.name, "slot", index)
        return self.link.boxes[number] if number in self.link.boxes else self.link.make(number, make())

    def ask(self, slot: Any) -> LinkedAnswer:
        number = self.link.numbers[id(slot)]
        self.link.gives(slot)
        self.link.tell(self.name, "ask", number)
        return LinkedAnswer(self.link, self.name, number)

    async def requests(self, most: int) -> list[tuple[Any, Callable[[Any], None]]]:
        def answer(number: int, slot: Any, value: Any) -> None:
            self.link.gives(slot)
            self.link.tell(self.name, "answer", number, value)

        asked = await self.link.ask(self.name, "requests", most)
        slots = [(number, self.link.boxes[slot]) for number, slot in asked]
        return [(slot, partial(answer, number, slot)) for number, slot in slots]


WORDS = {"queue": LinkedQueue, "weights": LinkedWeights, "replay": LinkedReplay, "calls": LinkedCalls}


class LinkedRole:
    """`Role` in its own process."""

    def __init__(self, link: Link, spec: RoleSpec, seed: int, saved: dict[str, Any] | None) -> None:
        self.link, self.name, self.index, self.seed, self._saved = link, spec.name, spec.index, seed, saved

    def report(self, step: int, values: dict[str, Any]) -> None:
        self.link.send("report", step, values)

    def advance(self, steps: int) -> None:
        self.link.send("advance", steps)

    @contextmanager
    def unit(self) -> Iterator[None]:
        self.link.send("within", True)
        yield
        self.link.send("within", False)

    async def boundary(self) -> None:
        """Nothing to wait for: a process stops at a question."""

    def keep(self, part: Part) -> Part:
        if self.link.part is not None:
            raise RuntimeError(f"{self.name} {self.index} keeps two parts; keep one that holds both.")
        if self._saved is not None:
            restore(part, self._saved, f"{self.name} {self.index}")
        self.link.keep(part)
        return part


def main(connection: Connection, threads: int) -> None:
    """What the process of a role does, which it is told first: its spec, its seed and its state, packed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the runtime decides
    signal.signal(signal.SIGTERM, lambda *_: None)  # and so does one to the whole group; not inherited by exec
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHELTERED)
    _die_with_parent()
    try:
        with _importing():
            spec, seed, saved = connection.recv()
    except EOFError:  # the runtime is gone
        return
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"{spec.name} {spec.index}")  # for `top` and `ps` (Linux)
    torch.set_num_threads(threads)
    live(Link(connection), spec, seed, saved)


def live(link: Link, spec: RoleSpec, seed: int, saved: dict[str, Any] | None) -> None:
    """Play a role from its beginning until the runtime has heard how it ended."""
    try:
        try:
            _play(begun(link, spec, seed, saved), spec.name)
        except Exception as error:
            link.send("failed", said(error), traceback.format_exc())
        else:
            link.account()
            link.send("over", link.state())
        link.hear("end")  # until then this process is here to share the boxes it made
    except Ended:
        pass


def begun(link: Link, spec: RoleSpec, seed: int, saved: dict[str, Any] | None) -> Any:
    """The role's coroutine, before its first turn."""
    args = spec.arguments(lambda word: WORDS[word.kind](link, word.name))
    return spec.function(LinkedRole(link, spec, seed, None if saved is None else unpacked(saved)), **args)


def _play(coroutine: Any, name: str) -> None:
    """Run a role to its end."""
    try:
        coroutine.send(None)  # its words wait inside
    except StopIteration:
        return
    finally:
        coroutine.close()
    raise RuntimeError(f"{name} awaits something that is not a word; use only the words handed to it.")


def _die_with_parent() -> None:
    """Be killed when the process that started this one dies (Linux; elsewhere the closed connection is noticed).

    With a server of forks that is the server, which ends once nobody has the other end of a pipe: the runtime, and each
    process that it made, which has to let go of it.
    """
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if (held := getattr(server, "_forkserver_alive_fd", None)) is not None:
        os.close(held)
        server._forkserver_alive_fd = None
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

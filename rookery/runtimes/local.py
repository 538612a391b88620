"""The local runtime: each role in a process of its own, the words kept by this one.

Every wait of a role is a question to this process, which answers when the inline runtime's word of the same name would
go on; so both runtimes obey the same rules by the same code, and no lock is shared that a killed process could hold.
What is large lies in boxes, memory that the processes share: only their numbers travel.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.util
import pickle
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from rookery.runtimes.boxes import copied, fits, packed, pour, unpacked
from rookery.runtimes.inline import (
    Deadlock,
    InlineCalls,
    InlineQueue,
    InlineReplay,
    InlineWeights,
    RoleError,
    State,
    role_seed,
    until,
)
from rookery.runtimes.process import main
from rookery.runtimes.words import Graph, Published, RoleSpec

__all__ = ["Local"]

log = logging.getLogger("rookery")

TICK = 0.2  # seconds after which signals and deadlines are looked at, when nothing happens
UNITS = ("put", "insert", "publish", "answer", "report")  # what a role says when it has done a unit of work
BURST = 64  # messages heard from one member before the others have their turn
ASIDE = ("box", "count")  # questions that are answered at once, and lend no work
UNGUARDED = "what it says stands above; a script needs `if __name__ == '__main__':` before it trains"
GRACE = 5.0  # seconds that a role has to close what it holds


class Box:
    """A box, and which members have heard of it."""

    def __init__(self, number: int, value: Any = None) -> None:
        self.number, self.value = number, value
        self.known_to: set[Connection] = set()

    def batch(self) -> Any:
        """What a replay takes from a slot."""
        return self.value.batch()


@dataclass
class Member:
    """A role and its process."""

    spec: RoleSpec
    seed: int
    kept: State | None  # its state when that was last heard of, packed
    process: Any = None
    connection: Connection = None  # type: ignore[assignment]  # from its start on
    waiting: Coroutine[Any, Any, Any] | None = None  # its question
    starts: bool = False  # whether the answer starts new work, rather than ending some
    works: bool = False  # whether it gives work at all
    waits_for: str = "its first turn"
    since: float = 0.0  # when it was last heard of
    spoke: bool = False  # since its process began
    over: bool = False
    failures: int = 0  # in a row
    failed_at: int = -1  # steps of the run at the last failure
    granted: bool = False  # whether it is at a unit of work
    filling: dict[int, tuple[str, Box]] = field(default_factory=dict)  # boxes lent to it, and by which word
    reading: dict[int, tuple[str, Box]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.spec.index}"


class LocalQueue(InlineQueue):
    """`Queue`: what goes round are boxes."""

    starts = ("slot",)

    def __init__(self, runtime: Local, name: str, each: int) -> None:
        super().__init__(each)
        self.runtime, self.name = runtime, name

    async def ask_slot(self, member: Member, index: int) -> int:
        box = await self.slot(self.runtime.box, index)
        member.filling[box.number] = (self.name, box)
        return self.runtime.lend(member, box)

    async def ask_get(self, member: Member, count: int) -> list[int]:
        boxes = await self.get(count)
        member.reading.update({box.number: (self.name, box) for box in boxes})
        return [self.runtime.lend(member, box) for box in boxes]

    def tell_put(self, member: Member, number: int) -> None:
        self.put(member.filling.pop(number)[1])

    def tell_release(self, member: Member, numbers: list[int]) -> None:
        self.release([member.reading.pop(number)[1] for number in numbers])

    def reclaim(self, filling: list[Box], reading: list[Box]) -> int:
        """Take back what a dead role held: what it read goes back to the front; gives how many units are lost."""
        self.release(filling)
        self._filled.extendleft(reversed(reading))
        return len(filling)

    @property
    def underway(self) -> bool:
        """Whether something is filled: the rest that it waits for must come before the run's state is taken."""
        return bool(self._filled)

    def state(self) -> State:
        return {}  # what is still on its way, since nobody would have taken it, is dropped

    def load_state(self, state: State) -> None:
        """What another runtime had on its way is dropped too: roles make slots, and there is none yet."""


@dataclass
class Reading:
    """What a member was last given by `Weights`."""

    published: Published
    era: int
    ended: bool = False  # the member died, once it had done its work with this


class LocalWeights(InlineWeights):
    """`Weights`: a box is written again once it is neither the newest nor held by a reader, nor being written.

    A publisher that begins anew falls back to versions that readers had before. Its first is what they have, nearly:
    they wait for its second, which begins an era in which everything counts as newer. So who acted in step with
    the publisher still does.
    """

    starts = ("newer_than", "latest")

    def __init__(self, runtime: Local, name: str) -> None:
        super().__init__()
        self.runtime, self.name = runtime, name
        self._boxes: list[Box] = []
        self._readings: dict[int, Reading] = {}  # by the member
        self._era, self._turning = 0, False
        self._anew: set[int] = set()  # members that died since they last published

    async def ask_box(self, member: Member) -> int:
        newest = [] if self._newest is None else [self._newest]
        held = [reading.published for reading in self._readings.values() if not reading.ended]
        busy = {published.values.number for published in newest + held}
        busy |= {number for each in self.runtime.members for number in each.filling}
        box = next((box for box in self._boxes if box.number not in busy), None)
        if box is None:
            box = self.runtime.box()
            self._boxes.append(box)
        member.filling[box.number] = (self.name, box)
        return self.runtime.lend(member, box)

    def tell_publish(self, member: Member, version: int, number: int, steps: int) -> None:
        if id(member) in self._anew:
            self._anew.remove(id(member))
            self._turning = self._newest is not None
        elif self._turning:
            self._turn()
        self.publish(version, member.filling.pop(number)[1], steps)

    async def ask_newer_than(self, member: Member, version: int) -> tuple[int, int, int]:
        def ready() -> bool:
            if self._newest is None:
                return False
            known = self._readings.get(id(member))
            if known is None:
                return self._newest.version > version
            least = max(version, known.published.version) if known.ended else version
            return self._newest.version > least or self._era > known.era

        await until(ready, f"weights newer than {version}")
        return self._read(member)

    async def ask_latest(self, member: Member) -> tuple[int, int, int]:
        await self.latest()
        return self._read(member)

    def _read(self, member: Member) -> tuple[int, int, int]:
        assert self._newest is not None
        self._readings[id(member)] = Reading(self._newest, self._era)
        return self._newest.version, self.runtime.lend(member, self._newest.values), self._newest.steps

    def _turn(self) -> None:
        self._era, self._turning = self._era + 1, False

    def reclaim(self, filling: list[Box], reading: list[Box]) -> int:
        return 0

    def forget(self, member: Member) -> None:
        """Forget what a dead member was at: one that had not done its work is given the same again."""
        self._anew.add(id(member))
        if not member.granted and id(member) in self._readings:
            self._readings[id(member)].ended = True
        else:
            self._readings.pop(id(member), None)

    def relent(self) -> bool:
        """When nobody can go on: let those read who were made to wait because of a death; whether there are any."""
        ended = [who for who, reading in self._readings.items() if reading.ended]
        found = self._turning or bool(ended)
        for who in ended:
            del self._readings[who]
        if self._turning:
            self._turn()
        return found


class LocalReplay(InlineReplay):
    """`Replay`: the store is in this process, slots and samples go through boxes.

    Until its reader comes back, what was sampled is not learnt from, and nobody may insert on its account: a topology
    whose sides take turns does so here too.
    """

    starts = ("slot",)

    def __init__(self, runtime: Local, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.runtime, self.name = runtime, name
        self._samples: list[Box] = []
        self._lent: dict[int, tuple[int, Box]] = {}  # samples, and the box they are in, by the member that has them

    async def ask_count(self, member: Member) -> int:
        return self.inserts

    async def ask_slot(self, member: Member, items: int, writer: int) -> tuple[int, int]:
        box = await self.slot(self.runtime.box, items, writer)
        member.filling[box.number] = (self.name, box)
        return self.runtime.lend(member, box), self.inserts

    def tell_insert(self, member: Member, number: int, count: int, writer: int) -> None:
        self.insert(member.filling.pop(number)[1], count, writer)

    def ask_sample(self, member: Member, *how: Any) -> Coroutine[Any, Any, tuple[int, int]]:
        if id(member) in self._lent:
            self.limiter.unlearnt -= self._lent.pop(id(member))[0]
        return self._sample(member, *how)

    async def _sample(self, member: Member, count: int, most: int, how: dict[str, Any]) -> tuple[int, int]:
        drawn, samples = await self.draw(count, most, **how)
        self.limiter.unlearnt += drawn
        lent = [box.number for _, box in self._lent.values()]
        box = next((box for box in self._samples if box.number not in lent and fits(box.value, samples)), None)
        if box is None:
            box = self.runtime.box(copied(samples))
            self._samples.append(box)
        else:
            pour(samples, box.value)
        self._lent[id(member)] = (drawn, box)
        return self.runtime.lend(member, box), self.inserts

    def tell_prioritise(self, member: Member, index: np.ndarray, priorities: np.ndarray) -> None:
        self.prioritise(unpacked(index), unpacked(priorities))

    def _may_write(self, writer: int) -> bool:
        return self._overlap or super()._may_write(writer)

    def reclaim(self, filling: list[Box], reading: list[Box]) -> int:
        for box in filling:
            self._give_back(box)
        return len(filling)

    def forget(self, member: Member) -> None:
        """What a dead member did not learn from is owed again."""
        drawn, _ = self._lent.pop(id(member), (0, None))
        self.limiter.unlearnt -= drawn
        self.limiter.samples -= drawn


class LocalCalls(InlineCalls):
    """`Calls`: requests and answers travel as they are."""

    starts = ("ask",)

    def __init__(self, runtime: Local, name: str) -> None:
        super().__init__()
        self._open: dict[int, tuple[Member, Any, Callable[[Any], None]]] = {}  # who works on which request
        self._asked = 0

    async def ask_ask(self, member: Member, request: Any) -> Any:
        return await self.ask(request)

    async def ask_requests(self, member: Member, most: int) -> list[tuple[int, Any]]:
        found = []
        for request, answer in await self.requests(most):
            self._asked += 1
            self._open[self._asked] = (member, request, answer)
            found.append((self._asked, request))
        return found

    def tell_answer(self, member: Member, number: int, value: Any) -> None:
        self._open.pop(number)[2](value)

    def forget(self, member: Member) -> None:
        """What a dead member did not answer waits again, as the first."""
        left = [number for number, (who, *_) in self._open.items() if who is member]
        self._waiting.extendleft(self._open.pop(number)[1:] for number in reversed(left))


WORDS: dict[str, Callable[..., Any]] = {
    "queue": LocalQueue,
    "weights": LocalWeights,
    "replay": LocalReplay,
    "calls": LocalCalls,
}


class Local:
    """Runs a graph of roles as processes.

    A role whose process dies or raises, or that is not heard of for `deadline` seconds, is started again from its
    arguments (and the last state that it handed over): the unit of work it was at is dropped and counted, the others
    go on. `failures` in a row without a unit of work done end the run.

    Args:
        report: takes role, index, step and values of every row.
        threads: of torch, in each process.
        deadline: seconds that a role may work without a word.
    """

    def __init__(
        self,
        report: Callable[[str, int, int, dict[str, Any]], None],
        *,
        threads: int = 1,
        deadline: float = 600.0,
        failures: int = 3,
    ) -> None:
        self.report, self.threads, self.deadline, self.failures = report, threads, deadline, failures
        self.steps = self.restarts = self.dropped = 0
        self.members: list[Member] = []
        self.words: dict[str, Any] = {}
        self._boxes: dict[int, Box] = {}
        self._paused = False
        self._owing: set[int] = set()  # members whose state was asked for
        kinds = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")

    # Boxes.

    def box(self, value: Any = None) -> Box:
        made = Box(len(self._boxes), value)
        self._boxes[made.number] = made
        return made

    def lend(self, member: Member, box: Box) -> int:
        """The box's number, once the member knows what it stands for."""
        if box.value is not None and member.connection not in box.known_to:
            box.known_to.add(member.connection)
            self._send(member, "box", box.number, box.value)
        return box.number

    # Running.

    def run(
        self, graph: Graph, between: Callable[[int, Callable[[], State]], bool], saved: State | None = None
    ) -> State:
        """Run until a role that ends the run returns, or `between` says so; gives the final state.

        Raises:
            Deadlock: if no role can go on.
            RoleError: if a role fails again and again.
        """
        self.words = {name: WORDS[spec.kind](self, name, **spec.options) for name, spec in graph.words.items()}
        if saved is not None:
            self.steps = saved["steps"]
            for name, word in self.words.items():
                if hasattr(word, "load_state"):
                    word.load_state(saved["words"].get(name, {}))
        for spec in graph.roles:
            state = None if saved is None else saved["roles"].get(f"{spec.name}_{spec.index}")
            self.members.append(Member(spec, role_seed(graph.seed, spec), packed(state)))
        # One process imports what roles need, and each role is a fork of it: 10 ms instead of 1.5 s.
        self._context.set_forkserver_preload(
            [main.__module__, *sorted({spec.function.__module__ for spec in graph.roles})]
        )
        multiprocessing.util.get_temp_dir()  # one for all processes: a killed one cannot remove its own
        _open_many_files()
        try:
            for member in self.members:
                self._start(member)
            while not between(self.steps, self.snapshot) and not self._ended():
                self._turn()
            return self.snapshot()
        finally:
            self._end()
            self.members, self.words, self._boxes = [], {}, {}  # which frees the shared memory

    def snapshot(self) -> State:
        """The run's state once nobody is at work: what is begun is finished, nothing new is started."""
        self._paused = True
        while True:
            while self._answer_all() or not self._idle() or self._finish():
                self._turn()
            self._owing = {id(member) for member in self.members if not member.over}
            for member in self.members:
                self._send(member, "state")
            while self._owing and self._idle():
                self._turn()
            if not self._owing:  # else one has died: once more
                break
        self._paused = False
        kept = {f"{member.spec.name}_{member.spec.index}": member.kept for member in self.members}
        return {
            "roles": {name: unpacked(state) for name, state in kept.items() if state is not None},
            "words": {name: word.state() for name, word in self.words.items() if hasattr(word, "state")},
            "steps": self.steps,
        }

    def _finish(self) -> bool:
        """Let one go on while something is on its way that others wait to complete; whether one does."""
        underway = any(getattr(word, "underway", False) for word in self.words.values())
        return underway and any(self._answer(member, paused=False) for member in self.members)

    def _ended(self) -> bool:
        return any(member.over and member.spec.ends_run for member in self.members)

    def _turn(self) -> None:
        """Answer what can be answered, and hear what there is to be heard."""
        self._answer_all()
        at = {member.connection: member for member in self.members if not member.over}
        if self._idle() and not self._paused and not self._ended() and not wait(list(at), 0):
            if sum(word.relent() for word in self.words.values() if hasattr(word, "relent")):
                return
            waits = "; ".join(f"{member.name} waits for {member.waits_for}" for member in self.members)
            raise Deadlock(f"no role can go on: {waits}.")
        for connection in wait(list(at), TICK):
            self._listen(at[connection])  # type: ignore[index]
        self._look_after()

    def _listen(self, member: Member) -> None:
        """Hear what a member says."""
        connection = member.connection
        for _ in range(BURST):
            try:
                if not connection.poll():
                    return
                message = connection.recv()
            except (EOFError, OSError) as error:
                hint = "" if member.spoke else f" before it began; {UNGUARDED}"
                self._revive(member, f"its process ended ({_cause(member.process)}){hint}", error)
                return
            try:
                self._hear(member, *message)
            except RoleError:
                raise
            except Exception as error:  # a word's, on the role's behalf
                raise RoleError(f"{member.name} failed: {error}") from error
            if member.over or member.connection is not connection:
                return

    def _idle(self) -> bool:
        return all(member.over or member.waiting is not None for member in self.members)

    def _hear(self, member: Member, kind: str, *rest: Any) -> None:
        member.since, member.spoke = time.monotonic(), True
        if kind == "tell":
            word, what, args = rest
            getattr(self.words[word], f"tell_{what}")(member, *args)
            self._credit(member, what)
        elif kind == "ask":
            word, what, args = rest
            member.waiting = getattr(self.words[word], f"ask_{what}")(member, *args)
            member.starts, member.works = what in self.words[word].starts, what not in ASIDE
        elif kind == "box":
            number, value = rest
            self._boxes[number].value = value
            self._boxes[number].known_to = {member.connection}
        elif kind == "report":
            self.report(member.spec.name, member.spec.index, *rest)
            self._credit(member, kind)
        elif kind == "advance":
            self.steps = rest[0]
        elif kind == "kept":
            member.kept = rest[0]
        elif kind == "state":
            member.kept = rest[0]
            self._owing.discard(id(member))
        elif kind == "over":
            member.over, member.waits_for, member.kept = True, "nothing, it has ended", rest[0]
            self._send(member, "end")
        elif kind == "failed":
            error, trace = rest
            self._revive(member, error, RuntimeError(trace))

    def _credit(self, member: Member, what: str) -> None:
        """Note a unit of work done; failures are forgotten once the run has come further than it was at the last."""
        if member.granted and what in UNITS:
            member.granted = False
            if self.steps > member.failed_at:
                member.failures = 0

    def _answer_all(self) -> bool:
        """Answer what can be answered, and what can be then; whether anything was."""
        found = False
        while sum(self._answer(member, self._paused) for member in self.members):
            found = True
        return found

    def _answer(self, member: Member, paused: bool) -> bool:
        """Answer a member's question if that can be; whether it was."""
        if member.waiting is None or (paused and member.starts):
            return False
        try:
            member.waits_for, _ = member.waiting.send(None)
            return False
        except StopIteration as answer:
            member.waiting, member.since = None, time.monotonic()
            member.granted |= member.works
            self._send(member, "answer", answer.value)
            return True
        except Exception as error:
            raise RoleError(f"{member.name} failed: {error}") from error

    # Processes.

    def _start(self, member: Member) -> None:
        member.connection, theirs = self._context.Pipe()
        args = (theirs, member.spec, member.seed, member.kept, self.threads)
        process = self._context.Process(target=main, args=args, name=member.name, daemon=True)
        try:
            process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ValueError(
                f"{member.name} cannot be handed to another process ({error}); make environments, networks and "
                "functions importable (no lambdas or local classes), or use runtime='inline'."
            ) from error
        theirs.close()
        member.process, member.since, member.granted, member.spoke = process, time.monotonic(), False, False

    def _revive(self, member: Member, reason: str, error: BaseException) -> None:
        """Start a role again that has failed, and take back what it held."""
        self._close(member, 0.0)
        member.failures, member.failed_at = member.failures + 1, self.steps
        lost = 0
        for name, word in self.words.items():
            filling = [box for held, box in member.filling.values() if held == name]
            reading = [box for held, box in member.reading.values() if held == name]
            if filling or reading:
                lost += word.reclaim(filling, reading)
            if hasattr(word, "forget"):
                word.forget(member)
        member.filling, member.reading, member.waiting = {}, {}, None
        self.dropped += lost
        log.warning("%s failed: %s", member.name, reason, exc_info=error)
        if member.failures >= self.failures:
            raise RoleError(f"{member.name} failed {member.failures} times in a row: {reason}") from error
        self.restarts += 1
        self.report("runtime", member.spec.index, self.steps, {"restarted": member.name, "dropped": lost})
        self._start(member)

    def _look_after(self) -> None:
        """Start again who has died silently or is not heard of."""
        now = time.monotonic()
        for member in self.members:
            if member.waiting is None and not member.over and now - member.since > self.deadline:
                reason = f"it was not heard of for {self.deadline:g} s"
                self._revive(member, reason, TimeoutError(reason))

    def _send(self, member: Member, *message: Any) -> None:
        with contextlib.suppress(OSError):  # its end is noticed at the next turn
            member.connection.send(message)

    def _close(self, member: Member, patience: float) -> None:
        """End a process, first by asking, then by force."""
        member.connection.close()
        member.process.join(patience)
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        if member.waiting is not None:
            member.waiting.close()

    def _end(self) -> None:
        for member in self.members:
            if member.process is not None:
                self._send(member, "end")
        latest = time.monotonic() + GRACE
        for member in self.members:
            if member.process is not None:
                self._close(member, max(0.0, latest - time.monotonic()))


def _open_many_files() -> None:
    """Each tensor of a box keeps a file open: some 30 an actor, and the usual limit is 1024."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there is no such limit, or no way to raise it
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cause(process: Any) -> str:
    process.join(GRACE)
    code = process.exitcode
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"

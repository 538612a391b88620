"""The four words as the local runtime keeps them: the inline words' own code, over boxes in place of values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from rookery.runtimes.boxes import copied, fits, pour, unpacked
from rookery.runtimes.inline import Answer, InlineCalls, InlineQueue, InlineReplay, InlineWeights, State, newer, until
from rookery.runtimes.meter import Meter
from rookery.runtimes.words import Published, RoleSpec

__all__ = ["WORDS", "Box", "Member"]


class Lender(Protocol):
    """What the words ask of their runtime."""

    members: list[Member]
    meter: Meter

    def box(self, value: Any = None) -> Box:
        """A new box."""

    def lend(self, member: Member, box: Box) -> int:
        """The box's number, once the member knows what it stands for, to be filled."""

    def show(self, member: Member, box: Box) -> int:
        """The same, to be read."""

    def fell_back(self, member: Member, word: str, versions: int, steps: int) -> None:
        """A member has begun again after a death, so many versions before the newest that it had published."""


class Box:
    """A box, and which members have heard of it."""

    def __init__(self, number: int, value: Any = None) -> None:
        self.number, self.value = number, value
        self.edition = 0  # another for each time that its content may have changed
        self.known_to: set[Connection] = set()

    def batch(self) -> Any:
        """What a replay takes from a slot."""
        return self.value.batch()


@dataclass(eq=False)
class Member:
    """A role and its process."""

    spec: RoleSpec
    seed: int
    kept: State | None  # its state when that was last heard of, packed
    process: Any = None
    connection: Any = None  # from its start on
    waiting: Coroutine[Any, Any, Any] | None = None  # its question
    starts: bool = False  # whether the answer starts new work, rather than ending some
    works: bool = False  # whether it gives work at all
    waits_for: str = "its first turn"
    since: float = 0.0  # when it was last heard of
    spoke: bool = False  # since its process began
    advanced: bool = False  # the run's clock, since its process began
    over: bool = False
    away: bool = False  # it has no place to be at yet
    lives: int = 0  # that are over
    deaths: list[float] = field(default_factory=list)  # when its processes ended
    failures: int = 0  # in a row
    failed_at: int = -1  # steps of the run at the last failure
    granted: bool = False  # whether it is at a unit of work
    within: bool = False  # whether it is at what has to be done whole
    filling: dict[int, tuple[str, Box]] = field(default_factory=dict)  # boxes lent to it, and by which word
    reading: dict[int, tuple[str, Box]] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget what the process before was at."""
        self.granted = self.spoke = self.within = self.advanced = False

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.spec.index}"


class LocalQueue(InlineQueue):
    """`Queue`: what goes round are boxes."""

    starts = ("slot",)

    def __init__(self, runtime: Lender, name: str, each: int) -> None:
        super().__init__(runtime.meter.word(name, "queue"), each)
        self.runtime, self.name = runtime, name

    async def ask_slot(self, member: Member, index: int) -> int:
        box = await self.slot(self.runtime.box, index)
        member.filling[box.number] = (self.name, box)
        return self.runtime.lend(member, box)

    async def ask_get(self, member: Member, count: int) -> list[int]:
        boxes = await self.get(count)
        member.reading.update({box.number: (self.name, box) for box in boxes})
        return [self.runtime.show(member, box) for box in boxes]

    def tell_put(self, member: Member, number: int) -> None:
        self.put(member.filling.pop(number)[1])

    def tell_release(self, member: Member, numbers: list[int]) -> None:
        self.release([member.reading.pop(number)[1] for number in numbers])

    def reclaim(self, filling: list[Box], reading: list[Box]) -> int:
        """Take back what a dead role held: what it read goes back to the front; gives how many units are lost."""
        self.release(filling)
        self._filled.extendleft(reversed(reading))
        self.meter.reclaims(len(filling), len(reading))
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

    def __init__(self, runtime: Lender, name: str, once: bool = False) -> None:
        super().__init__(runtime.meter.word(name, "weights"), once)
        # Whoever takes what there is, is at work already; but of memory that stays, that is where the work stops.
        self.starts = ("newer_than", "latest") if once else ("newer_than",)
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
        if self._stays:
            member.filling.pop(number)
            return
        if id(member) in self._anew:
            self._anew.remove(id(member))
            self._turning = self._newest is not None
            self._fall_back(member, version, steps)
        elif self._turning:
            self._turn()
        self.publish(version, member.filling.pop(number)[1], steps)

    def _fall_back(self, member: Member, version: int, steps: int) -> None:
        newest = self._newest
        if newest is not None and newest.version > version:
            undone = newest.version - version, newest.steps - steps
            self.meter.falls_back(*undone)
            self.runtime.fell_back(member, self.name, *undone)

    async def ask_newer_than(self, member: Member, version: int, steps: int) -> tuple[int, int, int]:
        def ready() -> bool:
            if self._newest is None or self._newest.steps < steps:
                return False
            known = self._readings.get(id(member))
            if known is None:
                return self._newest.version > version
            least = max(version, known.published.version) if known.ended else version
            return self._newest.version > least or self._era > known.era

        await until(ready, newer(version, steps), self.name)
        return self._read(member)

    async def ask_latest(self, member: Member) -> tuple[int, int, int]:
        await self.newer_than(-1)
        return self._read(member)

    def _read(self, member: Member) -> tuple[int, int, int]:
        assert self._newest is not None
        self._readings[id(member)] = Reading(self._newest, self._era)
        self.meter.reads(self._newest.version)
        return self._newest.version, self.runtime.show(member, self._newest.values), self._newest.steps

    def _turn(self) -> None:
        self._era, self._turning = self._era + 1, False

    def state(self) -> State:
        state = super().state()
        return {**state, "values": state["values"].value} if state else {}

    def load_state(self, state: State) -> None:
        super().load_state({**state, "values": self.runtime.box(copied(state["values"]))} if state else {})

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

    def __init__(self, runtime: Lender, name: str, **options: Any) -> None:
        super().__init__(runtime.meter.word(name, "replay"), **options)
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
        self.leave(member)
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
            box.edition += 1
        self._lent[id(member)] = (drawn, box)
        return self.runtime.show(member, box), self.inserts

    def tell_prioritise(self, member: Member, index: np.ndarray, priorities: np.ndarray) -> None:
        self.prioritise(unpacked(index), unpacked(priorities))

    def _may_write(self, writer: int) -> bool:
        return self._overlap or super()._may_write(writer)

    def reclaim(self, filling: list[Box], reading: list[Box]) -> int:
        for box in filling:
            self._give_back(box)
        return len(filling)

    def leave(self, member: Member) -> int:
        """The member has learnt from what it had; gives how many samples that were."""
        drawn, _ = self._lent.pop(id(member), (0, None))
        self.limiter.unlearnt -= drawn
        return drawn

    def forget(self, member: Member) -> None:
        """What a dead member did not learn from is owed again."""
        self.limiter.samples -= self.leave(member)


class LocalCalls(InlineCalls):
    """`Calls`: slots are boxes, answers travel as they are."""

    starts = ("answer",)  # what is asked, others may answer; who asked goes on once it may

    def __init__(self, runtime: Lender, name: str) -> None:
        super().__init__(runtime.meter.word(name, "calls"))
        self.runtime = runtime
        self._boxes: dict[int, Box] = {}
        self._asked: dict[int, tuple[Member, Answer]] = {}  # by the number of the slot
        self._open: dict[int, tuple[Member, Answer]] = {}  # who works on which request
        self._taken = 0

    async def ask_slot(self, member: Member, index: int) -> int:
        box = await self.slot(self.runtime.box, index)
        self._boxes[box.number] = box
        return self.runtime.lend(member, box)

    def tell_ask(self, member: Member, number: int) -> None:
        self._boxes[number].edition += 1
        self._asked[number] = member, self.ask(self._boxes[number])

    async def ask_answer(self, member: Member, number: int) -> Any:
        answer = await self._asked[number][1]
        self.runtime.show(member, self._boxes[number])
        return answer

    async def ask_requests(self, member: Member, most: int) -> list[tuple[int, int]]:
        found = []
        for answer in await self.take(most):
            self._taken += 1
            self._open[self._taken] = member, answer
            found.append((self._taken, self.runtime.show(member, answer.slot)))
        return found

    def tell_answer(self, member: Member, number: int, value: Any) -> None:
        answer = self._open.pop(number)[1]
        answer.slot.edition += 1
        answer.give(value)

    def forget(self, member: Member) -> None:
        """What a dead member asked is no longer asked; what it did not answer waits again, as the first."""
        gone = [answer for who, answer in self._asked.values() if who is member]
        self._waiting = deque(answer for answer in self._waiting if answer not in gone)
        left = [number for number, (who, _) in self._open.items() if who is member]
        self._waiting.extendleft(self._open.pop(number)[1] for number in reversed(left))


WORDS: dict[str, Callable[..., Any]] = {
    "queue": LocalQueue,
    "weights": LocalWeights,
    "replay": LocalReplay,
    "calls": LocalCalls,
}

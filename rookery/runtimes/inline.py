"""The inline runtime: one process, roles take turns in a fixed order.

A blocked `await` only means "not my turn", so nothing can hang, a debugger works, and a run is repeatable.
"""

from __future__ import annotations

import time
import types
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rookery.runtimes.boxes import nbytes
from rookery.runtimes.limiter import RateLimiter
from rookery.runtimes.meter import WORK, Meter, Told, WordMeter, combined, told
from rookery.runtimes.words import Graph, Part, Published, RoleSpec, Stateful

__all__ = ["Deadlock", "Inline", "RoleError", "newer", "restore", "role_seed", "until"]

State = dict[str, Any]


class Deadlock(RuntimeError):
    """Every role waits for another; the message names what each waits for."""


class RoleError(RuntimeError):
    """A role raised; the message names the role and its index, the cause is the role's own exception.

    Attributes:
        state: of the run without that role's last unit of work, where it could still be taken.
    """

    state: dict[str, Any] | None = None


def restore(part: Stateful, state: State, name: str) -> None:
    """Go on from where the state was taken.

    Raises:
        RoleError: if it is no state of this part.
    """
    try:
        part.load_state(state)
    except Exception as error:  # whatever a part makes of another's state
        raise RoleError(
            f"the checkpoint's state of {name} is not one that it can go on from ({type(error).__name__}: {error}); "
            "resume the run as it was trained, or remove that checkpoint."
        ) from error


class Wait(NamedTuple):
    """Why a role gives up its turn."""

    what: str
    done: bool  # whether anything was done since the last wait
    word: str


@types.coroutine
def until(ready: Callable[[], bool], what: str, word: str) -> Generator[Wait, None, None]:
    """Give up the turn until `ready`."""
    done = True
    while not ready():
        yield Wait(what, done, word)
        done = False


def said(error: BaseException) -> str:
    """What an error says; with its type, where that is no sentence, as a KeyError's is a key."""
    text = str(error)
    if " " in text and not isinstance(error, KeyError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class InlineQueue:
    """`Queue` within one process: slots are handed on by reference."""

    def __init__(self, meter: WordMeter, each: int) -> None:
        self.meter, self.each = meter, each
        self._made: Counter[int] = Counter()  # slots of each role that fills
        self._free: dict[int, list[Any]] = defaultdict(list)
        self._owner: dict[int, int] = {}  # of a slot by its identity
        self._filled: deque[Any] = deque()
        self._saved: list[State] = []  # of slots that were filled when the run was saved

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        while self._saved:
            saved, slot = self._saved.pop(0), make()
            slot.load_state(saved["slot"])
            self.meter.lends()
            self.put(self._own(slot, saved["index"]))
        await until(lambda: bool(self._free[index]) or self._made[index] < self.each, "a free slot", self.meter.name)
        self.meter.lends()
        return self._free[index].pop() if self._free[index] else self._own(make(), index)

    def _own(self, slot: Any, index: int) -> Any:
        self._made[index] += 1
        self._owner[id(slot)] = index
        return slot

    def put(self, slot: Any) -> None:
        self._filled.append(slot)
        self.meter.gives(1, slot)

    async def get(self, count: int) -> list[Any]:
        filled = len(self._filled)
        self.meter.looks(filled, self._made.total())
        await until(lambda: len(self._filled) >= count, f"{count} filled slots (there are {filled})", self.meter.name)
        self.meter.takes(count)
        return sorted((self._filled.popleft() for _ in range(count)), key=lambda slot: self._owner[id(slot)])

    def release(self, slots: list[Any]) -> None:
        for slot in slots:
            self._free[self._owner[id(slot)]].append(slot)

    @property
    def level(self) -> dict[str, float]:
        """How many filled slots nobody has taken."""
        return {"untaken": len(self._filled)}

    def state(self) -> State:
        filled = [{"index": self._owner[id(slot)], "slot": slot.state()} for slot in self._filled]
        return {str(place): each for place, each in enumerate([*self._saved, *filled])}

    def load_state(self, state: State) -> None:
        """What was on its way is back once the first slot is asked for, which says how one is made."""
        self._saved = [state[str(place)] for place in range(len(state))]


def newer(version: int, steps: int) -> str:
    """What those weights are called in an error."""
    return f"weights newer than {version}" + (f", of step {steps} or later" if steps else "")


class InlineWeights:
    """`Weights` within one process."""

    def __init__(self, meter: WordMeter, once: bool = False) -> None:
        self.meter = meter
        self._newest: Published | None = None
        self._once = once

    def publish(self, version: int, values: Any, steps: int) -> None:
        if not self._stays:
            self._newest = Published(version, values, steps)
            self.meter.gives(1, values)

    @property
    def _stays(self) -> bool:
        return self._once and self._newest is not None

    async def newer_than(self, version: int, steps: int = 0) -> Published:
        def ready() -> bool:
            newest = self._newest
            return newest is not None and newest.version > version and newest.steps >= steps

        await until(ready, newer(version, steps), self.meter.name)
        assert self._newest is not None
        self.meter.reads(self._newest.version)
        return self._newest

    async def latest(self) -> Published:
        newest = await self.newer_than(-1)
        if self._once:  # else whoever asks again and again would leave nobody a turn
            await until(iter((False, True)).__next__, "its turn", self.meter.name)
        return newest

    def state(self) -> State:
        """The value that stays; others are published anew."""
        return self._newest._asdict() if self._once and self._newest is not None else {}

    def load_state(self, state: State) -> None:
        self._newest = Published(**state) if state else None


class InlineReplay:
    """`Replay` within one process, over any store with `insert`, `sample`, `prioritise`, `state` and `load_state`.

    While the store has nothing to sample (its `len` is 0: no episode has ended yet, say), writers go on past the ratio.
    With `overlap` they need not insert in turn; inline they do, so that runs repeat.
    """

    def __init__(
        self,
        meter: WordMeter,
        make_store: Callable[[], Any],
        samples_per_insert: float,
        min_size: int,
        tolerance: float,
        writers: int = 1,
        save: bool = True,
        overlap: bool = False,
    ) -> None:
        self.meter = meter
        self.store, self.limiter = make_store(), RateLimiter(samples_per_insert, min_size, tolerance)
        self._turn, self._writers, self._save, self._overlap = 0, writers, save, overlap
        self._free: list[Any] = []
        self._promised: dict[int, int] = {}  # items to come, by the slot's identity

    @property
    def inserts(self) -> int:
        return self.limiter.inserts

    async def slot(self, make: Callable[[], Any], items: int, writer: int = 0) -> Any:
        """Writers insert in turn, so that a resumed run goes on with the one whose turn it was."""

        def ready() -> bool:
            room = self.limiter.may_insert(sum(self._promised.values()) + items)
            return self._may_write(writer) and (room or not len(self.store))

        await until(ready, f"its turn, and room for {items} inserts", self.meter.name)
        slot = self._free.pop() if self._free else make()
        self._promised[id(slot)] = items
        return slot

    def _may_write(self, writer: int) -> bool:
        return writer == self._turn

    def insert(self, slot: Any, count: int, writer: int = 0) -> None:
        self.meter.gives(count, slot)
        self.store.insert(slot.batch(), writer)
        self.limiter.inserts += count
        self._turn = (writer + 1) % self._writers
        self._give_back(slot)

    def _give_back(self, slot: Any) -> None:
        del self._promised[id(slot)]
        self._free.append(slot)

    async def sample(self, count: int, most: int = 1, **how: Any) -> Any:
        self.limiter.unlearnt = 0  # who asks has done its work with what it had
        self.limiter.unlearnt, samples = await self.draw(count, most, **how)
        return samples

    async def draw(self, count: int, most: int, **how: Any) -> tuple[int, Any]:
        """`sample`, with how many they are."""

        def ready() -> bool:
            return self.limiter.may_sample(count) and len(self.store) > 0

        await until(ready, f"{count} samples", self.meter.name)
        drawn = min(most, int(self.limiter.owed // count)) * count
        self.limiter.samples += drawn
        samples = self.store.sample(drawn, **how)
        self.meter.takes(drawn, samples)
        return drawn, samples

    def prioritise(self, index: Any, priorities: Any) -> None:
        self.store.prioritise(index, priorities)

    @property
    def level(self) -> dict[str, float]:
        """What the ratio of samples to inserts was kept over, since the run began."""
        counts: dict[str, float] = {
            "inserts": max(0, self.limiter.inserts - self.limiter.start),
            "samples": self.limiter.samples,
        }
        return {**counts, "fill": self.store.fill} if hasattr(self.store, "fill") else counts

    def state(self) -> State:
        own = {"counts": self.limiter.state(), "turn": self._turn}
        return {**own, "store": self.store.state()} if self._save else own

    def load_state(self, state: State) -> None:
        self.limiter.load_state(state["counts"])
        self._turn = state["turn"]
        if "store" in state:
            self.store.load_state(state["store"])
        else:
            self.limiter.begin_again()


class Answer:
    """What somebody asked, and the answer once it is there."""

    def __init__(self, slot: Any, word: str) -> None:
        self.slot, self.word = slot, word
        self._given: list[Any] = []

    def give(self, answer: Any) -> None:
        self._given.append(answer)

    def __await__(self) -> Generator[Any, None, Any]:
        yield from until(lambda: bool(self._given), "an answer", self.word)
        return self._given[0]


class InlineCalls:
    """`Calls` within one process."""

    def __init__(self, meter: WordMeter) -> None:
        self.meter = meter
        self._slots: dict[int, Any] = {}  # by asker
        self._sizes: dict[int, int] = {}  # in bytes, by the slot's `id`
        self._waiting: deque[Answer] = deque()

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        if index not in self._slots:
            self._slots[index] = make()
        return self._slots[index]

    def ask(self, slot: Any) -> Answer:
        self._waiting.append(Answer(slot, self.meter.name))
        if id(slot) not in self._sizes:
            self._sizes[id(slot)] = nbytes(slot)
        self.meter.asks(self._sizes[id(slot)])
        return self._waiting[-1]

    async def requests(self, most: int) -> list[tuple[Any, Callable[[Any], None]]]:
        return [(answer.slot, answer.give) for answer in await self.take(most)]

    async def take(self, most: int) -> list[Answer]:
        """`requests`, as they are kept here."""
        await until(lambda: bool(self._waiting), "a request", self.meter.name)
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        self.meter.takes(len(taken))
        return taken


WORDS: dict[str, Callable[..., Any]] = {
    "queue": InlineQueue,
    "weights": InlineWeights,
    "replay": InlineReplay,
    "calls": InlineCalls,
}


def role_seed(graph_seed: int, spec: RoleSpec, life: int = 0) -> int:
    """A role's seed: of the run's, its name, its index and how often it died, else of nothing; of 31 bits."""
    lived = f"/{life}" if life else ""
    return zlib.crc32(f"{graph_seed}/{spec.name}/{spec.index}{lived}".encode()) >> 1


class InlineRole:
    """A role and its coroutine."""

    def __init__(self, spec: RoleSpec, graph_seed: int, runtime: Inline, saved: State | None) -> None:
        self.name, self.index, self.ends_run = spec.name, spec.index, spec.ends_run
        self.title = f"{spec.name} {spec.index}"
        self.seed = role_seed(graph_seed, spec)
        self._runtime, self._saved = runtime, saved
        self._meter = runtime.meter.role(self.title)
        self._part: Stateful | None = None
        self._at_first: Told = told(None)
        self.coroutine: Any = None
        self.waits_for = "its first turn"
        self.over = self.within = False

    def report(self, step: int, values: dict[str, Any]) -> None:
        self._runtime.report(self.name, self.index, step, values)

    def advance(self, steps: int) -> None:
        self._runtime.steps = steps

    @contextmanager
    def unit(self) -> Iterator[None]:
        self.within = True
        yield
        self.within = False

    async def boundary(self) -> None:
        await until(lambda: not self._runtime.within, "the end of units that others are within", "units")

    def keep(self, part: Part) -> Part:
        if self._part is not None:
            raise RuntimeError(f"{self.name} {self.index} keeps two parts; keep one that holds both.")
        self._part = part
        if self._saved is not None:
            restore(part, self._saved, self.title)
        self._at_first = told(part)
        return part

    def measure(self) -> None:
        """Bring what it told of its work up to date."""
        self._meter.tells(combined(told(self._part), self._at_first, -1), time.perf_counter())

    def state(self) -> State | None:
        return None if self._part is None else self._part.state()

    def turn(self) -> bool:
        """Run until the next wait that is not over; whether anything was done."""
        if self.over:
            return False
        began = self._runtime.meter.begins(self.title)
        word: str | None = None
        try:
            self.waits_for, done, word = self.coroutine.send(None)
        except StopIteration:
            self.over, self.waits_for, done = True, "nothing, it has ended", True
        except Exception as error:
            raise RoleError(f"{self.title} failed: {said(error)}") from error
        if done:
            self._meter.turn(WORK, began)
            self._meter.turn(word, time.perf_counter())
        return done


class Inline:
    """Runs a graph of roles in this process.

    `between` is called after every round of turns with the steps so far and a function that gives the run's state; it
    says whether to stop. A round ends when every role has had its turn and none is within a unit, so the words of
    synchronous topologies are empty then.
    """

    def __init__(self, report: Callable[[str, int, int, dict[str, Any]], None]) -> None:
        self.report = report
        self.steps = 0
        self.meter = Meter()
        self._roles: list[InlineRole] = []
        self._words: dict[str, Any] = {}
        self.within: set[str] = set()  # names of the roles that were within a unit when a round ended

    def measured(self) -> dict[str, Any]:
        """What happened so far (`Meter.measured`)."""
        for role in self._roles:
            role.measure()
        return self.meter.measured(self._words)

    def run(
        self, graph: Graph, between: Callable[[int, Callable[[], State]], bool], saved: State | None = None
    ) -> State:
        """Run until a role that ends the run returns, or `between` says so; gives the final state.

        Raises:
            Deadlock: if no role can go on.
            RoleError: if a role raises.
        """
        words = {
            name: WORDS[spec.kind](self.meter.word(name, spec.kind), **spec.options)
            for name, spec in graph.words.items()
        }
        roles = [self._start(spec, words, graph.seed, saved) for spec in graph.roles]
        self._words, self._roles = words, roles
        if saved is not None:
            self.steps = saved["steps"]
            for name, word in words.items():
                if isinstance(word, Stateful):
                    restore(word, saved["words"].get(name, {}), name)
        try:
            while True:
                over = self._round(roles)
                self.within = {role.name for role in roles if role.within}
                if self.within and not over:
                    continue
                began = time.perf_counter()
                stop = between(self.steps, lambda: self._state(roles, words))
                self.meter.keeper += time.perf_counter() - began
                if stop or over:
                    return self._state(roles, words)
        finally:
            for role in roles:
                role.coroutine.close()

    def _start(self, spec: RoleSpec, words: dict[str, Any], seed: int, saved: State | None) -> InlineRole:
        state = None if saved is None else saved["roles"].get(f"{spec.name}_{spec.index}")
        role = InlineRole(spec, seed, self, state)
        role.coroutine = spec.function(role, **spec.arguments(lambda word: words[word.name]))
        return role

    def _round(self, roles: list[InlineRole]) -> bool:
        """One turn for each role; whether the run is over."""
        done = [role.turn() for role in roles]
        if any(role.over and role.ends_run for role in roles):
            return True
        if not any(done):
            waits = "; ".join(f"{role.title} waits for {role.waits_for}" for role in roles)
            raise Deadlock(f"no role can go on: {waits}.")
        return False

    def _state(self, roles: list[InlineRole], words: dict[str, Any]) -> State:
        kept = {f"{role.name}_{role.index}": role.state() for role in roles}
        return {
            "roles": {name: state for name, state in kept.items() if state is not None},
            "words": {name: word.state() for name, word in words.items() if isinstance(word, Stateful)},
            "steps": self.steps,
        }

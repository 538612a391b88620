"""The inline runtime: one process, roles take turns in a fixed order.

A blocked `await` only means "not my turn", so nothing can hang, a debugger works, and a run is repeatable.
"""

from __future__ import annotations

import types
import zlib
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from rookery.runtimes.limiter import RateLimiter
from rookery.runtimes.words import Graph, Part, Published, RoleSpec, Stateful, WordSpec

__all__ = ["Deadlock", "Inline", "RoleError", "role_seed", "until"]

State = dict[str, Any]


class Deadlock(RuntimeError):
    """Every role waits for another; the message names what each waits for."""


class RoleError(RuntimeError):
    """A role raised; the message names the role and its index, the cause is the role's own exception."""


@types.coroutine
def until(ready: Callable[[], bool], what: str) -> Generator[tuple[str, bool], None, None]:
    """Give up the turn until `ready`; yields what is waited for, and whether anything was done since the last wait."""
    done = True
    while not ready():
        yield what, done
        done = False


class Line:
    """First come, first served: else the role with the first turn of a round would take everything."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()

    async def until(self, ready: Callable[[], bool], what: str) -> None:
        ticket = object()
        self._waiting.append(ticket)
        try:
            await until(lambda: self._waiting[0] is ticket and ready(), what)
        finally:  # who gives up waiting leaves the line
            self._waiting.remove(ticket)


class InlineQueue:
    """`Queue` within one process: slots are handed on by reference."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self._made, self._line = capacity, 0, Line()
        self._free: list[Any] = []
        self._saved: list[State] = []  # of slots that were filled when the run was saved
        self._filled: deque[tuple[int, Any]] = deque()  # with the index of the role that filled it

    async def slot(self, make: Callable[[], Any]) -> Any:
        while self._saved:
            saved, slot = self._saved.pop(0), make()
            slot.load_state(saved["slot"])
            self._made += 1
            self.put(saved["index"], slot)
        await self._line.until(lambda: bool(self._free) or self._made < self.capacity, "a free slot")
        if self._free:
            return self._free.pop()
        self._made += 1
        return make()

    def put(self, index: int, slot: Any) -> None:
        self._filled.append((index, slot))

    async def get(self, count: int) -> list[Any]:
        await until(lambda: len(self._filled) >= count, f"{count} filled slots (there are {len(self._filled)})")
        taken = [self._filled.popleft() for _ in range(count)]
        return [slot for _, slot in sorted(taken, key=lambda each: each[0])]

    def release(self, slots: list[Any]) -> None:
        self._free.extend(slots)

    def state(self) -> State:
        return {str(i): {"index": index, "slot": slot.state()} for i, (index, slot) in enumerate(self._filled)}

    def load_state(self, state: State) -> None:
        """What was on its way is back once the first slot is asked for, which says how one is made."""
        self._saved = [state[str(i)] for i in range(len(state))]


class InlineWeights:
    """`Weights` within one process."""

    def __init__(self) -> None:
        self._newest: Published | None = None

    def publish(self, version: int, values: Any, steps: int) -> None:
        self._newest = Published(version, values, steps)

    async def newer_than(self, version: int) -> Published:
        await until(
            lambda: self._newest is not None and self._newest.version > version, f"weights newer than {version}"
        )
        assert self._newest is not None
        return self._newest

    async def latest(self) -> Published:
        return await self.newer_than(-1)


class InlineReplay:
    """`Replay` within one process, over any store with `insert`, `sample`, `prioritise`, `state` and `load_state`.

    While the store has nothing to sample (its `len` is 0: no episode has ended yet, say), writers go on past the ratio.
    """

    def __init__(
        self,
        make_store: Callable[[], Any],
        samples_per_insert: float,
        min_size: int,
        tolerance: float,
        writers: int = 1,
        save: bool = True,
    ) -> None:
        self.store, self.limiter = make_store(), RateLimiter(samples_per_insert, min_size, tolerance)
        self._turn, self._writers, self._save = 0, writers, save
        self._free: list[Any] = []

    @property
    def inserts(self) -> int:
        return self.limiter.inserts

    async def slot(self, make: Callable[[], Any], items: int, writer: int = 0) -> Any:
        """Writers insert in turn, so that a resumed run goes on with the one whose turn it was."""

        def ready() -> bool:
            return writer == self._turn and (self.limiter.may_insert(items) or not len(self.store))

        await until(ready, f"its turn, and room for {items} inserts")
        return self._free.pop() if self._free else make()

    def insert(self, slot: Any, count: int, writer: int = 0) -> None:
        self.store.insert(slot.batch(), writer)
        self.limiter.inserts += count
        self._turn = (writer + 1) % self._writers
        self._free.append(slot)

    async def sample(self, count: int, most: int = 1, **how: Any) -> Any:
        return (await self.draw(count, most, **how))[1]

    async def draw(self, count: int, most: int, **how: Any) -> tuple[int, Any]:
        """`sample`, with how many they are."""
        await until(lambda: self.limiter.may_sample(count) and len(self.store) > 0, f"{count} samples")
        drawn = min(most, int(self.limiter.owed // count)) * count
        self.limiter.samples += drawn
        return drawn, self.store.sample(drawn, **how)

    def prioritise(self, index: Any, priorities: Any) -> None:
        self.store.prioritise(index, priorities)

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


class InlineCalls:
    """`Calls` within one process."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, Callable[[Any], None]]] = deque()

    async def ask(self, request: Any) -> Any:
        answer: list[Any] = []
        self._waiting.append((request, answer.append))
        await until(lambda: bool(answer), "an answer")
        return answer[0]

    async def requests(self, most: int) -> list[tuple[Any, Callable[[Any], None]]]:
        await until(lambda: bool(self._waiting), "a request")
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]


WORDS: dict[str, Callable[..., Any]] = {
    "queue": InlineQueue,
    "weights": InlineWeights,
    "replay": InlineReplay,
    "calls": InlineCalls,
}


def role_seed(graph_seed: int, spec: RoleSpec) -> int:
    """A role's seed: of the run's, its name and its index, and of nothing else; environments take 31 bits."""
    return zlib.crc32(f"{graph_seed}/{spec.name}/{spec.index}".encode()) >> 1


class InlineRole:
    """A role and its coroutine."""

    def __init__(self, spec: RoleSpec, graph_seed: int, runtime: Inline, saved: State | None) -> None:
        self.name, self.index, self.ends_run = spec.name, spec.index, spec.ends_run
        self.seed = role_seed(graph_seed, spec)
        self._runtime, self._saved = runtime, saved
        self._part: Stateful | None = None
        self.coroutine: Any = None
        self.waits_for = "its first turn"
        self.over = False

    def report(self, step: int, values: dict[str, Any]) -> None:
        self._runtime.report(self.name, self.index, step, values)

    def advance(self, steps: int) -> None:
        self._runtime.steps = steps

    def keep(self, part: Part) -> Part:
        if self._part is not None:
            raise RuntimeError(f"{self.name} {self.index} keeps two parts; keep one that holds both.")
        self._part = part
        if self._saved is not None:
            part.load_state(self._saved)
        return part

    def state(self) -> State | None:
        return None if self._part is None else self._part.state()

    def turn(self) -> bool:
        """Run until the next wait that is not over; whether anything was done."""
        if self.over:
            return False
        try:
            self.waits_for, done = self.coroutine.send(None)
        except StopIteration:
            self.over, self.waits_for, done = True, "nothing, it has ended", True
        except Exception as error:
            raise RoleError(f"{self.name} {self.index} failed: {error}") from error
        return done


class Inline:
    """Runs a graph of roles in this process.

    `between` is called after every round of turns with the steps so far and a function that gives the run's state; it
    says whether to stop. A round ends when every role has had its turn, so the words of synchronous topologies are
    empty then.
    """

    def __init__(self, report: Callable[[str, int, int, dict[str, Any]], None]) -> None:
        self.report = report
        self.steps = 0

    def run(
        self, graph: Graph, between: Callable[[int, Callable[[], State]], bool], saved: State | None = None
    ) -> State:
        """Run until a role that ends the run returns, or `between` says so; gives the final state.

        Raises:
            Deadlock: if no role can go on.
            RoleError: if a role raises.
        """
        words = {name: WORDS[spec.kind](**spec.options) for name, spec in graph.words.items()}
        roles = [self._start(spec, words, graph.seed, saved) for spec in graph.roles]
        if saved is not None:
            for name, word in words.items():
                if isinstance(word, Stateful):
                    word.load_state(saved["words"].get(name, {}))
        try:
            while True:
                over = self._round(roles)
                if between(self.steps, lambda: self._state(roles, words)) or over:
                    return self._state(roles, words)
        finally:
            for role in roles:
                role.coroutine.close()

    def _start(self, spec: RoleSpec, words: dict[str, Any], seed: int, saved: State | None) -> InlineRole:
        state = None if saved is None else saved["roles"].get(f"{spec.name}_{spec.index}")
        role = InlineRole(spec, seed, self, state)
        args = {key: words[value.name] if isinstance(value, WordSpec) else value for key, value in spec.args.items()}
        role.coroutine = spec.function(role, **args)
        return role

    def _round(self, roles: list[InlineRole]) -> bool:
        """One turn for each role; whether the run is over."""
        done = [role.turn() for role in roles]
        if any(role.over and role.ends_run for role in roles):
            return True
        if not any(done):
            waits = "; ".join(f"{role.name} {role.index} waits for {role.waits_for}" for role in roles)
            raise Deadlock(f"no role can go on: {waits}.")
        return False

    def _state(self, roles: list[InlineRole], words: dict[str, Any]) -> State:
        kept = {f"{role.name}_{role.index}": role.state() for role in roles}
        return {
            "roles": {name: state for name, state in kept.items() if state is not None},
            "words": {name: word.state() for name, word in words.items() if isinstance(word, Stateful)},
            "steps": self.steps,
        }

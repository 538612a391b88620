"""A local run once more, in one process: every message is heard when it was heard then.

Roles run as coroutines, each as far as its next question; what they say waits until its turn in the record has come.
The words are the local runtime's own, so that what follows from an order of arrivals follows again: a run that came to
grief at update 3,000,000 can be stepped through in a debugger.
"""

from __future__ import annotations

import copy
import traceback
import types
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from rookery.runtimes.arrivals import DIED, KEPT, PAUSE, RELENT, RESUME, Replayed
from rookery.runtimes.inline import State, said
from rookery.runtimes.local import ASIDE, Local
from rookery.runtimes.local_words import Member
from rookery.runtimes.process import Ended, Link, begun
from rookery.runtimes.words import Graph

__all__ = ["Diverged", "Rerun"]


class Diverged(RuntimeError):
    """A run did something else than the record says it did; the message says where."""


class Reached(Exception):
    """The learner has made as many updates as were asked for."""

    def __init__(self, state: State) -> None:
        self.state = state


class Here(Link):
    """A role's line to the runtime in the same process."""

    def __init__(self, runtime: Rerun, member: Member) -> None:
        super().__init__(None)
        self.runtime, self.member = runtime, member
        self.said: deque[tuple[Any, ...]] = deque()  # and not yet heard

    def send(self, *message: Any) -> None:
        if message[0] == "box":
            self.runtime._hear(self.member, *message)
        elif message[0] != "told":
            self.said.append(message)

    @types.coroutine
    def ask(self, word: str, what: str, *args: Any) -> Generator[None, Any, Any]:  # type: ignore[override]
        self.ends_unit(word, what)
        self.send("ask", word, what, args)
        return (yield)

    def aside(self, word: str, what: str, *args: Any) -> Any:
        return self.runtime.answer_aside(self.member, word, what, *args)

    def state(self) -> dict[str, Any] | None:
        return copy.deepcopy(super().state())  # the role goes on to change its own

    def hand_over(self, learnt: str | None = None) -> None:
        number = self.runtime.number(self.member)
        if self.runtime.record.hands_over(number, self.runtime.heard[number] + len(self.said)):
            self.send("kept", self.state(), learnt)

    def close(self) -> None:
        """As a connection is."""


class Rerun(Local):
    """Runs a graph of roles as `Local` did when the record was made.

    Args:
        until: updates of the learner after which to stop, at its next question; of a parameter server, those that the
            first bundle knows of.
        resumed_at: the step from which the run was resumed later: what came after it then is not repeated.
    """

    def __init__(
        self,
        report: Callable[[str, int, int, dict[str, Any]], None],
        record: Replayed,
        until: int | None = None,
        resumed_at: int | None = None,
    ) -> None:
        super().__init__(report, often=len(record.events) + 1)
        self.record, self.until, self.resumed_at = record, until, resumed_at
        self.heard: dict[int, int] = {}  # messages of each role
        self.taken_at: int | None = None  # the step at which the state was last taken
        self._coroutines: dict[int, Any] = {}

    @property
    def _learner(self) -> Any:
        """The first one, also where it is part of what its role keeps."""
        part = next(member.connection.part for member in self.members if member.spec.name == "learner")
        return getattr(part, "learner", part)

    def number(self, member: Member) -> int:
        return self.members.index(member)

    def run(
        self, graph: Graph, between: Callable[[int, Callable[[], State]], bool], saved: State | None = None
    ) -> State:
        def stops(steps: int, snapshot: Callable[[], State]) -> bool:
            stop = between(steps, snapshot) or self.record.next in (None, PAUSE)
            return stop or (self.taken_at is not None and self.taken_at == self.resumed_at)

        self.heard = dict.fromkeys(range(len(graph.roles)), 0)
        try:
            return super().run(graph, stops, saved)
        except Reached as reached:
            return reached.state

    def _arrange(self) -> None:
        if moved := self.record.moved():
            self._move([self.members[number] for number in moved])

    def snapshot(self) -> State:
        """The state as it was taken then; elsewhere, as everything stands."""
        if self.record.next == PAUSE:
            state = super().snapshot()
            self.taken_at = state["steps"]  # some may have finished what they were at
            return state
        return self._standing()

    def _standing(self) -> State:
        for member in self.members:
            member.kept = member.connection.state()
        self.steps = max(self.steps, self._learner.steps)  # which may not be heard yet
        return self._collected()

    def _note(self, what: int, member: Member | None = None) -> None:
        if what in (PAUSE, RESUME):  # what else there is, is read as it comes
            if self.record.next != what:
                raise Diverged(f"at event {self.record.at} of the record the run takes its state at another time.")
            self.record.at += 1

    def _turn(self) -> None:
        self._answer_all()
        if self.record.next is None:
            raise Diverged(f"the record ends at event {self.record.at}, where the run would go on.")
        for what, number in self.record.turn():
            member = self.members[number]
            if what == RELENT:
                self._relent()
            elif what == DIED:
                self._revive(member, "its process ended in the run that is repeated", EOFError())
            else:
                self._repeat(member, what, number)

    def _repeat(self, member: Member, what: int, number: int) -> None:
        said = member.connection.said
        if not said or (said[0][0] == "kept") != (what == KEPT):
            found = f"says {said[0][0]!r}" if said else "says nothing"
            raise Diverged(f"{member.name} {found} at event {self.record.at} of the record, unlike then.")
        self.heard[number] += 1
        self._take(member, said.popleft())

    def answer_aside(self, member: Member, word: str, what: str, *args: Any) -> Any:
        """The answer to a question that does not wait."""
        assert what in ASIDE
        try:
            getattr(self.words[word], f"ask_{what}")(member, *args).send(None)
        except StopIteration as answer:
            return answer.value
        raise AssertionError(f"{what} waits")

    def _send(self, member: Member, *message: Any) -> None:
        link, (kind, *rest) = member.connection, message
        if kind == "box":
            link.know(*rest)
        elif kind == "state":
            link.send("state", link.state())
        elif kind == "answer":
            self._go_on(member, rest[0])

    def _start(self, member: Member) -> None:
        member.connection = link = Here(self, member)
        member.process, member.over = link, False
        member.begin()
        self._coroutines[id(member)] = begun(link, member.spec, member.seed, copy.deepcopy(member.kept))
        self._go_on(member, None)

    def _go_on(self, member: Member, answer: Any) -> None:
        """Let a role run to its next question."""
        link = member.connection
        try:
            self._coroutines[id(member)].send(answer)
        except StopIteration:
            link.send("over", link.state())
        except Ended:
            pass
        except Exception as error:  # what it did then, too
            link.send("failed", said(error), traceback.format_exc())
        counts = (member.spec.name, member.spec.index) == ("learner", 0) and link.part is not None
        if self.until is not None and counts and self._learner.updates >= self.until:
            raise Reached(self._standing())

    def _close(self, member: Member, patience: float) -> None:
        self._coroutines[id(member)].close()
        if member.waiting is not None:
            member.waiting.close()

    def _prepare(self, graph: Graph) -> None:
        """Nothing: there are no processes."""

    def _look_after(self) -> None:
        """Nobody is late."""

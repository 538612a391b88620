"""The four words that connect roles, and how a graph of roles is described as data.

A topology describes roles (a function, a name, an index and arguments) and words (Queue, Weights, Replay, Calls). A
runtime builds the words, puts them in place of their descriptions among the arguments, and runs the roles. Nothing
here knows of reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

__all__ = ["Calls", "Graph", "Published", "Queue", "Replay", "Role", "RoleSpec", "Stateful", "Weights", "WordSpec"]


@runtime_checkable
class Stateful(Protocol):
    """Something whose state belongs into a checkpoint: a nested dict of tensors and JSON scalars."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


Part = TypeVar("Part", bound=Stateful)


class Published(NamedTuple):
    """A value with its version, and how many steps had been learnt from when it was made."""

    version: int
    values: Any
    steps: int


class Queue(Protocol):
    """Order, bounded: slots go round between those who fill them and those who empty them."""

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        """Wait for a free slot of those that the role of that index fills; `make` allocates them, so many for each."""

    def put(self, slot: Any) -> None:
        """Hand on a filled slot. Never waits: the slot was waited for."""

    async def get(self, count: int) -> list[Any]:
        """Wait for `count` filled slots and take the oldest, in the order of the roles that filled them."""

    def release(self, slots: list[Any]) -> None:
        """Give slots back to be filled again."""


class Weights(Protocol):
    """The newest value, with a version.

    With the option `once` the first value that is published stays: everybody who reads it shares its memory, and may
    write to it. It is in checkpoints. Whoever asks for the latest lets others go on, and the run's state be taken.
    """

    def publish(self, version: int, values: Any, steps: int) -> None: ...

    async def newer_than(self, version: int, steps: int = 0) -> Published:
        """Wait for a value of a later version, published at so many steps or later."""

    async def latest(self) -> Published:
        """The newest value; waits only for the first."""


class Replay(Protocol):
    """Random access, with a ratio of samples to inserts that blocks the faster side (`runtimes.limiter`)."""

    inserts: int  # items stored since the run began

    async def slot(self, make: Callable[[], Any], items: int, writer: int = 0) -> Any:
        """Wait until `items` more inserts, by the writer of that index, keep the ratio; gives a slot to fill."""

    def insert(self, slot: Any, count: int, writer: int = 0) -> None:
        """Store what is in a slot (`slot.batch()`), which counts as so many items, and give the slot back."""

    async def sample(self, count: int, most: int = 1, **how: Any) -> Any:
        """Wait until `count` samples are owed, then draw as many times that as are owed, at most `most` times."""

    def prioritise(self, index: Any, priorities: Any) -> None:
        """Change the priorities of samples, by the `index` they came with."""


class Calls(Protocol):
    """Request and answer, both in a slot: who asks fills it, who answers writes there too."""

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        """The slot of the asker of that index, who keeps it; `make` allocates it."""

    def ask(self, slot: Any) -> Awaitable[Any]:
        """Ask now; what this gives is awaited for the answer, a small one. Until then the slot is left alone."""

    async def requests(self, most: int) -> list[tuple[Any, Callable[[Any], None]]]:
        """Wait for at least one request; gives at most `most` slots, each with the function that answers it."""


class Role(Protocol):
    """What every role function is handed first: who it is, and where its numbers and its state go."""

    name: str
    index: int
    seed: int  # from the run's seed, the role's name and its index

    def report(self, step: int, values: dict[str, Any]) -> None:
        """Add a row to the run's metrics; it carries the role and the index."""

    def advance(self, steps: int) -> None:
        """Say how many steps the run has come: the clock of checkpoints and progress."""

    def unit(self) -> AbstractContextManager[None]:
        """While a role is within, the run's state is not taken: what is done there is done whole."""

    async def boundary(self) -> None:
        """Before work that has a unit in which others have turns: wait until no role is in one.

        So the run's state can be taken, however many there are and whenever they began.
        """

    def keep(self, part: Part) -> Part:
        """Put `part`'s state into checkpoints, and bring it to the saved state when the run is resumed."""


@dataclass(frozen=True)
class WordSpec:
    """A word to be built by the runtime."""

    kind: str  # "queue", "weights", "replay", "calls"
    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RoleSpec:
    """A role as data, so that it can be started elsewhere, and again."""

    function: Callable[..., Awaitable[None]]
    name: str
    index: int
    args: dict[str, Any]  # WordSpecs among them, and in tuples among them, are replaced by the words
    ends_run: bool = False  # when this role returns, the run is over
    anew: bool = False  # who takes its place after a death begins anew, with other random numbers

    def arguments(self, word: Callable[[WordSpec], Any]) -> dict[str, Any]:
        """The arguments, with `word` of each WordSpec in its place."""

        def placed(value: Any) -> Any:
            if isinstance(value, WordSpec):
                return word(value)
            return tuple(map(placed, value)) if isinstance(value, tuple) and _words_in(value) else value

        return {name: placed(value) for name, value in self.args.items()}


def _words_in(values: tuple[Any, ...]) -> bool:
    return any(isinstance(value, WordSpec) for value in values)


@dataclass
class Graph:
    """Roles in the order of their turns, and the words between them."""

    seed: int
    roles: list[RoleSpec] = field(default_factory=list)
    words: dict[str, WordSpec] = field(default_factory=dict)

    def word(self, kind: str, name: str, **options: Any) -> WordSpec:
        """Describe a word; hand the result to the roles it connects."""
        return self.words.setdefault(name, WordSpec(kind, name, options))

    def role(
        self,
        function: Callable[..., Awaitable[None]],
        index: int = 0,
        ends_run: bool = False,
        anew: bool = False,
        **args: Any,
    ) -> None:
        """Add a role; it is named as its function is."""
        self.roles.append(RoleSpec(function, function.__name__, index, args, ends_run, anew))

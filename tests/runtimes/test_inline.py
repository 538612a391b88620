"""What only the inline runtime promises: turns in a fixed order, in this very process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import roles

from rookery.runtimes.inline import Inline, InlineQueue, RoleError
from rookery.runtimes.meter import Meter
from rookery.runtimes.words import Graph


def execute(graph: Graph, between: Callable[..., bool] | None = None) -> list[tuple[str, int, int, dict[str, Any]]]:
    """Run the graph; gives what the roles reported."""
    rows: list[tuple[str, int, int, dict[str, Any]]] = []
    Inline(lambda *row: rows.append(row)).run(graph, between or (lambda steps, state: False))
    return rows


class Turn:
    """Gives up one turn."""

    def __await__(self) -> Iterator[Any]:
        yield "its next turn", True, ""


async def player(role: Any, turns: list[int]) -> None:
    for count in range(4):
        turns.append(role.index)
        role.advance(count + 1)
        await Turn()


def players(turns: list[int]) -> Graph:
    graph = Graph(0)
    for index in (2, 0, 1):
        graph.role(player, index, turns=turns, ends_run=index == 1)
    return graph


def test_turns_are_taken_in_order() -> None:
    """The order of turns is that of the roles in the graph, round after round; so an inline run is repeatable."""
    turns: list[int] = []
    execute(players(turns))
    assert turns == [2, 0, 1] * 4


def test_between_is_called_after_every_round() -> None:
    turns: list[int] = []
    seen: list[tuple[int, int]] = []

    def between(steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        assert snapshot()["steps"] == steps
        seen.append((steps, len(turns)))
        return steps == 3

    execute(players(turns), between)
    assert seen == [(1, 3), (2, 6), (3, 9)]


def test_fillers_take_turns_exactly() -> None:
    graph = Graph(0)
    queue = graph.word("queue", "queue", each=2)
    for index in range(3):
        graph.role(roles.filler, index, queue=queue, count=1000)
    graph.role(roles.emptier, queue=queue, each=1, gets=60, first=1, ends_run=True)
    who = [row[3]["got"][0][0] for row in execute(graph) if "got" in row[3]]
    assert who == [number // 2 % 3 for number in range(60)]  # each fills all of its own, then it is the next one's turn


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyboardInterrupt()])
def test_a_roles_error_is_the_cause_itself(error: BaseException) -> None:
    """A debugger goes to the line; Ctrl-C is not an error."""
    graph = Graph(0)
    graph.role(roles.faulty, weights=graph.word("weights", "weights"), error=error)
    with pytest.raises((RoleError, KeyboardInterrupt)) as caught:
        execute(graph)
    assert error in (caught.value, caught.value.__cause__)
    assert error.__traceback__ is not None


def test_roles_need_no_event_loop() -> None:
    """An inline run works inside a running event loop, such as a notebook's."""

    async def notebook() -> int:
        turns: list[int] = []
        execute(players(turns))
        return len(turns)

    assert asyncio.run(notebook()) == 12


def test_a_queue_that_nobody_has_asked_since_it_was_loaded_keeps_what_it_holds() -> None:
    saved = {str(place): {"index": place % 2, "slot": {"value": place}} for place in range(3)}
    queue = InlineQueue(Meter().word("queue", "queue"), each=2)
    queue.load_state(saved)
    assert queue.state() == saved

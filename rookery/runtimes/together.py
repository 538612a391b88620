"""Several waits at once."""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator, Sequence
from typing import Any

__all__ = ["together"]


@types.coroutine
def together(waits: Sequence[Coroutine[Any, Any, Any]]) -> Generator[Any, None, list[Any]]:
    """Wait for several words at once: each is asked in this turn, whether or not another makes the role wait.

    Gives what they give, in their order.
    """
    given: dict[int, Any] = {}
    try:
        while True:
            waiting = []
            for place, wait in enumerate(waits):
                if place not in given:
                    try:
                        waits_for = wait.send(None)
                        while waits_for is None:  # in a rerun: it is answered before the next is asked, as in processes
                            waits_for = wait.send((yield))
                        waiting.append(waits_for)
                    except StopIteration as end:
                        given[place] = end.value
            if not waiting:
                return [given[place] for place in range(len(waits))]
            yield waiting[0]._replace(done=any(each.done for each in waiting))
    finally:
        for wait in waits:
            wait.close()

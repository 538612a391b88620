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
    while True:
        waiting = []
        for place, wait in enumerate(waits):
            if place not in given:
                try:
                    waiting.append(wait.send(None))
                except StopIteration as end:
                    given[place] = end.value
        if not waiting:
            return [given[place] for place in range(len(waits))]
        yield waiting[0]._replace(done=any(each.done for each in waiting))

"""Several replay buffers as one, each with a fixed share of what is drawn: demonstrations beside experience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rookery.data.plan import axis_of
from rookery.data.replay import ReplayBuffer, check_priorities
from rookery.envs.vector import Obs

__all__ = ["Mixture", "counts_of"]


def counts_of(owed: Sequence[float], count: int) -> list[int]:
    """`count` in whole numbers of 0 or more, as near as can be to what each part is `owed`; that sums to `count`."""
    counts = [max(0, int(part + 1e-9)) for part in owed]  # 0.29 · 100 is 28.999999999999996
    while left := count - sum(counts):
        step = 1 if left > 0 else -1
        able = [place for place, given in enumerate(counts) if given + step >= 0]
        counts[max(able, key=lambda place: step * (owed[place] - counts[place]))] += step
    return counts


class Mixture:
    """Batches of which each buffer gives its share; in a batch, the buffers follow each other.

    What rounding withholds from a buffer is owed to it in later batches: of all that was drawn it has its share.

    Args:
        parts: buffers whose samples have equal columns and one batch dimension, at the same place.
        shares: of what is drawn, for each buffer; they sum to 1.

    Raises:
        ValueError: for shares that are not one for each buffer, negative, or do not sum to 1.
    """

    def __init__(self, parts: Sequence[ReplayBuffer], shares: Sequence[float]) -> None:
        if len(parts) != len(shares) or min(shares, default=-1) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares={list(shares)} of {len(parts)} buffers: give one of 0 or more each, 1 together.")
        self.parts, self.shares = list(parts), [share / sum(shares) for share in shares]
        self._given = [0] * len(parts)  # samples of each so far

    def __len__(self) -> int:
        """How many samples there are to be drawn now, from those that have a share; 0 while one of them has none."""
        sizes = [len(part) for part, share in zip(self.parts, self.shares, strict=True) if share]
        return sum(sizes) if all(sizes) else 0

    def sample(self, count: int, beta: float = 1.0) -> dict[str, Obs]:
        """N = `count` samples, one batch of the plan after the other; see `ReplayBuffer.sample`.

        Importance weights are relative within what a batch has of a buffer.
        """
        drawn, size = [], self.parts[0].plan.batch
        for start in range(0, count, size):
            counts = self._turns(min(size, count - start))
            drawn += [(place, self.parts[place].sample(n, beta)) for place, n in enumerate(counts) if n]
        for place, batch in drawn:
            batch["index"] = batch["index"] * len(self.parts) + place
        first = drawn[0][1]
        for place, batch in drawn:
            if batch.keys() != first.keys():
                odd = ", ".join(sorted(batch.keys() ^ first.keys()))
                raise ValueError(f"buffer {place} samples other columns than the first: {odd}; store the same in both.")
        plan = self.parts[0].plan
        return {name: torch.cat([batch[name] for _, batch in drawn], axis_of(plan, name)) for name in first}

    def _turns(self, count: int) -> list[int]:
        """How many of the next `count` samples each buffer gives."""
        total = sum(self._given) + count
        owed = [share * total - given for share, given in zip(self.shares, self._given, strict=True)]
        counts = counts_of(owed, count)
        self._given = [given + n for given, n in zip(self._given, counts, strict=True)]
        return counts

    def prioritise(self, index: Tensor, priorities: Tensor) -> None:
        """Each buffer gets the priorities of its own samples; see `ReplayBuffer.prioritise`."""
        check_priorities(priorities, None, index.shape)
        owner, own = index.remainder(len(self.parts)), index.div(len(self.parts), rounding_mode="floor")
        for place, part in enumerate(self.parts):
            mine = owner == place
            part.prioritise(own[mine], priorities[mine])

    def state(self) -> dict[str, Any]:
        """The states of the buffers, and what each has given."""
        return {
            "given": torch.tensor(self._given),
            **{str(place): part.state() for place, part in enumerate(self.parts)},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state()` was taken.

        Raises:
            ValueError: for a state that one of the buffers refuses; none is loaded then.
        """
        states = [state[str(place)] for place in range(len(self.parts))]
        for part, own in zip(self.parts, states, strict=True):
            part.check_state(own)
        for part, own in zip(self.parts, states, strict=True):
            part.load_state(own)
        self._given = state["given"].tolist()

"""Several replay buffers as one, each with a fixed share of every batch: demonstrations beside experience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rookery.data.plan import PER_SAMPLE
from rookery.data.replay import ReplayBuffer, check_priorities
from rookery.envs.vector import Obs

__all__ = ["Mixture", "counts_of"]


def counts_of(shares: Sequence[float], count: int) -> list[int]:
    """`count` divided by `shares`, which sum to 1: rounded down, what is left over to the largest remainders."""
    exact = [share * count for share in shares]
    counts = [int(part + 1e-9) for part in exact]  # 0.29 · 100 is 28.999999999999996
    by_remainder = sorted(range(len(shares)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: count - sum(counts)]:
        counts[part] += 1
    return counts


class Mixture:
    """Batches of which each buffer gives its share, exactly; in a batch, the buffers follow each other.

    Args:
        parts: buffers whose samples have equal columns and one batch dimension, at the same place.
        shares: of a batch, for each buffer; they sum to 1.

    Raises:
        ValueError: for shares that are not one for each buffer, negative, or do not sum to 1.
    """

    def __init__(self, parts: Sequence[ReplayBuffer], shares: Sequence[float]) -> None:
        if len(parts) != len(shares) or min(shares, default=-1) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares={list(shares)} of {len(parts)} buffers: give one of 0 or more each, 1 together.")
        self.parts, self.shares = list(parts), list(shares)

    def __len__(self) -> int:
        """How many samples there are to be drawn now, from those that have a share; 0 while one of them has none."""
        sizes = [len(part) for part, share in zip(self.parts, self.shares, strict=True) if share]
        return sum(sizes) if all(sizes) else 0

    def sample(self, count: int, beta: float = 1.0) -> dict[str, Obs]:
        """N = `count` samples; see `ReplayBuffer.sample`. Importance weights are relative within a buffer's own."""
        counts = counts_of(self.shares, count)
        drawn = [(place, self.parts[place].sample(n, beta)) for place, n in enumerate(counts) if n]
        for place, batch in drawn:
            batch["index"] = batch["index"] * len(self.parts) + place
        first = drawn[0][1]
        for place, batch in drawn:
            if batch.keys() != first.keys():
                odd = ", ".join(sorted(batch.keys() ^ first.keys()))
                raise ValueError(f"buffer {place} samples other columns than the first: {odd}; store the same in both.")
        # Sequences are time-major, but for what they have once.
        dims = {name: int(value.ndim > 1 and self._sequences(name)) for name, value in first.items()}
        return {name: torch.cat([batch[name] for _, batch in drawn], dims[name]) for name in first}

    def _sequences(self, name: str) -> bool:
        return self.parts[0].plan.sequence > 0 and name not in PER_SAMPLE

    def prioritise(self, index: Tensor, priorities: Tensor) -> None:
        """Each buffer gets the priorities of its own samples; see `ReplayBuffer.prioritise`."""
        check_priorities(priorities, None, index.shape)
        owner, own = index.remainder(len(self.parts)), index.div(len(self.parts), rounding_mode="floor")
        for place, part in enumerate(self.parts):
            mine = owner == place
            part.prioritise(own[mine], priorities[mine])

    def state(self) -> dict[str, Any]:
        """The states of the buffers."""
        return {str(place): part.state() for place, part in enumerate(self.parts)}

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

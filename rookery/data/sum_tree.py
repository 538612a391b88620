"""A tree of sums: drawing in proportion to millions of priorities, and changing some, in a few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from rookery.data.storage import Allocate

__all__ = ["SumTree"]

FANOUT = 16  # children of a node


class SumTree:
    """Priorities as leaves; every node is the sum of its children, made anew from them whenever one changes.

    So no error builds up, and the sums depend on the leaves alone, not on how they came about.

    Attributes:
        levels: float64, the leaves first, the root's children last; each padded with zeros to whole nodes.
    """

    def __init__(self, size: int, allocate: Allocate, fanout: int = FANOUT) -> None:
        self.size, self.fanout = size, fanout
        self.levels: list[Tensor] = []
        while not self.levels or size > 1:
            size = -(-size // fanout)  # nodes above this level
            self.levels.append(allocate(f"sums.{len(self.levels)}", (size, fanout), torch.float64).zero_())

    @property
    def leaves(self) -> Tensor:
        """`[size]` float64; a view, not to be written."""
        return self.levels[0].view(-1)[: self.size]

    def total(self) -> Tensor:
        """The sum of all leaves, `[]`."""
        return self.levels[-1].sum()

    def set(self, index: Tensor, value: Tensor) -> None:
        """Change leaves `[N]` to finite values ≥ 0 `[N]`; where an index comes twice, equal values."""
        self.levels[0].view(-1).index_copy_(0, index, value)
        for level, above in zip(self.levels, self.levels[1:], strict=False):
            index = index.div(self.fanout, rounding_mode="floor")
            above.view(-1).index_copy_(0, index, level.index_select(0, index).sum(-1))

    def find(self, mass: Tensor) -> Tensor:
        """The leaf that holds each point `[N]` of [0, total), laying the leaves end to end; never one of 0.

        What rounding puts beyond the end belongs to the last leaf above 0. At least one leaf has to be.
        """
        node = torch.zeros_like(mass, dtype=torch.int64)
        for level in reversed(self.levels):
            ends = level.index_select(0, node).cumsum(-1)
            mass = torch.minimum(mass, torch.nextafter(ends[:, -1], ends.new_zeros(())))
            child = (ends <= mass.unsqueeze(-1)).sum(-1)  # a child of 0 ends where the one before it does: skipped
            begin = ends.gather(-1, (child - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
            mass = mass - begin * (child > 0)
            node = node * self.fanout + child
        return node

    def state(self, size: int) -> dict[str, Tensor]:
        """Copies of the nodes above the first `size` leaves, and of these; the other leaves have to be 0."""
        saved = {}
        for place, level in enumerate(self.levels):
            size = -(-size // self.fanout)
            saved[str(place)] = level[:size].clone()
        return saved

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state()` of a tree of this size was taken."""
        for place, level in enumerate(self.levels):
            saved = state[str(place)]
            level.zero_()[: len(saved)] = saved

"""A tree of sums: drawing in proportion to millions of priorities, and changing some, in a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from rookery.data.storage import Allocate

__all__ = ["SumTree", "sum_tree"]

# 32 children a node below a top of at most 32,768 sums: of 1M leaves, 512 are found in 174 µs of processor time and
# changed in 20 µs, against 192 and 35 below 1,024, 179 and 32 with 16 below 4,096, 226 and 36 with 128 below 8,192, 232
# and 18 with 16 below 65,536 (2026-11-21, torch 2.13, a core that others used too).
FANOUT, TOP = 32, 32_768


def sum_tree(size: int, allocate: Allocate, device: torch.device) -> SumTree:
    """The fastest there is: on a CPU with Numba installed in compiled loops, which draw three times as fast."""
    if device.type == "cpu" and find_spec("numba"):
        from rookery.data.compiled import CompiledSumTree

        return CompiledSumTree(size, allocate)
    return SumTree(size, allocate)


class SumTree:
    """Priorities as leaves; every sum is made anew from what is below it whenever that changes, so no error builds up.

    Attributes:
        levels: float64 `[nodes, FANOUT]`, the leaves first; padded with zeros to whole nodes.
        top: float64 `[nodes of the last level]`, its sums.
    """

    def __init__(self, size: int, allocate: Allocate, fanout: int = FANOUT, top: int = TOP) -> None:
        self.size, self.fanout = size, fanout
        self.levels: list[Tensor] = []
        while not self.levels or size > top:
            size = -(-size // fanout)  # nodes that hold so many
            self.levels.append(allocate(f"sums.{len(self.levels)}", (size, fanout), torch.float64).zero_())
        self.top = allocate("sums.top", (size,), torch.float64).zero_()
        self._zero = torch.zeros((), dtype=torch.float64, device=self.top.device)

    @property
    def leaves(self) -> Tensor:
        """`[size]` float64; a view, not to be written."""
        return self.levels[0].view(-1)[: self.size]

    def total(self) -> Tensor:
        """The sum of all leaves, `[]`."""
        return self.top.sum()

    def set(self, index: Tensor, value: Tensor) -> None:
        """Change leaves `[N]` to finite values ≥ 0 `[N]`; of an index that comes twice, one value stays."""
        self.levels[0].view(-1).index_copy_(0, index, value)
        for level, above in zip(self.levels, [*self.levels[1:], self.top], strict=True):
            index = index.div(self.fanout, rounding_mode="floor")
            above.view(-1).index_copy_(0, index, level.index_select(0, index).sum(-1))

    def change(self, index: Tensor, value: Tensor) -> None:
        """`set` those of the leaves `[N]` that are above 0."""
        above = self.leaves.index_select(0, index) > 0
        if not above.all():
            index, value = index[above], value[above]
        self.set(index, value)

    def draw(self, lots: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """For each row of lots `[batches, N]` in [0, 1), one leaf from each Nth of the sum.

        Returns:
            The leaves `[batches·N]`, and float32 what each holds, over the least of its row, to the power of −beta.
        """
        parts = (torch.arange(lots.shape[1], device=lots.device) + lots) / lots.shape[1]
        found = self.find(parts.view(-1) * self.total())
        value = self.leaves.index_select(0, found).view_as(lots)
        return found, ((value / value.amin(-1, keepdim=True)) ** -beta).float().view(-1)

    def find(self, mass: Tensor) -> Tensor:
        """The leaf that holds each point `[N]` of [0, total), laying the leaves end to end; never one of 0.

        What rounding puts beyond an end belongs to the last leaf above 0 before it. At least one leaf has to be.
        """
        ends = self.top.cumsum(0)
        mass = torch.minimum(mass, torch.nextafter(ends[-1], self._zero))
        node = torch.searchsorted(ends, mass, right=True)  # what is 0 ends where the one before it does: skipped
        mass, before = mass.unsqueeze(-1), (ends - self.top).index_select(0, node).unsqueeze(-1)
        for level in reversed(self.levels):
            values = level.index_select(0, node)
            ends = values.cumsum(-1)
            mass = torch.minimum((mass - before).clamp_(min=0), torch.nextafter(ends[:, -1:], self._zero))
            child = torch.searchsorted(ends, mass, right=True)
            node = torch.add(child.squeeze(-1), node, alpha=self.fanout)
            if level is not self.levels[0]:
                before = (ends - values).gather(-1, child)
        return node

    def state(self, size: int) -> dict[str, Tensor]:
        """Copies of the first `size` leaves, rounded up to nodes, and of all sums; the other leaves have to be 0."""
        first, *above = self.levels
        saved = {str(place): level.clone() for place, level in enumerate(above, start=1)}
        return {"0": first[: -(-size // self.fanout)].clone(), **saved, "top": self.top.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state()` of a tree of this size was taken, whatever its nodes."""
        leaves = state["0"].view(-1)[: self.size]
        self.levels[0].zero_().view(-1)[: len(leaves)] = leaves
        sums, saved = [*self.levels[1:], self.top], [state[name] for name in sorted(state) if name != "0"]
        if [level.shape for level in saved] == [level.shape for level in sums]:
            for level, values in zip(sums, saved, strict=True):
                level.copy_(values)
        else:
            self.set(torch.arange(self.size, device=leaves.device), self.leaves.clone())

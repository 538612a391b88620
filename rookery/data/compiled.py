"""The tree of sums in compiled loops: what replay on a CPU draws by where Numba is installed.

A descent by calls of torch goes over all points once for every call, and half of its time is the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit
from torch import Tensor

from rookery.data.storage import Allocate
from rookery.data.sum_tree import SumTree

__all__ = ["CompiledSumTree"]

# A node of 8 is one line of a cache. Drawing 512 of 1M leaves takes 69 µs, 79 with 16 and 168 with 32 (2026-11-23).
FANOUT, TOP = 8, 512

Numbers = np.ndarray[Any, np.dtype[Any]]

Function = TypeVar("Function", bound=Callable[..., Any])
U = np.uint64  # of an index that has no sign, nobody asks whether it counts from the end


def compiled(function: Function) -> Function:
    """Compiled at the first call, and kept on the disk for later processes where there is a folder to write to."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no such folder
        return njit(**options)(function)


class CompiledSumTree(SumTree):
    """What `SumTree` draws, but for rounding, of leaves and sums on the CPU."""

    def __init__(self, size: int, allocate: Allocate, fanout: int = FANOUT, top: int = TOP) -> None:
        super().__init__(size, allocate, fanout, top)
        self._flat = self._views()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, to which an array would travel as a copy of the memory that tensors share."""
        return {name: value for name, value in self.__dict__.items() if name != "_flat"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._flat = self._views()

    def _views(self) -> list[Numbers]:
        """The levels and the top, flat."""
        return [level.view(-1).numpy() for level in (*self.levels, self.top)]

    def set(self, index: Tensor, value: Tensor) -> None:
        self._write(index, value, -1.0)

    def change(self, index: Tensor, value: Tensor) -> None:
        self._write(index, value, 0.0)

    def _write(self, index: Tensor, value: Tensor, above: float) -> None:
        """Change those of the leaves that hold more than this, and the sums over them."""
        node = index.numpy().copy()
        _put(self._flat[0], node, value.numpy(), above)
        for level, sums in pairwise(self._flat):
            _add_up(level, sums, node, self.fanout)

    def draw(self, lots: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        leaves, top, count = self._flat[0], self._flat[-1], lots.shape[1]
        found = self._find(((np.arange(count) + lots.numpy()) * (top.sum() / count)).reshape(-1))
        value = leaves[found].reshape(lots.shape)
        weight = (value / value.min(-1, keepdims=True)) ** -beta
        return torch.from_numpy(found), torch.from_numpy(weight.astype(np.float32).reshape(-1))

    def find(self, mass: Tensor) -> Tensor:
        return torch.from_numpy(self._find(mass.numpy().copy()))

    def _find(self, rest: Numbers) -> Numbers:
        """What `find` finds; `rest` is written over."""
        *levels, top = self._flat
        node = np.empty(len(rest), np.int64)
        _begin(top, node, rest)
        for level in reversed(levels):
            _descend(level, node, rest, self.fanout)
        return node


@compiled
def _put(leaves: Numbers, index: Numbers, value: Numbers, above: float) -> None:
    """Change those of the leaves that hold more than this."""
    for i in range(len(index)):
        if leaves[U(index[i])] > above:
            leaves[U(index[i])] = value[i]


@compiled
def _add_up(below: Numbers, above: Numbers, node: Numbers, fanout: int) -> None:
    """From nodes to their parents, whose sums are made anew."""
    for i in range(len(node)):
        node[i] //= fanout
        total, first = 0.0, U(node[i]) * U(fanout)
        for k in range(fanout):
            total += below[first + U(k)]
        above[U(node[i])] = total


@compiled
def _begin(top: Numbers, node: Numbers, rest: Numbers) -> None:
    """The entry of the top that holds each point, and how far into it; points in order take one pass over the top."""
    last = 0
    for k in range(len(top)):
        last = k if top[k] > 0 else last
    at, before, end = 0, 0.0, top[0]
    for i in range(len(node)):
        if rest[i] < before:
            at, before, end = 0, 0.0, top[0]
        while rest[i] >= end and at < last:
            at += 1
            before = end
            end += top[at]
        node[i] = at
        rest[i] -= before


@compiled
def _descend(level: Numbers, node: Numbers, rest: Numbers, fanout: int) -> float:
    """From nodes to those of their children that hold the points, and how far into them."""
    touched = 0.0  # given back, else nothing would be read
    for i in range(len(node)):  # ask the memory for all nodes, before the first is waited for
        touched += level[U(node[i]) * U(fanout)]
    for i in range(len(node)):
        first, point = U(node[i]) * U(fanout), rest[i]
        child, end, before = 0, 0.0, 0.0
        for k in range(fanout):
            end += level[first + U(k)]
            beyond = point >= end
            child += beyond
            before = end if beyond else before
        if child == fanout:  # rounding put it beyond the end: the last above 0
            child, before = fanout - 1, 0.0
            while child > 0 and level[first + U(child)] == 0:
                child -= 1
        node[i] = np.int64(first) + child
        rest[i] = point - before
    return touched

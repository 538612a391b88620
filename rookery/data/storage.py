"""Where replay keeps its rows: a ring of columns, allocated once, in RAM, shared memory, a file or on a device."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rookery.envs.vector import Obs

__all__ = ["Allocate", "Key", "Memory", "Ring", "allocator", "assembled", "leaves", "nested", "plain", "tensor_of"]

Memory = Literal["ram", "shared"] | Path  # a path is the folder of memory-mapped files
Key = tuple[str, ...]  # a column's name, and below it the path into a structure
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]  # name, shape, dtype

SMALL = 4096  # bytes of a cell, up to which NumPy reads some hundred in two thirds of the time that torch takes


def plain(tensor: Tensor) -> Any:
    """On a CPU a view by NumPy, whose operations on a few hundred numbers take a third of the time; else the tensor."""
    return tensor.numpy() if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16 else tensor


def tensor_of(numbers: Any) -> Tensor:
    """The tensor that `plain` numbers are of."""
    return numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)


def leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Tensor]]:
    """Every tensor of a tensor, dict or TensorDict, with the path to it."""
    if isinstance(value, Tensor):
        yield key, value
    else:
        for name, child in value.items():
            yield from leaves(child, (*key, name))


def nested(parts: dict[Key, Any]) -> dict[str, Any]:
    """Dicts in dicts that have these leaves: the inverse of `leaves`."""
    whole: dict[str, Any] = {}
    for (*path, name), leaf in parts.items():
        inner = whole
        for step in path:
            inner = inner.setdefault(step, {})
        inner[name] = leaf
    return whole


def assembled(parts: dict[Key, Tensor], size: torch.Size) -> Obs:
    """The tensor, or the nested TensorDict of this batch size, whose leaves these are."""
    if () in parts:
        return parts[()]
    from tensordict import TensorDict  # takes a second to import, and only structures need it

    return TensorDict(nested(parts), batch_size=size)


def allocator(memory: Memory, device: torch.device) -> Allocate:
    """How memory of a kind is made; what is never written takes no room in RAM.

    Neither shared memory nor files have a name that could be left behind; room for files is taken at once.

    Raises:
        ValueError: for a kind that does not exist, or shared memory or files on another device. `Allocate` raises it
            where a folder has no room.
    """
    if not (memory in ("ram", "shared") or isinstance(memory, Path)):
        raise ValueError(f"memory={memory!r} is no kind of memory; use 'ram', 'shared' or the Path of a folder.")
    if memory != "ram" and device.type != "cpu":
        raise ValueError(f"memory={str(memory)!r} is not on {device}; use memory='ram' there, or device='cpu'.")
    return partial(_allocate, memory, device)


def _allocate(memory: Memory, device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if memory == "ram":
        return torch.empty(shape, dtype=dtype, device=device)
    size = torch.Size(shape)
    if memory == "shared":
        storage = torch.UntypedStorage._new_shared(size.numel() * dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage, 0, size)  # type: ignore[call-overload]  # its stubs want strides
    memory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=memory, prefix=name.replace("/", "_")) as file:
        _take_room(file.fileno(), size.numel() * dtype.itemsize, memory)
        return torch.from_file(file.name, shared=True, size=size.numel(), dtype=dtype).view(size)


def _take_room(file: int, size: int, folder: Path) -> None:
    """Else a write to memory that finds none on the disk would end the process (SIGBUS)."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise ValueError(
            f"replay takes {size / 1e9:.3g} GB more in {folder}, which has {free / 1e9:.3g} GB left "
            f"({error.strerror}); use a smaller capacity, or a run_dir on a larger disk."
        ) from error


class Ring:
    """Columns of C rows, time-major: L = W·B lanes side by side, B for each of W writers.

    Each writer numbers its rows from 0 on; row r of any of them lies in row r mod C. A cell is one lane of one row:
    cell = (r mod C)·L + lane.

    Attributes:
        rows: C.
        columns: by key, `[C, L, ...]`.
        names: the keys of a structure, or the one key of a tensor, by its name.
    """

    def __init__(self, rows: int, lanes: int, writers: int, allocate: Allocate) -> None:
        self.rows, self.lanes, self.writers, self.cells = rows, lanes, writers, rows * lanes * writers
        self.columns: dict[Key, Tensor] = {}
        self.names: dict[str, list[Key]] = {}
        self._allocate = allocate
        self._written: dict[Key, list[Tensor]] = {}  # each writer's [C, B, ...]
        self._flat: dict[Key, Tensor] = {}  # [C·L, numbers in a cell]
        self._arrays: dict[Key, Any] = {}  # of those that NumPy reads, its views

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, to which an array would travel as a copy of the memory that tensors share."""
        return {**self.__dict__, "_arrays": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for key in self._flat:
            self._view(key)

    def add(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make room for a column whose cells have this shape."""
        column = self._allocate(".".join(key), (self.rows, self.lanes * self.writers, *shape), dtype)
        self.columns[key] = column
        self.names.setdefault(key[0], []).append(key)
        self._written[key] = list(column.split(self.lanes, 1))
        # Whole cells of a two-dimensional tensor are picked several times faster than those of one with more.
        self._flat[key] = column.view(self.cells, -1) if shape else column.view(self.cells)
        self._view(key)

    def _view(self, key: Key) -> None:
        flat = self._flat[key]
        if flat[0].nbytes <= SMALL and not isinstance(plain(flat), Tensor):
            self._arrays[key] = plain(flat)

    def put(self, key: Key, writer: int, first: int, values: Tensor) -> None:
        """Store a writer's rows from row `first` on, `[T, B, ...]`, T ≤ C."""
        column, place = self._written[key][writer], first % self.rows
        room = self.rows - place
        if len(values) > room:
            column[: len(values) - room] = values[room:]
            values = values[:room]
        column[place : place + len(values)] = values

    def get(self, key: Key, writer: int, first: int, count: int) -> Tensor:
        """A writer's rows from row `first` on, `[count, B, ...]`: a view, or a copy where they wrap around."""
        column, place = self._written[key][writer], first % self.rows
        if place + count <= self.rows:
            return column[place : place + count]
        return torch.cat([column[place:], column[: place + count - self.rows]])

    def take(self, key: Key, cells: Tensor) -> Tensor:
        """These cells, `[*cells.shape, ...]`."""
        index = cells if cells.ndim == 1 else cells.flatten()
        if (array := self._arrays.get(key)) is None:
            found = self._flat[key].index_select(0, index)
        else:
            found = torch.from_numpy(array.take(index.numpy(), 0, mode="clip"))  # "raise" would copy once more
        if index is cells and self.columns[key].ndim <= 3:
            return found
        return found.view(*cells.shape, *self.columns[key].shape[2:])

    def read(self, name: str, cells: Tensor) -> Obs:
        """These cells of a whole structure, or of one tensor."""
        if (keys := self.names[name]) == [(name,)]:
            return self.take(keys[0], cells)
        return assembled({key[1:]: self.take(key, cells) for key in keys}, cells.shape)

    def later(self, cells: Tensor, rows: Tensor | int) -> Tensor:
        """The cells so many rows later in the same lanes; both broadcast."""
        ahead = plain(rows) if isinstance(rows, Tensor) else rows
        return tensor_of((plain(cells) + ahead * (self.lanes * self.writers)) % self.cells)

    def cells_of(self, writer: int, first: int, count: int) -> Tensor:
        """The cells of a writer's rows from row `first` on, `[count, B]`."""
        device = next(iter(self.columns.values())).device
        row = torch.arange(first, first + count, device=device).remainder(self.rows)
        lane = torch.arange(writer * self.lanes, (writer + 1) * self.lanes, device=device)
        return row.unsqueeze(-1) * (self.lanes * self.writers) + lane

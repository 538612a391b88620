"""Boxes: what one process fills and others read, in memory that they share, made once and known by a number.

A box is any object whose tensors are on the CPU. The first time that it is sent to another process its storages move
into shared memory, where they stay; from then on its number travels instead. That memory has no name in the file
system: it is freed with the last process that sees it, however that ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Parcel", "content", "copied", "fill", "fits", "nbytes", "packed", "pour", "unpacked"]


class Parcel:
    """A slot for nested dicts of tensors, always of the same names, shapes and dtypes."""

    def __init__(self, like: dict[str, Any]) -> None:
        self.content: dict[str, Any] = copied(like)

    def fill(self, content: dict[str, Any]) -> None:
        pour(content, self.content)

    def state(self) -> dict[str, Any]:
        return self.content

    def load_state(self, state: dict[str, Any]) -> None:
        pour(state, self.content)


def copied(value: Any) -> Any:
    """A copy of nested dicts and TensorDicts of tensors, on the CPU."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value)
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    return value.to("cpu").clone() if hasattr(value, "batch_size") else value


def fits(box: Any, value: Any) -> bool:
    """Whether a box has room for exactly this value: the same names, shapes and dtypes."""
    if isinstance(value, Tensor):
        return isinstance(box, Tensor) and box.shape == value.shape and box.dtype == value.dtype
    if isinstance(value, dict):
        return isinstance(box, dict) and box.keys() == value.keys() and all(fits(box[key], value[key]) for key in value)
    if hasattr(value, "batch_size"):
        return hasattr(box, "batch_size") and fits(box.to_dict(), value.to_dict())
    return False


def pour(value: Any, box: Any) -> None:
    """Copy a value into a box that it fits."""
    if isinstance(value, Tensor):
        box.copy_(value)
    elif isinstance(value, dict):
        for name, part in value.items():
            pour(part, box[name])
    else:
        box.update_(value)


def packed(value: Any) -> Any:
    """Nested dicts with arrays in place of tensors, which travel as bytes and share no memory."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return {name: packed(part) for name, part in value.items()} if isinstance(value, dict) else value


def unpacked(value: Any) -> Any:
    """The inverse of `packed`."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return {name: unpacked(part) for name, part in value.items()} if isinstance(value, dict) else value


def content(box: Any) -> list[np.ndarray]:
    """The memory of a box's tensors as bytes, in the order in which they are found in it."""
    return [_memory(tensor) for tensor in _tensors(box, set())]


def fill(box: Any, content: list[np.ndarray]) -> None:
    """Copy what is in another box of the same kind into this one."""
    for tensor, memory in zip(_tensors(box, set()), content, strict=True):
        np.copyto(_memory(tensor), memory)


def nbytes(box: Any) -> int:
    """Bytes of the tensors in an object."""
    return sum(tensor.nbytes for tensor in _tensors(box, set()))


def _memory(tensor: Tensor) -> np.ndarray:
    memory: np.ndarray = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memory


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an object, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = ()
    if isinstance(value, Mapping) or hasattr(value, "batch_size"):  # a TensorDict is no Mapping
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif hasattr(value, "__dict__"):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors(part, seen)

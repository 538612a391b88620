"""Storage of one unroll: allocated once from an example row, poisoned until written, one copy a leaf.

Also frame stacks whose frames are stored once: a strided view of the single frames, and the mask of what it may show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from rookery.envs.vector import Obs

__all__ = ["FrameStacks", "UnrollBuffer", "frames_to_stacks"]


class UnrollBuffer:
    """Room for T steps of B lanes, and one row more to bootstrap from.

    Attributes:
        storage: columns by name: tensors [T+1, B, ...], or TensorDicts of such and of batch size [T+1, B]. Rows never
            written are poisoned: NaN, the largest value of an unsigned integer, the smallest of a signed one, False.
        steps: T.
        copies: how many leaf tensors `write` has copied so far, each stack of rows counting as one.
    """

    storage: dict[str, Obs]
    steps: int
    copies: int

    def __init__(self, example: Mapping[str, Any], steps: int) -> None:
        """Allocate.

        Args:
            example: one row: tensors `[B, ...]` by name, in their dtypes and on their device; TensorDicts may nest.
            steps: T.

        Raises:
            ValueError: for an empty example, leaves that disagree on B, or fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} holds nothing; use 1 or more.")
        lanes = {name: list(leaf.shape[:1]) for name, leaf in _leaves(example)}
        sizes = {tuple(size) for size in lanes.values()}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(f"every tensor of an example row has shape [B, ...] with one B; got first sizes {lanes}.")
        self.storage = {name: _room(value, steps + 1, *sizes) for name, value in example.items()}
        self.steps = steps
        self.copies = 0
        self.poison()

    def poison(self) -> None:
        """Overwrite every row with values that no one can mistake for data."""
        for _, leaf in _leaves(self.storage):
            leaf.fill_(_poison_of(leaf.dtype))

    def write(self, rows: Mapping[str, Sequence[Obs]], first: int = 0) -> None:
        """Stack each key's rows, in order of time, into the storage from row `first` on: one copy a leaf.

        Other rows, and keys that are not mentioned, stay as they were.

        Raises:
            ValueError: for an unknown key, rows beyond the last, or a row of a wrong shape, dtype or device.
        """
        for key, sequence in rows.items():
            stored = self.storage.get(key)
            if stored is None:
                raise ValueError(f"no key {key!r} in this unroll; it holds {', '.join(sorted(self.storage))}.")
            if not sequence or not 0 <= first <= self.steps + 1 - len(sequence):
                raise ValueError(
                    f"{key!r} brings {len(sequence)} rows from row {first} on; "
                    f"an unroll of {self.steps} steps has rows 0 to {self.steps}."
                )
            into_rows = slice(first, first + len(sequence))
            if isinstance(stored, Tensor):
                self._stack(key, stored[into_rows], cast(Sequence[Tensor], sequence))
                continue
            for leaf, into in stored.items(include_nested=True, leaves_only=True):
                name = ".".join((key, *([leaf] if isinstance(leaf, str) else leaf)))
                self._stack(name, cast(Tensor, into)[into_rows], [_leaf_of(row, leaf, name) for row in sequence])

    def _stack(self, name: str, into: Tensor, rows: Sequence[Tensor]) -> None:
        wanted = (into.shape[1:], into.dtype, into.device)
        for shape, dtype, device in {(row.shape, row.dtype, row.device) for row in rows} - {wanted}:
            raise ValueError(
                f"{name!r} brings a row {_looks(shape, dtype, device)}; this unroll was allocated for "
                f"{_looks(*wanted)}: give rows like its example."
            )
        torch.stack(list(rows), out=into)
        self.copies += 1


class FrameStacks(NamedTuple):
    """N rows of stacked observations over single frames, each frame stored once."""

    view: Shaped[Tensor, "N B K1 *F"]  # no memory of its own; oldest frame first, K1 = stack
    mask: Bool[Tensor, "N B K1"]  # False where the frame belongs to an earlier episode, and must be read as zeros

    def gather(self, t: Int[Tensor, "*M"], b: Int[Tensor, "*M"]) -> Shaped[Tensor, "*M K1 *F"]:
        """The stacks of rows `t` in lanes `b` (both ≥ 0), one copy; frames of earlier episodes are zeros.

        The same as `view[t, b]` with the mask applied. Whole frames are picked by their row, which on a CPU takes a
        small part of the time of indexing in two dimensions.
        """
        stack, frame = self.mask.shape[2], self.view.shape[3:]
        rows, lanes = len(self.view) + stack - 1, self.view.shape[1]
        frames = self.view.as_strided((rows * lanes, frame.numel()), (frame.numel(), 1))
        chosen = (t * lanes + b)[..., None] + torch.arange(stack, device=t.device) * lanes
        stacks = frames.index_select(0, chosen.flatten())
        shown = self.mask[t, b].view(-1, 1)
        if stacks.is_floating_point():
            stacks.masked_fill_(~shown, 0.0)  # 0 times a poisoned frame would be NaN
        else:
            stacks.mul_(shown)  # much faster than masked_fill_ on bytes
        return stacks.view(*t.shape, stack, *frame)


def frames_to_stacks(frames: Shaped[Tensor, "NK B *F"], start: Bool[Tensor, "NK B"], stack: int) -> FrameStacks:
    """Stacked observations, as the environment would have stacked them, from single frames stored once.

    Row t of the result shows `frames[t : t + stack]`; `frames[t + stack - 1]` is its newest. Frames before the first
    one of the row's episode are zeros, by the mask.

    Args:
        frames: `stack - 1` rows of history, then N rows, `[N+stack-1, B, ...]` (`H, W` or `C, H, W`), contiguous.
            History may hold anything where `start` hides it.
        start: whether the frame is the first of its episode, `[N+stack-1, B]`, history included.
        stack: frames in an observation, 1 or more.

    Raises:
        ValueError: for frames that are not contiguous, or fewer than `stack`.
    """
    if not 1 <= stack <= len(frames):
        raise ValueError(f"stack={stack} with {len(frames)} rows of frames; use 1 to {len(frames)}.")
    if not frames.is_contiguous():
        raise ValueError("frames must be contiguous to be viewed as stacks; call .contiguous() on them first.")
    rows = len(frames) - stack + 1
    mask = start.new_ones((rows, frames.shape[1], stack))
    for place in range(stack - 2, -1, -1):  # a frame shows if the next newer one does and did not begin the episode
        mask[..., place] = mask[..., place + 1] & ~start[place + 1 : place + 1 + rows]
    return FrameStacks(frames.unfold(0, stack, 1).movedim(-1, 2), mask)


def _poison_of(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    limits = torch.iinfo(dtype)
    return limits.min or limits.max


def _leaves(columns: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor of a dict or TensorDict with its dotted name."""
    found: list[tuple[str, Tensor]] = []
    for name, value in columns.items():
        found += [(prefix + name, value)] if isinstance(value, Tensor) else _leaves(value, f"{prefix}{name}.")
    return found


def _room(example: Any, rows: int, lanes: tuple[int, ...]) -> Obs:
    """Memory for so many rows like the example."""
    if isinstance(example, Tensor):
        return example.new_empty((rows, *example.shape))
    from tensordict import TensorDict  # takes a second to import, and only structures need it

    nested = {name: _room(value, rows, lanes) for name, value in example.items()}
    return TensorDict(nested, batch_size=[rows, *lanes])


def _leaf_of(row: Obs, leaf: str | tuple[str, ...], name: str) -> Tensor:
    found = None if isinstance(row, Tensor) else row.get(leaf, None)
    if found is None:
        raise ValueError(f"{name!r} is missing from a row; give rows like the example this unroll was allocated from.")
    return found


def _looks(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"

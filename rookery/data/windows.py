"""What surrounds a row: its place in its episode and how long that goes on. Functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FAR", "steps_in_episode", "steps_left"]

FAR = 2**30  # steps: the episode's end is not known yet


def steps_left(ended: Tensor) -> Tensor:
    """How many rows after each row `[T, B]` its episode ends, 0 in the ended row itself; FAR − T or more if unknown."""
    place = torch.arange(len(ended), device=ended.device).unsqueeze(-1)
    end = torch.where(ended, place, FAR).flip(0).cummin(0).values.flip(0)
    return end - place


def steps_in_episode(first: Tensor, before: Tensor) -> Tensor:
    """How many rows before each row `[T, B]` its episode began.

    Args:
        first: whether the row is its episode's first, `[T, B]`.
        before: the result for the row before row 0, `[B]`.
    """
    place = torch.arange(len(first), device=first.device).unsqueeze(-1)
    begin = torch.where(first, place, -FAR)
    begin[0] = torch.where(first[0], 0, -1 - before)
    return place - begin.cummax(0).values

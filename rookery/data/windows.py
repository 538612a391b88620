"""What surrounds a row: its place in its episode, how long that goes on, the n-step return. Functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FAR", "n_step_returns", "steps_in_episode", "steps_left"]

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


def n_step_returns(reward: Tensor, terminated: Tensor, span: Tensor, n: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Σ_{k<m} γ^k r_{t+k} and γ^m·(1 − terminated) for windows of m = `span` rows (Sutton and Barto 2018, eq. 7.1).

    Args:
        reward, terminated, span: `[T, B]`; windows that reach beyond row T−1 give what makes no sense.
        n: the longest span.
    """
    rows = len(reward)
    total, padded = torch.zeros_like(reward), torch.cat([reward, reward.new_zeros(n - 1, reward.shape[1])])
    for k in range(n):
        total += gamma**k * torch.where(span > k, padded[k : k + rows], 0.0)
    last = torch.arange(rows, device=span.device).unsqueeze(-1) + span - 1
    final = terminated.gather(0, last.clamp(max=rows - 1))
    return total, torch.where(final, 0.0, gamma ** span.to(reward.dtype))

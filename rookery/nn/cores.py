"""Recurrent cores, with a reset at episode starts.

Every core maps features `x` and a packed state `[B, S]` to `(y, state)`. Without `start`, or with `start` `[B]`, `x` is
one step `[B, F]`; with `start` `[T, B]` it is a time-major sequence `[T, B, F]` and `state` belongs before its first
row. `start` is True in the rows that begin an episode: the state is zeroed before them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rookery.nn.init import init_linear

__all__ = ["GRU", "LSTM", "Core", "NoMemory", "make_core"]


class NoMemory(nn.Module):
    """Features pass through; the state is empty, `[B, 0]`."""

    state_size = 0

    def __init__(self, features: int, size: int = 0) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor, state: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, state


class Recurrent(nn.Module):
    """A cell over time: one product for the inputs of all T steps, then a loop over the small recurrent part."""

    gates: int  # products of size H a step

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.features = size
        self.input = init_linear(nn.Linear(features, self.gates * size), gain=1.0)
        self.recurrent = init_linear(nn.Linear(size, self.gates * size), gain=1.0)

    def cell(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step from the projected input `[B, gates·H]`: the output `[B, H]` and the next state `[B, S]`."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        projected = self.input(x)
        if start is None:
            return self.cell(projected, state)
        begins = start.unsqueeze(-1)
        if start.ndim == 1:
            return self.cell(projected, state.masked_fill(begins, 0))
        outputs = []
        for row, begin in zip(projected.unbind(0), begins.unbind(0), strict=True):
            y, state = self.cell(row, state.masked_fill(begin, 0))
            outputs.append(y)
        return torch.stack(outputs), state


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    The state `[B, 2H]` is h, then c. Orthogonal weights and zero biases.
    """

    gates = 4

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.state_size = 2 * size

    def cell(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, c = state.chunk(2, -1)
        gates = projected + self.recurrent(h)
        size = self.features
        forget, write, read = gates[..., : 3 * size].sigmoid().chunk(3, -1)
        c = forget * c + write * gates[..., 3 * size :].tanh()
        h = read * c.tanh()
        return h, torch.cat((h, c), -1)


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014), in the form of cuDNN: the reset gate acts after the product.

    The state `[B, H]` is the output. Orthogonal weights and zero biases.
    """

    gates = 3

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features, size)
        self.state_size = size

    def cell(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        size = self.features
        recurrent = self.recurrent(state)
        reset, keep = (projected[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid().chunk(2, -1)
        candidate = (projected[..., 2 * size :] + reset * recurrent[..., 2 * size :]).tanh()
        h = candidate + keep * (state - candidate)
        return h, h


Core = NoMemory | LSTM | GRU
CORES: dict[str, type[NoMemory] | type[LSTM] | type[GRU]] = {"none": NoMemory, "lstm": LSTM, "gru": GRU}


def make_core(memory: Literal["none", "lstm", "gru"], features: int, size: int) -> Core:
    """The core by name; its output has `features` numbers.

    Raises:
        ValueError: for an unknown name.
    """
    if memory not in CORES:
        raise ValueError(f"Unknown memory {memory!r}; choose one of {', '.join(CORES)}.")
    return CORES[memory](features, size)

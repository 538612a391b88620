"""What the parts around an algorithm ask of its network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PolicyNet"]


class PolicyNet(nn.Module):
    """A network that acts. How it is called is between the network and its algorithm."""

    state_size: int  # S, numbers of recurrent state a lane; 0 without memory

    def initial_state(self, lanes: int, device: torch.device | str = "cpu") -> Tensor:
        """The memory before an episode, float32 `[B, S]`; S is 0 without memory."""
        return torch.zeros(lanes, self.state_size, device=device)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The noise that sampling actions of this shape takes: `[*shape, N]`, on the generator's device."""
        raise NotImplementedError

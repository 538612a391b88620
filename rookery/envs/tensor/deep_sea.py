"""DeepSea: an exploration task whose reward undirected exploration finds with probability 2^-N."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.tensor import drawing
from rookery.envs.tensor.base import State, TensorEnv

__all__ = ["DeepSea"]


class DeepSea(TensorEnv):
    """Descend an N × N board from its top left corner, one row a step, going left or right; N steps an episode.

    bsuite's deterministic DeepSea (Osband et al. 2020): going right costs 0.01/N, going right in the last column
    gives +1; which of the two actions is "right" is drawn for each cell from `seed`, once for all lanes and episodes.
    The best return is 0.99. The observation is the place, one-hot `[N, N]` float32; all zero at the bottom.
    """

    id = "DeepSea-v0"
    reward_threshold = 0.98

    def build(self, size: int = 10, seed: int = 0) -> None:
        if size < 2:
            raise ValueError(f"DeepSea-v0 was asked for size={size}; use 2 or more.")
        self.size = size
        self.obs_space = spaces.Box(0.0, 1.0, (size, size), np.float32)
        self.action_space = spaces.Discrete(2)
        right = torch.randint(0, 2, (size, size), generator=torch.Generator().manual_seed(seed))
        # One row more than the board, since lanes that are over stand below it.
        self.right_action = self.constant(torch.cat((right, right[:1])), torch.int64)
        self._cells = torch.arange(size * size, device=self.device)
        self._start = torch.zeros(self.lanes, dtype=torch.int64, device=self.device)

    def initial(self, noise: Tensor) -> State:
        return {"row": self._start, "column": self._start}

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        row, column = state["row"], state["column"]
        right = action == self.right_action[row, column]
        found = right & (column == self.size - 1)
        column = torch.clamp(column + 2 * right - 1, 0, self.size - 1)
        row = torch.clamp(row + 1, max=self.size)
        return {"row": row, "column": column}, found.float() - right * (0.01 / self.size), row == self.size

    def observe(self, state: State) -> Tensor:
        place = state["row"] * self.size + state["column"]
        return (self._cells == place.unsqueeze(-1)).float().view(-1, self.size, self.size)

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        colours = np.full((self.size + 1, self.size, 3), drawing.PAPER, np.uint8)
        colours[-1] = drawing.GREY
        colours[-1, -1] = drawing.GREEN
        colours[int(state["row"]), int(state["column"])] = drawing.BLUE
        return drawing.board(colours)

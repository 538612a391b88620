"""Catch: a falling ball and a paddle, the smallest task with a picture and a delayed reward."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.tensor import drawing
from rookery.envs.tensor.base import State, TensorEnv

__all__ = ["Catch"]


class Catch(TensorEnv):
    """Move the paddle (left, stay, right) under the ball that falls one row a step: ±1 when it arrives.

    bsuite's Catch (Osband et al. 2020; Mnih et al. 2014): the ball starts in a random column of the top row, the
    paddle in the middle of the bottom row; the observation is the board, `[rows, columns]` float32 of 0 and 1. An
    episode has `rows − 1` steps; the best return is 1.
    """

    id = "Catch-v0"
    reward_threshold = 0.95
    draws = 1

    def build(self, rows: int = 10, columns: int = 5) -> None:
        if rows < 2 or columns < 1:
            raise ValueError(f"Catch-v0 was asked for {rows} rows × {columns} columns; use at least 2 × 1.")
        self.rows, self.columns = rows, columns
        self.obs_space = spaces.Box(0.0, 1.0, (rows, columns), np.float32)
        self.action_space = spaces.Discrete(3)
        self._cells = torch.arange(rows * columns, device=self.device)

    def initial(self, noise: Tensor) -> State:
        ball = (noise[:, 0] * self.columns).long()
        return {"ball": ball, "paddle": torch.full_like(ball, (self.rows - 1) * self.columns + self.columns // 2)}

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        last_row = (self.rows - 1) * self.columns
        paddle = torch.clamp(state["paddle"] + action - 1, last_row, last_row + self.columns - 1)
        ball = state["ball"] + self.columns
        landed = ball >= last_row
        return {"ball": ball, "paddle": paddle}, landed * ((ball == paddle) * 2.0 - 1.0), landed

    def observe(self, state: State) -> Tensor:
        ball, paddle = state["ball"].unsqueeze(-1), state["paddle"].unsqueeze(-1)
        board = (self._cells == ball) | (self._cells == paddle)
        return board.float().view(-1, self.rows, self.columns)

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        colours = np.full((self.rows * self.columns, 3), drawing.PAPER, np.uint8)
        colours[int(state["paddle"])] = drawing.BLUE
        if state["ball"] < len(colours):
            colours[int(state["ball"])] = drawing.RED
        return drawing.board(colours.reshape(self.rows, self.columns, 3))

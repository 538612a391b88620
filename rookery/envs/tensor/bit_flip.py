"""BitFlip: a task whose only goal-blind signal is found with probability 2^-N, and which hindsight makes easy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.goals import SparseGoal
from rookery.envs.tensor import drawing
from rookery.envs.tensor.base import Nested, State, TensorEnv
from rookery.envs.vector import Obs, Step

__all__ = ["BitFlip"]


class BitFlip(TensorEnv):
    """Make N bits equal to N given ones, flipping one a step; −1 a step, but 0 where they are equal.

    The bit-flipping environment of Andrychowicz et al. 2017, section 3.1: bits and goal are drawn uniformly for each
    episode, which has N steps and never terminates: it is truncated, so a goal that is reached is left again.
    Observations are 0 or 1, `[N]` float32 each: `observation`, which is also the `achieved_goal`, and `desired_goal`.
    `info["is_success"]` says whether the goal has been reached in this episode.
    """

    id = "BitFlip-v0"

    def __init__(self, lanes: int, device: torch.device | str = "cpu", **options: Any) -> None:
        super().__init__(lanes, device, **options)
        self.spec = replace(self.spec, goal_reward=SparseGoal(0.0))

    def build(self, bits: int = 8) -> None:
        if bits < 1:
            raise ValueError(f"BitFlip-v0 was asked for bits={bits}; use 1 or more.")
        self.default_max_steps, self.draws = bits, 2 * bits
        row = spaces.Box(0.0, 1.0, (bits,), np.float32)
        self.obs_space = spaces.Dict({"observation": row, "achieved_goal": row, "desired_goal": row})
        self.action_space = spaces.Discrete(bits)
        self._places = torch.arange(bits, device=self.device)
        self._never = torch.zeros(self.lanes, dtype=torch.bool, device=self.device)

    def initial(self, noise: Tensor) -> State:
        bits, goal = noise.round().chunk(2, -1)
        return {"bits": bits, "goal": goal, "reached": self._never}

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        bits = (state["bits"] - (self._places == action.unsqueeze(-1)).float()).abs()
        there = (bits == state["goal"]).all(-1)
        moved = {"bits": bits, "goal": state["goal"], "reached": state["reached"] | there}
        return moved, there.float() - 1.0, self._never

    def observe(self, state: State) -> Nested:
        bits, goal = state["bits"], state["goal"]
        return {"observation": bits.clone(), "achieved_goal": bits.clone(), "desired_goal": goal.clone()}

    def step(self, action: Obs) -> Step:
        return super().step(action)._replace(info={"is_success": self._state["reached"].clone()})

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        shown = np.stack([state["bits"], state["goal"]])[..., None]
        return drawing.board(np.where(shown > 0, drawing.INK, drawing.PAPER).astype(np.uint8))

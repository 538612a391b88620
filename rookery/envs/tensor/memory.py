"""Tasks a policy without memory cannot solve: a cue at the start decides which action is right at the end."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.tensor import drawing
from rookery.envs.tensor.base import State, TensorEnv

__all__ = ["MemoryChain", "TMaze"]


class MemoryChain(TensorEnv):
    """Name, `length` − 1 steps later, the bit shown at the start: ±1 on the last of `length` steps; by chance 0.

    After bsuite's memory length task (Osband et al. 2020) with one bit. The observation `[3]` float32 is (1 − t/length,
    1 if the answer is asked now, the bit as ±1 at t = 0). Here the first observation is seen once (in bsuite twice) and
    the question is a flag. With `length` 1 cue and question come together.
    """

    id = "MemoryChain-v0"
    reward_threshold = 0.9
    draws = 1

    def build(self, length: int = 10) -> None:
        if length < 1:
            raise ValueError(f"MemoryChain-v0 was asked for length={length}; use 1 or more.")
        self.length = length
        self.obs_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(2)

    def initial(self, noise: Tensor) -> State:
        bit = (noise[:, 0] < 0.5).long()
        return {"bit": bit, "time": torch.zeros_like(bit)}

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        time = state["time"] + 1
        over = time >= self.length
        return {"bit": state["bit"], "time": time}, over * ((action == state["bit"]) * 2.0 - 1.0), over

    def observe(self, state: State) -> Tensor:
        time = state["time"]
        cue = (2.0 * state["bit"] - 1.0) * (time == 0)
        return torch.stack((1.0 - time / self.length, (time == self.length - 1).float(), cue), dim=-1)

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        time, bit = int(state["time"]), int(state["bit"])
        canvas = drawing.Canvas(320, 200)
        pitch = 300 / (self.length + 1)
        for place in range(self.length + 1):
            colour = drawing.BLUE if place == time else drawing.AMBER if place == self.length - 1 else drawing.GREY
            canvas.draw.rectangle((10 + place * pitch, 90, 10 + (place + 0.85) * pitch, 120), fill=colour)
        canvas.draw.text((10, 20), f"bit {bit}, step {time} of {self.length}", fill=drawing.INK)
        canvas.disc(18, 65, 8, drawing.GREEN if bit else drawing.RED)
        return canvas.pixels()


class TMaze(TensorEnv):
    """Walk a corridor of `length` steps to a junction and turn to the side that the cue at the start named.

    After Bakker (2001). Actions: up, right, down, left. The right arm gives +1, the wrong one −1, and both end the
    episode; walking into a wall costs 0.1 and every other step nothing, so the best return is 1 and that without
    memory is 0. The observation `[3]` float32 is (cue ±1 at the start, else 0; in the corridor; at the junction);
    the places inside the corridor look alike, and all is zero in an arm.
    """

    id = "TMaze-v0"
    reward_threshold = 0.9
    draws = 1

    def build(self, length: int = 10) -> None:
        if length < 1:
            raise ValueError(f"TMaze-v0 was asked for length={length}; use 1 or more.")
        self.length = length
        self.default_max_steps = 10 * (length + 1)
        self.obs_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(4)

    def initial(self, noise: Tensor) -> State:
        cue = (noise[:, 0] < 0.5) * 2 - 1  # 1: the arm above, −1: the one below
        return {"cue": cue, "place": torch.zeros_like(cue), "arm": torch.zeros_like(cue)}

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        sideways, turn = (action == 1) * 1 - (action == 3) * 1, (action == 0) * 1 - (action == 2) * 1
        place = torch.clamp(state["place"] + sideways, 0, self.length)
        arm = turn * (state["place"] == self.length)
        bumped = (place == state["place"]) & (arm == 0)
        reward = (arm * state["cue"]).float() - 0.1 * bumped
        return {"cue": state["cue"], "place": place, "arm": arm}, reward, arm != 0

    def observe(self, state: State) -> Tensor:
        place, inside = state["place"], state["arm"] == 0
        cue = state["cue"] * ((place == 0) & inside)
        junction = (place == self.length) & inside
        return torch.stack((cue, inside & ~junction, junction), dim=-1).float()

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        colours = np.full((5, self.length + 3, 3), drawing.INK, np.uint8)
        colours[2, 1:-1] = colours[1:4, -2] = drawing.PAPER
        middle, cue = 2, int(state["cue"])
        colours[middle - cue, -2] = drawing.GREEN
        colours[middle - cue, 1] = drawing.AMBER  # the cue, beside the start
        colours[middle - int(state["arm"]), 1 + int(state["place"])] = drawing.BLUE
        return drawing.board(colours)

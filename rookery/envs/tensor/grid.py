"""KeyDoor: rooms in a row, each door's key in the room before it, and one reward at the very end."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.spec import MASK
from rookery.envs.tensor import drawing
from rookery.envs.tensor.base import Nested, State, TensorEnv

__all__ = ["KeyDoor"]

PLANES = ("wall", "key", "door", "goal", "agent")


class KeyDoor(TensorEnv):
    """Fetch each room's key, pass the door it opens, and reach the goal in the last room: +1 there and 0 before.

    Every episode draws its own layout: start, keys and goal anywhere in their rooms, doors anywhere in their walls.
    Actions: up, right, down, left; walking onto a key takes it, which opens the door of that room; walls and shut doors
    stop the agent. The observation is `[5, H, W]` of 0 and 1 (walls, keys not taken, shut doors, goal, agent), as
    float32 or, with `planes="uint8"`, as 0 and 255.

    Options:
        rooms: rooms in the row; there are `rooms` − 1 keys. `rooms=4, room_width=2, room_height=11` is 13 × 13.
        view: side of a square window around the agent to observe instead of the whole board (odd); None for all.
        masked: observe a dict of `board` and `action_mask`, `[4]` bool, False for moves that would bump.
    """

    id = "KeyDoor-v0"
    reward_threshold = 0.9

    def build(
        self,
        rooms: int = 2,
        room_width: int = 3,
        room_height: int = 5,
        view: int | None = None,
        planes: str = "float32",
        masked: bool = False,
    ) -> None:
        if min(rooms, room_width, room_height) < 1 or room_width * room_height < 2:
            raise ValueError(
                f"KeyDoor-v0 was asked for {rooms} rooms of {room_width} × {room_height}; use at least 1 of 2 × 1."
            )
        if view is not None and (view < 3 or view % 2 == 0):
            raise ValueError(f"KeyDoor-v0 was asked for view={view}; use an odd number from 3, or None for all.")
        if planes not in ("float32", "uint8"):
            raise ValueError(f"KeyDoor-v0 was asked for planes={planes!r}; use 'float32' or 'uint8'.")
        self.keys, self.view, self.masked, self.dtype = rooms - 1, view, masked, getattr(torch, planes)
        self.height, self.width = room_height + 2, rooms * (room_width + 1) + 1
        self.rooms, self.room_width, self.room_height = rooms, room_width, room_height
        self.draws = 2 + 2 * self.keys
        self.default_max_steps = 4 * self.height * self.width
        self.action_space = spaces.Discrete(4)
        shape = (len(PLANES), view or self.height, view or self.width)
        board = spaces.Box(0, 255 if planes == "uint8" else 1, shape, np.dtype(planes))
        mask = spaces.MultiBinary(4)
        self.obs_space = spaces.Dict({"board": board, MASK: mask}) if masked else board
        self._lay_out()

    def _lay_out(self) -> None:
        """Constants of the board: cells are numbered row by row on a board padded so that a window never leaves it."""
        pad = 0 if self.view is None else self.view // 2
        self._pitch = self.width + 2 * pad
        wall = torch.ones((self.height + 2 * pad, self._pitch), dtype=torch.bool)
        wall[1 + pad : -1 - pad, 1 + pad : -1 - pad] = False
        room_columns = torch.arange(self.rooms) * (self.room_width + 1) + 1 + pad  # the first of each room
        wall[:, room_columns[1:] - 1] = True
        self._wall = wall.flatten().to(self.device)
        self._corner = self.constant(room_columns + (1 + pad) * self._pitch, torch.int64)
        self._cells = torch.arange(wall.numel(), device=self.device)
        self._order = torch.arange(self.keys, device=self.device)
        self._moves = self.constant([-self._pitch, 1, self._pitch, -1], torch.int64)
        if self.view is not None:
            reach = torch.arange(self.view) - pad
            self._window = self.constant(reach[:, None] * self._pitch + reach, torch.int64).flatten()

    def initial(self, noise: Tensor) -> State:
        rooms, keys = self.rooms, self.keys
        size = self.room_width * self.room_height
        start = (noise[:, 0] * size).long()
        # The first room's item lies anywhere but on the start; the last room's item is the goal, the others' are keys.
        items = (noise[:, 1 : 1 + rooms] * size).long()
        apart = (start + 1 + (noise[:, 1] * (size - 1)).long()) % size
        items = torch.cat((apart.unsqueeze(-1), items[:, 1:]), dim=-1)
        cells = self._corner + items // self.room_width * self._pitch + items % self.room_width
        door_rows = (noise[:, 1 + rooms :] * self.room_height).long()
        return {
            "agent": self._corner[0] + start // self.room_width * self._pitch + start % self.room_width,
            "held": torch.zeros_like(start),  # keys are met in order, so their number says which
            "keys": cells[:, :keys],
            "doors": self._corner[1:] - 1 + door_rows * self._pitch,
            "goal": cells[:, keys],
        }

    def _free(self, state: State, cells: Tensor) -> Tensor:
        """Whether the agent may enter the cells, `[B, n]` bool."""
        opened = self._order < state["held"].unsqueeze(-1)
        doorway = (cells.unsqueeze(-1) == state["doors"].unsqueeze(1)) & opened.unsqueeze(1)
        return ~self._wall[cells] | doorway.any(-1)

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        target = state["agent"] + self._moves[action]
        agent = torch.where(self._free(state, target.unsqueeze(-1)).squeeze(-1), target, state["agent"])
        held = state["held"]
        next_key = (agent.unsqueeze(-1) == state["keys"]) & (self._order == held.unsqueeze(-1))
        reached = agent == state["goal"]
        return {**state, "agent": agent, "held": held + next_key.any(-1)}, reached.float(), reached

    def observe(self, state: State) -> Nested:
        remaining = self._order >= state["held"].unsqueeze(-1)
        doors = self._cells == state["doors"].unsqueeze(-1)  # [B, keys, cells]
        keys = self._cells == state["keys"].unsqueeze(-1)
        planes = (
            self._wall & ~doors.any(1),
            (keys & remaining.unsqueeze(-1)).any(1),
            (doors & remaining.unsqueeze(-1)).any(1),
            self._cells == state["goal"].unsqueeze(-1),
            self._cells == state["agent"].unsqueeze(-1),
        )
        board = torch.stack(planes, dim=1)
        if self.view is not None:
            window = (state["agent"].unsqueeze(-1) + self._window).unsqueeze(1)
            board = board.gather(2, window.expand(-1, len(PLANES), -1))
        board = board.unflatten(2, (self.view or self.height, self.view or self.width)).to(self.dtype)
        board = board * 255 if self.dtype == torch.uint8 else board
        if not self.masked:
            return board
        return {"board": board, MASK: self._free(state, state["agent"].unsqueeze(-1) + self._moves)}

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        colours = np.full((len(self._cells), 3), drawing.PAPER, np.uint8)
        colours[self._wall.cpu().numpy()] = drawing.INK
        held = int(state["held"])
        colours[state["doors"]] = drawing.RED
        colours[state["doors"][:held]] = drawing.GREY
        colours[state["goal"]] = drawing.GREEN
        colours[state["keys"][held:]] = drawing.AMBER
        colours[state["agent"]] = drawing.BLUE
        return drawing.board(colours.reshape(-1, self._pitch, 3))

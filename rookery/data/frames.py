"""How replay keeps observations: as they came, or of a stack of frames the newest only, from which all are rebuilt."""

from __future__ import annotations

import torch
from torch import Tensor

from rookery.data.storage import Ring
from rookery.data.windows import steps_in_episode
from rookery.envs.vector import Obs

__all__ = ["REACH", "Observations", "StackedFrames"]

REACH = ("replay", "reach")  # how many earlier frames of a stack are in the ring, + K · what stands for the others
REPEATS, ZEROS, UNKNOWN = range(3)  # the oldest one that is there; zeros; frames that were never stored


class Observations:
    """Every observation as it came."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def read(self, cells: Tensor) -> Obs:
        """What was observed in these cells, `[*cells.shape, ...]`."""
        return self.ring.read("obs", cells)


class StackedFrames(Observations):
    """Stacks of K frames along the first dimension of an observation, oldest first.

    An episode's first stacks show frames that never were: zeros, or its first frame again (EnvPool's way). What they
    show is noted for each row as it comes. A stream that begins in the middle of an episode shows frames that were
    never stored; its first rows cannot be read.
    """

    def __init__(self, ring: Ring, stack: int) -> None:
        super().__init__(ring)
        self.stack = stack
        # Frames back to each place of a stack.
        self.back = torch.arange(stack - 1, -1, -1)

    def newest(self, obs: Tensor) -> Tensor:
        """The newest frames of stacks `[T, B, K·C, ...]`: `[T, B, C, ...]`, a view."""
        size = obs.shape[2] // self.stack
        return obs.narrow(2, (self.stack - 1) * size, size)

    def read(self, cells: Tensor) -> Tensor:
        stack, shape = self.stack, self.ring.columns["obs",].shape[2:]
        kind_and_reach = self.ring.take(REACH, cells).unsqueeze(-1)
        reach, back = kind_and_reach % stack, self.back.to(cells.device)
        frames = self.ring.take(("obs",), self.ring.later(cells.unsqueeze(-1), -torch.minimum(back, reach)))
        hidden = (kind_and_reach >= stack) & (back > reach)
        if hidden.any():
            frames *= ~hidden.view(*hidden.shape, *[1] * len(shape))
        return frames.view(*cells.shape, stack * shape[0], *shape[1:])

    def readable(self, reach: Tensor) -> Tensor:
        """Whether stacks of this `REACH` can be rebuilt."""
        return reach < UNKNOWN * self.stack

    def reaches(self, obs: Tensor, valid: Tensor, before: Tensor | None) -> Tensor:
        """`REACH` of each stack.

        Args:
            obs: stacks, `[T+1, B, K·C, ...]`.
            valid: of the first T rows, `[T, B]`.
            before: what is known of row 0 already, `[B]`; None where a stream begins.

        Raises:
            ValueError: if a stack within an episode is not the one before it moved on by a frame.
        """
        frames = obs.reshape(*obs.shape[:2], self.stack, -1)
        begins = torch.ones(obs.shape[:2], dtype=torch.bool, device=obs.device)
        begins[1:] = (frames[1:, :, :-1] != frames[:-1, :, 1:]).flatten(2).any(-1)
        wrong = begins[1:] & valid
        if wrong.any():
            row, lane = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the observation after row {row} of lane {lane} is not the one of that row moved on by a frame: it "
                f"holds no stack of {self.stack} frames, oldest first; use stack=1."
            )
        kind = torch.full(begins.shape, UNKNOWN, dtype=torch.int64, device=obs.device)
        rows, lanes = begins.nonzero(as_tuple=True)
        first = frames[rows, lanes]
        older = first[:, :-1].flatten(1)
        found = torch.where((older == 0).all(-1), ZEROS, UNKNOWN)
        found = torch.where((first[:, :-1] == first[:, -1:]).flatten(1).all(-1), REPEATS, found)
        kind[rows, lanes] = found
        last = torch.full_like(kind[0], -1)
        if before is not None:
            begins[0], kind[0], last = False, before // self.stack, before.long() % self.stack - 1
        reach = steps_in_episode(begins, last)
        place = torch.arange(len(reach), device=obs.device).unsqueeze(-1)
        kind = kind.gather(0, (place - reach).clamp(min=0))
        return torch.where(reach >= self.stack - 1, self.stack - 1, kind * self.stack + reach).to(torch.uint8)

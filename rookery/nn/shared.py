"""Weights and optimiser statistics in memory that several learners step, without locks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rookery.nn.adam import Optimizer
from rookery.nn.flat import FlatParameters

__all__ = ["Memory", "Shared", "new_memory"]

Memory = dict[str, Any]  # tensors, and dicts of them, by name
MakeOptimizer = Callable[[list[nn.Parameter], Tensor], Optimizer]  # of flat parameters and a 0-d step size


class Shared:
    """What several learners step, each by the gradient of its own copy (Hogwild, Recht et al. 2011, arXiv 1106.5730).

    Nobody waits, and who dies holds no lock. Where two write a number at the same instant, one of them may be lost,
    which gradients bear. What has to be exact has a place for each learner, where nobody else writes.

    Args:
        flat: this learner's copy, with the gradient.
        memory: from `new_memory`, the same for all learners.
        index: of this learner among them.
    """

    def __init__(self, flat: FlatParameters, optimizer: MakeOptimizer, memory: Memory, index: int) -> None:
        self.memory, self.index, self._flat = memory, index, flat
        self._steppers: dict[str, tuple[nn.Parameter, Tensor, Optimizer]] = {}  # with their step sizes
        parts = memory["values"]["parameters"].split([group.numel() for group in flat.groups.values()])
        for name, part in zip(flat.groups, parts, strict=True):
            if name in flat.gradients:
                parameter, lr = _steppable(part), part.new_zeros(())
                made = optimizer([parameter], lr)
                made.state[parameter] = memory["statistics"][name]
                self._steppers[name] = (parameter, lr, made)

    @property
    def steps(self) -> int:
        """Of the run: those that all learners learnt from together."""
        return int(self.memory["steps"].sum())

    @property
    def updates(self) -> int:
        """That all learners made together."""
        return int(self.memory["updates"].sum())

    @property
    def version(self) -> int:
        """Of this learner's copy: 1, and the updates that had been made when it was last copied."""
        return int(self.memory["versions"][self.index])

    def pull(self) -> None:
        """Own copy ← shared weights, running statistics included."""
        self.memory["versions"][self.index] = self.updates + 1
        self._flat.restore(self.memory["values"])

    def step(self, moves: tuple[str, ...], lr: dict[str, Tensor]) -> int:
        """Step the shared weights of these groups by the gradient that is there; gives how old the copy was.

        That is the number of updates that others made since the weights were copied.
        """
        for name, gradient in self._flat.gradients.items():
            if name in moves:
                parameter, own_lr, optimizer = self._steppers[name]
                own_lr.copy_(lr[name])
                parameter.grad.copy_(gradient)  # type: ignore[union-attr]  # it has one from the beginning
                optimizer.step()
        age = self.updates + 1 - self.version
        self.memory["updates"][self.index] += 1
        return age

    def finish(self, steps: int) -> None:
        """After a batch's last update: hand on its running statistics, and count the steps it had.

        Its copy was fresh when it merged them, a moment ago. Had another learner done so in that same moment, what that
        one saw would be missing from the statistics.
        """
        for name, buffer in self._flat.buffers.items():
            self.memory["values"][name].copy_(buffer)
        self.memory["steps"][self.index] += steps


def new_memory(flat: FlatParameters, optimizer: MakeOptimizer, learners: int) -> Memory:
    """Memory in RAM for so many learners that begins with these weights, as nested dicts of tensors."""
    statistics = {name: _statistics(optimizer, gradient.cpu()) for name, gradient in flat.gradients.items()}
    counts = {name: torch.zeros(learners, dtype=torch.int64) for name in ("steps", "updates")}
    values = {name: value.cpu() for name, value in flat.snapshot().items()}
    return {"values": values, "statistics": statistics, **counts, "versions": counts["steps"] + 1}


def _statistics(optimizer: MakeOptimizer, like: Tensor) -> dict[str, Any]:
    """An optimiser's statistics before its first step, at which those of `torch.optim` make them."""
    parameter = _steppable(torch.zeros_like(like))
    made = optimizer([parameter], like.new_zeros(()))
    if not made.state:
        made.step()  # by a gradient of zero: it counts, and changes nothing else
        if "step" in made.state[parameter]:
            made.state[parameter]["step"].zero_()
    return dict(made.state[parameter])


def _steppable(values: Tensor) -> nn.Parameter:
    """A parameter in this memory, with a gradient of zero."""
    parameter = nn.Parameter(values)
    parameter.grad = torch.zeros_like(values)
    return parameter

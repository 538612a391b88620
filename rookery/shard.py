"""What a parameter server is made of: a share of the parameters with an optimiser of its own, and two safeguards."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rookery.algorithms.base import Algorithm, Part, PolicyNet, flat
from rookery.nn.flat import ALIGNMENT, FlatParameters
from rookery.nn.norm import RunningNorm

__all__ = ["Outliers", "Shard", "slices"]

RHO = 1e-3  # share of a new loss in the running mean and variance
COUNTED = 5.0  # deviations: a loss further above the mean counts as one that is so far above it


def slices(whole: FlatParameters, shards: int) -> list[dict[str, slice]]:
    """Which run of each flat parameter belongs to which shard, by the parameter's name.

    Runs begin at multiples of `ALIGNMENT`, so that a vector unit computes the same number whatever the shards.
    """

    def bound(group: nn.Parameter, index: int) -> int:
        block = ALIGNMENT // group.element_size()
        return group.numel() // block * index // shards * block

    return [
        {name: slice(bound(group, index), bound(group, index + 1)) for name, group in whole.groups.items()}
        for index in range(shards)
    ]


class Shard:
    """A share of a network's parameters in RAM, which others' gradients move.

    The first shard also merges what was observed into the network's running statistics.

    Args:
        net: what the parameters are to begin with.
        total_steps: the run's budget, over which annealing runs.
        index: which share, of `shards`.
        max_delay: own updates since the parameters of a gradient were read, above which it is dropped; 0 keeps all.
    """

    def __init__(
        self, algorithm: Algorithm, net: PolicyNet, total_steps: int, index: int, shards: int, max_delay: int = 0
    ) -> None:
        self.algorithm, self.total_steps, self.max_delay = algorithm, total_steps, max_delay
        whole = flat(algorithm, net)
        own = slices(whole, shards)[index]
        self.parameters = {
            name: nn.Parameter(group.detach()[own[name]].cpu().clone(), group.requires_grad)
            for name, group in whole.groups.items()
        }
        parts = algorithm.parts(net) or {}
        self.parts = {name: parts.get(name, Part([])) for name in whole.gradients}
        self.lr = {name: torch.tensor(part.lr or algorithm.lr) for name, part in self.parts.items()}
        self.optimizers = {name: algorithm.optimizer([self.parameters[name]], lr) for name, lr in self.lr.items()}
        norms = {name: part.cpu() for name, part in net.named_modules() if isinstance(part, RunningNorm)}
        self.norms = {} if index else norms
        self.steps, self.version = 0, 1  # of the run; of the parameters
        self.dropped = {"stale": 0}  # gradients
        self.seconds = {"learning": 0.0}  # by activity
        self.delays = {"count": 0, "sum": 0, "longest": 0}  # of the gradients since the last report

    def accept(self, share: dict[str, Any]) -> None:
        """Count a bundle's steps, and step by its gradient if it brings one that is young enough.

        Args:
            share: `steps` since the bundle's last; `moves`, the parts that its gradient moves, none if it brings none;
                `gradient` of each part, `version` of the parameters that it was computed from; `seen`, the moments of
                what was observed.
        """
        remaining = max(0.0, 1 - self.steps / self.total_steps)
        self.steps += int(share["steps"])
        moves = [name for name, moved in share["moves"].items() if moved]
        if not moves or not self._young(self.version - int(share["version"])):
            return
        began = time.perf_counter()
        for name in moves:
            self.lr[name].fill_(self.algorithm.part_rate(self.parts[name], remaining))
            self.parameters[name].grad = share["gradient"][name]
            self.optimizers[name].step()
        for name, norm in self.norms.items():
            norm.add(**share["seen"][name])
        self.version += 1
        self.seconds["learning"] += time.perf_counter() - began

    def _young(self, delay: int) -> bool:
        if delay >= 0:
            self.delays["count"] += 1
            self.delays["sum"] += delay
            self.delays["longest"] = max(self.delays["longest"], delay)
        # Below 0 it is from parameters that the shard had not handed over when it died: of no known age.
        stale = self.max_delay > 0 and not 0 <= delay <= self.max_delay
        self.dropped["stale"] += stale
        return not stale

    def values(self) -> dict[str, Any]:
        """A copy of the parameters by part, and of the running statistics by their names in the network."""
        return {
            "parameters": {name: own.detach().clone() for name, own in self.parameters.items()},
            "buffers": {name: buffer.clone() for name, buffer in self._statistics()},
        }

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        for name, norm in self.norms.items():
            yield from norm.named_buffers(name)

    def metrics(self) -> dict[str, float]:
        """The delays of gradients since the last call in updates, the gradients dropped for it, and the updates."""
        count, total, longest = self.delays.values()
        self.delays = dict.fromkeys(self.delays, 0)
        mean = {"delay": total / count, "delay_max": longest} if count else {}
        return {**mean, "stale_dropped": self.dropped["stale"], "updates": self.version - 1}

    def state(self) -> dict[str, Any]:
        """Parameters, optimisers, running statistics and counters."""
        return {
            **self.values(),
            "optimizers": {
                name: dict(optimizer.state[self.parameters[name]]) for name, optimizer in self.optimizers.items()
            },
            "counts": {name: getattr(self, name) for name in ("steps", "version", "dropped", "delays")},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        for name, own in self.parameters.items():
            own.copy_(state["parameters"][name])
        for name, buffer in self._statistics():
            buffer.copy_(state["buffers"][name])
        for name, saved in state["optimizers"].items():
            self.optimizers[name].state[self.parameters[name]] = dict(saved)
        for name, value in state["counts"].items():
            setattr(self, name, value)


class Outliers:
    """Which losses lie far above what is usual: running mean and deviation of |loss| (Nair et al. 2015, section 4).

    A loss counts as at most `COUNTED` deviations above the mean: some do not move the limit far (were it the limit of
    30 deviations, an outlier would nearly double the variance), and a lasting change is learnt.

    Args:
        deviations: c; a loss is an outlier above mean + c deviations. 0 for none.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.mean = self.variance = 0.0
        self.losses = self.dropped = 0

    def drop(self, loss: float) -> bool:
        """Whether this loss is an outlier; takes it into account."""
        if not self.deviations:
            return False
        size = abs(loss)
        if self.losses == 0:  # one loss says nothing of the deviation, so it stands for that too
            self.mean, self.variance = size, size**2
        deviation = math.sqrt(self.variance)
        outlier = size > self.mean + self.deviations * deviation
        self.losses, self.dropped = self.losses + 1, self.dropped + outlier
        rate = max(RHO, 1 / (self.losses + 1))
        error = min(size - self.mean, min(self.deviations, COUNTED) * deviation)
        self.mean += rate * error
        self.variance += rate * (error**2 - self.variance)
        return outlier

    def state(self) -> dict[str, Any]:
        """The running numbers."""
        return {name: getattr(self, name) for name in ("mean", "variance", "losses", "dropped")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        for name, value in state.items():
            setattr(self, name, value)

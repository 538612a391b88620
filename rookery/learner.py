"""What a learner does: make updates from unrolls, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rookery.algorithms.base import Algorithm, Batch, Loss, OnPolicy, PolicyNet
from rookery.nn.compiled import compiled, precision
from rookery.nn.flat import FlatParameters, snapshot

__all__ = ["Learner", "NonFinite"]


class NonFinite(RuntimeError):
    """A NaN or infinity stopped the run before it reached the weights; names the tensor it was first seen in."""


class Learner:
    """The network being learnt, its optimiser, and one update at a time.

    Args:
        net: from `algorithm.networks`, on the device to learn on.
        total_steps: the run's budget, over which annealing runs.
        compile: wrap the loss in `torch.compile`.
        graphs: replay what was compiled as CUDA graphs.
        bf16: run the trunk in bfloat16.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        net: PolicyNet,
        total_steps: int,
        seed: int,
        *,
        compile: bool = False,
        graphs: bool = False,
        bf16: bool = False,
    ) -> None:
        self.algorithm, self.net, self.total_steps = algorithm, net, total_steps
        self.flat = FlatParameters(net)
        self.device = next(net.parameters()).device
        self.lr = torch.tensor(algorithm.lr, device=self.device)
        self.remaining = torch.ones((), device=self.device)  # share of the run ahead
        self.optimizer = algorithm.optimizer(self.flat.groups, self.lr)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps = self.updates = 0
        self.version = 1  # of the weights; 0 is before the first
        self._bf16 = bf16
        self._loss = compiled(self._evaluate, graphs) if compile else self._evaluate

    def _evaluate(self, batch: Batch) -> Loss:
        with precision(self.device, self._bf16):
            return self.algorithm.loss(self.net, None, batch, self.remaining)

    def update(self, unroll: Batch) -> dict[str, float]:
        """Learn from a batch of unrolls, `[T+1, B, ...]`, and give the mean of the loss's metrics.

        Raises:
            NonFinite: before any weight is touched by a NaN or an infinity.
        """
        remaining = max(0.0, 1 - self.steps / self.total_steps)
        self.remaining.fill_(remaining)
        self.lr.fill_(self.algorithm.learning_rate(remaining))
        with torch.no_grad():
            data = self.algorithm.prepare(self.net, unroll)
        metrics: list[dict[str, Tensor]] = []
        for minibatch in self._minibatches(data, self.algorithm.plan):
            loss = self._loss(minibatch)
            if loss.stop is not None and loss.stop:
                break
            metrics.append({**loss.metrics, "grad_norm": self._minimise(loss, minibatch)})
        with torch.no_grad():
            self.algorithm.finish(self.net, unroll)
        self.steps += int(unroll["valid"][:-1].sum())
        self.version += 1
        names = metrics[0] if metrics else {}
        means = {name: float(torch.stack([each[name] for each in metrics]).mean()) for name in names}
        return {**means, "lr": float(self.lr), "updates": self.updates}

    def _minimise(self, loss: Loss, minibatch: Batch) -> Tensor:
        """One optimiser step; gives the norm of the gradient before it was clipped."""
        self.flat.zero_grad()
        loss.loss.backward()
        gradients = [group.grad for group in self.flat.groups.values() if group.grad is not None]
        norm = torch.linalg.vector_norm(gradients[0] if len(gradients) == 1 else torch.cat(gradients))
        if not torch.isfinite(norm):
            raise NonFinite(self._first_non_finite(loss, minibatch))
        if self.algorithm.max_grad_norm is not None:
            scale = (self.algorithm.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(scale)
        self.optimizer.step()
        self.updates += 1
        return norm

    def _minibatches(self, data: Batch, plan: OnPolicy) -> Iterator[Batch]:
        """Shuffled minibatches of each epoch: whole lanes `[T, b]`, or single rows `[n]`."""
        state, rows = data.pop("state"), data
        if not plan.sequences:
            rows = {name: value.flatten(0, 1) for name, value in rows.items()}
        axis = 1 if plan.sequences else 0
        count = rows["valid"].shape[axis]
        if plan.epochs * plan.minibatches == 1:
            yield {**rows, "state": state}
            return
        for _ in range(plan.epochs):
            order = torch.randperm(count, generator=self.generator, device=self.device)
            shuffled = {name: _take(value, order, axis) for name, value in rows.items()}
            lanes = state[order] if plan.sequences else state[:0]  # single rows are only learnt without memory
            size = count // plan.minibatches
            for start in range(0, count, size):
                part = {name: _narrow(value, axis, start, size) for name, value in shuffled.items()}
                yield {**part, "state": lanes[start : start + size]}

    def values(self) -> dict[str, Tensor]:
        """A copy of the weights to publish."""
        return snapshot(self.net, self.flat)

    def _first_non_finite(self, loss: Loss, minibatch: Batch) -> str:
        """Which tensor a NaN was first in, in order of the computation: data, weights, metrics, gradients."""
        order: list[tuple[str, Any]] = [(f"the batch's {name}", value) for name, value in minibatch.items()]
        order += [(f"the weights {name}", value) for name, value in self.net.named_parameters()]
        order += [(f"the loss's {name}", value) for name, value in loss.metrics.items()]
        order += [(f"the gradient of {name}", value.grad) for name, value in self.net.named_parameters()]
        where = next((name for name, value in order if not _finite(value)), "the gradient's norm")
        return (
            f"{where} is not finite at update {self.updates + 1} (step {self.steps}); the run stops with its weights "
            "as they were. Train with a smaller lr or max_grad_norm, or check the environment."
        )

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, counters and random generator."""
        optimizer = {str(i): dict(state) for i, state in enumerate(self.optimizer.state.values())}
        return {
            "net": dict(self.net.state_dict()),
            "optimizer": optimizer,
            "shuffle": self.generator.get_state(),
            "counts": {"steps": self.steps, "updates": self.updates, "version": self.version},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        self.net.load_state_dict(state["net"])
        groups = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter, saved in zip(groups, state["optimizer"].values(), strict=False):
            self.optimizer.state[parameter] = {
                name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in saved.items()
            }
        self.generator.set_state(state["shuffle"])
        for name, value in state["counts"].items():
            setattr(self, name, value)


def _take(value: Any, order: Tensor, axis: int) -> Any:
    """Rows or lanes in another order. Rows of images are taken as flat rows, which is several times as fast."""
    if not isinstance(value, Tensor):
        return value[order] if axis == 0 else value[:, order]
    if axis == 0 and value.ndim > 2:
        return value.flatten(1).index_select(0, order).view(-1, *value.shape[1:])
    return value.index_select(axis, order)


def _narrow(value: Any, axis: int, start: int, size: int) -> Any:
    """`size` rows or lanes from `start` on, as a view."""
    return value[start : start + size] if axis == 0 else value[:, start : start + size]


def _finite(value: Any) -> bool:
    if value is None:
        return True
    leaves = [value] if isinstance(value, Tensor) else value.values(include_nested=True, leaves_only=True)
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves if leaf.is_floating_point())

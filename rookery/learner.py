"""What a learner does: make updates from unrolls or replay, whatever the algorithm."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rookery.algorithms.base import Algorithm, Batch, Loss, Now, OnPolicy, Part, PolicyNet, ReplayPlan, flat
from rookery.data.plan import axis_of
from rookery.nn.compiled import compiled, precision

__all__ = ["Gradient", "Lags", "Learner", "NonFinite", "minibatches", "non_finite", "part_of"]


class NonFinite(RuntimeError):
    """A NaN or infinity stopped the run before it reached a checkpoint; names the tensor it was first seen in."""


def non_finite(where: str, update: int, step: int) -> NonFinite:
    """What to raise when that tensor is not finite."""
    return NonFinite(
        f"{where} is not finite at update {update} (step {step}); the run stops, and its last checkpoint is intact. "
        "Train with a smaller lr or max_grad_norm, or check the environment."
    )


class Gradient(NamedTuple):
    """What came with the gradient that lies in the parameters' `.grad`."""

    loss: Loss
    minibatch: Batch
    moves: tuple[str, ...]  # the parts whose parameters this update moves


class Lags:
    """How old the weights were that acted, or differentiated: their mean and maximum since the last row."""

    def __init__(self) -> None:
        self.number = self.total = self.most = 0

    def add(self, lags: Iterable[int]) -> None:
        """Note some, in versions of the weights; below 0 those are of a learner that died, and of no known age."""
        for lag in (each for each in lags if each >= 0):
            self.number, self.total, self.most = self.number + 1, self.total + lag, max(self.most, lag)

    def metrics(self) -> dict[str, float]:
        """Of those since the last call, if there were any."""
        number, total, most = self.number, self.total, self.most
        self.number = self.total = self.most = 0
        return {"policy_lag": total / number, "policy_lag_max": most} if number else {}

    def state(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state(self, state: dict[str, int]) -> None:
        vars(self).update(state)


class Learner:
    """The network being learnt, its optimiser and its slow copy, and one round of updates at a time.

    `seconds` has how long was spent in learning so far; on a GPU, in issuing its work, and waiting for the gradient's
    norm.

    Args:
        net: from `algorithm.networks`, on the device to learn on.
        total_steps: the run's budget, over which annealing runs.
        compile: wrap the loss and its gradient in `torch.compile`.
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
        self.flat = flat(algorithm, net)
        self.device = next(net.parameters()).device
        self.target_net = copy.deepcopy(net) if algorithm.target else None
        self._target_flat = flat(algorithm, self.target_net, learns=False) if self.target_net else None
        self._buffers = list(zip(self.target_net.buffers(), net.buffers(), strict=True)) if self.target_net else []
        self.parts = algorithm.parts(net) or {"all": Part(list(net.parameters()))}
        self.lr = {name: torch.tensor(part.lr or algorithm.lr, device=self.device) for name, part in self.parts.items()}
        self.optimizers = {
            name: algorithm.optimizer([self.flat.groups[name]], self.lr[name])
            for name in self.parts
            if name in self.flat.groups
        }
        self.remaining = torch.ones((), device=self.device)  # share of the run ahead
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps = self.updates = 0
        self.led = 0  # of the steps, those that it learnt of from another learner
        self.seconds = {"learning": 0.0}
        self.version = 1  # of the weights; 0 is before the first
        self.lags = Lags()  # that topologies note
        self.priorities: Tensor | None = None  # of the samples that were last learnt from, `[N]`
        self._sums: dict[str, Tensor] = {}  # of the metrics not yet reported, by their names; their number comes last
        self._one = torch.ones((), device=self.device)
        self._bf16 = bf16
        self._learnt = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._gradients: list[Any] = [parameter.grad for parameter in self._learnt]  # views into the flat ones
        self._compiled = compiled(self._loss_and_gradient, graphs) if compile else None

    def _loss(self, batch: Batch, moves: tuple[str, ...]) -> Loss:
        with precision(self.device, self._bf16):
            return self.algorithm.loss(self.net, self.target_net, batch, Now(self.remaining, moves))

    def _loss_and_gradient(self, batch: Batch, moves: tuple[str, ...]) -> tuple[Loss, tuple[Tensor, ...]]:
        loss = self._loss(batch, moves)
        gradient = torch.autograd.grad(loss.loss, self._learnt, allow_unused=True, materialize_grads=True)
        return loss._replace(loss=loss.loss.detach()), gradient

    def _differentiate(self, batch: Batch, moves: tuple[str, ...]) -> Loss:
        """The loss, its gradient in the parameters' `.grad`.

        Compiled, both are one function: apart they take up to twice as long (docs/notes.md).
        """
        if self._compiled is None:
            self.flat.zero_grad()
            loss = self._loss(batch, moves)
            loss.loss.backward()
            return loss
        loss, gradient = self._compiled(batch, moves)
        torch._foreach_copy_(self._gradients, gradient)
        return loss

    def update(self, data: Batch, steps: int) -> Tensor | None:
        """Learn from a batch of unrolls `[T+1, B, ...]` or from samples of replay; gives the samples' new priorities.

        Args:
            steps: of the run, these data included.

        Raises:
            NonFinite: before any weight is touched by a NaN or an infinity.
        """
        for gradient in self.gradients(data, steps):
            self.minimise(gradient)
        return self.priorities

    def gradients(self, data: Batch, steps: int) -> Iterator[Gradient]:
        """What `update` does, but for the steps: gives each gradient, in the parameters' `.grad`, for you to take.

        `priorities` has the samples' new ones afterwards.
        """
        began = time.perf_counter()
        self.anneal()
        plan, priorities = self.algorithm.plan, []
        rows = data
        if isinstance(plan, OnPolicy):
            with torch.no_grad(), precision(self.device, self._bf16):
                rows = self.algorithm.prepare(self.net, data)
        for minibatch in minibatches(plan, rows, self.generator):
            minibatch |= self.algorithm.noise(self.net, minibatch, self.generator)
            moves = self.moves()
            loss = self._differentiate(minibatch, moves)
            if loss.stop is not None and loss.stop:
                break
            self.seconds["learning"] += time.perf_counter() - began
            yield Gradient(loss, minibatch, moves)
            began = time.perf_counter()
            if loss.priorities is not None:
                priorities.append(loss.priorities.clone())
        self.conclude(data, steps, priorities)
        self.seconds["learning"] += time.perf_counter() - began

    def conclude(self, data: Batch, steps: int, priorities: list[Tensor]) -> Tensor | None:
        """After a batch's last step: count it, and let running statistics see it; gives the samples' priorities."""
        with torch.no_grad():
            self.algorithm.finish(self.net, data)
        self.steps = steps
        self.version += 1
        self.priorities = torch.cat(priorities) if priorities else None
        return self.priorities

    def anneal(self) -> None:
        """Set what changes over the run to where it stands."""
        remaining = max(0.0, 1 - self.steps / self.total_steps)
        self.remaining.fill_(remaining)
        for name, lr in self.lr.items():
            lr.fill_(self.algorithm.part_rate(self.parts[name], remaining))

    def moves(self) -> tuple[str, ...]:
        """The parts whose parameters the next update moves."""
        return tuple(name for name, part in self.parts.items() if (self.updates + 1) % part.every == 0)

    def minimise(self, gradient: Gradient) -> None:
        """One optimiser step by the gradient that is there, and the target network's."""
        began = time.perf_counter()
        norm = self.clip(gradient)
        for name in gradient.moves:
            if name in self.optimizers:
                self.optimizers[name].step()
        self.count(gradient, norm)
        self.seconds["learning"] += time.perf_counter() - began

    def clip(self, gradient: Gradient) -> Tensor:
        """Shorten the gradient that is there to `max_grad_norm`; gives the norm that it had, `[]`."""
        gradients = [group for name, group in self.flat.gradients.items() if name in gradient.moves]
        norms = [torch.linalg.vector_norm(group) for group in gradients]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if not torch.isfinite(norm):
            where = self._first_non_finite(gradient.loss, gradient.minibatch)
            raise non_finite(where, self.updates + 1, self.steps)
        if self.algorithm.max_grad_norm is not None:
            scale = (self.algorithm.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            for group in gradients:
                group.mul_(scale)
        return norm

    def count(self, gradient: Gradient, norm: Tensor) -> None:
        """Note an update that was made: its number, its metrics, and the target network's move where one is due."""
        self.updates += 1
        self._move_target()
        self._add({**gradient.loss.metrics, "grad_norm": norm})

    @torch.no_grad()
    def _move_target(self) -> None:
        """target ← (1−τ)·target + τ·network, where that falls due; buffers are copied."""
        target = self.algorithm.target
        if target is None or self._target_flat is None or self.updates % target.period:
            return
        for slow, fast in zip(self._target_flat.groups.values(), self.flat.groups.values(), strict=True):
            slow.lerp_(fast, target.tau)
        for slow_buffer, buffer in self._buffers:
            slow_buffer.copy_(buffer)

    def _add(self, metrics: dict[str, Tensor]) -> None:
        """Add an update's numbers to those that are not yet reported; updates differ in which they have."""
        values = torch.stack([*(value.detach().float() for value in metrics.values()), self._one])
        names = ",".join(metrics)
        self._sums[names] = self._sums[names] + values if names in self._sums else values

    def metrics(self) -> dict[str, float]:
        """The means of what the updates since the last call said, their policy lags, and where the learner stands."""
        totals: dict[str, list[float]] = {}
        for names, sums in self._sums.items():
            *values, count = sums.tolist()
            for name, value in zip(names.split(","), values, strict=True):
                before, counted = totals.get(name, (0.0, 0.0))
                totals[name] = [before + value, counted + count]
        self._sums = {}
        means = {name: total / count for name, (total, count) in totals.items()}
        stands = {"lr": float(next(iter(self.lr.values()))), "updates": self.updates}
        return {**means, **self.lags.metrics(), **stands}

    def values(self) -> dict[str, Tensor]:
        """A copy of the weights to publish."""
        return self.flat.snapshot()

    def follow(self, updates: int, values: dict[str, Tensor], steps: int) -> None:
        """Be where another learner is after so many updates and steps."""
        self.flat.restore(values)
        self.updates = min(self.updates, updates)  # that one may have died, and fallen back
        while self.updates < updates:
            self.updates += 1
            self._move_target()
        self._be_led(steps)

    def _be_led(self, steps: int) -> None:
        self.led, self.steps = self.led + steps - self.steps, steps

    def whole(self) -> dict[str, Any]:
        """A copy of the weights and of the target network's, for another learner to `join`."""
        return {"net": self.values(), **({"target": self._target_flat.snapshot()} if self._target_flat else {})}

    def join(self, updates: int, steps: int, whole: dict[str, Any]) -> None:
        """Be where another learner is after so many updates and steps, wherever this one was."""
        self.flat.restore(whole["net"])
        if self._target_flat is not None:
            self._target_flat.restore(whole["target"])
        self.updates = updates
        self._be_led(steps)

    def _first_non_finite(self, loss: Loss, minibatch: Batch) -> str:
        """Which tensor a NaN was first in, in order of the computation: weights, data, metrics, gradients.

        Weights come first: a step that was too long makes them infinite, and with them all that is computed.
        """
        order: list[tuple[str, Any]] = [(f"the weights {name}", value) for name, value in self.net.named_parameters()]
        order += [(f"the batch's {name}", value) for name, value in minibatch.items()]
        order += [(f"the loss's {name}", value) for name, value in loss.metrics.items()]
        order += [(f"the gradient of {name}", value.grad) for name, value in self.net.named_parameters()]
        return next((name for name, value in order if not _finite(value)), "the gradient's norm")

    def state(self) -> dict[str, Any]:
        """Weights, the target network's too, optimiser, counters, unreported metrics and random generator."""
        states = [state for optimizer in self.optimizers.values() for state in optimizer.state.values()]
        return {
            "net": dict(self.net.state_dict()),
            **({"target": dict(self.target_net.state_dict())} if self.target_net else {}),
            "optimizer": {str(index): dict(state) for index, state in enumerate(states)},
            "shuffle": self.generator.get_state(),
            "counts": {"steps": self.steps, "updates": self.updates, "version": self.version},
            "metrics": dict(self._sums),
            "lags": self.lags.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        self.net.load_state_dict(state["net"])
        if self.target_net is not None:
            self.target_net.load_state_dict(state["target"])
        steppers = [
            (optimizer, parameter)
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        for (optimizer, parameter), saved in zip(steppers, state["optimizer"].values(), strict=False):
            optimizer.state[parameter] = {
                name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in saved.items()
            }
        self.generator.set_state(state["shuffle"])
        self._sums = {names: sums.to(self.device) for names, sums in state.get("metrics", {}).items()}
        self.lags.load_state(state.get("lags", {}))
        for name, value in state["counts"].items():
            setattr(self, name, value)


def minibatches(plan: OnPolicy | ReplayPlan, data: Batch, generator: torch.Generator) -> Iterator[Batch]:
    """What each update learns from.

    Of unrolls, the shuffled minibatches of each epoch: whole lanes `[T, b]`, or single rows `[n]`. Of samples, as many
    as the plan says, in the order they were drawn.
    """
    if isinstance(plan, ReplayPlan):
        for start in range(0, len(data["weight"]), plan.batch):
            yield part_of(plan, data, start, plan.batch)
        return
    state, rows = data.pop("state"), data
    if not plan.sequences:
        rows = {name: value.flatten(0, 1) for name, value in rows.items()}
    axis = 1 if plan.sequences else 0
    count = rows["valid"].shape[axis]
    if plan.epochs * plan.minibatches == 1:
        yield {**rows, "state": state}
        return
    for _ in range(plan.epochs):
        order = torch.randperm(count, generator=generator, device=generator.device)
        shuffled = {name: _take(value, order, axis) for name, value in rows.items()}
        lanes = state[order] if plan.sequences else state[:0]  # single rows are only learnt without memory
        size = count // plan.minibatches
        for start in range(0, count, size):
            part = {name: _narrow(value, axis, start, size) for name, value in shuffled.items()}
            yield {**part, "state": lanes[start : start + size]}


def _take(value: Any, order: Tensor, axis: int) -> Any:
    """Rows or lanes in another order. Rows of images are taken as flat rows, which is several times as fast."""
    if not isinstance(value, Tensor):
        return value[order] if axis == 0 else value[:, order]
    if axis == 0 and value.ndim > 2:
        return value.flatten(1).index_select(0, order).view(-1, *value.shape[1:])
    return value.index_select(axis, order)


def part_of(plan: ReplayPlan, samples: Batch, start: int, size: int) -> Batch:
    """So many samples from there on, or as many as there are, as views."""
    return {name: _narrow(value, axis_of(plan, name), start, size) for name, value in samples.items()}


def _narrow(value: Any, axis: int, start: int, size: int) -> Any:
    """`size` rows or lanes from `start` on, as a view."""
    return value[start : start + size] if axis == 0 else value[:, start : start + size]


def _finite(value: Any) -> bool:
    if value is None:
        return True
    leaves = [value] if isinstance(value, Tensor) else value.values(include_nested=True, leaves_only=True)
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves if leaf.is_floating_point())

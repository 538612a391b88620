"""What an algorithm is: a frozen dataclass of hyperparameters with a few methods on tensors, and its data plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from rookery.nn.adam import Adam, Optimizer
from rookery.nn.policy import PolicyNet

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs

__all__ = [
    "Acted",
    "Algorithm",
    "Batch",
    "Loss",
    "Network",
    "OnPolicy",
    "PolicyNet",
    "Refused",
    "scaled_reward",
    "update_norms",
]

Batch = dict[str, Any]  # what a loss reads: tensors (structured observations: TensorDicts) with equal leading dims
Network = nn.Module | Callable[["EnvSpec"], nn.Module]


class Refused(ValueError):
    """A combination that cannot work, refused before anything is built; the message says what would work."""


class Acted(NamedTuple):
    """What acting in B lanes gives."""

    action: Obs  # [B, ...]
    record: dict[str, Tensor]  # stored beside the action, each [B, ...]: log_prob, value
    state: Tensor  # [B, S] the next recurrent state; S = 0 without memory


class Loss(NamedTuple):
    """One scalar to minimise, and what came with it."""

    loss: Tensor  # []
    metrics: dict[str, Tensor]  # each []
    priorities: Tensor | None = None  # [N] per sample, for prioritised replay
    stop: Tensor | None = None  # [] bool: leave out the rest of this batch's updates


@dataclass(frozen=True)
class OnPolicy:
    """Data plan: each unroll is learnt from at once, in shuffled minibatches, and then dropped."""

    unroll: int  # T, steps of an unroll
    epochs: int = 1  # passes over the unrolls
    minibatches: int = 1  # updates an epoch
    sequences: bool = False  # minibatches are whole lanes, in order of time, for recurrent networks

    def __post_init__(self) -> None:
        for name in ("unroll", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise Refused(f"{name}={getattr(self, name)} leaves nothing to learn from; use 1 or more.")

    def check(self, lanes: int) -> None:
        """Refuse minibatches that do not divide what an update has."""
        whole = lanes if self.sequences else self.unroll * lanes
        if whole % self.minibatches:
            nearest = min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - self.minibatches))
            what = f"{lanes} lanes" if self.sequences else f"{whole} samples"
            raise Refused(
                f"minibatches={self.minibatches} does not divide the {what} of an update "
                f"(unroll={self.unroll} × envs={lanes}); use {nearest} instead."
            )


# Settings by name, and what they have to be.
POSITIVE = {"lr", "max_grad_norm", "clip", "target_kl", "memory_size"}
SHARES = {"gamma", "lam"}
NOT_NEGATIVE = {"value_coef", "entropy_coef"}


class Algorithm:
    """Base of every algorithm. Subclasses are frozen dataclasses; their fields are the settings and the flags.

    Raises:
        Refused: when it is made with a setting that cannot work.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in POSITIVE and not value > 0:
                raise Refused(f"{name}={value} has to be above 0.")
            if name in SHARES and not 0 <= value <= 1:
                raise Refused(f"{name}={value} has to be between 0 and 1.")
            if name in NOT_NEGATIVE and not value >= 0:
                raise Refused(f"{name}={value} has to be 0 or more.")
            if get_origin(hints.get(name)) is Literal and value not in get_args(hints[name]):
                raise Refused(f"{name}={value!r} is not {' or '.join(map(repr, get_args(hints[name])))}.")
            if name == "hidden" and min(value, default=1) < 1:
                raise Refused(f"hidden={value} has a layer without units; use sizes of 1 or more.")

    lr: float  # the optimiser's step size
    max_grad_norm: float | None  # global norm the gradient is clipped to
    gamma: float  # discount

    @property
    def plan(self) -> OnPolicy:
        """Which data the loss eats."""
        raise NotImplementedError

    def networks(self, spec: EnvSpec, network: Network | None = None) -> PolicyNet:
        """Every network the loss needs, as one module; `network` replaces the part between observation and heads."""
        raise NotImplementedError

    def act(self, net: Any, obs: Obs, state: Tensor, explore: Tensor | None) -> Acted:
        """Choose actions for B lanes; `explore` is `[B, N]` noise from `net.draw`, None for the greedy action."""
        raise NotImplementedError

    def prepare(self, net: Any, unroll: Batch) -> Batch:
        """Once per batch of unrolls `[T+1, B]`, without gradient: advantages, targets. Gives `[T, B, ...]` tensors."""
        raise NotImplementedError

    def loss(self, net: Any, target: Any, batch: Batch, remaining: Tensor) -> Loss:
        """The loss of a minibatch; `remaining` runs from 1 to 0 over the run and drives annealing."""
        raise NotImplementedError

    def finish(self, net: Any, unroll: Batch) -> None:
        """After a batch's last update, without gradient: running statistics that live in the network."""

    def check(self, spec: EnvSpec, lanes: int) -> None:
        """Refuse what cannot work with this environment and so many lanes, before anything is built."""
        self.plan.check(lanes)

    def optimizer(self, groups: dict[str, nn.Parameter], lr: Tensor) -> Optimizer:
        """The one optimiser, over one flat parameter a group; `lr` is a 0-d tensor the learner anneals in place."""
        return Adam(groups.values(), lr)

    def learning_rate(self, remaining: float) -> float:
        """Step size with `remaining` (1 to 0) of the run ahead."""
        return self.lr


def scaled_reward(net: Any, unroll: Batch) -> Tensor:
    """The reward `[T, B]`, divided by the running deviation of the discounted return if the network keeps one."""
    reward = unroll["reward"][:-1]
    return reward if net.return_norm is None else net.return_norm.scale(reward)


def update_norms(net: Any, unroll: Batch) -> None:
    """Merge an unroll's observations and discounted returns into the network's running statistics, if it keeps any.

    After the batch's last update, so that all of its minibatches are normalised as its actions were.
    """
    valid = unroll["valid"][:-1]
    if net.norm is not None:
        net.norm.update(unroll["obs"][:-1], valid)
    if net.return_norm is not None:
        net.return_norm.update(unroll["discounted_return"][:-1], valid)

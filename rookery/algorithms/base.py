"""What an algorithm is: a frozen dataclass of hyperparameters with a few methods on tensors, and its data plan."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from rookery.data.plan import OnPolicy, Refused, ReplayPlan
from rookery.nn.adam import Adam, Optimizer
from rookery.nn.flat import FlatParameters
from rookery.nn.policy import PolicyNet

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs

__all__ = [
    "Acted",
    "Algorithm",
    "Batch",
    "Explore",
    "Loss",
    "Network",
    "Now",
    "OnPolicy",
    "Part",
    "PolicyNet",
    "Refused",
    "ReplayPlan",
    "Target",
    "fitting",
    "flat",
    "sampled",
    "with_last",
]

Batch = dict[str, Any]  # what a loss reads: tensors (structured observations: TensorDicts) with equal leading dims
Network = nn.Module | Callable[["EnvSpec"], nn.Module]


class Explore(NamedTuple):
    """What exploring in B lanes takes, drawn outside of `act`, so that what is compiled holds no generator."""

    noise: Tensor  # [B, N] from `net.draw`
    scale: Tensor  # [B] from `algorithm.exploration`: ε, or a standard deviation; policies that sample ignore it


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


class Now(NamedTuple):
    """Where an update stands in the run."""

    remaining: Tensor  # [] from 1 to 0 over the run: drives annealing
    moves: tuple[str, ...] = ("all",)  # the parts whose parameters this update moves


class Part(NamedTuple):
    """Parameters that are stepped alike."""

    parameters: list[nn.Parameter]
    lr: float | None = None  # their own step size, annealed as the algorithm's is; None takes the algorithm's
    every: int = 1  # updates a step


class Target(NamedTuple):
    """A slow copy of the network: target ← (1−τ)·target + τ·network after every `period` updates."""

    period: int = 1  # updates
    tau: float = 1.0  # τ; 1 copies


# Settings by name, and what they have to be; the data plan checks its own.
POSITIVE = {"lr", "actor_lr", "dual_lr", "adam_eps", "max_grad_norm", "clip", "target_kl", "tau", "kappa", "std"}
POSITIVE |= {"sigma_last", "epsilon_mean", "epsilon_std", "epsilon_penalty"}
SHARES = {"gamma", "lam", "tau", "epsilon", "epsilon_start"}
NOT_NEGATIVE = {"value_coef", "entropy_coef", "temperature", "sigma", "smoothing", "smoothing_clip", "ladder"}
NOT_NEGATIVE |= {"epsilon_steps"}
COUNTS = {"memory_size", "unrolls", "policy_delay", "critics", "target_critics", "samples", "atoms", "quantiles"}
COUNTS |= {"target_quantiles", "acting_quantiles"}
BOUNDS: tuple[tuple[set[str], Callable[[float], bool], str], ...] = (
    (POSITIVE, lambda value: value > 0, "above 0"),
    (SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
    (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (COUNTS, lambda value: value >= 1, "1 or more"),
)


class Algorithm:
    """Base of every algorithm. Subclasses are frozen dataclasses; their fields are the settings and the flags.

    Raises:
        Refused: when it is made with a setting that cannot work.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            if (typed := fitting(name, value, hints.get(name, object))) is not value:
                object.__setattr__(self, name, typed)
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise Refused(f"{name}={value} has to be a finite number.")
            for names, holds, words in BOUNDS:
                if name in names and not holds(value):
                    raise Refused(f"{name}={value} has to be {words}.")
            if name == "hidden" and min(value, default=1) < 1:
                raise Refused(f"hidden={value} has a layer without units; use sizes of 1 or more.")
            if name == "sigma_last" and vars(self)["sigma"] == 0:
                raise Refused(f"sigma_last={value} ends a ladder that cannot begin at sigma=0; use a sigma above 0.")
        _, target = self.plan, self.target  # a plan refuses what it cannot work with itself
        if target is not None and target.period < 1:
            raise Refused(f"target_period={target.period} has to be 1 or more.")

    lr: float  # the optimiser's step size
    max_grad_norm: float | None  # global norm the gradient is clipped to
    gamma: float  # discount

    @property
    def plan(self) -> OnPolicy | ReplayPlan:
        """Which data the loss eats."""
        raise NotImplementedError

    def networks(self, spec: EnvSpec, network: Network | None = None) -> PolicyNet:
        """Every network the loss needs, as one module; `network` replaces the part between observation and heads."""
        raise NotImplementedError

    @property
    def target(self) -> Target | None:
        """The slow copy of the network that `loss` is handed, if it needs one."""
        return None

    def parts(self, net: Any) -> dict[str, Part] | None:
        """The network's parameters by how they are stepped; None steps all of them alike, as the part "all"."""
        return None

    def exploration(self, steps: int, place: Tensor) -> Tensor | float:
        """How much to explore after so many steps of the run, `[B]` or one number: `Explore.scale`.

        Args:
            place: `[B]` where a lane stands among all lanes of the run, from 0 for the first to 1 for the last.
        """
        return 1.0

    def act(self, net: Any, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        """Choose actions for B lanes; without `explore`, greedy ones."""
        raise NotImplementedError

    def priorities(self, unroll: Batch) -> Tensor | None:
        """What the rows of an unroll enter prioritised replay with, `[T, B]`; None for the highest priority so far."""
        return None

    def prepare(self, net: Any, unroll: Batch) -> Batch:
        """Once per batch of unrolls `[T+1, B]`, without gradient: advantages, targets. Gives `[T, B, ...]` tensors.

        What comes from replay is handed to `loss` as it was sampled.
        """
        raise NotImplementedError

    def noise(self, net: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """Random numbers that the loss of this minibatch takes, by name; drawn outside as those of `act` are."""
        return {}

    def loss(self, net: Any, target: Any, batch: Batch, now: Now) -> Loss:
        """The loss of a minibatch (with its `noise`); `target` is the slow copy, if one is declared."""
        raise NotImplementedError

    def finish(self, net: Any, data: Batch) -> None:
        """After a batch's last update, without gradient: running statistics that live in the network."""

    def check(self, spec: EnvSpec, lanes: int) -> None:
        """Refuse what cannot work with this environment and so many lanes, before anything is built."""
        self.plan.check(lanes)

    def optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> Optimizer:
        """The optimiser of a part, over its flat parameter; `lr` is a 0-d tensor that the learner anneals in place."""
        return Adam(parameters, lr)

    def learning_rate(self, remaining: float) -> float:
        """Step size with `remaining` (1 to 0) of the run ahead."""
        return self.lr

    def part_rate(self, part: Part, remaining: float) -> float:
        """A part's step size then: its own, annealed as the algorithm's is."""
        annealed = self.learning_rate(remaining) / self.lr
        return (part.lr or self.lr) * annealed


def fitting(name: str, value: Any, hint: Any) -> Any:
    """A setting as its field's type has it: lists become tuples, and 1e6 an int where one is due.

    Raises:
        Refused: for a value of another type.
    """
    if isinstance(value, list) and not _fits(value, hint):
        value = tuple(value)
    if isinstance(value, float) and value.is_integer() and not _fits(value, hint):
        value = int(value)
    if not _fits(value, hint):
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        wanted = hint.__name__ if type(hint) is type else hint
        raise Refused(f"{name}={value!r} is not {' or '.join(map(repr, choices)) or f'of type {wanted}'}.")
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; an int passes for a float, a bool for neither."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        kinds = parts[:1] * len(value) if parts[1:] == (...,) and isinstance(value, tuple) else parts
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if hint in (int, float) and isinstance(value, bool):
        return False
    plain = isinstance(hint, type) and hint.__module__ == "builtins"  # else its owner knows
    return not plain or isinstance(value, (int, float) if hint is float else hint)


def flat(algorithm: Algorithm, net: nn.Module, learns: bool = True) -> FlatParameters:
    """The network's parameters as one flat tensor for each of the algorithm's parts, and one for all that is frozen.

    Args:
        learns: what does not, such as a copy that acts, is laid out like what does, and then frozen.

    Raises:
        ValueError: for a network that is frozen as a whole already: it would be laid out in another order.
    """
    if not any(each.requires_grad for each in net.parameters()):
        raise ValueError("the network is frozen, and its layout would not be the learner's; give it as it was made.")
    parts = algorithm.parts(net)
    groups = None
    if parts is not None:
        groups = {name: [each for each in part.parameters if each.requires_grad] for name, part in parts.items()}
        groups["frozen"] = [each for each in net.parameters() if not each.requires_grad]
        groups = {name: parameters for name, parameters in groups.items() if parameters}
    whole = FlatParameters(net, groups)
    if not learns:
        whole.freeze()
    return whole


def sampled(algorithm: Algorithm, net: PolicyNet, lanes: int, generator: torch.Generator) -> Explore:
    """What acting as at the end of training takes: noise for so many lanes, and the exploration that is left."""
    place = torch.zeros(lanes, device=generator.device)
    return Explore(net.draw((lanes,), generator), place + algorithm.exploration(sys.maxsize, place))


def with_last(action: Obs) -> Obs:
    """Actions `[T+1, B, ...]` of an unroll, whose last row has none, with that of the row before there instead.

    For asking a network about all rows at once; what it says of the last action means nothing.
    """
    return torch.cat([action[:-1], action[-2:-1]])

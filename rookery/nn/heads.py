"""Policies over every action space, and the heads that make them from features.

A policy holds tensors with any leading dimensions `[...]` and draws nothing itself: `sample` takes standard noise
`[..., N]` drawn outside (`Head.draw`), so that a compiled function holds no generator. Continuous policies live in
[-1, 1] coordinates and discrete ones count from 0; environments rescale and shift. All arithmetic is at least float32,
also under autocast.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from rookery.envs.spec import Leaf, leaves
from rookery.nn.init import init_linear

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = [
    "Bernoulli",
    "Categorical",
    "Composite",
    "Gaussian",
    "Head",
    "MultiCategorical",
    "Policy",
    "SquashedGaussian",
    "log_one_minus_tanh_squared",
    "make_head",
]

Mask: TypeAlias = "Tensor | TensorDict | None"
Shape = tuple[int, ...]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_STD_RANGE = (-20.0, 2.0)  # bounds of a state-dependent log std (Haarnoja et al. 2018, the authors' code)

# Gauss-Hermite quadrature: E f(m + s·x), x ~ N(0, 1), is about Σ weight·f(m + s·node)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
HERMITE_NODES = tuple(_NODES.tolist())
HERMITE_WEIGHTS = tuple((_WEIGHTS / _WEIGHTS.sum()).tolist())


class Policy(ABC):
    """A distribution over actions for each of `[...]` observations."""

    __slots__ = ()

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """N, the last dimension of the noise that `sample` takes."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Any:
        """The action that this standard noise `[..., N]` stands for; differentiable where the action is continuous."""

    @abstractmethod
    def mode(self) -> Any:
        """The greedy action."""

    @abstractmethod
    def log_prob(self, action: Any) -> Tensor:
        """Log probability (density) of an action, `[...]`."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy in nats, `[...]`."""

    @abstractmethod
    def kl(self, other: Any) -> Tensor:
        """KL(self ‖ other) in nats, `[...]`."""

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Any, Tensor]:
        """An action and its log probability, exact where inverting the action would round."""
        action = self.sample(noise)
        return action, self.log_prob(action)


@dataclass(frozen=True, slots=True)
class Categorical(Policy):
    """One choice among A; actions are int64 `[...]`. Noise: Gumbel.

    `logits` `[..., A]` are normalised log probabilities; `Categorical.of` makes them from any logits.
    """

    logits: Tensor

    @classmethod
    def of(cls, logits: Tensor, mask: Tensor | None = None) -> Self:
        """Normalise logits `[..., A]`. `mask` `[..., A]` is True where allowed; a row without any True allows all.

        Masked choices get the lowest finite logit, not -inf: probability 0, and nothing becomes NaN.
        """
        logits = _at_least_float32(logits)
        if mask is not None:
            mask = mask.bool()
            mask = mask | ~mask.any(-1, keepdim=True)
            logits = torch.where(mask, logits, torch.finfo(logits.dtype).min)
        return cls(torch.log_softmax(logits, -1))

    @property
    def noise_size(self) -> int:
        return self.logits.shape[-1]

    def sample(self, noise: Tensor) -> Tensor:
        return (self.logits + noise).argmax(-1)  # the Gumbel-max trick

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.logits.exp() * self.logits).sum(-1)

    def kl(self, other: Self) -> Tensor:
        return (self.logits.exp() * (self.logits - other.logits)).sum(-1)


@dataclass(frozen=True, slots=True)
class MultiCategorical(Policy):
    """K independent choices; actions are int64 `[..., K]`, or `[..., *shape]`. Noise: Gumbel, concatenated."""

    parts: tuple[Categorical, ...]
    shape: Shape | None = None  # of one action, where it is not [K]

    @classmethod
    def of(cls, logits: Tensor, sizes: Shape, mask: Tensor | None = None, shape: Shape | None = None) -> Self:
        """Split concatenated logits `[..., sum(sizes)]`, and the mask likewise, into one choice a size."""
        masks = (None,) * len(sizes) if mask is None else mask.split(sizes, -1)
        parts = zip(logits.split(sizes, -1), masks, strict=True)
        return cls(tuple(Categorical.of(part, allowed) for part, allowed in parts), shape)

    @property
    def noise_size(self) -> int:
        return sum(part.noise_size for part in self.parts)

    def sample(self, noise: Tensor) -> Tensor:
        noises = noise.split([part.noise_size for part in self.parts], -1)
        choices = [part.sample(n) for part, n in zip(self.parts, noises, strict=True)]
        return _shaped(torch.stack(choices, -1), self.shape)

    def mode(self) -> Tensor:
        return _shaped(torch.stack([part.mode() for part in self.parts], -1), self.shape)

    def log_prob(self, action: Tensor) -> Tensor:
        choices = _flat(action, self.shape).unbind(-1)
        return _total([part.log_prob(choice) for part, choice in zip(self.parts, choices, strict=True)])

    def entropy(self) -> Tensor:
        return _total([part.entropy() for part in self.parts])

    def kl(self, other: Self) -> Tensor:
        return _total([mine.kl(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)])


@dataclass(frozen=True, slots=True)
class Bernoulli(Policy):
    """N independent switches; actions are bool `[..., N]`, or `[..., *shape]`. Noise: logistic."""

    logits: Tensor  # [..., N], log odds of True
    shape: Shape | None = None  # of one action, where it is not [N]

    @property
    def noise_size(self) -> int:
        return self.logits.shape[-1]

    def sample(self, noise: Tensor) -> Tensor:
        return _shaped(self.logits + noise > 0, self.shape)

    def mode(self) -> Tensor:
        return _shaped(self.logits > 0, self.shape)

    def log_prob(self, action: Tensor) -> Tensor:
        action = _flat(action, self.shape).bool()
        return F.logsigmoid(torch.where(action, self.logits, -self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        return (F.softplus(self.logits) - self.logits * self.logits.sigmoid()).sum(-1)

    def kl(self, other: Self) -> Tensor:
        gap = self.logits.sigmoid() * (self.logits - other.logits)
        return (gap - F.softplus(self.logits) + F.softplus(other.logits)).sum(-1)


@dataclass(frozen=True, slots=True)
class Gaussian(Policy):
    """A diagonal Gaussian; actions are float `[..., N]`, or `[..., *shape]`, not clipped. Noise: normal."""

    mean: Tensor  # [..., N]
    log_std: Tensor  # [..., N], or anything that broadcasts to it
    shape: Shape | None = None  # of one action, where it is not [N]

    @property
    def noise_size(self) -> int:
        return self.mean.shape[-1]

    def sample(self, noise: Tensor) -> Tensor:
        return _shaped(self.mean + self.log_std.exp() * noise, self.shape)

    def mode(self) -> Tensor:
        return _shaped(self.mean, self.shape)

    def log_prob(self, action: Tensor) -> Tensor:
        z = (_flat(action, self.shape) - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z.square() - self.log_std).sum(-1) - HALF_LOG_2PI * self.noise_size

    def entropy(self) -> Tensor:
        return self.log_std.expand_as(self.mean).sum(-1) + (0.5 + HALF_LOG_2PI) * self.noise_size

    def kl(self, other: Self) -> Tensor:
        variance_ratio = (2 * (self.log_std - other.log_std)).exp()
        z = (self.mean - other.mean) * torch.exp(-other.log_std)
        return (other.log_std - self.log_std + 0.5 * (variance_ratio + z.square() - 1)).sum(-1)


@dataclass(frozen=True, slots=True)
class SquashedGaussian(Policy):
    """tanh of a diagonal Gaussian; actions are float in [-1, 1], `[..., N]` or `[..., *shape]`. Noise: normal.

    log π(a) = log N(u; mean, std) − Σ log(1 − tanh²u), a = tanh u (Haarnoja et al. 2018, appendix C).
    """

    mean: Tensor  # [..., N], before the tanh
    log_std: Tensor  # [..., N], or anything that broadcasts to it
    shape: Shape | None = None  # of one action, where it is not [N]

    @property
    def noise_size(self) -> int:
        return self.mean.shape[-1]

    def sample(self, noise: Tensor) -> Tensor:
        return _shaped((self.mean + self.log_std.exp() * noise).tanh(), self.shape)

    def mode(self) -> Tensor:
        """tanh of the mean: the median of every coordinate, which is what is meant by acting greedily."""
        return _shaped(self.mean.tanh(), self.shape)

    def log_prob(self, action: Tensor) -> Tensor:
        """Inverts the tanh, with |action| clamped just below 1; prefer `sample_with_log_prob` for own samples."""
        action = _at_least_float32(_flat(action, self.shape))
        limit = 1 - torch.finfo(action.dtype).eps
        return self._log_prob_before_tanh(action.clamp(-limit, limit).atanh())

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        u = self.mean + self.log_std.exp() * noise
        return _shaped(u.tanh(), self.shape), self._log_prob_before_tanh(u)

    def entropy(self) -> Tensor:
        """The Gaussian's entropy + E Σ log(1 − tanh²u), the expectation by 16-point Gauss-Hermite quadrature.

        There is no closed form; the error in nats a coordinate is below 1e-3 for std ≤ 1, 0.03 to e, and 0.3 to e².
        """
        nodes, weights = self.mean.new_tensor(HERMITE_NODES), self.mean.new_tensor(HERMITE_WEIGHTS)
        u = self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes
        shrink = (log_one_minus_tanh_squared(u) * weights).sum((-2, -1))
        return Gaussian(self.mean, self.log_std).entropy() + shrink

    def kl(self, other: Self) -> Tensor:
        """That of the two Gaussians: the same bijection of both changes nothing."""
        return Gaussian(self.mean, self.log_std).kl(Gaussian(other.mean, other.log_std))

    def _log_prob_before_tanh(self, u: Tensor) -> Tensor:
        return Gaussian(self.mean, self.log_std).log_prob(u) - log_one_minus_tanh_squared(u).sum(-1)


@dataclass(frozen=True, slots=True)
class Composite(Policy):
    """Independent policies by (nested) key, for Dict and Tuple spaces; actions are TensorDicts with those keys."""

    parts: dict[tuple[str, ...], Policy]

    @property
    def noise_size(self) -> int:
        return sum(part.noise_size for part in self.parts.values())

    def sample(self, noise: Tensor) -> TensorDict:
        return self.sample_with_log_prob(noise)[0]

    def mode(self) -> TensorDict:
        actions = {key: part.mode() for key, part in self.parts.items()}
        return _structured(actions, self.entropy().shape)

    def log_prob(self, action: TensorDict) -> Tensor:
        return _total([part.log_prob(action[key]) for key, part in self.parts.items()])

    def sample_with_log_prob(self, noise: Tensor) -> tuple[TensorDict, Tensor]:
        noises = noise.split([part.noise_size for part in self.parts.values()], -1)
        pairs = {key: part.sample_with_log_prob(n) for (key, part), n in zip(self.parts.items(), noises, strict=True)}
        actions = {key: action for key, (action, _) in pairs.items()}
        return _structured(actions, noise.shape[:-1]), _total([log_prob for _, log_prob in pairs.values()])

    def entropy(self) -> Tensor:
        return _total([part.entropy() for part in self.parts.values()])

    def kl(self, other: Self) -> Tensor:
        return _total([part.kl(other.parts[key]) for key, part in self.parts.items()])


def log_one_minus_tanh_squared(u: Tensor) -> Tensor:
    """log(1 − tanh²u) = 2(log 2 − u − softplus(−2u)), which neither overflows nor loses digits, elementwise."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


class Head(nn.Module, ABC):
    """Features `[..., F]` to a policy `[...]`."""

    noise_size: int  # N
    noise: Literal["gumbel", "logistic", "normal"]

    def draw(self, shape: Shape, generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
        """Standard noise float32 `[*shape, N]` for `Policy.sample`; the generator must live on `device`."""
        noise = torch.empty((*shape, self.noise_size), device=device)
        if self.noise == "normal":
            return noise.normal_(generator=generator)
        noise.exponential_(generator=generator)  # > 0, so both logarithms below are finite
        return noise.log_().neg_() if self.noise == "gumbel" else noise.expm1_().log_()

    @abstractmethod
    def forward(self, features: Tensor, mask: Mask = None) -> Policy:
        """The policy at these features. `mask` is True where allowed, and only discrete choices have one."""


class CategoricalHead(Head):
    """Discrete(A); mask `[..., A]`."""

    noise = "gumbel"

    def __init__(self, space: spaces.Discrete, features: int, gain: float) -> None:
        super().__init__()
        self.noise_size = int(space.n)
        self.linear = init_linear(nn.Linear(features, self.noise_size), gain)

    def forward(self, features: Tensor, mask: Mask = None) -> Categorical:
        return Categorical.of(self.linear(features), mask)


class MultiCategoricalHead(Head):
    """MultiDiscrete; mask `[..., sum(nvec)]`, the choices of one component after those of another."""

    noise = "gumbel"

    def __init__(self, space: spaces.MultiDiscrete, features: int, gain: float) -> None:
        super().__init__()
        self.sizes = tuple(int(size) for size in space.nvec.flatten())
        self.shape = _event_shape(space)
        self.noise_size = sum(self.sizes)
        self.linear = init_linear(nn.Linear(features, self.noise_size), gain)

    def forward(self, features: Tensor, mask: Mask = None) -> MultiCategorical:
        return MultiCategorical.of(self.linear(features), self.sizes, mask, self.shape)


class BernoulliHead(Head):
    """MultiBinary(N)."""

    noise = "logistic"

    def __init__(self, space: spaces.MultiBinary, features: int, gain: float) -> None:
        super().__init__()
        self.shape = _event_shape(space)
        self.noise_size = math.prod(space.shape)
        self.linear = init_linear(nn.Linear(features, self.noise_size), gain)

    def forward(self, features: Tensor, mask: Mask = None) -> Bernoulli:
        _refuse_mask(mask, "MultiBinary")
        return Bernoulli(_at_least_float32(self.linear(features)), self.shape)


class GaussianHead(Head):
    """Box in [-1, 1] coordinates; one learnt log std a coordinate, from 0, or one that depends on the features."""

    noise = "normal"

    def __init__(
        self, space: spaces.Box, features: int, gain: float, squash: bool = False, state_dependent_std: bool = False
    ) -> None:
        super().__init__()
        if np.issubdtype(space.dtype, np.integer):
            raise ValueError(
                f"A Box of {space.dtype} actions is neither continuous nor a choice; "
                "declare it as float32 or as MultiDiscrete."
            )
        self.shape = _event_shape(space)
        self.noise_size = math.prod(space.shape)
        self.squash = squash
        outputs = self.noise_size * (2 if state_dependent_std else 1)
        self.linear = init_linear(nn.Linear(features, outputs), gain)
        self.log_std = None if state_dependent_std else nn.Parameter(torch.zeros(self.noise_size))

    def forward(self, features: Tensor, mask: Mask = None) -> Gaussian | SquashedGaussian:
        _refuse_mask(mask, "Box")
        mean = _at_least_float32(self.linear(features))
        if self.log_std is None:
            mean, log_std = mean.chunk(2, -1)
            log_std = log_std.clamp(*LOG_STD_RANGE)
        else:
            log_std = self.log_std.expand_as(mean)
        return SquashedGaussian(mean, log_std, self.shape) if self.squash else Gaussian(mean, log_std, self.shape)


class CompositeHead(Head):
    """Dict and Tuple, nested: one head a leaf. The mask is a TensorDict with the keys of those leaves that have one."""

    def __init__(self, heads: dict[tuple[str, ...], Head]) -> None:
        super().__init__()
        self.keys = tuple(heads)
        self.heads = nn.ModuleList(heads.values())
        self.noise_size = sum(head.noise_size for head in heads.values())

    def draw(self, shape: Shape, generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
        return torch.cat([cast(Head, head).draw(shape, generator, device) for head in self.heads], -1)

    def forward(self, features: Tensor, mask: Mask = None) -> Composite:
        if isinstance(mask, Tensor):
            raise ValueError(
                f"One mask of shape {tuple(mask.shape)} cannot serve the actions {_names(self.keys)}; "
                "make action_mask a Dict with the key of each action that has a mask."
            )
        masks = {key: None if mask is None else mask.get(key, None) for key in self.keys}
        return Composite({key: head(features, masks[key]) for key, head in zip(self.keys, self.heads, strict=True)})


def make_head(
    space: spaces.Space, features: int, gain: float = 0.01, squash: bool = False, state_dependent_std: bool = False
) -> Head:
    """The head for an action space.

    Args:
        gain: of the orthogonal initialisation; small, so that the first policy is nearly uniform
            (Andrychowicz et al. 2020, section 3.2).
        squash: Box actions through tanh.
        state_dependent_std: Box actions whose spread depends on the features.

    Raises:
        ValueError: for a space without fixed-size actions, an empty one, or integer Box actions.
    """
    heads: dict[tuple[str, ...], Head] = {}
    for key, leaf in leaves(space).items():
        heads[key] = _leaf_head(leaf, features, gain, squash, state_dependent_std)
    if not heads:
        raise ValueError("The action space is an empty Dict or Tuple; a policy needs at least one action.")
    return heads[()] if () in heads else CompositeHead(heads)


def _leaf_head(leaf: Leaf, features: int, gain: float, squash: bool, state_dependent_std: bool) -> Head:
    if isinstance(leaf, spaces.Discrete):
        return CategoricalHead(leaf, features, gain)
    if isinstance(leaf, spaces.MultiDiscrete):
        return MultiCategoricalHead(leaf, features, gain)
    if isinstance(leaf, spaces.MultiBinary):
        return BernoulliHead(leaf, features, gain)
    return GaussianHead(leaf, features, gain, squash, state_dependent_std)


def _refuse_mask(mask: Mask, space: str) -> None:
    if mask is not None:
        raise ValueError(
            f"{space} actions cannot be masked, and the observation has an action_mask; "
            "drop that key, or use Discrete or MultiDiscrete actions."
        )


def _names(keys: tuple[tuple[str, ...], ...]) -> str:
    return ", ".join(".".join(key) for key in keys)


def _event_shape(space: Leaf) -> Shape | None:
    shape = tuple(space.shape or ())
    return None if len(shape) == 1 else shape


def _flat(action: Tensor, shape: Shape | None) -> Tensor:
    if shape is None:
        return action
    return action.flatten(-len(shape)) if shape else action.unsqueeze(-1)


def _shaped(action: Tensor, shape: Shape | None) -> Tensor:
    return action if shape is None else action.reshape(*action.shape[:-1], *shape)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _structured(actions: dict[tuple[str, ...], Tensor], batch: torch.Size) -> TensorDict:
    from tensordict import TensorDict

    result = TensorDict({}, batch_size=batch)
    for key, action in actions.items():
        result[key] = action
    return result

"""The networks of actor-critic algorithms on replay: an actor that acts, and critics that judge any action.

Features come from the observation first, then an actor's and the critics' own MLPs. Vectors have no layer in common.
The encoder of images, and a user's network, is learnt from the critics' loss alone: algorithms hand its features to
the actor detached (Yarats et al. 2021, "Improving sample efficiency in model-free RL from images").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from rookery.envs.spec import MASK, leaves
from rookery.nn.actor_critic import Network, OwnNetwork, check_mask
from rookery.nn.compiled import in_float32
from rookery.nn.encoders import ACTIVATIONS, MLP, Layers, StackedLinear, make_encoder
from rookery.nn.heads import make_head
from rookery.nn.init import init_linear
from rookery.nn.norm import NormObs
from rookery.nn.policy import PolicyNet

if TYPE_CHECKING:
    from tensordict import TensorDict

    from rookery.envs.spec import EnvSpec

__all__ = ["Actor", "ActorCritics", "Critics"]

Obs: TypeAlias = "Tensor | TensorDict"
Kind = Literal["deterministic", "gaussian", "squashed"]


class ActorCritics(PolicyNet):
    """An actor and K critics.

    Actions are one box in [-1, 1], flat inside, `[..., A]`. A squashed actor is categorical over Discrete actions,
    where critics judge all A of them at once.

    Attributes:
        discrete: whether actions are one choice among A.
        duals: parameters beside the networks, by name: Lagrange multipliers.

    Args:
        kind: of actor: tanh of a number, a Gaussian whose spread depends on the observation, or tanh of that.
        critics: K.
        outputs: of a critic for each action; more than 1 are kept as a last dimension.
        normalize_obs: normalise float observations by `self.norm`, a `NormObs` that the algorithm updates.
        network: a user's encoder, or a function that makes it from the spec: observations `[N, ...]` to `[N, F]`.

    Raises:
        ValueError: for actions that are not one bounded Box (or, squashed, Discrete), and masks of a Box.
    """

    state_size = 0
    return_norm = None

    def __init__(
        self,
        spec: EnvSpec,
        kind: Kind,
        layers: Layers,
        critics: int = 2,
        outputs: int = 1,
        duals: Mapping[str, Tensor] | None = None,
        normalize_obs: bool = False,
        network: Network | None = None,
    ) -> None:
        super().__init__()
        _check_actions(spec, kind)
        space = spec.action_space
        self.discrete = isinstance(space, spaces.Discrete)
        self.shape = tuple(space.shape or ())  # of an action
        self.actions = int(space.n) if isinstance(space, spaces.Discrete) else math.prod(self.shape)  # A
        self.norm = NormObs(spec.obs_space) if normalize_obs else None
        if network is None:
            self.encoder = make_encoder(spec.obs_space, (), layers.encoder, layers.activation)
        else:
            self.encoder = OwnNetwork(spec, network)
        self.actor = Actor(self.encoder.features, self.actions, "categorical" if self.discrete else kind, layers)
        inputs = self.encoder.features + (0 if self.discrete else self.actions)
        self.critics = Critics(inputs, layers, critics, (self.actions, outputs) if self.discrete else (outputs,))
        self.duals = nn.ParameterDict({name: nn.Parameter(value) for name, value in (duals or {}).items()})

    def set_std(self, std: float) -> None:
        """Begin with this standard deviation, of a Gaussian before any squashing."""
        self.actor.head.linear.bias.data[self.actions :] = math.log(std)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        noise = torch.empty((*shape, self.actions), device=generator.device)
        if self.discrete:
            return noise.exponential_(generator=generator).log_().neg_()  # Gumbel
        return noise.normal_(generator=generator)

    def encode(self, obs: Obs) -> Tensor:
        """Features `[N, F]`, which actor and critics take."""
        return self.encoder(obs if self.norm is None else self.norm(obs))

    def flat(self, action: Tensor) -> Tensor:
        """Actions `[N, *shape]` as the networks have them, `[N, A]`."""
        return action if len(self.shape) == 1 else action.reshape(-1, self.actions)

    def shaped(self, action: Tensor) -> Tensor:
        """Actions `[N, A]` as the environment has them, `[N, *shape]`."""
        return action if len(self.shape) == 1 else action.reshape(-1, *self.shape)


class Actor(nn.Module):
    """Features `[..., F]` to an action `[..., A]`, or to a policy over such actions."""

    def __init__(self, features: int, actions: int, kind: Kind | Literal["categorical"], layers: Layers) -> None:
        super().__init__()
        self.mlp = MLP((features, *layers.hidden), layers.activation)
        self.head: Any  # a Head, or layers
        if kind == "deterministic":
            self.head = nn.Sequential(init_linear(nn.Linear(self.mlp.features, actions), gain=0.01), nn.Tanh())
        elif kind == "categorical":
            self.head = make_head(spaces.Discrete(actions), self.mlp.features)
        else:
            space = spaces.Box(-1, 1, (actions,), np.float32)
            self.head = make_head(space, self.mlp.features, squash=kind == "squashed", state_dependent_std=True)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Any:
        return in_float32(self.head, self.mlp(features), *(() if mask is None else (mask,)))


class Critics(nn.Module):
    """K independent MLPs of one shape as one batched product a layer: `[..., inputs]` to `[K, ..., *outputs]`.

    A last dimension of 1 is left out. Layer normalisation has no parameters: the next layer has them.
    """

    def __init__(self, inputs: int, layers: Layers, copies: int, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.activation, self.layer_norm = ACTIVATIONS[layers.activation], layers.layer_norm
        self.outputs = outputs[:-1] if outputs[-1] == 1 else outputs
        sizes = (inputs, *layers.hidden, math.prod(outputs))
        gains = [math.sqrt(2)] * len(layers.hidden) + [0.1]
        pairs = zip(sizes[:-1], sizes[1:], gains, strict=True)
        self.layers = nn.ModuleList(StackedLinear(copies, i, o, gain) for i, o, gain in pairs)

    def forward(
        self, features: Tensor, action: Tensor | None = None, which: Tensor | slice | None = None, frozen: bool = False
    ) -> Tensor:
        """What every critic says.

        Args:
            features: `[..., F]`.
            action: `[..., A]`.
            which: int64 `[M]` or a slice: ask only these critics; the result is then `[M, ...]`.
            frozen: let gradients reach features and action, and compute none for the critics.
        """
        given = features if action is None else torch.cat([features, action], -1)
        parameters: list[tuple[Tensor, Tensor]] = [(layer.weight, layer.bias) for layer in self.layers]  # type: ignore[misc]
        if which is not None:
            parameters = [(weight[which], bias[which]) for weight, bias in parameters]
        if frozen:
            parameters = [(weight.detach(), bias.detach()) for weight, bias in parameters]
        x = given.reshape(1, -1, given.shape[-1]).expand(len(parameters[0][0]), -1, -1)
        for weight, bias in parameters[:-1]:
            x = _affine(x, weight, bias)
            x = self.activation(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        last, bias = parameters[-1]
        x = in_float32(_affine, x, last, bias)
        return x.reshape(len(x), *given.shape[:-1], *self.outputs)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias, x, weight)


def _check_actions(spec: EnvSpec, kind: Kind) -> None:
    space = spec.action_space
    if isinstance(space, spaces.Discrete) and kind == "squashed":
        check_mask(spec, int(space.n))
        return
    if not isinstance(space, spaces.Box) or not space.is_bounded() or np.issubdtype(space.dtype, np.integer):
        raise ValueError(
            f"{spec.id} has actions {space}, and the actors of ddpg, td3, sac, d4pg and mpo act in one bounded Box of "
            "floats; use sac or dqn for Discrete actions, and ppo for any."
        )
    if (MASK,) in leaves(spec.obs_space):
        raise ValueError(f"Box actions cannot be masked, and {spec.id} observes an action_mask; drop that key.")

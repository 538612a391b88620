"""The network of actor-critic algorithms: a policy and a value from an observation, with memory if asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from rookery.envs.spec import MASK, EnvSpec, example, leaves, mask_of
from rookery.nn.compiled import in_float32
from rookery.nn.cores import make_core
from rookery.nn.encoders import Encoder, Layers, VectorEncoder, make_encoder
from rookery.nn.heads import GaussianHead, Policy, make_head
from rookery.nn.init import init_linear
from rookery.nn.norm import NormObs, RunningNorm
from rookery.nn.policy import PolicyNet

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["ActorCritic", "ActorCriticOutput", "OwnNetwork", "check_mask"]

Obs: TypeAlias = "Tensor | TensorDict"
LAYERS = Layers()
Network = nn.Module | Callable[[EnvSpec], nn.Module]


class ActorCriticOutput(NamedTuple):
    """What an actor-critic says about observations `[...]`."""

    policy: Policy
    value: Tensor  # [...]


class ActorCritic(PolicyNet):
    """A policy head and a value head on one trunk or two.

    Observations without images, and without memory, use two trunks (actor and critic) evaluated as one batched
    product; images, memory and a user's own network use one trunk for both.

    Args:
        layers: of the trunk.
        memory: the recurrent core after the trunk, of `memory_size`.
        normalize_obs: normalise float observations by `self.norm`, a `NormObs` that the algorithm updates.
        normalize_reward: keep `self.return_norm`, the moments of the discounted return, by which rewards are scaled.
        network: a user's trunk, or a function that makes it from the spec: observations `[N, ...]` as the environment
            gives them (normalised if asked for) to features `[N, F]`.
    """

    def __init__(
        self,
        spec: EnvSpec,
        layers: Layers = LAYERS,
        memory: Literal["none", "lstm", "gru"] = "none",
        memory_size: int = 128,
        normalize_obs: bool = False,
        normalize_reward: bool = False,
        network: Network | None = None,
    ) -> None:
        super().__init__()
        self.norm = NormObs(spec.obs_space) if normalize_obs else None
        self.twin = False
        if network is None:
            trunk = make_encoder(spec.obs_space, layers.hidden, layers.encoder, layers.activation)
            self.twin = memory == "none" and isinstance(trunk, VectorEncoder)
            if self.twin:
                trunk = make_encoder(spec.obs_space, layers.hidden, layers.encoder, layers.activation, copies=2)
        else:
            trunk = OwnNetwork(spec, network)
        self.trunk = trunk
        self.core = make_core(memory, trunk.features, memory_size)
        self.state_size = self.core.state_size
        self.return_norm = RunningNorm(()) if normalize_reward else None
        self.policy_head = make_head(spec.action_space, self.core.features, gain=0.01)
        self.value_head = init_linear(nn.Linear(self.core.features, 1), gain=1.0)
        check_mask(spec, self.policy_head.noise_size)

    def set_std(self, std: float) -> None:
        """Begin with this standard deviation of the actions that are numbers."""
        for head in self.policy_head.modules():
            if isinstance(head, GaussianHead) and head.log_std is not None:
                head.log_std.data.fill_(math.log(std))

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.policy_head.draw(shape, generator, generator.device)

    def forward(
        self, obs: Obs, state: Tensor | None = None, start: Tensor | None = None
    ) -> tuple[ActorCriticOutput, Tensor | None]:
        """The policy and value at each observation, and the memory after the last.

        Args:
            obs: `[..., *obs]` without memory; one step `[B, *obs]` or, with `start` `[T, B]`, a sequence
                `[T, B, *obs]` with memory.
            state: `[B, S]` before the first row; not needed without memory.
            start: bool `[T, B]`, or `[B]` for one step: rows that begin an episode, before which the memory is zeroed.
        """
        if state is None and self.state_size:
            raise ValueError("A policy with memory needs its state; begin with initial_state(lanes, device).")
        mask = mask_of(obs)
        if self.norm is not None:
            obs = self.norm(obs)
        features = self.trunk(obs).float()  # a user's network may give other floats
        return in_float32(self._heads, features, mask, state, start)

    def _heads(
        self, features: Tensor, mask: Tensor | None, state: Tensor | None, start: Tensor | None
    ) -> tuple[ActorCriticOutput, Tensor | None]:
        if self.twin:
            actor, critic = features.unbind(0)
        else:
            actor, state = self.core(features, state, start)
            critic = actor
        return ActorCriticOutput(self.policy_head(actor, mask), self.value_head(critic).squeeze(-1)), state

    def scaled_reward(self, unroll: dict[str, Any]) -> Tensor:
        """The reward `[T, B]` of an unroll, divided by the running deviation of the discounted return if it is kept."""
        reward = unroll["reward"][:-1]
        return reward if self.return_norm is None else self.return_norm.scale(reward)

    def update_norms(self, unroll: dict[str, Any]) -> None:
        """Merge an unroll's observations and discounted returns into the running statistics, if any are kept.

        After the batch's last update, so that all of its minibatches are normalised as its actions were.
        """
        valid = unroll["valid"][:-1]
        if self.norm is not None:
            self.norm.update(unroll["obs"][:-1], valid)
        if self.return_norm is not None:
            self.return_norm.update(unroll["discounted_return"][:-1], valid)


class OwnNetwork(Encoder):
    """A user's network on observations with any leading dimensions; its feature size is found by one evaluation."""

    def __init__(self, spec: EnvSpec, network: Network) -> None:
        super().__init__()
        self.network = network if isinstance(network, nn.Module) else network(spec)
        if not isinstance(self.network, nn.Module):
            raise TypeError(
                f"network(spec) returned {type(self.network).__name__}; "
                "return an nn.Module from observations to features."
            )
        found = leaves(spec.obs_space)
        self.ndim = len(found[()].shape or ()) if () in found else 0
        first = next(self.network.parameters(), torch.empty(0))
        obs = example(spec.obs_space, lanes=2, device=first.device)
        try:
            with torch.no_grad():
                features = self.network(obs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = [tuple(leaf.shape) for leaf in ([obs] if isinstance(obs, Tensor) else obs.values(True, True))]
            raise ValueError(
                f"{type(self.network).__name__} does not take two observations of {spec.id}, of shape "
                f"{', '.join(map(str, shapes))}: {error}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The network must map 2 observations to features of shape (2, F), and it gave {got}; "
                "flatten its output from dimension 1 on."
            )
        self.features = features.shape[-1]

    def forward(self, obs: Obs) -> Tensor:
        lead = obs.shape[: obs.ndim - self.ndim]  # a TensorDict's shape is that of its batch
        rows = obs if len(lead) == 1 else obs.reshape(-1, *obs.shape[len(lead) :])
        features = self.network(rows)
        return features if len(lead) == 1 else features.reshape(*lead, self.features)


def check_mask(spec: EnvSpec, choices: int) -> None:
    """Refuse an action mask that has not one entry for each choice."""
    found, actions = leaves(spec.obs_space), leaves(spec.action_space)
    if (MASK,) in found and () in actions and found[(MASK,)].shape != (choices,):
        raise ValueError(
            f"The action_mask of {spec.id} has shape {found[(MASK,)].shape}, and its actions need ({choices},): "
            "one entry for each choice, in order."
        )

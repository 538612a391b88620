"""What actor-critic algorithms on replay share: functions of tensors, and of their network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rookery.algorithms.base import Batch, Explore, Part

if TYPE_CHECKING:
    from rookery.nn.critics import ActorCritics

__all__ = ["actor_critic_parts", "gaussian_scale", "normal_noise", "randomly", "with_noise"]


def actor_critic_parts(net: ActorCritics, actor_lr: float | None, every: int = 1) -> dict[str, Part]:
    """Critics, with the encoder they teach, and the actor, with the duals if there are any."""
    critic = Part([*net.encoder.parameters(), *net.critics.parameters()])
    return {"critic": critic, "actor": Part([*net.actor.parameters()], actor_lr, every)}


def gaussian_scale(sigma: float, last: float | None, place: Tensor) -> Tensor | float:
    """σ of each lane: `sigma` in all, or a ladder, evenly spaced in log σ, from there to `last` for the last lane."""
    return sigma if last is None else sigma * (last / sigma) ** place


def randomly(action: Tensor, explore: Explore) -> Tensor:
    """The actions `[B, A]` in [-1, 1], or uniformly random ones in the lanes whose scale is infinite.

    The normal noise is made uniform by its own distribution function, 2Φ(x) − 1 = erf(x / √2).
    """
    uniform = torch.erf(explore.noise * math.sqrt(0.5))
    return torch.where(explore.scale.isinf().unsqueeze(-1), uniform, action)


def with_noise(action: Tensor, explore: Explore | None) -> Tensor:
    """clip(a + σε, −1, 1) `[B, A]`, σ = `scale` lane by lane; uniformly random where it is infinite."""
    if explore is None:
        return action
    return randomly((action + explore.scale.unsqueeze(-1) * explore.noise).clamp(-1, 1), explore)


def normal_noise(net: ActorCritics, batch: Batch, generator: torch.Generator, names: tuple[str, ...]) -> Batch:
    """Noise for the policy `[N, A]` by name."""
    return dict(zip(names, net.draw((len(names), len(batch["reward"])), generator).unbind(0), strict=True))

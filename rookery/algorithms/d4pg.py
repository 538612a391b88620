"""Distributed distributional deterministic policy gradient (Barth-Maron et al. 2018, arXiv 1804.08617).

Idea: DDPG whose critic gives the distribution of an n-step return on fixed atoms instead of its mean, and whose actor
climbs the mean of that distribution.

What differs from the paper: fresh samples are not bounded by many actors but by `updates_per_step`; priorities are off
unless `alpha` is set, and are the cross-entropy above what it cannot fall below; the actor's loss is not weighted by
importance; one MLP of equal layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rookery.algorithms.base import Acted, Batch, Explore, Loss, Network, Now, Part, Refused
from rookery.algorithms.continuous import actor_critic_parts, gaussian_scale, with_noise
from rookery.algorithms.off_policy import OffPolicy, weighted_mean
from rookery.estimators import categorical_divergence, categorical_projection

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.critics import ActorCritics

__all__ = ["D4PG"]


@dataclass(frozen=True)
class D4PG(OffPolicy):
    """Distributed distributional DDPG (Barth-Maron et al. 2018)."""

    lr: float = 1e-4  # Adam's step size, of actor and critic
    n_step: int = 5  # n of n-step returns (Tassa et al. 2018, section 4)
    target_period: int = 100  # updates between copies (Tassa et al. 2018, section 4)
    tau: float = 1.0  # copies
    actor_lr: float | None = None  # the actor's own step size
    sigma: float = 0.3  # σ of the noise on actions
    sigma_last: float | None = None  # σ of the last lane, with a ladder over the others
    atoms: int = 51  # of the distribution
    v_min: float = -150.0  # return of the first atom
    v_max: float = 150.0  # return of the last one
    layer_norm: bool = False  # in the critic

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atoms < 2 or not self.v_min < self.v_max:
            raise Refused(
                f"atoms={self.atoms} from v_min={self.v_min} to v_max={self.v_max} hold no distribution; "
                "use 2 or more, and a v_min below v_max."
            )

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritics:
        from rookery.nn.critics import ActorCritics
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder, self.layer_norm)
        return ActorCritics(spec, "deterministic", layers, 1, self.atoms, None, self.normalize_obs, network)

    def parts(self, net: ActorCritics) -> dict[str, Part]:
        return actor_critic_parts(net, self.actor_lr)

    def exploration(self, steps: int, place: Tensor) -> Tensor | float:
        return torch.inf if steps < self.learning_starts else gaussian_scale(self.sigma, self.sigma_last, place)

    def act(self, net: ActorCritics, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        return Acted(net.shaped(with_noise(net.actor(net.encode(obs)), explore)), {}, state)

    def loss(self, net: ActorCritics, target: ActorCritics, batch: Batch, now: Now) -> Loss:
        reward = batch["reward"]
        support = torch.linspace(self.v_min, self.v_max, self.atoms, dtype=reward.dtype, device=reward.device)  # z
        with torch.no_grad():
            following = target.encode(batch["next_obs"])
            probability = target.critics(following, target.actor(following)).squeeze(0).softmax(-1)
            y = categorical_projection(support, probability, reward, batch["discount"])

        features = net.encode(batch["obs"])
        logits = net.critics(features, net.flat(batch["action"])).squeeze(0)
        divergence = categorical_divergence(y, logits)
        critic_loss = weighted_mean(divergence, batch)

        features = features.detach()
        value = (net.critics(features, net.actor(features), frozen=True).softmax(-1) * support).sum(-1).mean()
        loss = critic_loss - value  # the mean of the distribution is what the actor climbs
        metrics = {"critic_loss": critic_loss, "target": (y * support).sum(-1).mean(), "value": value, "loss": loss}
        return Loss(loss, {name: each.detach() for name, each in metrics.items()}, priorities=divergence.detach())

"""Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv 1509.02971; Silver et al. 2014).

Idea: the critic is differentiable in the action, so a deterministic actor climbs the gradient that the critic gives it.

What differs from the paper: Gaussian noise instead of an Ornstein-Uhlenbeck process, which later work found no better
(Fujimoto et al. 2018, section 6.1); τ, batch and step sizes of later work; no weight decay; the action joins the
observation in the first layer; no batch normalisation; weights start orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rookery.algorithms.base import Acted, Batch, Explore, Loss, Network, Now, Part
from rookery.algorithms.continuous import actor_critic_parts, gaussian_scale, with_noise
from rookery.algorithms.off_policy import OffPolicy, acting_errors, expected, weighted_mean

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.critics import ActorCritics

__all__ = ["DDPG"]


@dataclass(frozen=True)
class DDPG(OffPolicy):
    """Deep deterministic policy gradient (Lillicrap et al. 2016)."""

    actor_lr: float | None = None  # the actor's own step size; a tenth of the critic's in the paper
    sigma: float = 0.1  # σ of the noise on actions
    sigma_last: float | None = None  # σ of the last lane, with a ladder over the others
    layer_norm: bool = False  # in the critic
    actor_priorities: bool = False  # rows enter replay by their own error, not by the highest (Horgan et al. 2018)

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritics:
        from rookery.nn.critics import ActorCritics
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder, self.layer_norm)
        return ActorCritics(spec, "deterministic", layers, critics=1, normalize_obs=self.normalize_obs, network=network)

    def parts(self, net: ActorCritics) -> dict[str, Part]:
        return actor_critic_parts(net, self.actor_lr)

    def exploration(self, steps: int, place: Tensor) -> Tensor | float:
        return torch.inf if steps < self.learning_starts else gaussian_scale(self.sigma, self.sigma_last, place)

    def act(self, net: ActorCritics, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        features = net.encode(obs)
        best = net.actor(features)
        action = with_noise(best, explore)
        if not self.actor_priorities or explore is None:
            return Acted(net.shaped(action), {}, state)
        q, greedy = net.critics(features.expand(2, -1, -1), torch.stack([action, best])).squeeze(0)
        return Acted(net.shaped(action), {"q": q, "best": greedy}, state)

    def priorities(self, unroll: Batch) -> Tensor | None:
        return acting_errors(self, unroll) if self.actor_priorities else None

    def loss(self, net: ActorCritics, target: ActorCritics, batch: Batch, now: Now) -> Loss:
        with torch.no_grad():
            following = target.encode(batch["next_obs"])
            y = expected(batch, target.critics(following, target.actor(following)).squeeze(0))  # algorithm 1

        features = net.encode(batch["obs"])
        error = net.critics(features, net.flat(batch["action"])).squeeze(0) - y
        critic_loss = weighted_mean(error.square(), batch)

        features = features.detach()
        value = net.critics(features, net.actor(features), frozen=True).mean()
        loss = critic_loss - value  # its gradient in the actor is eq. 6
        metrics = {"critic_loss": critic_loss, "target": y.mean(), "value": value, "loss": loss}
        return Loss(loss, {name: each.detach() for name, each in metrics.items()}, priorities=error.detach().abs())

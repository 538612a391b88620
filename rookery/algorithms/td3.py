"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv 1802.09477).

Idea: a critic that is maximised is believed where it errs upwards. So the target is the lower of two critics, at an
action with a little noise, and the actor moves less often than the critics do.

What differs from the paper: any number of lanes, n-step returns, priorities and normalised observations as settings;
weights start orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rookery.algorithms.base import Acted, Batch, Explore, Loss, Network, Now, Part, Target
from rookery.algorithms.continuous import actor_critic_parts, gaussian_scale, normal_noise, with_noise
from rookery.algorithms.off_policy import OffPolicy, expected, weighted_mean

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.critics import ActorCritics

__all__ = ["TD3"]


@dataclass(frozen=True)
class TD3(OffPolicy):
    """Twin delayed DDPG (Fujimoto et al. 2018)."""

    actor_lr: float | None = None  # the actor's own step size
    sigma: float = 0.1  # σ of the noise on actions (section 6.1)
    sigma_last: float | None = None  # σ of the last lane, with a ladder over the others
    smoothing: float = 0.2  # σ of the noise on the target's actions (section 6.1)
    smoothing_clip: float = 0.5  # c, where that noise is clipped (section 6.1)
    policy_delay: int = 2  # d, updates of the critics for one of actor and target (section 6.1)
    target_period: int = 0  # updates between moves of the target network; 0 moves it with the actor (algorithm 1)
    critics: int = 2  # the lowest of them is the target's
    layer_norm: bool = False  # in the critics

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritics:
        from rookery.nn.critics import ActorCritics
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder, self.layer_norm)
        return ActorCritics(
            spec, "deterministic", layers, self.critics, normalize_obs=self.normalize_obs, network=network
        )

    @property
    def target(self) -> Target:
        return Target(self.target_period or self.policy_delay, self.tau)

    def parts(self, net: ActorCritics) -> dict[str, Part]:
        return actor_critic_parts(net, self.actor_lr, self.policy_delay)

    def exploration(self, steps: int, place: Tensor) -> Tensor | float:
        return torch.inf if steps < self.learning_starts else gaussian_scale(self.sigma, self.sigma_last, place)

    def act(self, net: ActorCritics, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        return Acted(net.shaped(with_noise(net.actor(net.encode(obs)), explore)), {}, state)

    def noise(self, net: ActorCritics, batch: Batch, generator: torch.Generator) -> Batch:
        return normal_noise(net, batch, generator, ("next_noise",))

    def loss(self, net: ActorCritics, target: ActorCritics, batch: Batch, now: Now) -> Loss:
        with torch.no_grad():
            following = target.encode(batch["next_obs"])
            noise = (self.smoothing * batch["next_noise"]).clamp(-self.smoothing_clip, self.smoothing_clip)
            next_action = (target.actor(following) + noise).clamp(-1, 1)  # section 5.3
            y = expected(batch, target.critics(following, next_action).amin(0))  # algorithm 1

        features = net.encode(batch["obs"])
        error = net.critics(features, net.flat(batch["action"])) - y
        loss = weighted_mean(error.square().sum(0), batch)
        metrics = {"critic_loss": loss.detach(), "target": y.mean()}
        if "actor" in now.moves:
            features = features.detach()
            value = net.critics(features, net.actor(features), which=slice(1), frozen=True)
            loss = loss - value.mean()
            metrics["value"] = value.detach().mean()
        return Loss(loss, {"loss": loss.detach(), **metrics}, priorities=error.detach().abs().mean(0))

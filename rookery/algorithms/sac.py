"""Soft actor-critic (Haarnoja et al. 2018a, arXiv 1801.01290; 2018b, arXiv 1812.05905), actions continuous or discrete.

Idea: maximise return and entropy at once. The critics learn the value of actions with the entropy that follows them,
the policy moves to what they value, and a temperature weighs entropy so that the policy keeps a given amount of it.

What differs from the paper: the loss of the temperature is linear in log α, as in the authors' code, so that learning
it does not slow down as α falls; weights start orthogonal; what later papers changed are settings. Over discrete
actions expectations are sums, not samples (Christodoulou 2019, arXiv 1910.07207), at an entropy lower than his.
`critics=10, target_critics=2, updates_per_step=20, policy_delay=20` is REDQ (Chen et al. 2021, arXiv 2101.05982).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rookery.algorithms.base import Acted, Batch, Explore, Loss, Network, Now, Part, Refused
from rookery.algorithms.continuous import actor_critic_parts, normal_noise, randomly
from rookery.algorithms.off_policy import OffPolicy, expected, weighted_mean
from rookery.envs.spec import mask_of
from rookery.nn.heads import Categorical, SquashedGaussian

if TYPE_CHECKING:
    from collections.abc import Callable

    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.critics import ActorCritics

__all__ = ["SAC", "judged", "soft_value"]


@dataclass(frozen=True)
class SAC(OffPolicy):
    """Soft actor-critic (Haarnoja et al. 2018b) with a learnt temperature."""

    actor_lr: float | None = None  # the actor's own step size
    temperature: float | None = None  # α; None learns it
    target_entropy: float | None = None  # nats; None is −A for boxes of A numbers, ½ log A for A choices
    critics: int = 2  # N
    target_critics: int = 2  # M, critics drawn anew for each update, the lowest of which is the target's (REDQ)
    policy_delay: int = 1  # updates of the critics for one of policy and temperature
    layer_norm: bool = False  # in the critics

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_critics <= self.critics:
            raise Refused(
                f"target_critics={self.target_critics} of critics={self.critics} cannot be drawn; "
                f"use 1 to {self.critics}."
            )

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritics:
        from rookery.nn.critics import ActorCritics
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder, self.layer_norm)
        duals = {"log_temperature": torch.zeros(())} if self.temperature is None else None
        return ActorCritics(spec, "squashed", layers, self.critics, 1, duals, self.normalize_obs, network)

    def parts(self, net: ActorCritics) -> dict[str, Part]:
        parts = actor_critic_parts(net, self.actor_lr, self.policy_delay)
        duals = Part([*net.duals.parameters()], None, self.policy_delay)
        return {**parts, "temperature": duals} if duals.parameters else parts

    def exploration(self, steps: int, place: Tensor) -> float:
        return torch.inf if steps < self.learning_starts else 1.0

    def act(self, net: ActorCritics, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        policy = net.actor(net.encode(obs), mask_of(obs))
        if explore is None:
            return Acted(net.shaped(policy.mode()), {}, state)
        action = policy.sample(explore.noise)
        if net.discrete:
            even = Categorical.of(torch.zeros_like(policy.logits), mask_of(obs)).sample(explore.noise)
            return Acted(torch.where(explore.scale.isinf(), even, action), {}, state)
        return Acted(net.shaped(randomly(action, explore)), {}, state)

    def noise(self, net: ActorCritics, batch: Batch, generator: torch.Generator) -> Batch:
        drawn = {} if net.discrete else normal_noise(net, batch, generator, ("noise", "next_noise"))
        if self.target_critics < self.critics:
            order = torch.randperm(self.critics, generator=generator, device=generator.device)
            drawn["judges"] = order[: self.target_critics]
        return drawn

    def loss(self, net: ActorCritics, target: ActorCritics, batch: Batch, now: Now) -> Loss:
        obs, next_obs, judges = batch["obs"], batch["next_obs"], batch.get("judges")
        if self.temperature is None:
            alpha = net.duals["log_temperature"].detach().exp()
        else:
            alpha = batch["reward"].new_full((), self.temperature)

        with torch.no_grad():
            policy, following = net.actor(net.encode(next_obs), mask_of(next_obs)), target.encode(next_obs)
            next_value, _ = soft_value(
                policy,
                lambda action: target.critics(following, action, judges).amin(0),
                alpha,
                batch.get("next_noise"),
            )
            y = expected(batch, next_value)

        features = net.encode(obs)
        error = judged(net, features, batch["action"]) - y
        loss = 0.5 * weighted_mean(error.square().sum(0), batch)  # 2018b, eq. 5
        metrics = {"critic_loss": loss.detach(), "target": y.mean(), "temperature": alpha}
        if "actor" in now.moves:
            features = features.detach()
            value, log_prob = soft_value(
                net.actor(features, mask_of(obs)),
                lambda action: self.together(net.critics(features, action, frozen=True)),
                alpha,
                batch.get("noise"),
            )
            loss = loss - value.mean()  # 2018b, eq. 9
            if self.temperature is None:
                loss = loss - net.duals["log_temperature"] * (log_prob.detach().mean() + self.aim(net))
            metrics |= {"value": value.detach().mean(), "entropy": -log_prob.detach().mean()}
        return Loss(loss, {"loss": loss.detach(), **metrics}, priorities=error.detach().abs().mean(0))

    def together(self, values: Tensor) -> Tensor:
        """What the policy climbs, of the critics' values `[N, ...]`: their lowest, or their mean if some are drawn."""
        return values.amin(0) if self.target_critics == self.critics else values.mean(0)

    def aim(self, net: ActorCritics) -> float:
        """The entropy aimed at, in nats."""
        if self.target_entropy is not None:
            return self.target_entropy
        return 0.5 * math.log(net.actions) if net.discrete else -float(net.actions)


def soft_value(
    policy: Categorical | SquashedGaussian, judge: Callable[..., Tensor], temperature: Tensor, noise: Any
) -> tuple[Tensor, Tensor]:
    """V(s) = E[Q(s, a) − α log π(a|s)] and E[log π(a|s)], `[N]`: of one sample, or over all discrete actions.

    2018b, eq. 3; Christodoulou 2019, eq. 10.

    Args:
        judge: Q `[N]` of an action `[N, A]`, or `[N, A]` of all for None.
        noise: `[N, A]` for the sample; None for discrete actions.
    """
    if isinstance(policy, Categorical):
        probability = policy.logits.exp()
        log_prob = (probability * policy.logits).sum(-1)
        return (probability * judge(None)).sum(-1) - temperature * log_prob, log_prob
    action, log_prob = policy.sample_with_log_prob(noise)
    return judge(action) - temperature * log_prob, log_prob


def judged(net: ActorCritics, features: Tensor, action: Tensor) -> Tensor:
    """What every critic says of the actions taken, `[K, N]`."""
    if not net.discrete:
        return net.critics(features, net.flat(action))
    values = net.critics(features)
    return values.gather(-1, action.expand(len(values), -1).unsqueeze(-1)).squeeze(-1)

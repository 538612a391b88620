"""Maximum a posteriori policy optimisation (Abdolmaleki et al. 2018a, arXiv 1806.06920; 2018b, arXiv 1812.02256).

Idea: weigh actions of the old policy by the exponential of their value, as far as a KL bound allows, then fit the new
policy to the weighted actions, its mean and its spread each within a KL bound of the old ones.

What differs from the paper: n-step returns instead of Retrace; each coordinate of an action has its own bounds, and
actions beyond [-1, 1] are penalised, as in the authors' later code; critics judge actions as the environment clips
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rookery.algorithms.base import Acted, Batch, Explore, Loss, Network, Now, Part
from rookery.algorithms.continuous import actor_critic_parts, randomly
from rookery.algorithms.off_policy import OffPolicy, expected, weighted_mean
from rookery.nn.heads import Gaussian

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.critics import ActorCritics

__all__ = ["MPO", "reweighted"]

LEAST_DUAL = -18.0  # before the softplus, which is 1e-8 there: below, its gradient vanishes


@dataclass(frozen=True)
class MPO(OffPolicy):
    """Maximum a posteriori policy optimisation (Abdolmaleki et al. 2018), with decoupled bounds."""

    lr: float = 1e-4  # Adam's step size, of actor and critic
    n_step: int = 5  # n of n-step returns
    target_period: int = 100  # updates between copies: how long a policy is the old one
    tau: float = 1.0  # copies
    actor_lr: float | None = None  # the actor's own step size
    dual_lr: float = 1e-2  # the multipliers' own step size
    std: float = 0.5  # σ of the first policy
    samples: int = 20  # M, actions of the old policy in each state
    epsilon: float = 0.1  # bound on the KL of the weights
    epsilon_mean: float = 2.5e-3  # bound on the KL of the mean, a coordinate
    epsilon_std: float = 1e-6  # bound on the KL of the spread, a coordinate
    epsilon_penalty: float = 1e-3  # bound on the KL of the weights of actions nearer to [-1, 1]
    layer_norm: bool = False  # in the critic

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritics:
        from rookery.nn.critics import ActorCritics
        from rookery.nn.encoders import Layers

        actions = math.prod(spec.action_space.shape or ())
        duals = {  # before the softplus, which leaves numbers from 10 on as they are
            "temperature": torch.tensor(10.0),
            "penalty": torch.tensor(10.0),
            "mean": torch.full((actions,), 10.0),
            "std": torch.full((actions,), 1000.0),
        }
        layers = Layers(self.hidden, self.activation, self.encoder, self.layer_norm)
        net = ActorCritics(spec, "gaussian", layers, 1, 1, duals, self.normalize_obs, network)
        net.set_std(self.std)
        return net

    def parts(self, net: ActorCritics) -> dict[str, Part]:
        return {**actor_critic_parts(net, self.actor_lr), "duals": Part([*net.duals.parameters()], self.dual_lr)}

    def exploration(self, steps: int, place: Tensor) -> float:
        return torch.inf if steps < self.learning_starts else 1.0

    def act(self, net: ActorCritics, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        policy = net.actor(net.encode(obs))
        action = policy.mode() if explore is None else randomly(policy.sample(explore.noise), explore)
        return Acted(net.shaped(action.clamp(-1, 1)), {}, state)

    def noise(self, net: ActorCritics, batch: Batch, generator: torch.Generator) -> Batch:
        shape = (self.samples, len(batch["reward"]))
        return {name: net.draw(shape, generator).transpose(0, 1) for name in ("noise", "next_noise")}

    def loss(self, net: ActorCritics, target: ActorCritics, batch: Batch, now: Now) -> Loss:
        with torch.no_grad():
            _, _, next_value = sampled(target, batch["next_obs"], batch["next_noise"])
            y = expected(batch, next_value.mean(1))
            old, action, value = sampled(target, batch["obs"], batch["noise"])

        features = net.encode(batch["obs"])
        error = net.critics(features, net.flat(batch["action"])).squeeze(0) - y
        critic_loss = weighted_mean(error.square(), batch)

        dual = {name: F.softplus(raw) + 1e-8 for name, raw in net.duals.items()}
        weight, dual_loss = reweighted(value, dual["temperature"], self.epsilon)
        beyond = (action - action.clamp(-1, 1)).norm(dim=-1)
        nearer, penalty_loss = reweighted(-beyond, dual["penalty"], self.epsilon_penalty)
        weight = weight + nearer

        new = of_samples(net.actor(features.detach()))
        moved, spread = Gaussian(new.mean, old.log_std), Gaussian(old.mean, new.log_std)
        fit = -(weight * (moved.log_prob(action) + spread.log_prob(action))).sum(1).mean()
        by_coordinate = (by_coordinate_kl(old, moved), by_coordinate_kl(old, spread))
        kl_mean, kl_std = (kl.mean((0, 1)) for kl in by_coordinate)  # [A]
        bounded = (dual["mean"].detach() * kl_mean + dual["std"].detach() * kl_std).sum()
        dual_loss = dual_loss + penalty_loss + (dual["mean"] * (self.epsilon_mean - kl_mean.detach())).sum()
        dual_loss = dual_loss + (dual["std"] * (self.epsilon_std - kl_std.detach())).sum()

        metrics = {
            "critic_loss": critic_loss,
            "actor_loss": fit + bounded,
            "dual_loss": dual_loss,
            "target": y.mean(),
            "temperature": dual["temperature"],
            "kl_mean": kl_mean.mean(),
            "kl_std": kl_std.mean(),
            "std": new.log_std.exp().mean(),
        }
        loss = critic_loss + fit + bounded + dual_loss
        metrics = {name: each.detach() for name, each in {"loss": loss, **metrics}.items()}
        return Loss(loss, metrics, priorities=error.detach().abs())

    def finish(self, net: ActorCritics, data: Batch) -> None:
        super().finish(net, data)
        for raw in net.duals.values():
            raw.clamp_(min=LEAST_DUAL)


def sampled(net: ActorCritics, obs: Obs, noise: Tensor) -> tuple[Gaussian, Tensor, Tensor]:
    """The policy `[N, 1, A]` in N states, M actions of it `[N, M, A]`, and what the critic says of each `[N, M]`.

    Args:
        noise: normal, `[N, M, A]`.
    """
    features = net.encode(obs)
    policy = of_samples(net.actor(features))
    action = policy.sample(noise)
    value = net.critics(features.unsqueeze(1).expand(-1, noise.shape[1], -1), action.clamp(-1, 1))
    return policy, action, value.squeeze(0)


def of_samples(policy: Gaussian) -> Gaussian:
    """The policy of N states as one of M samples in each: `[N, 1, A]`."""
    return Gaussian(policy.mean.unsqueeze(1), policy.log_std.unsqueeze(1))


def reweighted(value: Tensor, temperature: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Weights of M samples in each of N states `[N, M]`, softmax(q/η), and the dual of η whose minimum makes them.

    g(η) = ηε + η mean_s log mean_i exp(q_i/η) (2018a, E-step): the weights' KL to equal ones is then at most ε.

    Args:
        value: q, `[N, M]`, without gradient.
        temperature: η, `[]`.
    """
    weight = torch.softmax(value / temperature.detach(), 1)
    log_mean = torch.logsumexp(value / temperature, 1) - math.log(value.shape[1])
    return weight, temperature * (epsilon + log_mean.mean())


def by_coordinate_kl(first: Gaussian, second: Gaussian) -> Tensor:
    """KL of each coordinate, in the shape of the means."""
    return Gaussian(first.mean.unsqueeze(-1), first.log_std.unsqueeze(-1)).kl(
        Gaussian(second.mean.unsqueeze(-1), second.log_std.unsqueeze(-1))
    )

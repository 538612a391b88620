"""Importance-weighted actor-learner (IMPALA, Espeholt et al. 2018, arXiv 1802.01561): actor-critic with V-trace.

Idea: actors never wait for the learner, so what it learns from was done by an older policy μ. V-trace weighs each step
by π/μ, truncated: values are then those of a policy between μ and π, and the gradient is that of the newer one.

What differs from the paper: losses are means over the batch, not sums, so that the learning rate does not depend on its
size (ε of RMSProp and the gradient's norm are smaller accordingly); inputs are observations alone, without the last
action and reward. `correction="none"` leaves out the weights, which is what the paper compares with (section 5.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rookery.algorithms.base import Acted, Algorithm, Batch, Explore, Loss, Network, Now, OnPolicy, with_last
from rookery.estimators import valid_mean, vtrace
from rookery.nn.adam import Optimizer

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.actor_critic import ActorCritic

__all__ = ["IMPALA"]


@dataclass(frozen=True)
class IMPALA(Algorithm):
    """Importance-weighted actor-learner (Espeholt et al. 2018): V-trace actor-critic."""

    unroll: int = 20  # n, steps of an unroll (table G.1)
    unrolls: int = 1  # an update; each has an actor's lanes
    lr: float = 6e-4  # RMSProp's step size (table G.1)
    anneal: bool = True  # the learning rate falls linearly to 0 over the run
    gamma: float = 0.99  # discount
    value_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float | None = 0.5  # global norm of the gradient
    correction: Literal["vtrace", "none"] = "vtrace"  # of what older weights did
    hidden: tuple[int, ...] = (64, 64)  # units of the MLP's layers
    activation: Literal["tanh", "relu", "silu"] = "tanh"  # of those layers
    encoder: Literal["auto", "mlp", "nature", "impala", "grid"] = "auto"  # of images
    memory: Literal["none", "lstm", "gru"] = "none"  # recurrent core
    memory_size: int = 256  # units of the recurrent core
    normalize_obs: bool = False  # by running mean and variance
    normalize_reward: bool = False  # by the running deviation of the discounted return

    @property
    def plan(self) -> OnPolicy:
        return OnPolicy(self.unroll, sequences=True, stale=True, unrolls=self.unrolls)

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritic:
        from rookery.nn.actor_critic import ActorCritic
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder)
        memory = (self.memory, self.memory_size)
        return ActorCritic(spec, layers, *memory, self.normalize_obs, self.normalize_reward, network)

    def act(self, net: ActorCritic, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        (policy, _), state = net(obs, state)
        if explore is None:
            return Acted(policy.mode(), {}, state)
        action = policy.sample(explore.noise)
        return Acted(action, {"log_prob": policy.log_prob(action)}, state)

    def prepare(self, net: ActorCritic, unroll: Batch) -> Batch:
        kept = {name: unroll[name][:-1] for name in ("log_prob", "terminated", "truncated", "valid")}
        rows = {name: unroll[name] for name in ("obs", "start", "state")}
        return {**kept, **rows, "action": with_last(unroll["action"]), "reward": net.scaled_reward(unroll)}

    def loss(self, net: ActorCritic, target: None, batch: Batch, now: Now) -> Loss:
        valid, terminated = batch["valid"], batch["terminated"]
        (policy, value), _ = net(batch["obs"], batch["state"], batch["start"])  # [T+1, B]
        log_prob, entropy = policy.log_prob(batch["action"])[:-1], policy.entropy()[:-1]

        log_rho = log_prob.detach() - batch["log_prob"]
        if self.correction == "none":
            log_rho = torch.zeros_like(log_rho)
        now_value, next_value = value[:-1].detach(), value[1:].detach()
        ended = terminated | batch["truncated"]
        v, advantage = vtrace(log_rho, batch["reward"], now_value, next_value, terminated, ended, self.gamma)  # eq. 1

        policy_loss = -valid_mean(log_prob * advantage, valid)  # section 4.2
        value_loss = 0.5 * valid_mean((value[:-1] - v).square(), valid)
        entropy_mean = valid_mean(entropy, valid)

        loss = policy_loss + self.value_coef * value_loss - self.entropy_coef * entropy_mean
        metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy_mean}
        metrics["clipped_rho"] = valid_mean((log_rho > 0).float(), valid)
        return Loss(loss, {name: value.detach() for name, value in metrics.items()})

    def finish(self, net: ActorCritic, unroll: Batch) -> None:
        net.update_norms(unroll)

    def optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> Optimizer:
        return torch.optim.RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-5)

    def learning_rate(self, remaining: float) -> float:
        return self.lr * remaining if self.anneal else self.lr

"""Advantage actor-critic, synchronous (Mnih et al. 2016, arXiv 1602.01783, without its threads).

Idea: act for a few steps in B lanes, then one gradient step on the n-step policy gradient with a value baseline.

What differs from the paper: one synchronous batch instead of lock-free workers, means instead of sums over the batch,
and λ of GAE as an option (λ = 1 gives the paper's n-step advantage).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rookery.algorithms.base import Acted, Algorithm, Batch, Explore, Loss, Network, Now, OnPolicy
from rookery.estimators import gae, valid_mean
from rookery.nn.adam import Optimizer

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.actor_critic import ActorCritic

__all__ = ["A2C"]


@dataclass(frozen=True)
class A2C(Algorithm):
    """Advantage actor-critic (Mnih et al. 2016), synchronous."""

    unroll: int = 5  # t_max, steps of an unroll
    lr: float = 7e-4  # RMSProp's step size
    anneal: bool = True  # the learning rate falls linearly to 0 over the run
    gamma: float = 0.99  # discount
    lam: float = 1.0  # λ of GAE
    value_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.01  # β, weight of the entropy bonus
    max_grad_norm: float | None = 0.5  # global norm of the gradient
    hidden: tuple[int, ...] = (64, 64)  # units of the MLP's layers
    activation: Literal["tanh", "relu", "silu"] = "tanh"  # of those layers
    encoder: Literal["auto", "mlp", "nature", "impala", "grid"] = "auto"  # of images
    memory: Literal["none", "lstm", "gru"] = "none"  # recurrent core
    memory_size: int = 128  # units of the recurrent core
    normalize_obs: bool = False  # by running mean and variance
    normalize_reward: bool = False  # by the running deviation of the discounted return

    @property
    def plan(self) -> OnPolicy:
        return OnPolicy(self.unroll, sequences=self.memory != "none")

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritic:
        from rookery.nn.actor_critic import ActorCritic
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder)
        memory = (self.memory, self.memory_size)
        return ActorCritic(spec, layers, *memory, self.normalize_obs, self.normalize_reward, network)

    def act(self, net: ActorCritic, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        (policy, value), state = net(obs, state)
        action = policy.mode() if explore is None else policy.sample(explore.noise)
        return Acted(action, {"value": value}, state)

    def prepare(self, net: ActorCritic, unroll: Batch) -> Batch:
        value, reward = unroll["value"], net.scaled_reward(unroll)
        terminated, truncated = unroll["terminated"][:-1], unroll["truncated"][:-1]
        advantage = gae(reward, value[:-1], value[1:], terminated, terminated | truncated, self.gamma, self.lam)
        kept = {name: unroll[name][:-1] for name in ("obs", "action", "valid", "start")}
        return {**kept, "advantage": advantage, "target": advantage + value[:-1], "state": unroll["state"]}

    def loss(self, net: ActorCritic, target: None, batch: Batch, now: Now) -> Loss:
        valid = batch["valid"]
        (policy, value), _ = net(batch["obs"], batch["state"], batch["start"])

        policy_loss = -valid_mean(policy.log_prob(batch["action"]) * batch["advantage"], valid)
        value_loss = 0.5 * valid_mean((value - batch["target"]).square(), valid)
        entropy = valid_mean(policy.entropy(), valid)

        loss = policy_loss + self.value_coef * value_loss - self.entropy_coef * entropy  # section 4.2, appendix
        metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        return Loss(loss, {name: value.detach() for name, value in metrics.items()})

    def finish(self, net: ActorCritic, unroll: Batch) -> None:
        net.update_norms(unroll)

    def optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> Optimizer:
        return torch.optim.RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-5)

    def learning_rate(self, remaining: float) -> float:
        return self.lr * remaining if self.anneal else self.lr

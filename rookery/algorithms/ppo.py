"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), clipped surrogate.

Idea: collect T steps in B lanes, then take several epochs of minibatch steps on the same data, with the probability
ratio clipped so that the policy cannot leave the region in which the data still speak about it.

What differs from the paper: advantages are normalised in each minibatch, value and policy have separate networks on
vector observations, weights start orthogonal, and the clip range is annealed with the learning rate, as in the
reference implementations; value clipping and a KL stop are options. With `vtrace` (APPO, asynchronous PPO) actors do
not wait for the learner, and V-trace (Espeholt et al. 2018) makes advantages and targets from what older weights did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rookery.algorithms.base import Acted, Algorithm, Batch, Explore, Loss, Network, Now, OnPolicy, with_last
from rookery.estimators import Limits, gae, valid_mean, vtrace
from rookery.nn.adam import Adam, Optimizer

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.actor_critic import ActorCritic

__all__ = ["PPO"]


@dataclass(frozen=True)
class PPO(Algorithm):
    """Proximal policy optimisation (Schulman et al. 2017), clipped surrogate."""

    unroll: int = 128  # T, steps of an unroll (Table 5)
    epochs: int = 4  # passes over an unroll
    minibatches: int = 4  # updates an epoch
    lr: float = 2.5e-4  # Adam's step size (Table 5)
    anneal: bool = True  # learning rate and clip range fall linearly to 0 over the run (Table 5)
    gamma: float = 0.99  # discount
    lam: float = 0.95  # λ of GAE, and of V-trace
    vtrace: bool = False  # instead of GAE: actors need not wait for the newest weights
    clip: float = 0.2  # ε, range of the probability ratio
    clip_value: bool = False  # keep the value within ε of the old one
    value_coef: float = 0.5  # c₁, weight of the value loss
    entropy_coef: float = 0.01  # c₂, weight of the entropy bonus
    max_grad_norm: float | None = 0.5  # global norm of the gradient
    target_kl: float | None = None  # leave out the rest of a batch's updates past this KL
    std: float = 1.0  # σ of the first policy, of actions in [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # units of the MLP's layers
    activation: Literal["tanh", "relu", "silu"] = "tanh"  # of those layers
    encoder: Literal["auto", "mlp", "nature", "impala", "grid"] = "auto"  # of images
    memory: Literal["none", "lstm", "gru"] = "none"  # recurrent core
    memory_size: int = 128  # units of the recurrent core
    normalize_obs: bool = False  # by running mean and variance
    normalize_reward: bool = False  # by the running deviation of the discounted return

    @property
    def once(self) -> bool:
        """Whether a batch is for one update, so that the pass for V-trace can be that of the loss."""
        return self.vtrace and self.epochs == self.minibatches == 1

    @property
    def plan(self) -> OnPolicy:
        sequences = self.memory != "none" or self.once
        count = int(self.vtrace)
        return OnPolicy(self.unroll, self.epochs, self.minibatches, sequences, self.vtrace, count)

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ActorCritic:
        from rookery.nn.actor_critic import ActorCritic
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder)
        memory = (self.memory, self.memory_size)
        net = ActorCritic(spec, layers, *memory, self.normalize_obs, self.normalize_reward, network)
        net.set_std(self.std)
        return net

    def act(self, net: ActorCritic, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        (policy, value), state = net(obs, state)
        if explore is None:
            return Acted(policy.mode(), {}, state)
        action = policy.sample(explore.noise)
        return Acted(action, {"log_prob": policy.log_prob(action), "value": value}, state)

    def prepare(self, net: ActorCritic, unroll: Batch) -> Batch:
        given = {name: unroll[name][:-1] for name in ("log_prob", "terminated", "truncated", "valid")}
        given["reward"] = net.scaled_reward(unroll)
        if self.once:
            rows = {name: unroll[name] for name in ("obs", "start", "state")}
            return {**given, **rows, "action": with_last(unroll["action"])}
        value, terminated, ended = unroll["value"], given["terminated"], given["terminated"] | given["truncated"]
        kept = {name: unroll[name][:-1] for name in ("obs", "action", "log_prob", "value", "valid", "start")}
        kept["state"] = unroll["state"]
        if self.vtrace:
            (policy, value), _ = net(unroll["obs"], unroll["state"], unroll["start"])
            log_prob = policy.log_prob(with_last(unroll["action"]))
            return {**kept, "value": value[:-1], **self._corrected(given, log_prob, value)}
        advantage = gae(given["reward"], value[:-1], value[1:], terminated, ended, self.gamma, self.lam)
        return {**kept, "advantage": advantage, "target": advantage + value[:-1]}

    def _corrected(self, given: Batch, log_prob: Tensor, value: Tensor) -> Batch:
        """V-trace's advantages and targets of T rows by what the newest network says of T + 1."""
        terminated, log_rho = given["terminated"], log_prob[:-1] - given["log_prob"]
        now = (value[:-1], value[1:], terminated, terminated | given["truncated"], self.gamma)
        target, advantage = vtrace(log_rho, given["reward"], *now, Limits(self.lam))
        return {"advantage": advantage, "target": target}

    def loss(self, net: ActorCritic, target: None, batch: Batch, now: Now) -> Loss:
        valid, clip = batch["valid"], self.clip * now.remaining if self.anneal else self.clip
        (policy, value), _ = net(batch["obs"], batch["state"], batch["start"])
        log_prob, entropy = policy.log_prob(batch["action"]), policy.entropy()
        if self.once:
            corrected = self._corrected(batch, log_prob.detach(), value.detach())
            log_prob, entropy, value = log_prob[:-1], entropy[:-1], value[:-1]
            batch = {**batch, **corrected, "value": value.detach()}

        advantage = batch["advantage"]
        centred = advantage - valid_mean(advantage, valid)
        advantage = centred / (valid_mean(centred.square(), valid).sqrt() + 1e-8)

        log_ratio = log_prob - batch["log_prob"]
        ratio = log_ratio.exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)  # eq. 7
        policy_loss = -valid_mean(surrogate, valid)

        error = (value - batch["target"]).square()
        if self.clip_value:
            clipped = batch["value"] + (value - batch["value"]).clamp(-clip, clip)
            error = torch.maximum(error, (clipped - batch["target"]).square())
        value_loss = 0.5 * valid_mean(error, valid)

        entropy = valid_mean(entropy, valid)
        loss = policy_loss + self.value_coef * value_loss - self.entropy_coef * entropy  # eq. 9

        kl = valid_mean(ratio - 1 - log_ratio, valid).detach()  # unbiased, never negative (Schulman 2020)
        metrics = {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": kl,
            "clip_fraction": valid_mean(((ratio - 1).abs() > clip).float(), valid).detach(),
        }
        return Loss(loss, metrics, stop=None if self.target_kl is None else kl > self.target_kl)

    def finish(self, net: ActorCritic, unroll: Batch) -> None:
        net.update_norms(unroll)

    def optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> Optimizer:
        return Adam(parameters, lr, eps=1e-5)

    def learning_rate(self, remaining: float) -> float:
        return self.lr * remaining if self.anneal else self.lr

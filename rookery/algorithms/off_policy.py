"""What algorithms on replay share: their common settings, and a few functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rookery.algorithms.base import Acted, Algorithm, Batch, Explore, Loss, Refused, ReplayPlan, Target
from rookery.envs.spec import mask_of
from rookery.estimators import n_step
from rookery.nn.adagrad import AdaGrad
from rookery.nn.adam import Adam, Optimizer

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import Obs
    from rookery.nn.q_net import QNet

__all__ = [
    "OffPolicy",
    "QLearning",
    "acting_errors",
    "allowed_only",
    "epsilon_greedy",
    "expected",
    "greedy_next",
    "of_action",
    "q_loss",
    "scheduled",
    "weighted_mean",
]


@dataclass(frozen=True)
class OffPolicy(Algorithm):
    """Settings of an algorithm on replay. A file of one states again what its paper sets otherwise."""

    lr: float = 3e-4  # Adam's step size
    gamma: float = 0.99  # discount
    batch: int = 256  # samples an update
    capacity: int = 1_000_000  # rows that replay keeps
    learning_starts: int = 1_000  # steps before the first update; actions are uniformly random until then
    updates_per_step: float = 1.0  # updates for each step after that
    unroll: int = 0  # T, steps of a lane between rounds of updates; 0 takes what an update is owed for, rounded
    n_step: int = 1  # n of n-step returns
    alpha: float = 0.0  # exponent of priorities (Schaul et al. 2016); 0 samples uniformly
    beta: float = 0.4  # exponent of their importance weights, rising to 1 over the run
    target_period: int = 1  # updates between moves of the target network
    tau: float = 0.005  # share by which it moves; 1 copies
    max_grad_norm: float | None = None  # global norm of the gradient
    ahead: int = 0  # unrolls that each actor may be ahead of the learner; 0 takes turns
    hindsight: float = 0.0  # share of samples whose goal is one reached later (Andrychowicz et al. 2017: 0.8)
    hidden: tuple[int, ...] = (256, 256)  # units of the MLPs' layers
    activation: Literal["tanh", "relu", "silu"] = "relu"  # of those layers
    encoder: Literal["auto", "mlp", "nature", "impala", "grid"] = "auto"  # of images
    normalize_obs: bool = False  # by running mean and variance

    @property
    def plan(self) -> ReplayPlan:
        return ReplayPlan(
            self.capacity,
            self.batch,
            self.learning_starts,
            self.updates_per_step,
            self.gamma,
            self.n_step,
            self.alpha,
            self.beta,
            unroll=self.unroll,
            ahead=self.ahead,
            hindsight=self.hindsight,
        )

    @property
    def target(self) -> Target | None:
        return Target(self.target_period, self.tau)

    def check(self, spec: EnvSpec, lanes: int) -> None:
        if self.hindsight and spec.goal_reward is None:
            raise Refused(
                f"hindsight={self.hindsight} puts other goals in place of the desired ones, and {spec.id} does not say "
                "what reward those give (EnvSpec.goal_reward); use hindsight=0, or a goal-conditioned environment such "
                "as FetchReach-v4."
            )
        super().check(spec, lanes)

    def finish(self, net: Any, data: Batch) -> None:
        """Merge the sampled observations into the network's running statistics, if it keeps any."""
        if net.norm is not None:
            net.norm.update(data["obs"])


@dataclass(frozen=True)
class QLearning(OffPolicy):
    """Settings of Q-learning with a `QNet`, and how it acts.

    Batch, updates a step and the target's period are by default those of Mnih et al. 2015. Adam's step size, ε and
    its steps, and the start are not: they suit runs of 10⁵ steps, and recipes for Atari have the paper's ε and start.
    """

    lr: float = 1e-4  # Adam's step size
    adam_eps: float = 1e-8  # ε in Adam's denominator
    batch: int = 32  # samples an update (Extended Data Table 1)
    updates_per_step: float = 0.25  # one for every 4 steps (Extended Data Table 1)
    target_period: int = 2_500  # updates between copies: 10,000 steps
    tau: float = 1.0  # copies
    double: bool = False  # the network chooses the next action, its slow copy judges it (van Hasselt et al. 2016)
    dueling: bool = False  # a value and advantages instead of one head (Wang et al. 2016)
    noisy: bool = False  # noise with learnt scales on the last layers instead of ε (Fortunato et al. 2018)
    epsilon: float = 0.05  # ε in the end
    epsilon_start: float = 1.0  # ε when learning starts; before that it is 1
    epsilon_steps: int = 50_000  # steps over which it falls
    ladder: float = 0.0  # α: of N lanes, lane i keeps ε^(1 + α·i/(N−1)) throughout (Horgan et al. 2018: 7)
    actor_priorities: bool = False  # rows enter replay by their own error, not by the highest priority (the same)
    anneal: bool = False  # the learning rate falls linearly to 0 over the run
    adagrad: bool = False  # AdaGrad in Adam's place, with the same ε under its root (Nair et al. 2015)

    @property
    def net_settings(self) -> dict[str, Any]:
        """The settings of its `QNet`."""
        from rookery.nn.encoders import Layers

        layers = Layers(self.hidden, self.activation, self.encoder)
        return {"layers": layers, **{name: getattr(self, name) for name in ("dueling", "noisy", "normalize_obs")}}

    def optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> Optimizer:
        return (AdaGrad if self.adagrad else Adam)(parameters, lr, eps=self.adam_eps)

    def learning_rate(self, remaining: float) -> float:
        return self.lr * remaining if self.anneal else self.lr

    def exploration(self, steps: int, place: Tensor) -> Tensor | float:
        since = steps - self.learning_starts
        if self.noisy or since < 0:
            return float(since < 0)
        if self.ladder:
            return self.epsilon ** (1 + self.ladder * place)
        return scheduled(since, self.epsilon_start, self.epsilon, self.epsilon_steps)

    def act(self, net: QNet, obs: Obs, state: Tensor, explore: Explore | None) -> Acted:
        mask = mask_of(obs)
        values = net.values(obs, None if explore is None else net.layer_noise(explore.noise))
        action = epsilon_greedy(values, mask, explore)
        if not self.actor_priorities or explore is None:
            return Acted(action, {}, state)
        return Acted(action, {"q": of_action(values, action), "best": allowed_only(values, mask).amax(-1)}, state)

    def priorities(self, unroll: Batch) -> Tensor | None:
        return acting_errors(self, unroll) if self.actor_priorities else None

    def noise(self, net: QNet, batch: Batch, generator: torch.Generator) -> Batch:
        names = ("noise", "target_noise", "next_noise") if self.double else ("noise", "target_noise")
        return net.noises(names, len(batch["reward"]), generator)


def greedy_next(settings: QLearning, net: QNet, target: QNet, batch: Batch, *rest: Tensor) -> Tensor:
    """What the target network says of the best next action, `[N, ...]`; with `double` it is the best to the network.

    Args:
        rest: what the target network takes besides observations and noise.
    """
    obs = batch["next_obs"]
    out = target(obs, batch.get("target_noise"), *rest)
    values = net.values(obs, batch.get("next_noise")) if settings.double else target.mean(out)
    return of_action(out, allowed_only(values, mask_of(obs)).argmax(-1))


def of_action(out: Tensor, action: Tensor) -> Tensor:
    """What `[N, A, ...]` holds for the actions `[N]`, `[N, ...]`."""
    index = action.reshape(-1, *[1] * (out.ndim - 1))
    return out.gather(1, index.expand(-1, 1, *out.shape[2:])).squeeze(1)


def weighted_mean(loss: Tensor, batch: Batch) -> Tensor:
    """Mean of a loss `[N]` with the importance weights of prioritised replay, which are 1 in uniform replay."""
    return (loss * batch["weight"]).mean()


def expected(batch: Batch, next_value: Tensor) -> Tensor:
    """The target y = r + γ·v' `[N, ...]`; `reward` and `discount` are those of n steps.

    The discount is 0 where the episode terminated, and only there: a time limit keeps the bootstrap.
    """
    shape = (-1, *[1] * (next_value.ndim - 1))
    return torch.addcmul(batch["reward"].view(shape), batch["discount"].view(shape), next_value)


def q_loss(losses: Tensor, value: Tensor, target: Tensor, batch: Batch, priorities: Tensor | None = None) -> Loss:
    """The mean of a Q-learner's losses `[N]`; they are the priorities, too, unless others are given.

    Args:
        value: what the network said of the actions taken, on average what `target` should be.
    """
    loss = weighted_mean(losses, batch)
    metrics = {"loss": loss.detach(), "value": value.detach().mean(), "target": target.mean()}
    return Loss(loss, metrics, (losses if priorities is None else priorities).detach())


def acting_errors(settings: OffPolicy, unroll: Batch) -> Tensor:
    """|Gₜ − Q(sₜ, aₜ)| `[T, B]` by the actor's own network, Gₜ the n-step return that ends in its best value.

    Args:
        unroll: with what acting noted: `q`, the value of the action, and `best`, that of the greedy one.
    """
    terminated, truncated = unroll["terminated"][:-1], unroll["truncated"][:-1]
    row = (unroll["reward"][:-1], unroll["best"][1:], terminated, terminated | truncated)
    return (n_step(*row, settings.gamma, settings.n_step) - unroll["q"][:-1]).abs()


def allowed_only(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values `[..., A]`, the lowest finite number where the mask forbids; a row without any True allows all."""
    if mask is None:
        return values
    mask = mask.bool()
    return values.masked_fill(~mask & mask.any(-1, keepdim=True), torch.finfo(values.dtype).min)


def epsilon_greedy(values: Tensor, mask: Tensor | None, explore: Explore | None) -> Tensor:
    """The best action for each of B lanes, `[B]`; with probability ε = `scale`, lane by lane, a uniformly random one.

    Args:
        values: `[B, A]`.
        mask: `[B, A]`, True where the action is allowed.
        explore: its noise `[B, 1+A+...]` is uniform in [0, 1): the coin, then a number for each action.
    """
    best = allowed_only(values, mask).argmax(-1)
    if explore is None:
        return best
    coin, lots = explore.noise[:, 0], explore.noise[:, 1 : 1 + values.shape[-1]]
    return torch.where(coin < explore.scale, allowed_only(lots, mask).argmax(-1), best)


def scheduled(steps: int, start: float, end: float, over: int) -> float:
    """From `start` to `end` in a straight line over so many steps, and `end` from then on."""
    return end if steps >= over else start + (end - start) * steps / over

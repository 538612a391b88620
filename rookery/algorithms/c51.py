"""C51, categorical DQN (Bellemare, Dabney and Munos 2017, arXiv 1707.06887).

Idea: learn the distribution of the return instead of its mean, as probabilities of fixed atoms, by cross-entropy to the
distribution of r + γZ of the next state, whose mass is shared out among the atoms.

What differs from the paper: the settings of `QLearning`. With double, dueling, noisy, n_step=3 and alpha=0.5 it is
Rainbow (Hessel et al. 2018, arXiv 1710.02298), whose priorities, KL(m ‖ p), C51 has here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rookery.algorithms.base import Batch, Loss, Network, Now, Refused
from rookery.algorithms.off_policy import QLearning, greedy_next, of_action, q_loss
from rookery.estimators import categorical_divergence, categorical_projection

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.nn.q_net import CategoricalQNet

__all__ = ["C51"]


@dataclass(frozen=True)
class C51(QLearning):
    """Categorical DQN (Bellemare et al. 2017), and Rainbow by its settings."""

    lr: float = 2.5e-4  # Adam's step size (section 5)
    adam_eps: float = 0.01 / 32  # ε in Adam's denominator (section 5)
    atoms: int = 51  # K (section 5.1)
    v_min: float = -10.0  # return of the first atom (section 5)
    v_max: float = 10.0  # return of the last one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atoms < 2:
            raise Refused(f"atoms={self.atoms} cannot hold a distribution; use 2 or more.")
        if not self.v_min < self.v_max:
            raise Refused(f"v_min={self.v_min} has to be below v_max={self.v_max}: returns lie between them.")

    def networks(self, spec: EnvSpec, network: Network | None = None) -> CategoricalQNet:
        from rookery.nn.q_net import CategoricalQNet

        return CategoricalQNet(spec, self.atoms, (self.v_min, self.v_max), network=network, **self.net_settings)

    def loss(self, net: CategoricalQNet, target: CategoricalQNet, batch: Batch, now: Now) -> Loss:
        logits = of_action(net(batch["obs"], batch.get("noise")), batch["action"])
        with torch.no_grad():
            following = greedy_next(self, net, target, batch).softmax(-1)
            aim = categorical_projection(net.support, following, batch["reward"], batch["discount"])
        # KL(m ‖ p): the gradient of the cross-entropy, and 0 where nothing is left to learn
        return q_loss(categorical_divergence(aim, logits), net.mean(logits), (aim * net.support).sum(-1), batch)

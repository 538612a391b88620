"""QR-DQN, quantile regression DQN (Dabney et al. 2018a, arXiv 1710.10044).

Idea: learn the distribution of the return as N equally likely returns, its quantiles at τ_i = (2i + 1) / 2N, by
quantile regression to r + γθ_j of the next state: no range of returns needs to be known.

What differs from the paper: the settings of `QLearning`; priorities, which it has none of, are the samples' losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rookery.algorithms.base import Batch, Loss, Network, Now, Refused
from rookery.algorithms.off_policy import QLearning, expected, greedy_next, of_action, q_loss
from rookery.estimators import quantile_huber

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.nn.q_net import QNet

__all__ = ["QRDQN"]


@dataclass(frozen=True)
class QRDQN(QLearning):
    """Quantile regression DQN (Dabney et al. 2018a)."""

    lr: float = 5e-5  # Adam's step size (section 5.2)
    adam_eps: float = 0.01 / 32  # ε in Adam's denominator (section 5.2)
    quantiles: int = 200  # N (section 5.2)
    kappa: float = 1.0  # κ of the Huber loss; towards 0, exact quantiles

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantiles < 2:
            raise Refused(f"quantiles={self.quantiles} cannot hold a distribution; use 2 or more.")

    def networks(self, spec: EnvSpec, network: Network | None = None) -> QNet:
        from rookery.nn.q_net import QNet

        return QNet(spec, outputs=self.quantiles, network=network, **self.net_settings)

    def loss(self, net: QNet, target: QNet, batch: Batch, now: Now) -> Loss:
        quantile = of_action(net(batch["obs"], batch.get("noise")), batch["action"])
        fraction = (torch.arange(self.quantiles, device=quantile.device) + 0.5) / self.quantiles
        with torch.no_grad():
            aim = expected(batch, greedy_next(self, net, target, batch))
        return q_loss(quantile_huber(quantile, fraction, aim, self.kappa), quantile, aim, batch)

"""IQN, implicit quantile networks (Dabney et al. 2018b, arXiv 1806.06923).

Idea: the quantile of the return at any fraction τ, by a network that takes τ; every update draws other fractions, so
that the whole quantile function is learnt.

What differs from the paper: actions are chosen by K fractions that are midpoints instead of drawn, and the next one in
an update by the mean over the N' fractions of its target; the settings of `QLearning`; priorities, which the paper has
none of, are the samples' losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rookery.algorithms.base import Batch, Loss, Network, Now
from rookery.algorithms.off_policy import QLearning, expected, greedy_next, of_action, q_loss
from rookery.estimators import quantile_huber

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.nn.q_net import ImplicitQNet, QNet

__all__ = ["IQN"]


@dataclass(frozen=True)
class IQN(QLearning):
    """Implicit quantile networks (Dabney et al. 2018b)."""

    lr: float = 5e-5  # Adam's step size (as QR-DQN)
    adam_eps: float = 0.01 / 32  # ε in Adam's denominator
    quantiles: int = 64  # N, fractions drawn for the values of an update (section 4)
    target_quantiles: int = 64  # N', fractions drawn for their targets
    acting_quantiles: int = 32  # K, fractions that choose actions
    kappa: float = 1.0  # κ of the Huber loss; towards 0, exact quantiles

    def networks(self, spec: EnvSpec, network: Network | None = None) -> ImplicitQNet:
        from rookery.nn.q_net import ImplicitQNet

        return ImplicitQNet(spec, self.acting_quantiles, network=network, **self.net_settings)

    def noise(self, net: QNet, batch: Batch, generator: torch.Generator) -> Batch:
        rows, device = len(batch["reward"]), generator.device
        sizes = {"fraction": self.quantiles, "target_fraction": self.target_quantiles}
        drawn = {name: torch.rand(rows, size, generator=generator, device=device) for name, size in sizes.items()}
        return drawn | super().noise(net, batch, generator)

    def loss(self, net: ImplicitQNet, target: ImplicitQNet, batch: Batch, now: Now) -> Loss:
        fraction = batch["fraction"]
        quantile = of_action(net(batch["obs"], batch.get("noise"), fraction), batch["action"])
        with torch.no_grad():
            aim = expected(batch, greedy_next(self, net, target, batch, batch["target_fraction"]))
        return q_loss(quantile_huber(quantile, fraction, aim, self.kappa), quantile, aim, batch)

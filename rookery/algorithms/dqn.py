"""Deep Q-network (Mnih et al. 2015, Nature 518; 2013, arXiv 1312.5602).

Idea: learn Q(s, a) by regression to r + γ max Q of the next state, from a replay of past steps, where the Q of the next
state is that of a slow copy of the network.

What differs from the paper: Adam instead of RMSProp, and a run's settings for everything that later papers added one
by one: double Q-learning (van Hasselt et al. 2016), dueling heads (Wang et al. 2016), n-step returns, priorities
(Schaul et al. 2016: |error|), noisy layers (Fortunato et al. 2018). `target_period=1, huber=False` is the DQN of 2013.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rookery.algorithms.base import Batch, Loss, Network, Now
from rookery.algorithms.off_policy import QLearning, expected, greedy_next, of_action, q_loss
from rookery.estimators import huber

if TYPE_CHECKING:
    from rookery.envs.spec import EnvSpec
    from rookery.nn.q_net import QNet

__all__ = ["DQN"]


@dataclass(frozen=True)
class DQN(QLearning):
    """Deep Q-network (Mnih et al. 2015), with what later papers added as settings."""

    huber: bool = True  # errors clipped to [-1, 1] in the gradient; squares otherwise

    def networks(self, spec: EnvSpec, network: Network | None = None) -> QNet:
        from rookery.nn.q_net import QNet

        return QNet(spec, network=network, **self.net_settings)

    def loss(self, net: QNet, target: QNet, batch: Batch, now: Now) -> Loss:
        value = of_action(net(batch["obs"], batch.get("noise")), batch["action"])
        with torch.no_grad():
            y = expected(batch, greedy_next(self, net, target, batch))
        error = y - value
        return q_loss(huber(error) if self.huber else 0.5 * error.square(), value, y, batch, priorities=error.abs())

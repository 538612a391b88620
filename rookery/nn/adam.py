"""Adam over flat parameters, without what `torch.optim` brings along."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from rookery.nn.adagrad import AdaGrad

__all__ = ["Adam", "Optimizer"]


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) by PyTorch's fused kernel: bit for bit `torch.optim.Adam(fused=True)`.

    An optimiser of `torch.optim` imports torch._dynamo when it is made, which takes as long as importing the rest of
    torch. This one keeps what learners and checkpoints use: `param_groups`, `state`, `step`.

    Args:
        lr: 0-d tensor, which may be changed in place between steps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters)}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for each in self.param_groups[0]["params"]:
            moments = {name: torch.zeros_like(each, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.state[each] = {"step": torch.zeros((), device=each.device), **moments}

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient."""
        with_gradient = [each for each in self.param_groups[0]["params"] if each.grad is not None]
        states = [self.state[each] for each in with_gradient]
        adam(
            with_gradient,
            [each.grad for each in with_gradient],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # maxima of AMSGrad, which is off
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )


Optimizer = Adam | AdaGrad | torch.optim.Optimizer  # what a learner steps

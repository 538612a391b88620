"""AdaGrad over flat parameters, without what `torch.optim` brings along (see `Adam`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdaGrad"]


class AdaGrad:
    """θ ← θ − lr·g / √(Σg² + ε), number by number (Duchi et al. 2011, the diagonal form; Nair et al. 2015).

    Args:
        lr: 0-d tensor, which may be changed in place between steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: Tensor, eps: float = 1e-8) -> None:
        self.lr, self.eps = lr, eps
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters)}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {
            each: {"sum": torch.zeros_like(each, requires_grad=False)} for each in self.param_groups[0]["params"]
        }

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient."""
        for each in self.param_groups[0]["params"]:
            if each.grad is not None:
                squares = self.state[each]["sum"].addcmul_(each.grad, each.grad)
                each.addcdiv_(self.lr * each.grad, (squares + self.eps).sqrt(), value=-1)

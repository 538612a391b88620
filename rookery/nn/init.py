"""Orthogonal initialisation."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import nn

__all__ = ["GAINS", "init_linear"]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)

# Gains that keep the size of activations (torch.nn.init.calculate_gain); √2 for tanh is the custom of PPO's references
GAINS = {"tanh": math.sqrt(2), "relu": math.sqrt(2), "elu": math.sqrt(2), "gelu": math.sqrt(2), "silu": math.sqrt(2)}


def init_linear(layer: Layer, gain: float = math.sqrt(2)) -> Layer:
    """Orthogonal weights of this gain and zero biases, in place (Saxe et al. 2014); returns the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

"""The tensor backend: environments as batched torch code, by id."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from rookery.envs.tensor import bit_flip, catch, classic_control, deep_sea, grid, memory, probes
from rookery.envs.tensor.base import TensorEnv

__all__ = ["TENSOR_ENVS", "TensorEnv", "make_tensor_env"]

_FILES = (classic_control, catch, deep_sea, bit_flip, memory, grid, probes)
_CLASSES: list[type[TensorEnv]] = [getattr(file, name) for file in _FILES for name in file.__all__]

TENSOR_ENVS = {env.id: env for env in _CLASSES}


def make_tensor_env(id: str, lanes: int, device: torch.device | str = "cpu", **options: Any) -> TensorEnv:
    """Build the environment with this id; `options` are TensorEnv's (`max_steps`, `compile`) and the environment's own.

    Raises:
        ValueError: for an id that is not in `TENSOR_ENVS`, and for what the environment refuses.
    """
    if id not in TENSOR_ENVS:
        near = difflib.get_close_matches(id, TENSOR_ENVS, n=3, cutoff=0.4) or list(TENSOR_ENVS)
        raise ValueError(f"the tensor backend has no environment {id!r}; the nearest are {', '.join(near)}.")
    return TENSOR_ENVS[id](lanes, device, **options)

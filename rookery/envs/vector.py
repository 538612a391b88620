"""The one interface to every environment: B lanes that step together, with the stream convention.

The stream convention (next-step autoreset): the observation a step returns is always the true next one, final
observations included. The call after an ended step ignores that lane's action and begins a new episode: it returns
the new episode's first observation, reward 0 and `valid` False.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rookery.envs.spec import EnvSpec

__all__ = ["EnvError", "Obs", "Step", "VectorEnv"]

if TYPE_CHECKING:
    from tensordict import TensorDict

    Obs = Tensor | TensorDict  # [B, ...], or a nested TensorDict of batch size [B]
else:
    Obs = Any  # tensordict takes a second to import (it takes torch._dynamo along), and only structures need it


class EnvError(RuntimeError):
    """An environment raised, or returned something that cannot be trained on; names the lane and the step."""


class Step(NamedTuple):
    """What followed one action in each of B lanes."""

    obs: Obs  # the true next observation
    reward: Tensor  # [B] float32; 0 where not valid
    terminated: Tensor  # [B] bool: the episode ended and has no future
    truncated: Tensor  # [B] bool: the episode was cut off
    valid: Tensor  # [B] bool: False where the call began a new episode instead of applying the action
    info: dict[str, Tensor]  # further numbers, each [B, ...], aligned with the lanes

    def columns(self) -> dict[str, Tensor]:
        """What an unroll stores of a step; `raw_reward` where a transform has changed the reward."""
        row = {
            "reward": self.reward,
            "terminated": self.terminated,
            "truncated": self.truncated,
            "valid": self.valid,
        }
        return row | {"raw_reward": self.info["raw_reward"]} if "raw_reward" in self.info else row


class VectorEnv(ABC):
    """B lanes of one environment on one device.

    Tensors that leave are new ones or the caller's to keep: a later step never writes into them.
    """

    spec: EnvSpec
    lanes: int
    device: torch.device

    @abstractmethod
    def reset(self, seed: int | None = None) -> Obs:
        """Begin an episode in every lane. The same seed gives the same future for the same actions."""

    @abstractmethod
    def step(self, action: Obs) -> Step:
        """Apply one action a lane, `[B, ...]` in the dtype of the action space."""

    @property
    def innermost(self) -> VectorEnv:
        """The environment below all transforms."""
        return self

    def state(self) -> dict[str, Tensor]:
        """All that decides the future (physics, counters, random generators), as a flat dict of tensors on the CPU."""
        raise NotImplementedError(f"{self.spec.id} on backend {self.spec.backend} cannot save its state.")

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue exactly where `state()` was taken."""
        raise NotImplementedError(f"{self.spec.id} on backend {self.spec.backend} cannot load a state.")

    def render(self) -> np.ndarray:
        """A picture of lane 0, `[H, W, 3]` uint8."""
        raise NotImplementedError(f"{self.spec.id} on backend {self.spec.backend} cannot draw itself.")

    def close(self) -> None:
        """Free what the environment holds; calling it twice is harmless."""

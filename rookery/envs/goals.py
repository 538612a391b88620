"""What goals are worth: rewards as functions of the goal that was reached and the one that was desired.

Hindsight (Andrychowicz et al. 2017) asks them what a step would have earned had another goal been desired. They are
data, so that they can travel to the process that holds replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.spec import GoalReward

__all__ = ["ComputedGoal", "DenseGoal", "PoseGoal", "SparseGoal", "has_goals", "robotics_goal"]

REACHED_IN_MAZE = 0.45  # metres, PointMaze's own constant


@dataclass(frozen=True)
class SparseGoal:
    """`success` where ‖achieved − desired‖ ≤ `threshold`, `failure` elsewhere."""

    threshold: float
    success: float = 0.0
    failure: float = -1.0

    def __call__(self, achieved: Tensor, desired: Tensor) -> Tensor:
        return torch.where(_distance(achieved, desired) <= self.threshold, self.success, self.failure)


@dataclass(frozen=True)
class DenseGoal:
    """−‖achieved − desired‖, or with `exponential` exp of that."""

    exponential: bool = False

    def __call__(self, achieved: Tensor, desired: Tensor) -> Tensor:
        reward = -_distance(achieved, desired)
        return reward.exp() if self.exponential else reward


@dataclass(frozen=True)
class PoseGoal:
    """0 where a pose `[N, 7]`, a place and a unit quaternion, is near the desired one, −1 elsewhere."""

    distance: float  # metres between the places that count as near; infinite where only the rotation matters
    angle: float  # radians between the rotations; infinite where only the place matters

    def __call__(self, achieved: Tensor, desired: Tensor) -> Tensor:
        # The real part of one quaternion times the other's conjugate is their inner product.
        cosine = (achieved[:, 3:] * desired[:, 3:]).sum(-1).clamp(-1, 1)
        near = (_distance(achieved[:, :3], desired[:, :3]) < self.distance) & (2 * cosine.acos() < self.angle)
        return torch.where(near, 0.0, -1.0)


@dataclass(frozen=True)
class ComputedGoal:
    """What a Gymnasium environment's own `compute_reward(achieved, desired, info)` gives.

    `compute` is handed float32 arrays `[N, ...]` and an empty info, as Gymnasium-Robotics has it.
    """

    compute: Callable[[Any, Any, dict[str, Any]], Any]

    def __call__(self, achieved: Tensor, desired: Tensor) -> Tensor:
        """The rewards `[N]`, float32.

        Raises:
            ValueError: for a `compute_reward` that gives anything but one reward for each of N goals.
        """
        reward = torch.as_tensor(self.compute(achieved.cpu().numpy(), desired.cpu().numpy(), {}))
        if reward.shape != achieved.shape[:1]:
            raise ValueError(
                f"compute_reward gave {list(reward.shape)} for {len(achieved)} goals; let it take goals "
                f"{list(achieved.shape)} and give rewards [{len(achieved)}]."
            )
        return reward.to(achieved.device, torch.float32)


def has_goals(obs_space: spaces.Space) -> bool:
    """Whether achieved and desired goals are observed, each as one array."""
    if not isinstance(obs_space, spaces.Dict):
        return False
    return all(isinstance(obs_space.get(name), spaces.Box) for name in ("achieved_goal", "desired_goal"))


def robotics_goal(config: Mapping[str, Any]) -> GoalReward | None:
    """What a goal is worth in EnvPool's Gymnasium-Robotics with these settings; None where it cannot be told.

    That is so for hands that handle a pen, whose turn about its axis is left out of the angle, and for their dense
    rewards.
    """
    sparse = config["reward_type"] == "sparse"
    if "maze_map" in config:
        return SparseGoal(REACHED_IN_MAZE, 1.0, 0.0) if sparse else DenseGoal(exponential=True)
    if config.get("hand_task") != "manipulate":
        return SparseGoal(config["distance_threshold"]) if sparse else DenseGoal()
    if not sparse or config["ignore_z_target_rotation"]:
        return None
    bounds = [("target_position", "distance_threshold"), ("target_rotation", "rotation_threshold")]
    return PoseGoal(*(torch.inf if config[target] == "ignore" else config[bound] for target, bound in bounds))


def _distance(achieved: Tensor, desired: Tensor) -> Tensor:
    """Euclidean, `[N]`."""
    return torch.linalg.vector_norm((achieved - desired).flatten(1), dim=-1)

"""What an environment's lanes look like: spaces, limits, and the tensors that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from gymnasium import spaces
from torch import Tensor

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["EnvSpec", "GoalReward", "Leaf", "dtype_of", "example", "leaves", "mask_of"]

MASK = "action_mask"
GoalReward = Callable[[Tensor, Tensor], Tensor]  # achieved and desired goals, each [N, G] -> reward [N]

Leaf = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary


@dataclass(frozen=True)
class EnvSpec:
    """One lane of an environment, as the agent sees it (after every transform).

    `obs_space` and `action_space` are Gymnasium spaces: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple
    of these, nested. A structured observation may hold the key `action_mask` (bool, True = allowed).
    """

    id: str
    backend: str  # "tensor", "envpool", "gym", or "own" for a user's object
    obs_space: spaces.Space
    action_space: spaces.Space
    frame_skip: int = 1  # frames a step
    max_steps: int | None = None  # steps after which an episode is truncated
    reward_threshold: float | None = None  # mean return at which the environment counts as solved
    goal_reward: GoalReward | None = None  # the reward `[N]` of achieved goals when others were desired
    stack: int = 1  # frames along the observation's first dimension, oldest first
    saves_state: bool = False  # whether state() and load_state() give back the very same future


def dtype_of(space: Leaf) -> torch.dtype:
    """The dtype a leaf space has as a tensor: images stay uint8, other boxes are float32, counts are int64."""
    if isinstance(space, spaces.Box):
        return torch.uint8 if space.dtype == "uint8" else torch.float32
    return torch.bool if isinstance(space, spaces.MultiBinary) else torch.int64


def leaves(space: spaces.Space, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Leaf]:
    """The leaf spaces by nested key, in the space's order; a plain space has the one key `()`.

    Raises:
        ValueError: for a space that has no fixed-size tensor (Text, Sequence, Graph, OneOf).
    """
    named: Iterable[tuple[str, spaces.Space]]
    if isinstance(space, spaces.Dict):
        named = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        named = ((str(index), child) for index, child in enumerate(space.spaces))
    elif isinstance(space, Leaf):
        return {prefix: space}
    else:
        raise ValueError(
            f"{type(space).__name__} at {'.'.join(prefix) or 'the top'} has no fixed-size tensor; "
            "use Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of them."
        )
    return {key: leaf for name, child in named for key, leaf in leaves(child, (*prefix, name)).items()}


def example(space: spaces.Space, lanes: int, device: torch.device | str = "cpu") -> Tensor | TensorDict:
    """Zeros in the shape and dtype of `lanes` observations or actions: `[B, ...]`, or a TensorDict of such."""
    found = leaves(space)
    if () in found:
        return torch.zeros((lanes, *(found[()].shape or ())), dtype=dtype_of(found[()]), device=device)
    from tensordict import TensorDict

    result = TensorDict({}, batch_size=[lanes], device=device)
    for key, leaf in found.items():
        result[key] = torch.zeros((lanes, *(leaf.shape or ())), dtype=dtype_of(leaf), device=device)
    return result


def mask_of(obs: Tensor | TensorDict) -> Tensor | None:
    """The observation's `action_mask`, `[..., A]` bool, if it has one."""
    return None if isinstance(obs, Tensor) else obs.get(MASK, None)

"""From a backend's own conventions to ours: spaces whose values count from 0, and one seed spread over the lanes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from gymnasium import spaces

__all__ = ["agent_space", "lane_seeds", "start_of"]


def agent_space(space: spaces.Space, is_action: bool = False) -> spaces.Space:
    """The space an agent sees: discrete values count from 0, floats are float32, integer boxes of actions are counts.

    `start_of` says what to add to a tensor's values for the environment.
    """
    match space:
        case spaces.Dict():
            pairs = ((key, agent_space(child, is_action)) for key, child in space.spaces.items())
            return spaces.Dict(OrderedDict(pairs))  # Gymnasium would sort a plain dict's keys
        case spaces.Tuple():
            return spaces.Tuple([agent_space(child, is_action) for child in space.spaces])
        case spaces.Discrete():
            return spaces.Discrete(int(space.n))
        case spaces.MultiDiscrete():
            return spaces.MultiDiscrete(space.nvec)
        case spaces.Box() if space.dtype.kind == "f":
            limits = np.finfo(space.dtype)  # EnvPool's bounds where there is none: the least positive and the greatest
            low = np.where(space.low == limits.tiny, -np.inf, space.low).astype(np.float32)
            return spaces.Box(low, np.where(space.high == limits.max, np.inf, space.high).astype(np.float32))
        case spaces.Box() if is_action and space.is_bounded() and space.dtype.kind in "iu":
            return spaces.MultiDiscrete(space.high.astype(np.int64) - space.low.astype(np.int64) + 1)
    return space


def start_of(leaf: spaces.Space, is_action: bool = False) -> Any:
    """What the values of an environment's own leaf space start from: an int or an array; 0 where nothing is to add."""
    if isinstance(leaf, spaces.Discrete):
        return int(leaf.start)
    if isinstance(leaf, spaces.MultiDiscrete):
        start = np.asarray(leaf.start, dtype=np.int64)
    elif is_action and isinstance(leaf, spaces.Box) and leaf.dtype.kind in "iu" and leaf.is_bounded():
        start = leaf.low.astype(np.int64)
    else:
        return 0
    return start if start.any() else 0


def lane_seeds(seed: int, lanes: int) -> list[int]:
    """A seed a lane, each in [0, 2³¹): lane i's depends on `seed` and i only, and neighbouring seeds share none.

    (Plain `seed + i` would give lane 1 of seed 0 the very stream of lane 0 of seed 1.)
    """
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or a positive integer.")
    return [int(word) >> 1 for word in np.random.SeedSequence(seed).generate_state(lanes)]

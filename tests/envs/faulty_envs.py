"""Environments that tests send to workers; without torch, so that a worker starts fast."""

import os
import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Counter(gymnasium.Env):
    """Counts its steps, ends after 3, and misbehaves at step `at` in the way `fault` names, if its seed is `seed`."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(3, start=-1)

    def __init__(self, fault=None, at=2, render_mode=None):
        self.fault, self.at, self.render_mode, self.seen = fault, at, render_mode, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        if self.fault == "reset":
            raise RuntimeError("no power")
        return np.array([0, self.np_random.uniform()]), {"power": 1.0}

    def step(self, action):
        assert -1 <= action <= 1, action
        self.count += 1
        obs, reward = np.array([self.count, self.np_random.uniform()]), float(action)
        if self.count == self.at:
            match self.fault:
                case "raise":
                    raise ZeroDivisionError("the wheel came off")
                case "nan":
                    obs[1] = np.nan
                case "reward":
                    reward = float("inf")
                case "shape":
                    obs = obs[:1]
                case "hang":
                    time.sleep(600)
                case "exit":
                    os._exit(3)
        return obs, reward, self.count == 3, False, {"power": 0.5} if self.count == 1 else {}

    def render(self):
        return np.full((4, 5, 3), self.count, np.uint8)


class Shades(Counter):
    """Draws itself in numbers from 0 to 1."""

    def render(self):
        return super().render() / 10


class Tally(Counter):
    """Says in `info` which step of its episode it is at; episodes take 2 to 5."""

    def reset(self, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        self.last = self.np_random.integers(2, 6)
        return obs, {"step": 0}

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, self.count == self.last, False, {"step": self.count}


class Nest(gymnasium.Env):
    """Every kind of space, nested; its observation repeats the action, so that a test sees what arrived."""

    action_space = spaces.Dict(
        move=spaces.Discrete(4, start=1),
        grip=spaces.Tuple([spaces.MultiBinary(3), spaces.Box(-1, 1, (2,), np.float64)]),
        gears=spaces.MultiDiscrete([3, 5], start=[0, 2]),
        knob=spaces.Box(5, 9, (1,), np.int32),
    )
    observation_space = spaces.Dict(did=action_space, action_mask=spaces.MultiBinary(4))

    def _obs(self, action):
        return {"did": action, "action_mask": np.ones(4, np.int8)}

    def reset(self, seed=None, options=None):
        self.action_space.seed(seed)
        return self._obs(self.action_space.sample()), {}

    def step(self, action):
        assert action in self.action_space, action
        return self._obs(action), 1.0, False, False, {}


class Words(Counter):
    observation_space = spaces.Text(5)

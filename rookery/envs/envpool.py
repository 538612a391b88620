"""Environments in C++ by EnvPool: Atari, MuJoCo, DM Control, Box2D, MiniGrid, goal robots and many more."""

from __future__ import annotations

import difflib
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.goals import has_goals, robotics_goal
from rookery.envs.native import agent_space, lane_seeds, start_of
from rookery.envs.spec import EnvSpec, dtype_of, leaves
from rookery.envs.vector import EnvError, Obs, Step, VectorEnv

__all__ = ["EnvPoolEnv", "envpool_ids"]

WORTH_KEEPING = ("lives", "is_success", "success")  # of EnvPool's info, where it has them
EMULATORS = ("envpool.atari", "envpool.vizdoom")  # families whose frame_skip counts frames; MuJoCo's counts substeps
CHEAP = ("envpool.classic_control", "envpool.toy_text")  # a step costs less than waking a second thread
UNLIMITED = 2**31 - 1  # EnvPool's max_episode_steps where it has no limit


def envpool_ids() -> list[str]:
    """Every id EnvPool has; empty where EnvPool is not installed.

    Raises:
        EnvError: where it is installed but broken.
    """
    try:
        import envpool
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "envpool":
            return []
        raise EnvError(
            f"EnvPool is installed but cannot be imported: {error}; mend or uninstall it, or ask for 'gym:ID'."
        ) from error
    return list(envpool.list_all_envs())


class EnvPoolEnv(VectorEnv):
    """B lanes of one of EnvPool's environments, stepped by its threads.

    EnvPool resets on the next step by itself; `valid` follows from the lane having ended before. Where an episode
    reaches its limit in the very step that also terminates it, EnvPool (hence `Step`) says truncated only.
    Discrete values count from 0 in tensors even where EnvPool counts from elsewhere, and boxes of integer actions
    become MultiDiscrete.

    With `batch_size` < `lanes` the lanes may be stepped asynchronously: `send` actions to any lanes, `recv` the
    `batch_size` that are ready first. `step` still steps all.
    """

    _pool: Any  # EnvPool's classes are made at run time; None once closed
    _fresh: bool  # no episode has begun since the pool was seeded
    _pending: int  # lanes sent and not received

    def __init__(
        self,
        id: str,
        lanes: int,
        seed: int = 0,
        threads: int | None = None,
        batch_size: int | None = None,
        info: bool | Collection[str] = False,
        render: bool = False,
        **env_kwargs: Any,
    ) -> None:
        """Build `lanes` copies of `id`.

        Args:
            seed: spread over the lanes.
            threads: EnvPool's worker threads; None is one for toy problems and one a core, at most, for others.
            batch_size: lanes a `recv` returns; must divide `lanes`; None is all of them.
            info: further numbers of EnvPool's to keep in `Step.info`, by name, or True for all; lives, success and
                Atari's unclipped reward are kept anyhow.
            render: prepare for `render()`; Atari can always draw what the agent sees.
            env_kwargs: EnvPool's own settings, such as `stack_num=1` or `reward_clip=True`.

        Raises:
            ValueError: for an id or a setting EnvPool does not have, or an environment of several players.
        """
        if lanes < 1:
            raise ValueError(f"lanes={lanes} is not a positive number of lanes.")
        batch_size = lanes if batch_size is None else batch_size
        if not 1 <= batch_size <= lanes or lanes % batch_size:
            raise ValueError(f"batch_size={batch_size} does not divide lanes={lanes}; use a divisor such as {lanes}.")
        family = _check_id(id)
        _check_settings(id, env_kwargs)
        self.lanes, self.batch_size, self.device = lanes, batch_size, torch.device("cpu")
        self._render, self._info = render, info
        self._make_kwargs = dict(
            task_id=id,
            env_type="gymnasium",
            num_envs=lanes,
            batch_size=batch_size,
            num_threads=threads or _threads(family, batch_size),
            **({"render_mode": "rgb_array"} if render else {}),
            **env_kwargs,
        )
        self._steps = 0
        self._build(seed)
        self.spec = self._describe(id, family)
        self._last: Obs | None = None  # for render

    # --- stepping ---------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> Obs:
        """Begin an episode in every lane.

        EnvPool fixes its seeds when it is built, so a `seed` builds it anew (milliseconds; Atari: tens of them).
        """
        if seed is not None and not (self._fresh and seed == self._seed):
            self._build(seed)
        if self._pool is None:
            raise EnvError(f"{self.spec.id} is closed; make a new one.")
        if self._pending:
            raise EnvError(
                f"reset of {self.spec.id} with {self._pending} lanes sent and not received; recv() them first."
            )
        self._fresh, self._steps = False, -1
        self._ended = np.ones(self.lanes, dtype=bool)
        self._pool._reset(self._ids)
        self._pending = self.lanes
        return self._gather().obs

    def step(self, action: Obs) -> Step:
        self.send(action)
        return self._gather()

    def send(self, action: Obs, lanes: Tensor | None = None) -> None:
        """Hand actions `[K, ...]` to the K `lanes` (int64; None: all), without waiting for what follows."""
        ids = self._ids if lanes is None else lanes.numpy().astype(np.int32)
        # Always a copy, for threads read it after we return; EnvPool has no structured actions.
        array: np.ndarray = action.numpy().astype(self._action_dtype)  # type: ignore[union-attr]
        if array.shape != (len(ids), *self._action_shape):
            raise ValueError(
                f"{self.spec.id} got actions of shape {tuple(action.shape)}; "
                f"expected {(len(ids), *self._action_shape)}, one for each lane."
            )
        if self._shifted:
            array += self._action_start
        if self._fresh or self._waiting[ids].any():
            raise EnvError(
                f"{self.spec.id}: actions for lanes that are not ready; reset() first, then recv() all sent."
            )
        self._waiting[ids] = True
        self._pending += len(ids)
        self._pool._send([ids, ids, array.reshape(len(ids), *self._raw_action_shape)])

    def recv(self) -> tuple[Step, Tensor]:
        """Wait for the `batch_size` lanes that are ready first: what followed in them, and their indices (int64)."""
        if self._pending < self.batch_size:
            raise EnvError(f"recv() waits for {self.batch_size} lanes of {self.spec.id} but {self._pending} were sent.")
        values = self._pool._recv()
        self._pending -= self.batch_size
        self._waiting[values[self._lane_at]] = False
        lanes = torch.from_numpy(values[self._lane_at]).long()
        return self._read(values, lanes), lanes

    def _gather(self) -> Step:
        """Receive all lanes and put them in order."""
        if self.batch_size == self.lanes:
            self._pending = 0
            self._waiting[:] = False
            return self._read(self._pool._recv(), None)
        received = [self.recv() for _ in range(self.lanes // self.batch_size)]
        order = torch.cat([lanes for _, lanes in received]).argsort()
        steps = [step for step, _ in received]
        info = {name: torch.cat([step.info[name] for step in steps])[order] for name in steps[0].info}
        columns = (torch.cat(column)[order] for column in zip(*(step[:-1] for step in steps), strict=True))
        return Step(*columns, info=info)  # type: ignore[misc, arg-type]  # one iterable of the five columns

    def _read(self, values: list[np.ndarray], lanes: Tensor | None) -> Step:
        """EnvPool's arrays, fresh ones in each call, as a Step of `lanes` (None: all, in order)."""
        done, truncated, reward = values[self._done_at], values[self._truncated_at], values[self._reward_at]
        self._steps += 1
        if lanes is None:
            began, self._ended = self._ended, done
        else:
            began = self._ended[lanes.numpy()]
            self._ended[lanes.numpy()] = done
        reward[began] = 0.0  # DM Control and MetaWorld repeat the last reward, or give NaN, in the row of a reset
        total = np.add.reduce(reward)
        for index in self._float_at:
            total += np.add.reduce(values[index], axis=None)
        if not math.isfinite(total):  # one sum an array is cheap, and only a strange one is worth looking into
            self._refuse_strange(values, lanes)
        self._last = self._obs(values)
        return Step(
            self._last,
            torch.from_numpy(reward),
            torch.from_numpy(done > truncated),
            torch.from_numpy(truncated),
            torch.from_numpy(~began),
            {name: torch.from_numpy(values[index]) for name, index in self._info_at},
        )

    def _obs(self, values: list[np.ndarray]) -> Obs:
        if len(self._leaves) == 1 and not self._leaves[0].key:
            return self._leaves[0].tensor(values)
        from tensordict import TensorDict

        obs = TensorDict({}, batch_size=[len(values[self._done_at])])
        for leaf in self._leaves:
            obs[leaf.key] = leaf.tensor(values)
        return obs

    def _refuse_strange(self, values: list[np.ndarray], lanes: Tensor | None) -> None:
        named = [("reward", self._reward_at), *((leaf.name, leaf.at) for leaf in self._leaves)]
        for name, index in named:
            bad = ~np.isfinite(values[index].reshape(len(values[index]), -1)).all(1)
            if bad.any():
                row = int(bad.argmax())
                lane = row if lanes is None else int(lanes[row])
                raise EnvError(
                    f"{self.spec.id}, lane {lane}, step {self._steps}: "
                    f"returned NaN or an infinite number in {name}: {values[index][row]}."
                )

    # --- building ---------------------------------------------------------------------------------------------------

    def _build(self, seed: int) -> None:
        import envpool

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium warns of float64 bounds cast to float32
            self._pool = envpool.make(**self._make_kwargs, seed=lane_seeds(seed, self.lanes))
        self._seed = seed
        self._fresh, self._pending = True, 0
        self._waiting = np.zeros(self.lanes, dtype=bool)  # which lanes are sent and not received
        self._ended = np.ones(self.lanes, dtype=bool)

    def _describe(self, id: str, family: str) -> EnvSpec:
        """Read the pool's layout once, so that a step only indexes lists; returns what the agent sees."""
        pool, config = self._pool, self._pool.config
        at = {name: index for index, name in enumerate(pool._state_keys)}
        self._done_at, self._truncated_at, self._reward_at = at["done"], at["trunc"], at["reward"]
        self._lane_at = at["info:env_id"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            obs_space, self._leaves = _observations(pool.observation_space, at)
            action_space, start = agent_space(pool.action_space, True), start_of(pool.action_space, True)
        dtypes = [np.dtype(array.dtype) for array in pool.spec.state_array_spec.values()]
        self._float_at = [leaf.at for leaf in self._leaves if dtypes[leaf.at].kind == "f"]
        self._info_at = [
            (name.removeprefix("info:"), index)
            for name, index in at.items()
            if name.startswith("info:") and not name.endswith("env_id") and self._keeps(name, config)
        ]
        action = pool.spec.action_array_spec["action"]
        self._action_dtype = np.dtype(action.dtype)
        self._action_start = np.asarray(start).astype(self._action_dtype)
        self._shifted = bool(np.any(start))
        self._action_shape = action_space.shape or ()
        self._raw_action_shape = tuple(action.shape[1:] if tuple(action.shape[:1]) == (-1,) else action.shape)
        self._ids = np.arange(self.lanes, dtype=np.int32)
        self._mujoco = family.startswith("envpool.mujoco")
        limit = config["max_episode_steps"]
        goals = family == "envpool.mujoco.robotics" and has_goals(obs_space)
        return EnvSpec(
            id=id,
            backend="envpool",
            obs_space=obs_space,
            action_space=action_space,
            frame_skip=config.get("frame_skip", 1) if family in EMULATORS else 1,
            max_steps=limit if 0 < limit < UNLIMITED else None,
            reward_threshold=_threshold(id, config.get("reward_threshold")),
            goal_reward=robotics_goal(config) if goals else None,
            stack=config.get("stack_num", 1) if family in EMULATORS else 1,
        )

    def _keeps(self, name: str, config: dict[str, Any]) -> bool:
        name = name.removeprefix("info:")
        asked = self._info if isinstance(self._info, bool) else name in self._info
        return asked or name in WORTH_KEEPING or (name == "reward" and bool(config.get("reward_clip")))

    def render(self) -> np.ndarray:
        """Lane 0 as EnvPool draws it, or else the newest frame of an image observation."""
        if self._render:
            if self._mujoco:
                _check_drawing(self.spec.id)
            return np.asarray(self._pool.render())[0]
        if isinstance(self._last, Tensor) and self._last.dtype == torch.uint8 and self._last.ndim == 4:
            channels = 3 if self._pool.config.get("gray_scale") is False else 1
            newest = self._last[0, -channels:].permute(1, 2, 0)
            return newest.expand(-1, -1, 3).numpy().copy()
        raise RuntimeError(f"{self.spec.id} draws itself only if built for it; make it with render=True.")

    def close(self) -> None:
        self._pool, self._fresh = None, True


class _Leaf(NamedTuple):
    """Where one leaf of the observation lies in EnvPool's list of arrays, and what it becomes."""

    key: tuple[str, ...]
    at: int
    shape: tuple[int, ...]  # of one lane
    start: int  # subtracted, so that discrete values count from 0
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return ".".join(("obs", *self.key))

    def tensor(self, values: list[np.ndarray]) -> Tensor:
        array = values[self.at]
        if array.shape[1:] != self.shape:
            array = array.reshape(len(array), *self.shape)
        tensor = torch.from_numpy(array)
        if self.start:
            tensor = tensor - self.start
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)


def _observations(space: spaces.Space, at: dict[str, int]) -> tuple[spaces.Space, list[_Leaf]]:
    """The space the agent sees, and where each of its leaves is found; EnvPool names them `obs:outer.inner`."""
    named = {
        tuple(name.removeprefix("obs:").replace(":", ".").split(".")): index
        for name, index in at.items()
        if name == "obs" or name.startswith("obs:")
    }
    seen = agent_space(space)
    starts = [start_of(leaf) for leaf in leaves(space).values()]
    found = []
    for (key, leaf), start in zip(leaves(seen).items(), starts, strict=True):
        index = named[key] if key else next(iter(named.values()))
        found.append(_Leaf(key, index, leaf.shape or (), start, dtype_of(leaf)))
    return seen, found


@cache
def _check_drawing(id: str) -> None:
    """Draw once in another process: MuJoCo ends the process where it finds no OpenGL, and that must not be ours."""
    make = f"envpool.make({id!r}, 'gymnasium', num_envs=1, render_mode='rgb_array')"
    code = f"import envpool; env = {make}; env.reset(); env.render()"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tempfile.gettempdir()).returncode:
        raise RuntimeError(
            f"{id} on EnvPool cannot draw here, for want of OpenGL; give the process a display, or use 'gym:{id}' "
            "with MUJOCO_GL=egl or osmesa where one of them is installed."
        )


def _threads(family: str, batch_size: int) -> int:
    if family in CHEAP:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(batch_size, cores)


def _threshold(id: str, own: float | None) -> float | None:
    """EnvPool's reward threshold, or else Gymnasium's for the same id."""
    if own is None:
        registered = gymnasium.registry.get(id)
        own = None if registered is None else registered.reward_threshold
    return None if own is None else float(own)


def _check_id(id: str) -> str:
    """Refuse what EnvPool does not have or we cannot step; returns the family, EnvPool's module that has the id."""
    import envpool
    from envpool.registration import registry

    if id not in registry.specs:
        near = difflib.get_close_matches(id, list(registry.specs), 3, cutoff=0.3)
        raise ValueError(f"EnvPool has no environment {id!r}; nearest: {', '.join(near)}.")
    spec = envpool.make_spec(id)
    if spec.config.max_num_players > 1 or len(spec.action_array_spec) != 3:
        raise ValueError(f"{id} on EnvPool is for several players; only single-agent environments run here.")
    return registry.specs[id][0]


def _check_settings(id: str, asked: dict[str, Any]) -> None:
    import envpool

    config = envpool.make_spec(id).config
    known = config._fields
    limit = asked.get("max_episode_steps", UNLIMITED)
    if limit != UNLIMITED and config.max_episode_steps == UNLIMITED:
        # EnvPool's toy problems without a limit of their own take the setting and never look at it
        raise ValueError(f"{id} on EnvPool is never cut off; leave max_episode_steps={limit} out, or use 'gym:{id}'.")
    rendering = ("from_pixels", "render_width", "render_height", "render_camera_id")
    for name in asked:
        if name not in (*known, *rendering):
            raise ValueError(f"{id} on EnvPool has no setting {name!r}; it has: {', '.join(known)}.")

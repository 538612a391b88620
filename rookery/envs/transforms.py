"""Small objects that wrap a VectorEnv and are VectorEnvs: stacked frames, changed rewards, actions in [−1, 1].

A time limit is no transform: a lane that was cut off must begin a new episode on the next call, and only the backend
can begin one in a single lane. `make_env(id, max_steps=...)` hands the limit to it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.spec import GoalReward, dtype_of, example, leaves
from rookery.envs.vector import EnvError, Obs, Step, VectorEnv

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["Checked", "ClipReward", "FrameStack", "RescaleAction", "ScaleReward", "Transform", "transform"]

RAW_REWARD = "raw_reward"  # in Step.info: the reward before any transform
INNER = "env."  # before the names of the wrapped environment's state, where a transform has state of its own


class Transform(VectorEnv):
    """Hands everything on to `env`; a subclass changes what it is about.

    `generator`, `carry` and `settle`, which CUDA graphs need (see TensorEnv), are there if `env` has them. One that
    carries tensors from step to step gives them in `own`, and takes them in `take`, as the environments do.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env, self.spec, self.lanes, self.device = env, env.spec, env.lanes, env.device

    @property
    def innermost(self) -> VectorEnv:
        return self.env.innermost

    def own(self) -> dict[str, Tensor]:
        """The tensors this transform itself hands from one step to the next, by name; not copies."""
        return {}

    def take(self, own: dict[str, Tensor]) -> None:
        """Go on from these, which are the transform's to keep."""

    def reset(self, seed: int | None = None) -> Obs:
        return self.env.reset(seed)

    def step(self, action: Obs) -> Step:
        return self.env.step(action)

    def state(self) -> dict[str, Tensor]:
        saved = {name: value.detach().to("cpu", copy=True) for name, value in self.own().items()}
        return self._joined(self.env.state(), saved)

    def load_state(self, state: dict[str, Tensor]) -> None:
        inner, own = self._parted(state)
        expected = self.own()
        for name in sorted(expected.keys() | own.keys()):
            wanted, got = (tensors[name].shape if name in tensors else None for tensors in (expected, own))
            if wanted != got:
                raise ValueError(
                    f"the saved state has {_size(got)} as {name!r} where {type(self).__name__} of {self.spec.id} has "
                    f"{_size(wanted)}; load a state of the same environment, transforms and lanes."
                )
        self.env.load_state(inner)
        self.take({name: value.to(self.device, copy=True) for name, value in own.items()})

    @property
    def generator(self) -> torch.Generator:
        return self.env.generator  # type: ignore[attr-defined]  # an AttributeError is the right answer

    @property
    def carry(self) -> Callable[[], dict[str, Tensor]]:
        inner = self.env.carry  # type: ignore[attr-defined]  # as above
        return lambda: self._joined(inner(), self.own())

    @property
    def settle(self) -> Callable[[dict[str, Tensor]], None]:
        inner = self.env.settle  # type: ignore[attr-defined]  # as above

        def settle(carry: dict[str, Tensor]) -> None:
            inside, own = self._parted(carry)
            for name, now in self.own().items():
                own[name].copy_(now)
            self.take(own)
            inner(inside)

        return settle

    def _joined(self, inner: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**own, **{INNER + name: value for name, value in inner.items()}} if own else inner

    def _parted(self, joined: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.own():
            return joined, {}
        inner = {name.removeprefix(INNER): value for name, value in joined.items() if name.startswith(INNER)}
        return inner, {name: value for name, value in joined.items() if not name.startswith(INNER)}

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class Checked(Transform):
    """For environments that are not ours: refuses what cannot be trained on, and names the lane and the step.

    Raises:
        EnvError: if the environment raises, or gives a wrong shape or dtype, or a NaN or an infinity.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self._wanted = example(env.spec.obs_space, env.lanes, env.device)
        self._steps = 0

    def reset(self, seed: int | None = None) -> Obs:
        self._steps = 0
        return self._checked("obs", self.env.reset(seed), self._wanted)

    def step(self, action: Obs) -> Step:
        self._steps += 1
        try:
            step = self.env.step(action)
        except Exception as error:  # whatever a user's environment raises
            raise EnvError(f"{self.spec.id} failed at step {self._steps}: {type(error).__name__}: {error}") from error
        self._checked("obs", step.obs, self._wanted)
        floats = torch.zeros(self.lanes, device=self.device)
        self._checked("reward", step.reward, floats)
        for name in ("terminated", "truncated", "valid"):
            self._checked(name, getattr(step, name), floats.bool())
        return step

    def _checked(self, name: str, got: Obs, wanted: Obs) -> Obs:
        if not isinstance(wanted, Tensor):
            for key in wanted.keys(include_nested=True, leaves_only=True):
                self._checked(f"{name} {key}", got.get(key, None), wanted[key])  # type: ignore[union-attr, arg-type]
            return got
        where = f"{self.spec.id} at step {self._steps}"
        if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
            seen = f"{list(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
            raise EnvError(f"{where} gave {name} of {seen}; its spec says {list(wanted.shape)} {wanted.dtype}.")
        if got.is_floating_point() and not torch.isfinite(got).all():
            lane = int((~torch.isfinite(got)).reshape(self.lanes, -1).any(1).nonzero()[0])
            raise EnvError(
                f"{where} gave {name} that is not finite in lane {lane}: {got[lane].flatten()[:8].tolist()}."
            )
        return got


class FrameStack(Transform):
    """Observations become the last `frames` ones, oldest first; frames before the episode's first are zeros.

    They stand along the axis of the channels: `[C, H, W]` becomes `[K·C, H, W]`, `[H, W, C]` (fewer channels than
    rows) `[H, W, K·C]`, `[H, W]` `[K, H, W]` and a vector `[D]` `[K·D]`. A replay that stores each frame once gets it
    from `newest`, and the same stacks back from `rookery.data.unroll.frames_to_stacks`.

    Raises:
        ValueError: for fewer than one frame, or observations that are not one Box.
    """

    def __init__(self, env: VectorEnv, frames: int = 4) -> None:
        super().__init__(env)
        space = env.spec.obs_space
        if frames < 1:
            raise ValueError(f"frames={frames} leaves nothing to see; use 1 or more.")
        if not isinstance(space, spaces.Box) or len(space.shape) > 3:
            raise ValueError(
                f"{env.spec.id} observes {space}; frames are stacked where it is one Box of up to three dimensions: "
                "leave frame_stack out."
            )
        shape = space.shape
        self.frames = frames
        # The frames' own axis stands before that of the channels, then the two are merged where there are channels.
        self._axis = 3 if len(shape) == 3 and shape[2] < shape[0] else 1
        self._merged = len(shape) in (1, 3)
        self._width = shape[self._axis - 1] if self._merged else 1
        self._shown = (-1, *[1] * (self._axis - 1), frames, *[1] * (len(shape) + 1 - self._axis))
        low, high = (self._together([np.minimum(space.low, 0)] * frames), self._together([space.high] * frames))
        high = np.maximum(high, 0)  # zeros are to be seen even where no frame has any
        stack = frames * env.spec.stack if self._axis == 1 else 1
        self.spec = replace(env.spec, obs_space=spaces.Box(low, high, low.shape, space.dtype.type), stack=stack)
        self._ages = torch.arange(frames - 1, -1, -1, dtype=torch.int32, device=self.device)  # of each place's frame
        zeros = torch.zeros((self.lanes, *shape), dtype=dtype_of(space), device=self.device)
        self._past = [zeros.clone() for _ in range(frames - 1)]
        self._age = torch.zeros(self.lanes, dtype=torch.int32, device=self.device)  # steps since the episode's first

    def _together(self, frames: list[np.ndarray]) -> np.ndarray:
        axis = self._axis - 1
        return np.concatenate(frames, axis) if self._merged else np.stack(frames, axis)

    def newest(self, obs: Tensor) -> Tensor:
        """The single frame a stacked observation `[..., *stacked]` was made with, `[..., *frame]`; a view."""
        dims = len(self.spec.obs_space.shape or ())
        axis = obs.ndim - dims + self._axis - 1
        start = (self.frames - 1) * self._width
        return obs.narrow(axis, start, self._width) if self._merged else obs.select(axis, start)

    def reset(self, seed: int | None = None) -> Obs:
        first = self.env.reset(seed)
        assert isinstance(first, Tensor), "a Box observation is one tensor"
        self._past = [torch.zeros_like(first) for _ in range(self.frames - 1)]
        self._age = torch.zeros_like(self._age)
        return self._stacked(first)

    def step(self, action: Obs) -> Step:
        step = self.env.step(action)
        assert isinstance(step.obs, Tensor), "a Box observation is one tensor"
        self._age = (self._age + 1) * step.valid
        return step._replace(obs=self._stacked(step.obs))

    def _stacked(self, frame: Tensor) -> Tensor:
        frames = [*self._past, frame]
        self._past = frames[1:]
        stacked = torch.stack(frames, self._axis)
        shown = self._ages <= self._age.unsqueeze(-1)  # [B, K]
        if stacked.is_floating_point():
            stacked = stacked.masked_fill_(~shown.view(self._shown), 0.0)
        else:
            stacked = stacked.mul_(shown.view(self._shown))  # much faster than masked_fill_ on bytes
        return stacked.flatten(self._axis, self._axis + 1) if self._merged else stacked

    def own(self) -> dict[str, Tensor]:
        # Oldest first: `settle` then overwrites a frame only after it has moved to the place before.
        return {**{f"frames.{place}": frame for place, frame in enumerate(self._past)}, "frames.age": self._age}

    def take(self, own: dict[str, Tensor]) -> None:
        self._past = [own[f"frames.{place}"] for place in range(self.frames - 1)]
        self._age = own["frames.age"]


class _Reward(Transform):
    """Changes the reward; the one before any change is `info["raw_reward"]`, `[B]` float32.

    Args:
        change: what the agent gets for a reward; 0 for 0, so that rows without a step keep theirs.
    """

    def __init__(self, env: VectorEnv, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(env)
        self.change = change
        if (of_goals := env.spec.goal_reward) is not None:
            self.spec = replace(env.spec, goal_reward=partial(_of_goals, of_goals, change))

    def step(self, action: Obs) -> Step:
        step = self.env.step(action)
        info = step.info if RAW_REWARD in step.info else {**step.info, RAW_REWARD: step.reward}
        return step._replace(reward=self.change(step.reward), info=info)


class ClipReward(_Reward):
    """Rewards are clipped to [low, high] (Mnih et al. 2015, Methods: to [−1, 1], on Atari the same as their sign).

    Raises:
        ValueError: for a range that does not hold 0.
    """

    def __init__(self, env: VectorEnv, low: float = -1.0, high: float = 1.0) -> None:
        if not low <= 0.0 <= high:
            raise ValueError(f"rewards clipped to [{low:g}, {high:g}] are never 0; use low <= 0 <= high.")
        super().__init__(env, partial(_clipped, low=low, high=high))


class ScaleReward(_Reward):
    """Rewards are multiplied by `factor`.

    Raises:
        ValueError: for a factor that is not a positive number.
    """

    def __init__(self, env: VectorEnv, factor: float) -> None:
        if not (factor > 0.0 and math.isfinite(factor)):
            raise ValueError(f"rewards times {factor:g} say nothing or the opposite; use a positive factor.")
        super().__init__(env, partial(_scaled, factor=factor))


def _clipped(reward: Tensor, low: float, high: float) -> Tensor:
    return reward.clamp(low, high)


def _scaled(reward: Tensor, factor: float) -> Tensor:
    return reward * factor


def _of_goals(reward: GoalReward, change: Callable[[Tensor], Tensor], achieved: Tensor, desired: Tensor) -> Tensor:
    """The changed reward of achieved goals when others were desired."""
    return change(reward(achieved, desired))


class RescaleAction(Transform):
    """Bounded boxes of numbers, also inside structured actions, are acted on in [−1, 1].

    What is outside is clamped; −1 becomes the box's `low` and 1 its `high`, exactly. Other leaves pass.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.spec = replace(env.spec, action_space=_with_leaves(env.spec.action_space, _unit))
        self._bounds: dict[tuple[str, ...], tuple[Tensor, Tensor] | None] = {}  # None: is [−1, 1] already
        for key, leaf in leaves(env.spec.action_space).items():
            if _rescaled(leaf):
                low, high = (torch.as_tensor(edge).to(self.device) for edge in (leaf.low, leaf.high))
                same = bool((low == -1.0).all() and (high == 1.0).all())
                self._bounds[key] = None if same else (low, high)

    def step(self, action: Obs) -> Step:
        if isinstance(action, Tensor):
            return self.env.step(self._mapped(action, ()) if () in self._bounds else action)
        mapped: TensorDict = action.copy()  # its own keys, the same tensors
        for key in self._bounds:
            mapped[key] = self._mapped(action[key], key)
        return self.env.step(mapped)

    def _mapped(self, action: Tensor, key: tuple[str, ...]) -> Tensor:
        clamped, bounds = action.clamp(-1.0, 1.0), self._bounds[key]
        return clamped if bounds is None else torch.lerp(*bounds, (clamped + 1.0) / 2.0)


def transform(
    env: VectorEnv,
    *,
    frame_stack: int | None = None,
    clip_reward: bool = False,
    scale_reward: float | None = None,
) -> VectorEnv:
    """The environment as the agent sees it: actions in [−1, 1] wherever they are bounded numbers, and what is asked.

    Args:
        frame_stack: frames in an observation.
        clip_reward: to [−1, 1], after any scaling.
        scale_reward: the factor.

    Raises:
        ValueError: for what the environment's spaces do not allow.
    """
    if any(_rescaled(leaf) for leaf in leaves(env.spec.action_space).values()):
        env = RescaleAction(env)
    if scale_reward is not None:
        env = ScaleReward(env, scale_reward)
    if clip_reward:
        env = ClipReward(env)
    return env if frame_stack is None else FrameStack(env, frame_stack)


def _rescaled(leaf: spaces.Space) -> TypeGuard[spaces.Box]:
    return isinstance(leaf, spaces.Box) and leaf.dtype.kind == "f" and leaf.is_bounded()


def _unit(leaf: spaces.Space) -> spaces.Space:
    return spaces.Box(-1.0, 1.0, leaf.shape, np.float32) if _rescaled(leaf) else leaf


def _with_leaves(space: spaces.Space, change: Callable[[spaces.Space], spaces.Space]) -> spaces.Space:
    """The same structure with changed leaves."""
    if isinstance(space, spaces.Dict):
        pairs = ((key, _with_leaves(child, change)) for key, child in space.spaces.items())
        return spaces.Dict(OrderedDict(pairs))  # Gymnasium would sort a plain dict's keys
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_with_leaves(child, change) for child in space.spaces])
    return change(space)


def _size(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(list(shape))

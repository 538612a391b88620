"""Some of an environment's lanes, stepped in place over plain arrays: the inside of GymEnv, in its process or another.

Knows numpy and Gymnasium only, so that a worker process starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from rookery.envs.native import start_of

__all__ = ["Block", "Field", "LaneError", "Maker", "arrays", "fields", "make_envs", "paths", "serve", "size"]

ALIGN = 64  # bytes; a cache line, so that two workers never write the same one at an array's start
RESET, STEP = ("obs", "info"), ("obs", "reward", "terminated", "truncated", "info")  # what Gymnasium's calls return


class LaneError(Exception):
    """What went wrong in which lane, in one sentence; the traceback of the environment's own error after it."""

    def __init__(self, lane: int, text: str) -> None:
        super().__init__(text)
        self.lane, self.text = lane, text


@dataclass(frozen=True)
class Maker:
    """Makes one copy of an environment; travels to workers, so what it holds must be importable there."""

    source: gymnasium.envs.registration.EnvSpec | Callable[..., gymnasium.Env]
    kwargs: dict[str, Any]

    def __call__(self, render: bool = False) -> gymnasium.Env:
        kwargs = {**self.kwargs, "render_mode": "rgb_array"} if render else self.kwargs
        if isinstance(self.source, gymnasium.envs.registration.EnvSpec):
            return gymnasium.make(self.source, disable_env_checker=True, **kwargs)  # Block checks what it gets
        return self.source(**kwargs)


# --- the arrays that rows are written into ----------------------------------------------------------------------------


class Field(NamedTuple):
    """One array of the lanes' common memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # lanes first


def paths(space: spaces.Space, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The leaf spaces with what to index an observation by to reach each, in the order of `spec.leaves`."""
    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            yield from paths(child, (*prefix, key))
    elif isinstance(space, spaces.Tuple):
        for index, child in enumerate(space.spaces):
            yield from paths(child, (*prefix, index))
    else:
        yield prefix, space


def _dtype(leaf: spaces.Space) -> str:
    if isinstance(leaf, spaces.Box):
        return "uint8" if leaf.dtype == np.uint8 else "float32"
    return "bool" if isinstance(leaf, spaces.MultiBinary) else "int64"


def fields(obs_space: spaces.Space, action_space: spaces.Space, lanes: int, info: int) -> list[Field]:
    """The arrays of `lanes` rows, for the spaces an agent sees and `info` further numbers."""
    named = [("reward", "float32"), ("terminated", "bool"), ("truncated", "bool"), ("valid", "bool"), ("seed", "int64")]
    return [
        *(Field(name, dtype, (lanes,)) for name, dtype in named),
        Field("info", "float32", (lanes, info)),
        Field("at", "int64", (lanes,)),  # [slot] = the lane that worker is in
        *(Field(f"obs{i}", _dtype(leaf), (lanes, *leaf.shape)) for i, (_, leaf) in enumerate(paths(obs_space))),
        *(Field(f"action{i}", _dtype(leaf), (lanes, *leaf.shape)) for i, (_, leaf) in enumerate(paths(action_space))),
    ]


def _bytes(field: Field) -> int:
    used = math.prod(field.shape) * np.dtype(field.dtype).itemsize
    return -(-used // ALIGN) * ALIGN


def size(layout: list[Field]) -> int:
    """Bytes that `arrays` needs."""
    return sum(map(_bytes, layout)) + ALIGN


def arrays(layout: list[Field], memory: Any) -> dict[str, np.ndarray]:
    """The arrays by name, as views of `memory`."""
    found, offset = {}, 0
    for field in layout:
        count = math.prod(field.shape)
        found[field.name] = np.frombuffer(memory, field.dtype, count, offset).reshape(field.shape)
        offset += _bytes(field)
    return found


# --- the lanes --------------------------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    path: tuple[str | int, ...]
    array: np.ndarray  # [lanes, ...]
    start: Any  # what the environment's values start from
    shape: tuple[int, ...]
    shifted: bool  # whether start is not 0

    @property
    def name(self) -> str:
        return ".".join(("observation", *map(str, self.path)))


class Block:
    """Lanes `first` to `first + len(envs) - 1`: reads their actions from arrays and writes their rows into arrays."""

    def __init__(self, envs: list[gymnasium.Env], first: int, rows: dict[str, np.ndarray], slot: int, info: list[str]):
        self.envs, self.first, self.rows, self.slot, self.info = envs, first, rows, slot, info
        self.span = slice(first, first + len(envs))
        self.ended = [True] * len(envs)
        self.action_space = envs[0].action_space
        self.obs = [
            _Leaf(path, rows[f"obs{i}"], start_of(leaf), leaf.shape, bool(np.any(start_of(leaf))))
            for i, (path, leaf) in enumerate(paths(envs[0].observation_space))
        ]
        self.finite = [leaf for leaf in self.obs if leaf.array.dtype == np.float32]
        self.decode = _decoder(self.action_space, iter(range(len(rows))), rows)

    def reset(self, seeded: bool) -> None:
        """Begin an episode in every lane, from the row's seed or going on with the environment's own generator."""
        for index, env in enumerate(self.envs):
            lane = self.first + index
            seed = int(self.rows["seed"][lane]) if seeded else None
            self._guarded(self._begin, index, env, seed)
        self._check_finite()

    def step(self) -> None:
        """Apply each lane's action, or begin an episode where the last one has ended."""
        for index, env in enumerate(self.envs):
            if self.ended[index]:
                self._guarded(self._begin, index, env, None)
            else:
                self._guarded(self._advance, index, env)
        self._check_finite()

    def _guarded(self, call: Callable[..., None], index: int, *args: Any) -> None:
        lane = self.rows["at"][self.slot] = self.first + index
        try:
            call(index, *args)
        except LaneError:
            raise
        except Exception as error:
            raise LaneError(int(lane), f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}") from error

    def _begin(self, index: int, env: gymnasium.Env, seed: int | None) -> None:
        obs, info = self._parts(index, env.reset(seed=seed), RESET)
        self._write(index, obs, info, 0.0, (False, False, False))

    def _advance(self, index: int, env: gymnasium.Env) -> None:
        found = env.step(self.decode(self.first + index))
        obs, reward, terminated, truncated, info = self._parts(index, found, STEP)
        cut = bool(truncated) and not terminated  # Gymnasium's TimeLimit says both of a last step that ends by itself
        self._write(index, obs, info, reward, (bool(terminated), cut, True))

    def _parts(self, index: int, found: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        if isinstance(found, tuple) and len(found) == len(names):
            return found
        gave = f"{len(found)} values" if isinstance(found, tuple) else f"one value ({type(found).__name__})"
        raise LaneError(self.first + index, f"returned {gave}; return {', '.join(names)}.")

    def _write(self, index: int, obs: Any, info: dict[str, Any], reward: Any, flags: tuple[bool, bool, bool]) -> None:
        lane, rows = self.first + index, self.rows
        for leaf in self.obs:
            value = obs
            for part in leaf.path:
                value = value[part]
            if np.shape(value) != leaf.shape:
                raise LaneError(
                    lane, f"returned {leaf.name} of shape {np.shape(value)}, but its space has shape {leaf.shape}."
                )
            leaf.array[lane] = np.subtract(value, leaf.start) if leaf.shifted else value
        rows["reward"][lane] = reward
        rows["terminated"][lane], rows["truncated"][lane], rows["valid"][lane] = flags
        self.ended[index] = flags[0] or flags[1]
        for column, name in enumerate(self.info):
            rows["info"][lane, column] = info.get(name, math.nan)

    def _check_finite(self) -> None:
        """Refuse NaN and infinite numbers; one sum an array is cheap, and only a strange one is looked into."""
        for name, array in (("reward", self.rows["reward"]), *((leaf.name, leaf.array) for leaf in self.finite)):
            part = array[self.span]
            if not math.isfinite(np.add.reduce(part, axis=None)):
                bad = ~np.isfinite(part.reshape(len(part), -1)).all(1)
                if bad.any():
                    index = int(bad.argmax())
                    raise LaneError(self.first + index, f"returned NaN or an infinite number in {name}: {part[index]}.")

    def render(self) -> np.ndarray:
        """The first lane's picture; where that is of numbers from 0 to 1, as MinAtar's, they become bytes."""
        picture = np.asarray(self.envs[0].render())
        if picture.dtype.kind == "f" and picture.size and 0 <= picture.min() <= picture.max() <= 1:
            return np.rint(255 * picture).astype(np.uint8)
        return picture

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _decoder(space: spaces.Space, index: Iterator[int], rows: dict[str, np.ndarray]) -> Callable[[int], Any]:
    """A function from a lane to its action in the environment's own form; leaves are numbered in the space's order."""
    if isinstance(space, spaces.Dict):
        children = {key: _decoder(child, index, rows) for key, child in space.spaces.items()}
        return lambda lane: {key: child(lane) for key, child in children.items()}
    if isinstance(space, spaces.Tuple):
        parts = [_decoder(child, index, rows) for child in space.spaces]
        return lambda lane: tuple(part(lane) for part in parts)
    array, start, dtype = rows[f"action{next(index)}"], start_of(space, is_action=True), np.dtype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return lambda lane: dtype.type(array[lane] + start)
    if np.any(start):
        return lambda lane: (array[lane] + start).astype(dtype)
    return lambda lane: array[lane].astype(dtype)


def make_envs(maker: Maker, lanes: range, render: bool, at: np.ndarray) -> list[gymnasium.Env]:
    """Make a copy for each of `lanes`, lane 0's able to draw if `render`; `at[0]` tells which is being made."""
    if render:  # into arrays: SDL needs no window, and says nothing of a missing one
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    envs = []
    for lane in lanes:
        at[0] = lane
        try:
            envs.append(maker(render=render and lane == 0))
        except Exception as error:
            hint = "; to be drawn it has to take render_mode, and to have render()" * ("render_mode" in str(error))
            text = f"could not be made: {type(error).__name__}: {error}{hint}\n{traceback.format_exc()}"
            raise LaneError(lane, text) from error
    return envs


# --- a worker process -------------------------------------------------------------------------------------------------


def serve(
    maker: Maker, layout: list[Field], memory: Any, first: int, count: int, slot: int, options: dict[str, Any],
    pipe: Connection,
) -> None:  # fmt: skip
    """A worker's life: make the lanes, then do what each byte asks and answer with one, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    rows = arrays(layout, memory)
    try:
        envs = make_envs(maker, range(first, first + count), options["render"], rows["at"][slot:])
        block = Block(envs, first, rows, slot, options["info"])
        pipe.send_bytes(b"k")
        while True:
            match pipe.recv_bytes():
                case b"s":
                    block.step()
                case b"r":
                    block.reset(seeded=False)
                case b"R":
                    block.reset(seeded=True)
                case b"v":
                    picture = np.ascontiguousarray(block.render(), dtype=np.uint8)
                    pipe.send_bytes(np.asarray(picture.shape, dtype=np.int64).tobytes())
                    pipe.send_bytes(picture.tobytes())
            pipe.send_bytes(b"k")
    except LaneError as error:
        with contextlib.suppress(OSError):  # another worker may have failed first, at which the parent closed its end
            pipe.send_bytes(f"{error.lane} {error.text}".encode())
    except (EOFError, OSError):
        return  # the parent has closed its end


def _leave_with_parent() -> None:
    """End this process when its parent is gone, however that died and whatever the environment is doing."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

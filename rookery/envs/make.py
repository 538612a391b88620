"""One way to any environment: by id, on the fastest backend that has it, on any device."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rookery.envs.vector import Obs, Step, VectorEnv

__all__ = ["BACKENDS", "OnDevice", "env_ids", "make_env", "pick"]

BACKENDS = ("tensor", "envpool", "gym")

# Lanes from which the tensor backend is no slower on a CPU, and EnvPool takes a second to import. Measured 2026-11-21
# on one core, torch 2.13, EnvPool 1.2.5 with one thread, µs a step of all lanes (tensor / envpool): CartPole 70/53 at
# 8 lanes, 72/71 at 32, 74/96 at 64, 82/240 at 256, 114/818 at 1,024; MountainCar 94/93 at 64; Pendulum 111/101 at 64,
# 113/147 at 128; Acrobot, whose Runge-Kutta steps are many operations, 417/122 at 64, 434/200 at 128. (Gymnasium in
# place: CartPole 21 at 1, 77 at 8.)
TENSOR_FROM = {"CartPole-v1": 32, "MountainCar-v0": 64, "Acrobot-v1": 512}
TENSOR_FROM_ELSE = 128

NO_LIMIT = {"envpool": 2**31 - 1, "gym": -1}  # max_episode_steps that never truncates


def make_env(
    id: str | VectorEnv | gymnasium.Env | Callable[..., gymnasium.Env],
    envs: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **kwargs: Any,
) -> VectorEnv:
    """Make `envs` lanes of an environment, without transforms.

    Args:
        id: an id, with `tensor:`, `envpool:` or `gym:` before it to force that backend; or `module:Name`, a class or
            function to import; or a Gymnasium environment, a class or function that makes one; or a VectorEnv, which
            is returned as it is.
        envs: lanes.
        device: where observations arrive. Only tensor environments also run there; the others' are copied.
        seed: of the first episodes and all that follow.
        kwargs: what the backend takes (`threads`, `workers`, `render` ...) and the environment's own settings; on
            every backend `max_steps`, after which an episode is truncated (None: never).

    Raises:
        ValueError: for an id that no backend, or not the forced one, has; names the nearest.
    """
    if isinstance(id, VectorEnv):
        return id
    device = torch.device(device)
    if not isinstance(id, str):
        return _on(device, _own(id, envs, seed, **kwargs))
    backend, _, name = pick(id, envs, device).partition(":")
    if backend not in BACKENDS:  # `module:Name`, which importing the module makes, or registers with Gymnasium
        own = _imported(id)
        if own is not None:
            return _on(device, _own(own, envs, seed, **kwargs))
        backend, name = "gym", id
    if backend == "tensor":
        from rookery.envs.tensor import make_tensor_env

        kwargs.pop("render", None)  # they can always draw themselves
        tensor_env = make_tensor_env(name, envs, device, **kwargs)
        tensor_env.reset(seed)
        return tensor_env
    if "max_steps" in kwargs:
        limit = kwargs.pop("max_steps")
        kwargs["max_episode_steps"] = NO_LIMIT[backend] if limit is None else limit
    if backend == "envpool":
        from rookery.envs.envpool import EnvPoolEnv

        return _on(device, EnvPoolEnv(name, envs, seed, **kwargs))
    from rookery.envs.gym import GymEnv

    return _on(device, GymEnv(name, envs, seed, **kwargs))


def pick(id: str, lanes: int, device: torch.device | str = "cpu", compile: bool = False) -> str:
    """The id with the fastest backend for so many lanes before it; as it is where it names one itself, or a module.

    Where acting is compiled that is the tensor backend: its steps are compiled along.

    Raises:
        ValueError: for an id that no backend has; names the nearest.
    """
    return id if ":" in id else f"{_fastest(id, lanes, torch.device(device), compile)}:{id}"


def env_ids(backend: str | None = None) -> list[str]:
    """The ids of one backend, or of all, each id once."""
    if backend is None:
        return list(dict.fromkeys(id for each in BACKENDS for id in env_ids(each)))
    if backend == "tensor":
        from rookery.envs.tensor import TENSOR_ENVS

        return list(TENSOR_ENVS)
    if backend == "envpool":
        from rookery.envs.envpool import envpool_ids

        return envpool_ids()
    if backend == "gym":
        from rookery.envs.gym import gym_ids

        return gym_ids()
    raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}.")


def _imported(id: str) -> Any:
    """What `module:Name` names, if it is a class or function; None for ids that a module registers with Gymnasium."""
    module, _, name = id.partition(":")
    if not name.isidentifier() or "/" in module:
        return None
    from rookery.envs.gym import imported

    return getattr(imported(module), name, None)


def _own(source: gymnasium.Env | Callable[..., gymnasium.Env], lanes: int, seed: int, **kwargs: Any) -> VectorEnv:
    from rookery.envs.gym import GymEnv

    if "max_steps" in kwargs:
        raise ValueError(
            f"max_steps={kwargs['max_steps']} is for ids; wrap your own environment in gymnasium.wrappers.TimeLimit."
        )
    return GymEnv(source, lanes, seed, **kwargs)


def _fastest(id: str, lanes: int, device: torch.device, compile: bool = False) -> str:
    few = device.type == "cpu" and not compile and lanes < TENSOR_FROM.get(id, TENSOR_FROM_ELSE)
    if id in env_ids("tensor") and not few:
        return "tensor"  # without a look at EnvPool, which takes a second to import
    having = [backend for backend in BACKENDS if id in env_ids(backend)]
    if not having and "/" in id:
        from rookery.envs.gym import register_namespace

        register_namespace(id)
        having = ["gym"] if id in env_ids("gym") else []
    if not having:
        known = env_ids()
        near = difflib.get_close_matches(id, known, 3, cutoff=0.4) or difflib.get_close_matches(id, known, 3, 0.0)
        own = "One of your own is named module:Name, after the file it is in and its class or function."
        raise ValueError(f"no backend has an environment {id!r}; nearest: {', '.join(near)}. {own}")
    return next((backend for backend in having if backend != "tensor"), "tensor")


def _on(device: torch.device, env: VectorEnv) -> VectorEnv:
    return env if device.type == "cpu" else OnDevice(env, device)


class OnDevice(VectorEnv):
    """An environment on the CPU whose tensors arrive on another device."""

    def __init__(self, env: VectorEnv, device: torch.device | str) -> None:
        self.env, self.device = env, torch.device(device)
        self.spec, self.lanes = env.spec, env.lanes
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            env.close()
            raise ValueError(f"device={str(device)!r} is not to be had here ({error}); use 'cpu'.") from error

    def reset(self, seed: int | None = None) -> Obs:
        return self._there(self.env.reset(seed))

    def step(self, action: Obs) -> Step:
        step = self.env.step(action.to("cpu"))
        info = {name: self._there(value) for name, value in step.info.items()}
        columns = (self._there(column) for column in step[:-1])
        return Step(*columns, info=info)  # type: ignore[misc, arg-type]  # one iterable of the five columns

    def _there(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        return self.env.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.env.load_state(state)

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

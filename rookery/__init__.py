"""Rookery: distributed reinforcement learning for PyTorch.

`train("ppo", "CartPole-v1", steps=150_000)` gives a run; `load(path)` brings one back. Everything is imported when it
is first used, so that `import rookery` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "train": "rookery.train",
    "resume": "rookery.train",
    "rerun": "rookery.rerun",
    "load": "rookery.run",
    "evaluate": "rookery.run",
    "Run": "rookery.run",
    "Policy": "rookery.run",
    "Options": "rookery.settings",
    "make_env": "rookery.envs.make",
    "VectorEnv": "rookery.envs.vector",
    "check_env": "rookery.envs.check",
    "A2C": "rookery.algorithms.a2c",
    "C51": "rookery.algorithms.c51",
    "D4PG": "rookery.algorithms.d4pg",
    "DDPG": "rookery.algorithms.ddpg",
    "DQN": "rookery.algorithms.dqn",
    "IMPALA": "rookery.algorithms.impala",
    "IQN": "rookery.algorithms.iqn",
    "MPO": "rookery.algorithms.mpo",
    "PPO": "rookery.algorithms.ppo",
    "QRDQN": "rookery.algorithms.qr_dqn",
    "SAC": "rookery.algorithms.sac",
    "TD3": "rookery.algorithms.td3",
    "SYSTEMS": "rookery.systems",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"rookery has no {name!r}; it has {', '.join(_WHERE)}.")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """`rookery.train` is the function, though importing the module of that name would put the module there."""
        is_function = name in ("train", "rerun") and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_function else value)


sys.modules[__name__].__class__ = _Package

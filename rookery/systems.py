"""The table of systems: which algorithm runs on which topology. A published system is a row here, not a code base."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rookery.algorithms.base import Algorithm

__all__ = ["SYSTEMS", "System", "find", "recipe"]


@dataclass(frozen=True)
class System:
    """A named composition."""

    name: str
    algorithm: str  # module:class, imported when it is used
    topology: str  # module below rookery.topologies
    about: str

    def algorithm_class(self) -> type[Algorithm]:
        """The algorithm's dataclass."""
        module, _, name = self.algorithm.partition(":")
        return getattr(import_module(module), name)


TABLE = (
    System("ppo", "rookery.algorithms.ppo:PPO", "actors_learner", "clipped surrogate, several epochs an unroll"),
    System("a2c", "rookery.algorithms.a2c:A2C", "actors_learner", "one policy-gradient step an unroll"),
)
SYSTEMS = {system.name: system for system in TABLE}


def find(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: for an unknown one; names the nearest.
    """
    if name.lower() in SYSTEMS:
        return SYSTEMS[name.lower()]
    near = difflib.get_close_matches(name.lower(), SYSTEMS, 3, 0.5) or list(SYSTEMS)
    raise ValueError(f"no system {name!r}; nearest: {', '.join(near)} (`rookery list systems` shows all).")


def recipe(system: str, env: str) -> dict[str, Any]:
    """Tuned settings for this system on this environment; empty where there are none."""
    return dict(_recipes(system).get(env.partition(":")[2] if env.split(":")[0] in BACKENDS else env, {}))


BACKENDS = ("tensor", "envpool", "gym")


@cache
def _recipes(system: str) -> dict[str, dict[str, Any]]:
    file = resources.files("rookery.recipes") / f"{system}.toml"
    return tomllib.loads(file.read_text()) if file.is_file() else {}

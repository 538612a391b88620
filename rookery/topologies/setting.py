"""What every role of a run is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rookery.data.plan import OnPolicy, ReplayPlan
from rookery.nn.compiled import fast_bf16

if TYPE_CHECKING:
    from collections.abc import Callable

    from rookery.algorithms.base import Algorithm, PolicyNet
    from rookery.envs.spec import EnvSpec
    from rookery.envs.vector import VectorEnv

__all__ = ["ReplaySetting", "Setting", "crosses"]


@dataclass(frozen=True)
class ReplaySetting:
    """Where replay lies, and what it knows of the environment."""

    memory: Literal["ram", "shared"] | Path = "ram"  # a path is the folder of memory-mapped files
    device: str = "cpu"
    save: bool = True  # in checkpoints
    stack: int = 1  # frames of an observation, each stored once
    spec: EnvSpec | None = None  # of the environment


@dataclass(frozen=True)
class Setting:
    """What every role of a run is built from."""

    algorithm: Algorithm
    make_env: Callable[..., VectorEnv]  # from the number of lanes and a seed; `device` puts it elsewhere
    make_net: Callable[..., PolicyNet]  # always with the same weights
    lanes: int  # an actor's
    total_steps: int
    log_every: int  # steps
    eval_every: int  # steps; 0 for never
    eval_episodes: int
    compile: bool = False
    graphs: bool = False
    bf16: bool = False
    replay: ReplaySetting = field(default_factory=ReplaySetting)
    actors_on: dict[str, str] = field(default_factory=dict)  # the `device` of actors, if they are not on the learner's

    @property
    def unroll_plan(self) -> OnPolicy:
        """Which unrolls the algorithm asks for."""
        assert isinstance(self.algorithm.plan, OnPolicy)  # for the type checker: replay has another topology
        return self.algorithm.plan

    @property
    def replay_plan(self) -> ReplayPlan:
        """What the algorithm asks of replay."""
        assert isinstance(self.algorithm.plan, ReplayPlan)  # for the type checker: others have no replay
        return self.algorithm.plan

    def actor_env(self, lanes: int, seed: int) -> VectorEnv:
        """An actor's lanes."""
        return self.make_env(lanes, seed, **self.actors_on)

    def actor_net(self) -> PolicyNet:
        """An actor's network."""
        return self.make_net(**self.actors_on)

    @property
    def actor_means(self) -> dict[str, bool]:
        """`means` of an actor, that on a CPU of its own has no CUDA graphs, and bfloat16 where that is fast."""
        if not self.actors_on:
            return self.means
        return {"compile": self.compile, "graphs": False, "bf16": self.bf16 and fast_bf16("cpu")}

    @property
    def means(self) -> dict[str, bool]:
        """How acting and learning are computed."""
        return {"compile": self.compile, "graphs": self.graphs, "bf16": self.bf16}


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every != after // every

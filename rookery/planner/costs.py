"""What units of work cost, what is planned, and the cluster that it is planned for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from rookery.data.plan import OnPolicy, Refused, ReplayPlan

__all__ = ["Cluster", "Costs", "Work"]


@dataclass(frozen=True)
class Costs:
    """Seconds of one core that units of work take, where nothing else is said; an actor's are for all its lanes."""

    environment: float  # a step of the lanes
    update: tuple[tuple[float, float], ...]  # rounds of updates: how many unrolls (of replay: batches), and the seconds
    inference: float = 0.0  # a forward pass for the lanes
    asleep: float = 0.0  # seconds of a step of the lanes that take no core
    unroll: float = 0.0  # an unroll besides its steps
    load: float = 0.0  # to act with new weights
    publish: float = 0.0  # to copy weights for others
    optimise: float = 0.0  # an optimiser's step, which is part of an update (parameter server)
    insert: float = 0.0  # to store an unroll in replay
    sample: float = 0.0  # to draw a batch from replay, and to change its priorities
    message: float = 0.0  # to say or to ask something
    answer: float = 0.0  # to hear it, for the process that keeps the words
    hop: float = 0.0  # seconds of a question and its answer that take no core
    unroll_bytes: float = 0.0
    weights_bytes: float = 0.0
    valid: float = 1.0  # the share of rows that count as steps
    crowding: float = 1.0  # times as long as that when all cores of a host are busy
    slower: Mapping[str, float] = field(default_factory=dict)  # times as long in a run, by kind of role

    def round(self, size: float) -> float:
        """Seconds of a round of updates: between two measured sizes, or beyond the last two, on a straight line."""
        (least, first), *_ = points = sorted(self.update)
        if size <= least or len(points) == 1:
            return first * size / least
        (low, before), (high, after) = next((two for two in pairwise(points) if size <= two[1][0]), points[-2:])
        return before + (after - before) * (size - low) / (high - low)


@dataclass(frozen=True)
class Work:
    """What roles do: a topology, an algorithm's plan, an actor's lanes."""

    topology: str  # module below rookery.topologies
    plan: OnPolicy | ReplayPlan
    lanes: int
    shards: int = 1  # of a parameter server, or of replay

    @property
    def rows(self) -> int:
        """T, the steps of an unroll."""
        return self.plan.unroll if isinstance(self.plan, OnPolicy) else self.plan.rows(self.lanes)

    def batch(self, actors: int) -> int:
        """The most that a round of updates learns from: unrolls, or batches of samples."""
        if isinstance(self.plan, ReplayPlan):
            return self.plan.updates(self.lanes)
        return self.plan.unrolls or (1 if self.topology == "hogwild" else actors)


@dataclass(frozen=True)
class Cluster:
    """Hosts and the network between them. The first has the learner, and what keeps the words."""

    cores_per_host: int = 0  # 0 puts every role on one host, with as many cores as this machine
    actors_per_host: int = 0  # 0 takes one a core, and one fewer where the learner is
    bandwidth: float = 10.0  # Gbit/s, into the learner's host and out of it
    latency: float = 0.1  # ms, one way between hosts
    mtbf: float = 0.0  # hours between two deaths of a host, on average; 0 for never
    restart: float = 60.0  # seconds from a host's death until it works again
    price: float = 0.0  # of a core for an hour, in whatever currency

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise Refused(f"{name}={value} has to be a finite number, 0 or more.")
        if not self.bandwidth:
            raise Refused("bandwidth=0 lets nothing through; use a number above 0, in Gbit/s.")

    @property
    def cores(self) -> int:
        """Of each host."""
        return self.cores_per_host or len(os.sched_getaffinity(0))

    def places(self, actors: int) -> list[int]:
        """The host of each actor."""
        if not self.cores_per_host:
            return [0] * actors
        each = self.actors_per_host or self.cores_per_host
        first = self.actors_per_host or self.cores_per_host - 1
        return [0 if index < first else 1 + (index - first) // each for index in range(actors)]

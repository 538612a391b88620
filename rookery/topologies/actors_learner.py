"""Actors and a learner: actors fill unrolls, the learner learns from each once.

    actor:   wait for a free slot; wait for newer weights, or take those there are; fill the slot; put it.
    learner: publish; get unrolls; update; release; publish ...

Actors that wait for the newest weights do what is on-policy, and the run does not depend on who is faster. Those that
take what there is wait for the learner only when the queue is full: their unrolls lag behind by some versions, which
the loss has to correct for (IMPALA, APPO).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rookery.actor import Collector, Unroll
from rookery.data.plan import OnPolicy, ReplayPlan
from rookery.evaluator import Evaluator
from rookery.learner import Learner
from rookery.runtimes.words import Graph, Queue, Role, Weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from rookery.algorithms.base import Algorithm, PolicyNet
    from rookery.envs.spec import GoalReward
    from rookery.envs.vector import VectorEnv

__all__ = ["ReplaySetting", "Setting", "actor", "evaluator", "learner", "wire"]


@dataclass(frozen=True)
class ReplaySetting:
    """Where replay lies, and what it knows of the environment."""

    memory: Literal["ram", "shared"] | Path = "ram"  # a path is the folder of memory-mapped files
    device: str = "cpu"
    save: bool = True  # in checkpoints
    stack: int = 1  # frames of an observation, each stored once
    goal_reward: GoalReward | None = None


@dataclass(frozen=True)
class Setting:
    """What every role of a run is built from."""

    algorithm: Algorithm
    make_env: Callable[[int, int], VectorEnv]  # from the number of lanes and a seed
    make_net: Callable[[], PolicyNet]  # always with the same weights
    lanes: int  # an actor's
    total_steps: int
    log_every: int  # steps
    eval_every: int  # steps; 0 for never
    eval_episodes: int
    compile: bool = False
    graphs: bool = False
    bf16: bool = False
    replay: ReplaySetting = field(default_factory=ReplaySetting)

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

    @property
    def means(self) -> dict[str, bool]:
        """How acting and learning are computed."""
        return {"compile": self.compile, "graphs": self.graphs, "bf16": self.bf16}


async def actor(role: Role, setting: Setting, weights: Weights, unrolls: Queue) -> None:
    """Collect with the newest weights only, or with those there are."""
    algorithm, env = setting.algorithm, setting.make_env(setting.lanes, role.seed)
    net, plan = setting.make_net(), setting.unroll_plan
    collector = role.keep(Collector(algorithm, net, env, plan.unroll, role.seed, **setting.means))
    version = 0
    try:
        while True:
            slot = await unrolls.slot(collector.slot, role.index)
            version, values, steps = await (weights.latest() if plan.stale else weights.newer_than(version))
            if version != collector.version:
                collector.load(version, values)
            valid = collector.fill(slot)
            unrolls.put(slot)
            if crosses(collector.steps - valid, collector.steps, setting.log_every) and collector.returns:
                role.report(steps + valid * (not plan.stale), collector.episodes())
    finally:
        env.close()


async def learner(role: Role, setting: Setting, count: int, weights: Weights, unrolls: Queue) -> None:
    """Update with so many unrolls at once."""
    net = setting.make_net()
    learner = role.keep(Learner(setting.algorithm, net, setting.total_steps, role.seed, **setting.means))
    role.advance(learner.steps)
    weights.publish(learner.version, learner.values(), learner.steps)
    while learner.steps < setting.total_steps:
        slots = await unrolls.get(count)
        before = learner.steps
        batch = joined(slots)
        learner.update(batch, before + int(batch["valid"][:-1].sum()))
        if crosses(before, learner.steps, setting.log_every):
            lags = [learner.version - 1 - int(slot.version) for slot in slots]
            lag = {"policy_lag": sum(lags) / len(lags), "policy_lag_max": max(lags)}
            role.report(learner.steps, {**learner.metrics(), **lag})
        unrolls.release(slots)
        role.advance(learner.steps)
        weights.publish(learner.version, learner.values(), learner.steps)


async def evaluator(role: Role, setting: Setting, weights: Weights) -> None:
    """Play episodes every so many steps."""
    env = setting.make_env(setting.eval_episodes, role.seed)
    evaluator = role.keep(Evaluator(setting.algorithm, setting.make_net(), env, role.seed, bf16=setting.bf16))
    evaluator.due = evaluator.due or setting.eval_every
    version = 0
    try:
        while True:
            version, values, steps = await weights.newer_than(version)
            if steps >= evaluator.due:
                evaluator.due = (steps // setting.eval_every + 1) * setting.eval_every
                evaluator.load(values)
                role.report(steps, evaluator.play(setting.eval_episodes).summary())
    finally:
        env.close()


def joined(slots: list[Unroll]) -> dict[str, Any]:
    """Unrolls side by side, as one batch of all their lanes; a single one is not copied."""
    batches = [slot.batch() for slot in slots]
    if len(batches) == 1:
        return batches[0]
    return {name: torch.cat([batch[name] for batch in batches], dim=int(name != "state")) for name in batches[0]}


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every != after // every


def wire(setting: Setting, seed: int, actors: int = 1) -> Graph:
    """The whole topology."""
    graph = Graph(seed)
    weights = graph.word("weights", "weights")
    plan = setting.unroll_plan
    count = plan.unrolls or actors
    # One unroll of each actor, or one to fill while the learner has one, and as many as a batch takes.
    unrolls = graph.word("queue", "unrolls", each=1 + math.ceil(count / actors) if plan.stale else 1)
    for index in range(actors):
        graph.role(actor, index, setting=setting, weights=weights, unrolls=unrolls)
    graph.role(learner, setting=setting, count=count, weights=weights, unrolls=unrolls, ends_run=True)
    if setting.eval_every:
        graph.role(evaluator, setting=setting, weights=weights)
    return graph

"""Hogwild: workers that each act and learn on a copy of shared weights, and wait for nobody.

    worker: copy the shared weights; act for some steps; step the shared weights by the copy's gradient; copy ...

Algorithm S3 of Mnih et al. 2016 (A3C, arXiv 1602.01783). Others have stepped meanwhile, as often as there are other
workers, about; that is not corrected for. With many lanes a worker these are the asynchronous learners of Stooke and
Abbeel 2018 (arXiv 1803.02811), but for their locks, which a killed process would hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rookery.actor import Collector
from rookery.algorithms.base import Algorithm, OnPolicy, Refused
from rookery.learner import Learner
from rookery.nn.shared import Shared, new_memory
from rookery.runtimes.words import Graph, Role, Weights
from rookery.topologies.actor_learner import ActorLearner
from rookery.topologies.actors_learner import evaluator
from rookery.topologies.setting import Setting, crosses

__all__ = ["Worker", "check", "learner", "wire"]


async def learner(role: Role, setting: Setting, workers: int, memory: Weights, weights: Weights) -> None:
    """Act and learn until all workers together have learnt from the run's steps."""
    algorithm, env = setting.algorithm, setting.make_env(setting.lanes, role.seed)
    collector = Collector(algorithm, setting.make_net(), env, setting.unroll_plan.unroll, role.seed, **setting.means)
    learner = Learner(algorithm, setting.make_net(), setting.total_steps, role.seed, **setting.means)
    worker = role.keep(Worker(collector, learner))
    slot = collector.slot()
    try:
        if role.index == 0:
            memory.publish(1, new_memory(learner.flat, algorithm.optimizer, workers), 0)
        shared = Shared(learner.flat, algorithm.optimizer, (await memory.latest()).values, role.index)
        if shared.version != learner.version:  # it died, and begins again with an older copy
            shared.pull()
        while shared.steps < setting.total_steps:
            collector.load(shared.version, learner.values())
            valid = collector.fill(slot)
            before, learner.steps = learner.steps, shared.steps
            for gradient in learner.gradients(slot.batch(), learner.steps + valid):
                norm = learner.clip(gradient)
                learner.lags.add([shared.step(gradient.moves, learner.lr)])
                learner.count(gradient, norm)
                shared.pull()
            shared.finish(valid)
            learner.version = shared.version
            if crosses(before, learner.steps, setting.log_every) and (row := worker.summary(shared)):
                role.report(learner.steps, row)
            if role.index == 0 and setting.eval_every and crosses(before, learner.steps, setting.eval_every):
                weights.publish(shared.version, learner.values(), learner.steps)
            role.advance(shared.steps)
            await memory.latest()
    finally:
        env.close()


@dataclass
class Worker(ActorLearner):
    """What a worker keeps; the optimiser's statistics are in the shared memory."""

    collector: Collector
    learner: Learner

    def state(self) -> dict[str, Any]:
        return {**self.learner.state(), "optimizer": {}, "collector": self.collector.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.learner.load_state(state)
        self.collector.load_state(state["collector"])

    def summary(self, shared: Shared) -> dict[str, Any]:
        """A row of metrics: its episodes, and of the first worker how learning goes."""
        if shared.index:
            return self.collector.episodes()
        return {**self.learner.metrics(), "updates": shared.updates, **self.collector.episodes()}


def check(algorithm: Algorithm, lanes: int, learners: int) -> None:
    """Refuse what is not learnt from a worker's own unroll.

    Raises:
        Refused: for replay, and for batches of several unrolls.
    """
    plan = algorithm.plan
    if not isinstance(plan, OnPolicy):
        raise Refused(
            f"{type(algorithm).__name__} learns from replay, and hogwild's workers from the unroll each has just "
            "filled; use it as actors_replay_learner."
        )
    if plan.unrolls > 1:
        raise Refused(f"unrolls={plan.unrolls}: a worker of hogwild learns from one unroll, its own; leave it out.")


def wire(setting: Setting, seed: int, learners: int = 1) -> Graph:
    """The whole topology."""
    graph = Graph(seed)
    memory, weights = graph.word("weights", "memory", once=True), graph.word("weights", "weights")
    for index in range(learners):
        own: dict[str, Any] = {"setting": setting, "workers": learners, "memory": memory, "weights": weights}
        graph.role(learner, index, ends_run=True, **own)
    if setting.eval_every:
        graph.role(evaluator, setting=setting, weights=weights)
    return graph

"""Data-parallel learners on replay: one samples and steps, replicas differentiate, each on its share of the samples.

    learner: for each batch of what was sampled: ask every replica for a gradient; step by their mean.
    replica: be where the learner is; differentiate on the samples that it asks about; answer.

Shares are of equal size, so K learners do what one does with all of the batch, but that each draws its own noise where
a loss has some. All that a gradient depends on is in the slot that asks for it, so replicas keep nothing but their
random generators: what a dead one did not answer, the next one does, and what a dead learner asked nobody hears of.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rookery.algorithms.base import Algorithm, Batch, ReplayPlan
from rookery.learner import Learner, minibatches, part_of
from rookery.runtimes.boxes import Parcel
from rookery.runtimes.words import Calls, Graph, Role
from rookery.topologies.replicas import check_evenly, pooled
from rookery.topologies.setting import Setting

__all__ = ["Team", "check", "replica", "wire"]


async def replica(role: Role, setting: Setting, gradients: Calls) -> None:
    """Answer with one gradient after another."""
    learner = role.keep(Replica(setting.algorithm, setting.make_net(), setting.total_steps, role.seed, **setting.means))
    while True:
        for slot, answer in await gradients.requests(1):
            asked = slot.content
            updates, steps = asked["at"].tolist()
            learner.join(updates, steps, asked["whole"])
            samples = {name: value.to(learner.device) for name, value in asked["samples"].items()}
            gradient = next(learner.gradients(samples, steps), None)
            if gradient is None:
                raise ValueError("a loss that stops before its batch ends cannot be shared out; use learners=1.")
            loss = gradient.loss
            judged = {} if loss.priorities is None else {"priorities": loss.priorities}
            slot.fill({"gradient": learner.flat.gradients, **judged})
            answer({"metrics": {name: float(value) for name, value in loss.metrics.items()}, "judged": bool(judged)})


class Replica(Learner):
    """A learner that is told where to be: its own is the generator of its noise."""

    def state(self) -> dict[str, Any]:
        return {"shuffle": self.generator.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["shuffle"])


class Team:
    """What a learner leads: a `Calls` for each replica."""

    def __init__(self, gradients: tuple[Calls, ...]) -> None:
        self.gradients = gradients
        self._slots: list[Parcel] = []  # of each

    async def update(self, learner: Learner, samples: Batch, steps: int) -> torch.Tensor | None:
        """What `Learner.update` does, by the replicas' gradients."""
        plan, priorities = learner.algorithm.plan, []
        assert isinstance(plan, ReplayPlan)
        size = plan.batch // len(self.gradients)
        rows = torch.tensor(size)
        learner.anneal()
        for batch in minibatches(plan, samples, learner.generator):
            at = {"at": torch.tensor([learner.updates, learner.steps]), "whole": learner.whole()}
            shares = [part_of(plan, batch, place * size, size) for place in range(len(self.gradients))]
            if not self._slots:
                answer = {"gradient": learner.flat.gradients, "priorities": shares[0]["weight"]}
                like = {**at, "samples": shares[0], **answer}
                self._slots = [await calls.slot(partial(Parcel, like), 0) for calls in self.gradients]
            asked = []
            for slot, share, calls in zip(self._slots, shares, self.gradients, strict=True):
                slot.fill({**at, "samples": share})
                asked.append(calls.ask(slot))
            said = [
                {**slot.content, "rows": rows, **await answer} for slot, answer in zip(self._slots, asked, strict=True)
            ]
            learner.minimise(pooled(learner, said))
            priorities += [each["priorities"].to(learner.device, copy=True) for each in said if each["judged"]]
        return learner.conclude(samples, steps, priorities)


def check(algorithm: Algorithm, learners: int) -> None:
    """Refuse a batch that so many learners cannot share evenly."""
    plan = algorithm.plan
    assert isinstance(plan, ReplayPlan)
    check_evenly("learners", learners, "batch", plan.batch)


def wire(graph: Graph, setting: Setting, learners: int) -> dict[str, Any]:
    """Add so many replicas, or none for one learner; gives what `learner` asks them by."""
    gradients = tuple(graph.word("calls", f"gradients_{index}") for index in range(learners if learners > 1 else 0))
    for index, calls in enumerate(gradients):
        graph.role(replica, index, setting=setting, gradients=calls)
    return {"gradients": gradients}

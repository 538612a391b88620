"""Data-parallel learners on replay: one samples and steps, replicas differentiate, each on its share of the samples.

    learner: for each batch of what was sampled: order a gradient of every replica; step by their mean.
    replica: get an order; differentiate on its samples with the newest parameters; put the gradient.

Shares are of equal size, so K learners do what one does with all of the batch. A gradient says which samples it is of,
and for which update: one that nobody waits for, which a death leaves behind, is dropped. An order stays in its queue
until the gradient is on its way, so whoever takes a dead one's place is given it again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rookery.algorithms.base import Algorithm, Batch, Refused, ReplayPlan
from rookery.learner import Gradient, Learner, minibatches, part_of
from rookery.runtimes.boxes import Parcel
from rookery.runtimes.words import Graph, Queue, Role, Weights, WordSpec
from rookery.topologies.replicas import Leader, pooled
from rookery.topologies.setting import Setting

__all__ = ["check", "replica", "update", "wire"]


async def replica(
    role: Role, setting: Setting, replicas: int, parameters: Weights, orders: Queue, gradients: Queue
) -> None:
    """Differentiate on one share of samples after another."""
    learner = role.keep(Learner(setting.algorithm, setting.make_net(), setting.total_steps, role.seed, **setting.means))
    while True:
        (order,) = await orders.get(1)
        with role.unit():
            version, values, steps = await parameters.latest()
            if version == int(order.content["update"]):  # else it is of a learner that has died since
                learner.join(version - 1, values, steps)
                samples = {name: value.to(learner.device) for name, value in order.content["samples"].items()}
                gradient = next(learner.gradients(samples, steps))
                own = {"update": torch.tensor(version), "replica": torch.tensor(role.index)}
                share = {**own, **share_of(learner, gradient, samples)}
                moved = sum(1 << place for place, name in enumerate(learner.parts) if name in gradient.moves)
                parcel = await gradients.slot(partial(Parcel, share), moved * replicas + role.index)  # metrics differ
                parcel.fill(share)
                gradients.put(parcel)
            orders.release([order])


async def update(
    learner: Leader, samples: Batch, steps: int, parameters: Weights, orders: tuple[Queue, ...], gradients: Queue
) -> torch.Tensor | None:
    """What `Learner.update` does, by the replicas' gradients."""
    plan, priorities = learner.algorithm.plan, []
    assert isinstance(plan, ReplayPlan)
    learner.anneal()
    for batch in minibatches(plan, samples, learner.generator):
        number, size = learner.updates + 1, plan.batch // len(orders)
        parameters.publish(number, learner.whole(), learner.steps)
        shares = [part_of(plan, batch, place * size, size) for place in range(len(orders))]
        for queue, share in zip(orders, shares, strict=True):
            order = {"update": torch.tensor(number), "samples": share}
            parcel = await queue.slot(partial(Parcel, order), 0)
            parcel.fill(order)
            queue.put(parcel)
        parcels = await gathered(learner, [share["index"].cpu() for share in shares], gradients)
        found = [parcel.content for parcel in parcels]
        learner.minimise(pooled(learner, found))
        priorities += [content["priorities"].clone() for content in found]
        gradients.release(parcels)
    return learner.conclude(samples, steps, priorities if plan.alpha else [])


def share_of(learner: Learner, gradient: Gradient, samples: Batch) -> Batch:
    """What a replica hands on: its gradient, what came with it, and which samples it is of."""
    priorities = gradient.loss.priorities
    return {
        "gradient": learner.flat.gradients,
        "metrics": gradient.loss.metrics,
        "priorities": samples["weight"] if priorities is None else priorities,
        "index": samples["index"],
        "rows": torch.tensor(len(samples["weight"])),  # that the gradient is the mean over
    }


async def gathered(learner: Leader, indexes: list[torch.Tensor], gradients: Queue) -> list[Parcel]:
    """The gradient of the samples of each index, for the update that is next; others are dropped."""
    found: dict[int, Parcel] = {}
    while len(found) < len(indexes):
        (parcel,) = await gradients.get(1)
        share, who = parcel.content, int(parcel.content["replica"])
        if share["update"] == learner.updates + 1 and who not in found and torch.equal(share["index"], indexes[who]):
            found[who] = parcel
        else:
            learner.dropped["out_of_step"] += 1
            gradients.release([parcel])
    return [found[who] for who in range(len(indexes))]


def check(algorithm: Algorithm, learners: int) -> None:
    """Refuse a batch that so many learners cannot share evenly.

    Raises:
        Refused: names the next batch that they can.
    """
    plan = algorithm.plan
    assert isinstance(plan, ReplayPlan)
    if plan.batch % learners:
        enough = -(-plan.batch // learners) * learners
        raise Refused(f"learners={learners} cannot share batch={plan.batch} evenly; use batch={enough}.")


def wire(graph: Graph, setting: Setting, learners: int) -> dict[str, Any]:
    """Add so many replicas, or none for one learner; gives what `learner` is handed to lead them."""
    if learners == 1:
        return {}
    words: dict[str, Any] = {"parameters": graph.word("weights", "parameters")}
    words["gradients"] = graph.word("queue", "gradients", each=1)
    orders: tuple[WordSpec, ...] = tuple(graph.word("queue", f"orders_{index}", each=1) for index in range(learners))
    for index, queue in enumerate(orders):
        graph.role(replica, index, setting=setting, replicas=learners, orders=queue, **words)
    return {**words, "orders": orders}

"""Data-parallel learners: replicas differentiate, each on its share of the data, and one learner steps.

    replica: get unrolls of its own actors; for each minibatch: put its gradient; wait for the parameters it led to.
    learner: for each minibatch: get a gradient of every replica; step by their mean; publish the parameters.

The number of updates says which batch and which minibatch of it is next. Each gradient carries it: one of another
update, which a death leaves behind, is dropped, and who made it goes on where the learner is. Unrolls are marked with
the batch that they are learnt from in, so that who takes a dead replica's place does not learn from them in the next.

The mean is weighted by the rows that each gradient is the mean over, so that it is the gradient of all of them: K
learners with a K-th of the data each do what one does with all of it. Only the learner has an optimiser, so replicas
cannot drift apart, and one that dies begins again with the parameters that there are.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch

from rookery.actor import Unroll, joined
from rookery.algorithms.base import Algorithm, Loss, OnPolicy, Refused
from rookery.learner import Gradient, Learner
from rookery.nn.norm import RunningNorm
from rookery.runtimes.boxes import Parcel, copied, pour
from rookery.runtimes.words import Graph, Queue, Role, Weights, WordSpec
from rookery.topologies.setting import Setting, crosses

__all__ = ["check", "check_evenly", "learner", "pooled", "replica", "wire"]

Values = dict[str, Any]  # tensors, and dicts of them, by name


async def replica(
    role: Role, setting: Setting, count: int, parameters: Weights, gradients: Queue, unrolls: Queue
) -> None:
    """Differentiate on so many unrolls at once; the learner says where that leads."""
    each = updates_of_a_batch(setting)
    learner = role.keep(Learner(setting.algorithm, setting.make_net(), setting.total_steps, role.seed, **setting.means))
    version, values, steps = await parameters.latest()
    learner.follow(version - 1, values, steps)
    while True:
        slots = await unrolls.get(count)
        with role.unit():
            batch = joined(slots, learner.device)
            data = {**told(role, slots), "seen": moments(learner, batch), "steps": batch["valid"][:-1].sum()}
            while begun((version - 1) // each, slots):
                for gradient in islice(learner.gradients(dict(batch), steps), (version - 1) % each, None):
                    share = {**share_of(learner, gradient), **data, "version": torch.tensor(version)}
                    parcel = await gradients.slot(partial(Parcel, share), role.index)
                    parcel.fill(share)
                    gradients.put(parcel)
                    before = version
                    version, values, steps = await parameters.newer_than(version)
                    learner.follow(version - 1, values, learner.steps)
                    if version != before + 1:  # somebody died: the learner is elsewhere
                        break
                learner.follow(version - 1, values, steps)
            unrolls.release(slots)


async def learner(
    role: Role, setting: Setting, replicas: int, weights: Weights, parameters: Weights, gradients: Queue
) -> None:
    """Step by the replicas' mean gradient."""
    each = updates_of_a_batch(setting)
    learner = role.keep(Leader(setting.algorithm, setting.make_net(), setting.total_steps, role.seed, **setting.means))
    role.advance(learner.steps)
    parameters.publish(learner.updates + 1, learner.values(), learner.steps)
    weights.publish(learner.version, learner.values(), learner.steps)
    while learner.steps < setting.total_steps:
        learner.anneal()
        before = learner.steps
        for minibatch in range(learner.updates % each, each):  # who begins anew may be in the middle of a batch
            parcels = await gathered(learner, replicas, parameters, gradients)
            shares = [parcel.content for parcel in parcels]
            learner.minimise(pooled(learner, shares))
            if minibatch == each - 1:
                conclude(learner, shares)
            gradients.release(parcels)
            parameters.publish(learner.updates + 1, learner.values(), learner.steps)
        if crosses(before, learner.steps, setting.log_every):
            role.report(learner.steps, learner.metrics())
        role.advance(learner.steps)
        weights.publish(learner.version, learner.values(), learner.steps)


def check_evenly(sharers: str, count: int, name: str, number: int) -> None:
    """Refuse a number that so many cannot share.

    Raises:
        Refused: names the next one that they can.
    """
    if number % count:
        enough = -(-number // count) * count
        raise Refused(f"{sharers}={count} cannot share {name}={number} evenly; use {name}={enough}.")


def check(algorithm: Algorithm, lanes: int, actors: int, learners: int) -> None:
    """Refuse what cannot be shared out among so many learners.

    Raises:
        Refused: for numbers that do not divide, and for settings by which each would go its own way.
    """
    plan = algorithm.plan
    assert isinstance(plan, OnPolicy)
    for name, number in (("actors", actors), ("unrolls", plan.unrolls)):
        if not (name == "unrolls" and number < learners):
            check_evenly("learners", learners, name, number)
    plan.check(actors * lanes // learners)
    if getattr(algorithm, "target_kl", None) is not None:
        raise Refused(
            f"target_kl={algorithm.target_kl} with learners={learners}: each would stop by what it alone has seen; "  # type: ignore[attr-defined]
            "leave it out, or use learners=1."
        )


def wire(graph: Graph, setting: Setting, count: int, weights: WordSpec, unrolls: list[WordSpec]) -> None:
    """Add a replica for each queue of unrolls, and the learner; a batch has so many unrolls of each queue."""
    own: dict[str, Any] = {"setting": setting, "parameters": graph.word("weights", "parameters")}
    own["gradients"] = graph.word("queue", "gradients", each=1)
    for index, queue in enumerate(unrolls):
        graph.role(replica, index, count=count, unrolls=queue, **own)
    graph.role(learner, replicas=len(unrolls), weights=weights, ends_run=True, **own)


class Leader(Learner):
    """The learner that steps; `dropped` counts the gradients that were of another update, since its process began."""

    def __init__(self, *args: Any, **means: Any) -> None:
        super().__init__(*args, **means)
        self.dropped = {"out_of_step": 0}


async def gathered(learner: Leader, replicas: int, parameters: Weights, gradients: Queue) -> list[Parcel]:
    """A gradient of each replica for the update that is next, in the replicas' order; others are dropped."""
    found: list[Parcel] = []
    while len(found) < replicas:
        parcels = await gradients.get(replicas - len(found))
        late = [parcel for parcel in parcels if parcel.content["version"] != learner.updates + 1]
        found += [parcel for parcel in parcels if parcel not in late]
        if late:
            learner.dropped["out_of_step"] += len(late)
            gradients.release(late)
            parameters.publish(learner.updates + 1, learner.values(), learner.steps)  # their makers wait to hear of it
    return sorted(found, key=lambda parcel: int(parcel.content["replica"]))


def updates_of_a_batch(setting: Setting) -> int:
    """Each by another minibatch."""
    return setting.unroll_plan.epochs * setting.unroll_plan.minibatches


def begun(batch: int, slots: list[Unroll]) -> bool:
    """Whether the unrolls are part of the batch of that number, and not of an earlier one; marks them."""
    if any(0 <= int(slot.learnt_in) < batch for slot in slots):
        return False
    for slot in slots:
        slot.learnt_in.fill_(batch)
    return True


def told(role: Role, slots: list[Unroll]) -> Values:
    """Who learns from which unrolls."""
    return {"replica": torch.tensor(role.index), "versions": torch.stack([slot.version for slot in slots])}


def share_of(learner: Learner, gradient: Gradient) -> Values:
    """What a replica hands on of a minibatch: its gradient, and what came with it."""
    return {
        "gradient": learner.flat.gradients,
        "metrics": gradient.loss.metrics,
        "rows": gradient.minibatch["valid"].sum(),  # that the gradient is the mean over
    }


def pooled(learner: Learner, shares: list[Values]) -> Gradient:
    """The mean gradient, in the learner's parameters, and the mean metrics."""
    rows = torch.stack([share["rows"] for share in shares])
    weights = (rows / rows.sum()).tolist()
    learner.flat.zero_grad()
    metrics = {name: torch.zeros(()) for name in shares[0]["metrics"]}
    for weight, share in zip(weights, shares, strict=True):
        for name, part in learner.flat.gradients.items():
            part.add_(share["gradient"][name].to(part.device), alpha=weight)
        for name, value in share["metrics"].items():
            metrics[name] += weight * value
    metrics = {name: value.to(learner.device) for name, value in metrics.items()}
    return Gradient(Loss(metrics["loss"], metrics), {}, learner.moves())


def conclude(learner: Learner, shares: list[Values]) -> None:
    """After a batch's last step: count it, and merge what the replicas saw into the running statistics."""
    learner.lags.add(int(lag) for share in shares for lag in learner.version - share["versions"])
    learner.steps += sum(int(share["steps"]) for share in shares)
    learner.version += 1
    for name, norm in norms(learner).items():
        for share in shares:
            norm.add(**{key: value.to(norm.mean.device) for key, value in share["seen"][name].items()})


def norms(learner: Learner) -> dict[str, RunningNorm]:
    """The network's running statistics by name."""
    return {name: part for name, part in learner.net.named_modules() if isinstance(part, RunningNorm)}


@torch.no_grad()
def moments(learner: Learner, batch: Values) -> Values:
    """What the network's running statistics would be, had they seen this batch alone."""
    found = {name: dict(norm.named_buffers()) for name, norm in norms(learner).items()}
    if not found:
        return {}
    kept = copied(found)
    for norm in norms(learner).values():
        norm.reset()
    learner.algorithm.finish(learner.net, batch)
    seen: Values = copied(found)
    pour(kept, found)
    return seen

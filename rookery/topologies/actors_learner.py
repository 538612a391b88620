"""Actors and a learner: actors fill unrolls, the learner learns from each once.

    actor:   wait for a free slot; wait for newer weights, or take those there are; fill the slot; put it.
    learner: publish; get unrolls; update; release; publish ...

Actors that wait for the newest weights do what is on-policy, and the run does not depend on who is faster. Those that
take what there is wait for the learner only when the queue is full: their unrolls lag behind by some versions, which
the loss has to correct for (IMPALA, APPO).
"""

from __future__ import annotations

from rookery.actor import joined
from rookery.algorithms.base import Algorithm
from rookery.evaluator import Evaluator
from rookery.learner import Learner
from rookery.runtimes.words import Calls, Graph, Queue, Role, Weights
from rookery.topologies import replicas, shared_policy
from rookery.topologies.setting import Setting, crosses

__all__ = ["actor", "check", "evaluator", "learner", "wire"]


async def actor(
    role: Role, setting: Setting, weights: Weights, unrolls: Queue, calls: Calls | None = None, groups: int = 1
) -> None:
    """Collect with the newest weights only, or with those there are."""
    plan = setting.unroll_plan
    collector = await shared_policy.acting(role, setting, plan.unroll, calls, groups)
    version = 0
    try:
        while True:
            await collector.ready()
            slot = await unrolls.slot(collector.slot, role.index)
            version, values, steps = await (weights.latest() if plan.stale else weights.newer_than(version))
            if not plan.stale or version != collector.version:  # a learner that began anew comes to the same number
                collector.load(version, values)
            valid = await collector.filled(slot)
            unrolls.put(slot)
            if crosses(collector.steps - valid, collector.steps, setting.log_every) and collector.returns:
                role.report(steps + valid * (not plan.stale), collector.episodes())
    finally:
        collector.close()


async def learner(role: Role, setting: Setting, count: int, weights: Weights, unrolls: Queue) -> None:
    """Update with so many unrolls at once."""
    net = setting.make_net()
    learner = role.keep(Learner(setting.algorithm, net, setting.total_steps, role.seed, **setting.means))
    role.advance(learner.steps)
    weights.publish(learner.version, learner.values(), learner.steps)
    while learner.steps < setting.total_steps:
        slots = await unrolls.get(count)
        before = learner.steps
        batch = joined(slots, learner.device)
        learner.lags.add(learner.version - int(slot.version) for slot in slots)
        learner.update(batch, before + int(batch["valid"][:-1].sum()))
        if crosses(before, learner.steps, setting.log_every):
            role.report(learner.steps, learner.metrics())
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
            version, values, steps = await weights.newer_than(version, evaluator.due)
            evaluator.due = (steps // setting.eval_every + 1) * setting.eval_every
            if steps < setting.total_steps:  # else the run itself evaluates what it ends with
                evaluator.load(values)
                role.report(steps, evaluator.play(setting.eval_episodes).summary())
    finally:
        env.close()


def check(algorithm: Algorithm, lanes: int, actors: int, learners: int, inference: str, double_buffer: bool) -> None:
    """Refuse numbers of roles that the algorithm's data cannot be shared out among, and lanes that need no halves."""
    shared_policy.check(lanes, inference, double_buffer)
    if learners > 1:
        replicas.check(algorithm, lanes, actors, learners)


def wire(
    setting: Setting,
    seed: int,
    actors: int = 1,
    learners: int = 1,
    inference: str = "own",
    double_buffer: bool = False,
) -> Graph:
    """The whole topology; several learners are replicas of one, each with its share of the actors."""
    graph = Graph(seed)
    weights = graph.word("weights", "weights")
    plan = setting.unroll_plan
    count = max(plan.unrolls, learners) if plan.unrolls else actors  # unrolls of a batch
    names = ["unrolls"] if learners == 1 else [f"unrolls_{index}" for index in range(learners)]
    queues = [graph.word("queue", name, each=plan.slots(count, actors)) for name in names]
    policy = shared_policy.wire(graph, setting, actors, weights, inference, double_buffer)
    for index in range(actors):
        graph.role(
            actor, index, anew=True, setting=setting, weights=weights, unrolls=queues[index % learners], **policy
        )
    if learners == 1:
        graph.role(learner, setting=setting, count=count, weights=weights, unrolls=queues[0], ends_run=True)
    else:
        replicas.wire(graph, setting, count // learners, weights, queues)
    if setting.eval_every:
        graph.role(evaluator, setting=setting, weights=weights)
    return graph

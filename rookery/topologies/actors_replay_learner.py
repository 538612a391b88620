"""Actors, replay and a learner: actors store what they do, the learner samples from it again and again.

    actor:   wait for room; act with the newest weights; insert.
    learner: wait until samples are owed; sample; update; hand back priorities; publish.

Nobody waits for anybody but by the ratio of samples to inserts. With `ahead = 0` both sides alternate: one actor is
then the classic loop of acting for some steps and updating for some. With more, each actor may be so many unrolls ahead
of the learner, and both sides work at once (Ape-X).
"""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rookery.algorithms.base import Algorithm, ReplayPlan
from rookery.data.replay import ReplayBuffer
from rookery.learner import Learner
from rookery.runtimes.words import Calls, Graph, Replay, Role, Weights
from rookery.topologies import replay_replicas, replay_shards, shared_policy
from rookery.topologies.actors_learner import evaluator
from rookery.topologies.replay_replicas import Team
from rookery.topologies.replay_shards import Home, Ledger, Receipt, Shares
from rookery.topologies.setting import Setting, crosses

__all__ = ["MakeStore", "actor", "check", "learner", "wire"]


@dataclass(frozen=True)
class MakeStore:
    """How the replay is made, as data."""

    setting: Setting
    actors: int
    seed: int

    def __call__(self) -> ReplayBuffer:
        setting, replay = self.setting, self.setting.replay
        return ReplayBuffer(
            setting.replay_plan,
            setting.lanes,
            writers=self.actors,
            seed=self.seed,
            stack=replay.stack,
            memory=replay.memory,
            device=replay.device,
            spec=replay.spec,
        )


async def actor(
    role: Role,
    setting: Setting,
    actors: int,
    weights: Weights,
    replay: Replay,
    calls: Calls | None = None,
    groups: int = 1,
    shards: tuple[Calls, ...] = (),
) -> None:
    """Act with the newest weights there are, and store it, in a shard if there are any."""
    algorithm, rows = setting.algorithm, setting.replay_plan.rows(setting.lanes)
    collector = await shared_policy.acting(role, setting, rows, calls, groups)
    lanes = torch.arange(setting.lanes, device=collector.device) + role.index * setting.lanes
    place = lanes / max(1, actors * setting.lanes - 1)
    home = Home(role, shards) if shards else None
    try:
        while True:
            await collector.ready()
            slot = await replay.slot(Receipt if shards else collector.slot, rows * setting.lanes, role.index)
            delivery = await home.delivery(collector.slot) if home else None
            unroll = delivery.unroll if delivery else slot
            version, values, _ = await weights.latest()
            if version != collector.version:
                collector.load(version, values)
            before = replay.inserts
            steps = before + await collector.filled(unroll, algorithm.exploration(before, place))
            if home and delivery:
                await home.store(delivery, slot)
            replay.insert(slot, steps - before, role.index)
            role.advance(steps)
            if crosses(before, steps, setting.log_every) and collector.returns:
                role.report(steps, collector.episodes())
    finally:
        collector.close()


async def learner(
    role: Role,
    setting: Setting,
    weights: Weights,
    replay: Replay,
    gradients: tuple[Calls, ...] = (),
    shards: tuple[Calls, ...] = (),
) -> None:
    """Update as often as the plan says for each step that was stored, by replicas' gradients if there are any."""
    net, plan, team = setting.make_net(), setting.replay_plan, Team(gradients) if gradients else None
    shares = Shares(plan, shards) if shards else None
    learner = role.keep(Learner(setting.algorithm, net, setting.total_steps, role.seed, **setting.means))
    role.advance(replay.inserts)
    weights.publish(learner.version, learner.values(), learner.steps)
    while learner.steps < setting.total_steps:
        beta = plan.beta + (1 - plan.beta) * learner.steps / setting.total_steps
        if team or shares:
            await role.boundary()
        samples = await replay.sample(plan.batch, plan.updates(setting.lanes), beta=beta)
        before, steps = learner.steps, replay.inserts
        with role.unit() if team or shares else nullcontext():
            if shares and (samples := await shares.sample(int(samples["count"]), beta)) is None:
                continue
            batch = {name: value.to(learner.device) for name, value in samples.items()}
            priorities = await team.update(learner, batch, steps) if team else learner.update(batch, steps)
            if priorities is not None and shares:
                await shares.prioritise(samples["index"], priorities)
        if priorities is not None and not shares:
            replay.prioritise(samples["index"], priorities)
        weights.publish(learner.version, learner.values(), learner.steps)
        if crosses(before, steps, setting.log_every):
            role.report(steps, learner.metrics())


def check(
    algorithm: Algorithm, lanes: int, actors: int, learners: int, shards: int, inference: str, double_buffer: bool
) -> None:
    """Refuse lanes that cannot be halved, or need not be, and batches that learners or shards cannot share."""
    shared_policy.check(lanes, inference, double_buffer)
    replay_replicas.check(algorithm, learners)
    replay_shards.check(algorithm, actors, shards)
    assert isinstance(algorithm.plan, ReplayPlan)
    algorithm.plan.check_unrolls(lanes, actors)


def wire(
    setting: Setting,
    seed: int,
    actors: int = 1,
    learners: int = 1,
    shards: int = 1,
    inference: str = "own",
    double_buffer: bool = False,
) -> Graph:
    """The whole topology; several learners share each batch, and several shards what is stored."""
    graph, plan = Graph(seed), setting.replay_plan
    store = MakeStore(setting, actors, zlib.crc32(f"{seed}/replay".encode()))
    weights = graph.word("weights", "weights")
    replay = graph.word(
        "replay",
        "replay",
        make_store=partial(Ledger, shards) if shards > 1 else store,
        samples_per_insert=plan.samples_per_insert,
        min_size=plan.learning_starts,
        tolerance=plan.tolerance(setting.lanes, actors),
        writers=actors,
        save=setting.replay.save,
        overlap=plan.ahead > 0,
    )
    policy = shared_policy.wire(graph, setting, actors, weights, inference, double_buffer)
    words: dict[str, Any] = {"weights": weights, "replay": replay}
    words["shards"] = replay_shards.wire(graph, setting, actors, shards)
    for index in range(actors):
        graph.role(actor, index, anew=True, setting=setting, actors=actors, **words, **policy)
    team = replay_replicas.wire(graph, setting, learners)
    graph.role(learner, setting=setting, ends_run=True, **words, **team)
    if shards > 1:  # it asks before actors do, in a resumed run's first round as in any other
        graph.roles.insert(0, graph.roles.pop())
    if setting.eval_every:
        graph.role(evaluator, setting=setting, weights=weights)
    return graph

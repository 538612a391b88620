"""A parameter server: bundles of actor, replay and learner, and shards that own the parameters (Nair et al. 2015).

    bundle: wait for room; take the newest parameters; act into its own replay unless updates are owed; differentiate
            if one is; put each shard's slice of the gradient.
    shard:  get a gradient; step by it unless it is stale; publish.

A bundle waits until its own last gradient was taken, and for nobody else. So a gradient comes late by as many updates
as others made meanwhile, and the slices that a bundle reads need not be of one version. Against what goes wrong then, a
shard drops gradients whose parameters were read too many updates ago, and a bundle those of losses far above what is
usual: machines may be slow, vanish, or send nonsense.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.actor import Collector
from rookery.algorithms.base import Algorithm, Refused, ReplayPlan
from rookery.data.replay import ReplayBuffer
from rookery.learner import Gradient, Learner
from rookery.runtimes.boxes import Parcel, copied
from rookery.runtimes.limiter import RateLimiter
from rookery.runtimes.together import together
from rookery.runtimes.words import Graph, Published, Queue, Role, Weights
from rookery.shard import Outliers, Shard, slices
from rookery.topologies.actor_learner import ActorLearner
from rookery.topologies.actors_learner import evaluator
from rookery.topologies.replicas import moments, norms
from rookery.topologies.setting import Setting, crosses

__all__ = ["Bundle", "check", "learner", "shard", "wire"]


async def shard(
    role: Role, setting: Setting, shards: int, max_delay: int, gradients: Queue, parameters: Weights
) -> None:
    """Step by whichever gradient comes next; the first shard is the run's clock."""
    net = setting.make_net()
    shard = role.keep(Shard(setting.algorithm, net, setting.total_steps, role.index, shards, max_delay))
    clock = role.index == 0
    if clock:
        role.advance(shard.steps)
    parameters.publish(shard.version, shard.values(), shard.steps)
    while True:
        (slot,) = await gradients.get(1)
        before = shard.steps
        shard.accept(slot.content)
        parameters.publish(shard.version, shard.values(), shard.steps)
        gradients.release([slot])  # now, so that a bundle whose slot is free reads what its gradient led to
        if clock:
            role.advance(shard.steps)
            if crosses(before, shard.steps, setting.log_every):
                role.report(shard.steps, shard.metrics())


async def learner(
    role: Role,
    setting: Setting,
    bundles: int,
    outliers: float,
    weights: Weights,
    gradients: tuple[Queue, ...],
    parameters: tuple[Weights, ...],
) -> None:
    """A bundle: act, remember and differentiate; the first one shows its parameters to the evaluator."""
    bundle = role.keep(Bundle(role, setting, bundles, len(gradients), outliers))
    shown = -1  # steps
    try:
        while True:
            makes = [partial(bundle.parcel, shard) for shard in range(len(gradients))]
            slots = await together([each.slot(make, role.index) for each, make in zip(gradients, makes, strict=True)])
            before = bundle.clock
            bundle.follow([await each.latest() for each in parameters])
            if crosses(before, bundle.clock, setting.log_every):
                role.report(bundle.clock, bundle.metrics())
            if bundle.first and setting.eval_every and crosses(shown, bundle.clock, setting.eval_every):
                weights.publish(bundle.versions[0], bundle.learner.values(), bundle.clock)
                shown = bundle.clock
            if bundle.clock >= setting.total_steps:
                return
            steps = 0 if bundle.owes else bundle.act()
            moves = bundle.differentiate() if bundle.owes else ()
            for shard, (queue, slot) in enumerate(zip(gradients, slots, strict=True)):
                slot.fill(bundle.share(shard, steps, moves))
                queue.put(slot)
    finally:
        bundle.collector.env.close()


def check(algorithm: Algorithm, lanes: int, actors: int, shards: int, max_delay: int, outliers: float) -> None:
    """Refuse what bundles cannot do.

    Raises:
        Refused: for an algorithm without replay, and for settings that have no meaning here or do not fit.
    """
    plan = algorithm.plan
    if not isinstance(plan, ReplayPlan):
        raise Refused(
            f"{type(algorithm).__name__} learns from each unroll at once, and the bundles of a parameter server from "
            "replay; use an algorithm with replay, such as DQN."
        )
    if plan.ahead:
        raise Refused(f"ahead={plan.ahead}: a bundle acts and learns in turn, and waits for nobody; leave it out.")
    each_of(plan, actors).check(lanes)


def each_of(plan: ReplayPlan, bundles: int) -> ReplayPlan:
    """A bundle's share of what is kept, and of what is stored before learning starts."""
    return replace(plan, capacity=plan.capacity // bundles, learning_starts=math.ceil(plan.learning_starts / bundles))


def wire(
    setting: Setting, seed: int, actors: int = 1, shards: int = 1, max_delay: int = 0, outliers: float = 0.0
) -> Graph:
    """The whole topology, with as many bundles as actors."""
    graph = Graph(seed)
    weights = graph.word("weights", "weights")
    gradients = tuple(graph.word("queue", f"gradients_{index}", each=1) for index in range(shards))
    parameters = tuple(graph.word("weights", f"parameters_{index}") for index in range(shards))
    for index in range(shards):
        own: dict[str, Any] = {"gradients": gradients[index], "parameters": parameters[index]}
        graph.role(shard, index, setting=setting, shards=shards, max_delay=max_delay, **own)
    words: dict[str, Any] = {"weights": weights, "gradients": gradients, "parameters": parameters}
    for index in range(actors):
        graph.role(learner, index, index == 0, setting=setting, bundles=actors, outliers=outliers, **words)
    if setting.eval_every:
        graph.role(evaluator, setting=setting, weights=weights)
    return graph


class Bundle(ActorLearner):
    """An actor, its replay and a learner, which have their parameters from shards.

    Args:
        bundles: how many there are.
        shards: how many a gradient goes to.
        outliers: deviations above the mean loss, above which a gradient is dropped; 0 keeps all.
    """

    def __init__(self, role: Role, setting: Setting, bundles: int, shards: int, outliers: float) -> None:
        def seed(name: str) -> int:  # as in a run of its own
            return zlib.crc32(f"{role.seed}/{name}".encode())

        algorithm, lanes, replay = setting.algorithm, setting.lanes, setting.replay
        self.first = role.index == 0
        self.plan, self.save_replay = each_of(setting.replay_plan, bundles), replay.save
        actor_seed, env = seed("actor/0") >> 1, setting.make_env(lanes, seed("actor/0") >> 1)
        rows = self.plan.rows(lanes)
        self.collector = Collector(algorithm, setting.make_net(), env, rows, actor_seed, **setting.means)
        self.learner = Student(
            algorithm, setting.make_net(), setting.total_steps, seed("learner/0") >> 1, **setting.means
        )
        memory = replay.memory / str(role.index) if isinstance(replay.memory, Path) else replay.memory
        own: dict[str, Any] = {"stack": replay.stack, "device": replay.device, "spec": replay.spec}
        self.replay = ReplayBuffer(self.plan, lanes, seed=seed("replay"), memory=memory, **own)
        self.limiter = RateLimiter(self.plan.samples_per_insert, self.plan.learning_starts, self.plan.batch)
        self.outliers = Outliers(outliers)
        self.slices = slices(self.learner.flat, shards)
        self.versions = [1] * shards  # of the slices
        self.clock = 0  # steps of the run, as far as every shard knows of them
        self.seen = {name: copied(dict(norm.named_buffers())) for name, norm in norms(self.learner).items()}
        self._unroll = self.collector.slot()
        place = torch.arange(lanes, device=env.device) + role.index * lanes
        self._place = place / max(1, bundles * lanes - 1)

    def follow(self, newest: list[Published]) -> None:
        """Take the shards' parameters; the target network moves as often as fell due by the first shard's updates."""
        names = self.learner.flat.groups
        parts = [shard.values["parameters"][name] for name in names for shard in newest]
        constant = dict(self.learner.net.named_buffers())
        values = {**constant, **newest[0].values["buffers"], "parameters": torch.cat(parts)}
        self.versions, self.clock = [shard.version for shard in newest], min(shard.steps for shard in newest)
        self.learner.follow(newest[0].version - 1, values, self.clock)
        self.learner.anneal()
        self.collector.load(newest[0].version, values)

    @property
    def owes(self) -> bool:
        """Whether an update is due for the steps in replay."""
        return self.limiter.may_sample(self.plan.batch) and len(self.replay) > 0

    def act(self) -> int:
        """Steps into replay; gives how many."""
        steps = self.collector.fill(self._unroll, self.learner.algorithm.exploration(self.clock, self._place))
        self.replay.insert(self._unroll.batch())
        self.limiter.inserts += steps
        return steps

    def differentiate(self) -> tuple[str, ...]:
        """Leave the gradient of a batch of samples in the learner; gives the parts it moves, none if it is dropped."""
        plan, learner = self.plan, self.learner
        moves: tuple[str, ...] = ()
        beta = plan.beta + (1 - plan.beta) * min(1.0, self.clock / learner.total_steps)
        drawn = self.replay.sample(plan.batch, beta=beta)
        self.limiter.samples += plan.batch
        samples = {name: value.to(learner.device) for name, value in drawn.items()}
        for gradient in learner.gradients(samples, self.clock):  # of as many samples it is one
            if not self.outliers.drop(gradient.loss.loss.item()):
                learner.count(gradient, learner.clip(gradient))
                moves = gradient.moves
        if learner.priorities is not None:
            self.replay.prioritise(drawn["index"], learner.priorities)
        self.seen = moments(learner, samples)
        return moves

    def share(self, shard: int, steps: int, moves: tuple[str, ...]) -> dict[str, Any]:
        """What a shard is told (`Shard.accept`)."""
        own, gradients = self.slices[shard], self.learner.flat.gradients
        return {
            "gradient": {name: gradient[own[name]] for name, gradient in gradients.items()},
            "moves": {name: torch.tensor(name in moves) for name in gradients},
            "version": torch.tensor(self.versions[shard]),
            "steps": torch.tensor(steps),
            "seen": self.seen if shard == 0 else {},
        }

    def parcel(self, shard: int) -> Parcel:
        """A slot for that."""
        return Parcel(self.share(shard, 0, ()))

    @property
    def dropped(self) -> dict[str, int]:
        """Gradients that were dropped, by reason."""
        return {"outlier": self.outliers.dropped}

    def metrics(self) -> dict[str, Any]:
        """Its episodes, what it dropped, how far apart its slices are; of the first bundle also how learning goes."""
        drops = {"outlier_dropped": self.outliers.dropped, "version_skew": max(self.versions) - min(self.versions)}
        return {**(self.learner.metrics() if self.first else {}), **self.collector.episodes(), **drops}

    def state(self) -> dict[str, Any]:
        """Of its parts, and where the run stands; `net` is what the learner has (`Run.net`)."""
        return {
            **self.learner.state(),
            "collector": self.collector.state(),
            "limiter": self.limiter.state(),
            "outliers": self.outliers.state(),
            "reads": {"versions": self.versions, "clock": self.clock},
            **({"replay": self.replay.state()} if self.save_replay else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken; without a replay, fill it anew first."""
        self.learner.load_state(state)
        self.collector.load_state(state["collector"])
        self.limiter.load_state(state["limiter"])
        self.outliers.load_state(state["outliers"])
        self.versions, self.clock = list(state["reads"]["versions"]), state["reads"]["clock"]
        if "replay" in state:
            self.replay.load_state(state["replay"])
        else:
            self.limiter.begin_again()


class Student(Learner):
    """A learner that follows the parameters it differentiates, and never steps itself."""

    def __init__(self, *args: Any, **means: Any) -> None:
        super().__init__(*args, **means)
        self.derived = 0  # gradients

    def moves(self) -> tuple[str, ...]:
        """Parts that move every so many updates take turns by its own gradients: what others make, it cannot know."""
        return tuple(name for name, part in self.parts.items() if (self.derived + 1) % part.every == 0)

    def count(self, gradient: Gradient, norm: Tensor) -> None:
        """Note a gradient that was handed out; `follow` knows of the updates, and moves the target network."""
        self.derived += 1
        self._add({**gradient.loss.metrics, "grad_norm": norm})

    def state(self) -> dict[str, Any]:
        """Without an optimiser, which it does not use."""
        state = super().state()
        return {**state, "optimizer": {}, "counts": {**state["counts"], "derived": self.derived}}

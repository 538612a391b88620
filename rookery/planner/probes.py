"""What roles' work costs on this machine, measured with the roles' own parts.

Other programs on the machine must not count, so what is taken is processor time, the lower quartile of many; what was
spent neither on a processor nor waiting for one was slept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rookery.actor import Collector, Unroll, joined
from rookery.algorithms.base import Algorithm, ReplayPlan
from rookery.data.replay import ReplayBuffer
from rookery.learner import Learner
from rookery.planner.costs import Cluster, Costs, Work
from rookery.planner.rehearsal import corrected, rehearse
from rookery.run import build, closing, threads
from rookery.runtimes.boxes import copied, nbytes, pour
from rookery.runtimes.local import Local
from rookery.runtimes.words import Graph, Role, Weights
from rookery.settings import Options
from rookery.systems import system_of
from rookery.topologies.setting import Setting
from rookery.train import setting_of

__all__ = ["measure", "probe"]

SECONDS = 1.0  # for which an actor is measured, alone and with others
BUDGET, LEAST = 0.4, 6  # seconds, and calls, for whatever else is
ROWS = 64  # that are taken together: some begin an episode, which takes longer
ASKS = 400
LARGEST = 8  # unrolls of a batch; what larger ones take follows from these
STORED = 20_000  # rows of a replay, at most


def measure(name: str, algorithm: Algorithm, env: Any, options: Options, actors: list[int]) -> tuple[Work, Costs]:
    """The work of a system for such numbers of actors (of hogwild: workers), and what it costs here.

    Raises:
        ValueError: for what `rookery train` would refuse.
    """
    system = system_of(name, algorithm)
    kind = "actors" if "actors" in system.takes else "learners"
    options = replace(options, runtime="local", threads=1, learners=1)
    for number in actors:
        sized: Any = {kind: number}
        run, found = build(name, algorithm, env, replace(options, **sized), None)
    work = Work(system.topology, algorithm.plan, options.envs, options.shards)
    setting = setting_of(run, replace(found, replay_memory="ram"))
    batches = sorted({work.batch(number) for number in actors})
    with threads(1):
        learns = _learner(setting, work, [size for size in batches if size <= LARGEST] or batches[:1])
        costs = Costs(**learns, **_actor(setting, work.rows))
    return work, corrected(work, costs, rehearse(system, found, setting, work.shards))


class Metered(Collector):
    """Whose `seconds` are the processor's."""

    clock = staticmethod(time.process_time)


async def probe(role: Role, setting: Setting, rows: int, hops: Weights, go: Weights) -> None:
    """An actor, whose first one is measured alone, with its messages, and then beside the others."""
    env, net = setting.actor_env(setting.lanes, role.seed), setting.actor_net()
    collector = Metered(setting.algorithm, net, env, rows, role.seed, **setting.actor_means)
    slot = collector.slot()
    try:
        if role.index == 0:
            list(_fills(collector, slot, SECONDS / 2))  # until what is compiled is, and caches are warm
            role.report(0, {"alone": list(_fills(collector, slot, SECONDS))})
            hops.publish(1, {}, 0)
            taken = []
            role.report(0, {})
            spent = time.process_time()
            for _ in range(ASKS):
                began = time.perf_counter()
                await hops.latest()
                taken.append(time.perf_counter() - began)
            role.report(0, {"message": (time.process_time() - spent) / ASKS, "asked": _low(taken)})
            go.publish(1, {}, 0)
        await go.newer_than(0)
        found = list(_fills(collector, slot, SECONDS))
        if role.index == 0:
            role.report(0, {"together": found})
    finally:
        collector.close()


def _fills(collector: Collector, slot: Unroll, seconds: float) -> Iterator[dict[str, float]]:
    """What some unrolls took: seconds of processor, also by activity, and asleep; and how many steps were valid."""
    lanes, times = collector.env.lanes, -(-ROWS // collector.T)
    scale = collector.algorithm.exploration(0, torch.zeros(lanes, device=collector.device))
    latest, count = time.perf_counter() + seconds, 0
    while count < LEAST or time.perf_counter() < latest:
        before, held = dict(collector.seconds), _held_up()
        began, spent = time.perf_counter(), time.process_time()
        valid = sum(collector.fill(slot, scale) for _ in range(times))
        spent, clock, held = time.process_time() - spent, time.perf_counter() - began, _held_up() - held
        found = {"processor": spent, "asleep": max(0.0, clock - spent - held)}
        found |= {name: total - before.get(name, 0.0) for name, total in collector.seconds.items()}
        yield {"valid": valid / (times * collector.T * lanes), **{name: each / times for name, each in found.items()}}
        count += 1


def _held_up() -> float:
    """Seconds that this process's threads were ready and had no core, as Linux counts them; elsewhere 0."""
    files = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[1]) for file in files) * 1e-9


def _actor(setting: Setting, rows: int) -> dict[str, Any]:
    """What acting and messages cost, in processes of their own as in a run."""
    heard: dict[str, Any] = {}
    kept: list[float] = []  # processor time of this process, which keeps the words

    def report(_role: str, _index: int, _step: int, values: dict[str, Any]) -> None:
        heard.update(values)
        kept.append(time.process_time())

    graph = Graph(0)
    words: Any = {name: graph.word("weights", name) for name in ("hops", "go")}
    for index in range(Cluster().cores):
        graph.role(probe, index, ends_run=index == 0, setting=setting, rows=rows, **words)
    Local(report, failures=1).run(graph, lambda *_: False)
    answer = (kept[2] - kept[1]) / ASKS
    alone, together = heard["alone"], heard["together"]
    usual, crowded = (sorted(fills, key=lambda each: each["processor"])[len(fills) // 4] for fills in (alone, together))
    acting, spent = usual.get("inference", 0.0), usual["processor"]
    stepping = usual.get("environment", 0.0) + usual.get("environment and inference", 0.0)
    return {
        "environment": stepping / rows,
        "inference": acting / rows,
        "asleep": statistics.median(each["asleep"] for each in alone) / rows,
        "unroll": max(0.0, spent - stepping - acting),
        "message": heard["message"],
        "answer": answer,
        "hop": max(0.0, heard["asked"] - heard["message"] - answer),
        "valid": statistics.fmean(each["valid"] for each in alone + together),
        "crowding": max(1.0, crowded["processor"] / spent),
    }


def _learner(setting: Setting, work: Work, sizes: list[int]) -> dict[str, Any]:
    """What updates, weights and replay cost, and how large what is sent is."""
    plan, lanes = work.plan, work.lanes
    with closing(setting.actor_env(lanes, 0)) as env:
        collector = Collector(setting.algorithm, setting.actor_net(), env, work.rows, 0, **setting.actor_means)
        unroll = collector.slot()
        found: dict[str, float] = {}
        batches: list[Callable[[], Any]]
        learner = Learner(setting.algorithm, setting.make_net(), setting.total_steps, 0, **setting.means)
        values = learner.values()
        box = copied(values)
        if isinstance(plan, ReplayPlan):
            found, batches = _replay(setting, plan, work.shards, collector, unroll, sizes)
        else:
            collector.fill(unroll)
            batches = [partial(joined, [unroll] * size, learner.device) for size in sizes]

    def again() -> None:
        learner.flat.restore(values)  # what is learnt from over and over is soon learnt

    def round_of(batch: Callable[[], Any]) -> Any:
        return learner.update(batch(), 0), learner.values()

    on_cpu = learner.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    update = [_taken(partial(round_of, batch), again, clock) for batch in batches]
    steppers = learner.optimizers.values()
    return {
        **found,
        "update": tuple(zip(sizes, update, strict=True)),
        "optimise": _taken(lambda: [each.step() for each in steppers], again),
        "load": _taken(lambda: collector.load(1, box)),
        "publish": _taken(lambda: pour(values, box)),
        "unroll_bytes": float(nbytes(unroll)),
        "weights_bytes": float(nbytes(values)),
    }


def _replay(
    setting: Setting, plan: ReplayPlan, shards: int, collector: Collector, unroll: Unroll, sizes: list[int]
) -> tuple[dict[str, float], list[Callable[[], Any]]]:
    """What storing and drawing cost, of one of the shards its share; what is drawn for each size of a round."""
    small = replace(plan, capacity=min(plan.capacity, STORED), learning_starts=1)
    store = ReplayBuffer(small, setting.lanes, seed=0, stack=setting.replay.stack, spec=setting.replay.spec)
    taken: list[float] = []
    while len(store) < plan.batch or len(taken) < LEAST:
        collector.fill(unroll)
        began = time.process_time()
        store.insert(unroll.batch())
        taken.append(time.process_time() - began)
    drawn = [store.sample(plan.batch * size, beta=plan.beta) for size in sizes]

    def draw() -> None:
        samples = store.sample(plan.batch // shards, beta=plan.beta)
        copied(samples)
        if plan.alpha:
            store.prioritise(samples["index"], samples["weight"])

    return {"insert": _low(taken), "sample": _taken(draw)}, [partial(dict, samples) for samples in drawn]


def _taken(
    function: Callable[[], Any], before: Callable[[], Any] = bool, clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of a call, the first not counted."""
    taken: list[float] = []
    latest = time.perf_counter() + BUDGET
    while len(taken) < LEAST or time.perf_counter() < latest:
        before()
        began = clock()
        function()
        taken.append(clock() - began)
    return _low(taken[1:])


def _low(values: list[float]) -> float:
    """The lower quartile."""
    return sorted(values)[len(values) // 4]

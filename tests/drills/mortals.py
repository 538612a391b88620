"""Roles that are killed in drills: actors and a learner in step, whose every number can be checked."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from rookery import PPO
from rookery.algorithms.base import Loss
from rookery.runtimes.words import Graph

__all__ = [
    "Diary",
    "Endless",
    "Lesson",
    "Poisoned",
    "Slot",
    "asking",
    "brittle",
    "corrupt",
    "counter",
    "deaf",
    "diarist",
    "freezer",
    "idler",
    "in_step",
    "learner",
    "newborn",
    "Store",
    "player",
    "sampler",
    "server",
    "sleeper",
    "stuck",
    "taker",
    "talker",
    "ticking",
    "unreachable",
    "watcher",
    "writer",
]

SIZE = 10_000


class Slot:
    """Rows that all say who filled them, and with which version."""

    def __init__(self) -> None:
        self.rows = torch.zeros(SIZE, 2, dtype=torch.int64)


class Lesson:
    """A learner's state: its version, and how many rows it has learnt from."""

    def __init__(self) -> None:
        self.version, self.steps = 1, 0

    def state(self) -> dict[str, Any]:
        return {"version": self.version, "steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.version, self.steps = state["version"], state["steps"]


async def player(role: Any, weights: Any, queue: Any) -> None:
    version = 0
    while True:
        version, values, _ = await weights.newer_than(version)
        slot = await queue.slot(Slot, role.index)
        assert (values["w"] == version).all(), "torn"
        slot.rows[:, 0] = role.index
        slot.rows[:, 1] = version
        queue.put(slot)


async def learner(role: Any, weights: Any, queue: Any, players: int, until: int) -> None:
    """Learns 3 rows an unroll; reports what it learnt from, and from where it came."""
    lesson = role.keep(Lesson())
    role.advance(lesson.steps)
    weights.publish(lesson.version, {"w": torch.full((SIZE,), lesson.version)}, lesson.steps)
    while lesson.steps < until:
        slots = await queue.get(players)
        assert all((slot.rows == slot.rows[0]).all() for slot in slots), "torn"
        seen = [slot.rows[0].tolist() for slot in slots]
        time.sleep(0.002)
        before, lesson.steps = lesson.steps, lesson.steps + 3 * players
        role.report(lesson.steps, {"before": before, "version": lesson.version, "seen": seen})
        lesson.version += 1
        queue.release(slots)
        role.advance(lesson.steps)
        weights.publish(lesson.version, {"w": torch.full((SIZE,), lesson.version)}, lesson.steps)


class Diary(Lesson):
    """Every unit that was ever learnt from."""

    def __init__(self) -> None:
        super().__init__()
        self.units: list[int] = []

    def state(self) -> dict[str, Any]:
        return {**super().state(), "units": list(self.units)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.units = list(state["units"])


async def counter(role: Any, queue: Any) -> None:
    """Gives out numbers."""
    number = 0
    while True:
        number += 1
        slot = await queue.slot(Slot, role.index)
        slot.rows[:] = number
        queue.put(slot)


async def diarist(role: Any, weights: Any, queue: Any, marker: Path) -> None:
    """Notes each number; dies once where it has published what it learnt, and has not told that it did."""
    diary = role.keep(Diary())
    while diary.steps < 100:
        (slot,) = await queue.get(1)
        diary.units.append(int(slot.rows[0, 0]))
        diary.steps += 1
        time.sleep(0.002)
        weights.link._took = 0.0  # the state is handed over as often as it may be
        weights.publish(diary.steps, {}, diary.steps)
        if diary.steps >= 50 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        queue.release([slot])
        role.advance(diary.steps)


class Store:
    """Replay that knows only how much it has."""

    def __init__(self) -> None:
        self.items = 0

    def __len__(self) -> int:
        return self.items

    def insert(self, batch: dict[str, Any], writer: int) -> int:
        self.items += len(batch["n"])
        return len(batch["n"])

    def sample(self, count: int) -> dict[str, Any]:
        return {"n": torch.zeros(count)}

    def state(self) -> dict[str, Any]:
        return {"items": self.items}


class Row(Slot):
    """Four of them."""

    def batch(self) -> dict[str, Any]:
        return {"n": self.rows[:4]}


async def writer(role: Any, replay: Any) -> None:
    while True:
        replay.insert(await replay.slot(Row, 4), 4)


async def sampler(role: Any, weights: Any, replay: Any, marker: Path) -> None:
    """Counts samples; dies once where it has handed over its state, and has not asked for more."""
    lesson = role.keep(Lesson())
    while lesson.steps < 800:
        lesson.steps += len((await replay.sample(8))["n"])
        weights.publish(lesson.steps, {}, lesson.steps)
        role.advance(lesson.steps)
        if lesson.steps >= 400 and not marker.exists():
            marker.touch()
            replay.link._took = 0.0  # however long that took before
            replay.link.hand_over(replay.name)
            os.kill(os.getpid(), signal.SIGKILL)


async def watcher(role: Any, weights: Any) -> None:
    version = 0
    while True:
        version, values, steps = await weights.newer_than(version)
        assert (values["w"] == version).all(), "torn"
        time.sleep(0.005)
        role.report(steps, {"watched": version})


def in_step(players: int, until: int) -> Graph:
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    queue = graph.word("queue", "queue", each=1)
    for index in range(players):
        graph.role(player, index, weights=weights, queue=queue)
    graph.role(learner, weights=weights, queue=queue, players=players, until=until, ends_run=True)
    graph.role(watcher, weights=weights)
    return graph


async def asking(role: Any, calls: Any, count: int) -> None:
    """Ends the run once its questions are answered; it goes on where it was."""
    lesson = role.keep(Lesson())
    slot = await calls.slot(Slot, role.index)
    while lesson.steps < count:
        slot.rows[:] = lesson.steps
        assert await calls.ask(slot) == -lesson.steps
        lesson.steps += 1
        role.advance(lesson.steps)
        role.report(lesson.steps, {"asked": lesson.steps})


async def server(role: Any, calls: Any) -> None:
    while True:
        for slot, answer in await calls.requests(8):
            time.sleep(0.002)
            answer(-int(slot.rows[0, 0]))


async def sleeper(role: Any, weights: Any, marker: Path) -> None:
    """Hangs in its first life."""
    weights.publish(1, {}, 0)
    await weights.newer_than(0)
    if not marker.exists():
        marker.touch()
        time.sleep(600)


async def brittle(role: Any, weights: Any) -> None:
    """Dies without a word, each time."""
    weights.publish(1, {}, 0)
    await weights.newer_than(0)
    raise SystemExit(3)


class Heavy(Lesson):
    """Takes so long to hand over that it is handed over at the beginning of each life only."""

    def state(self) -> dict[str, Any]:
        time.sleep(0.05)
        return super().state()


async def stuck(role: Any, weights: Any) -> None:
    """Works well up to its fifth step, whose error comes again in each life."""
    lesson = role.keep(Heavy())
    while True:
        role.advance(lesson.steps)
        weights.publish(lesson.version, {}, lesson.steps)
        await weights.latest()
        lesson.version, lesson.steps = lesson.version + 1, lesson.steps + 1
        if lesson.steps == 5:
            raise ArithmeticError("a loss of NaN")


async def freezer(role: Any, queue: Any, marker: Path) -> None:
    """Hangs in its first life, in C, so that no thread of its process goes on, with a box that nobody has seen yet."""
    slot = await queue.slot(Slot, role.index)
    if not marker.exists():
        marker.touch()
        ctypes.PyDLL(None).sleep(600)
    queue.put(slot)


class Endless:
    """Never arrives: to make it again takes an hour."""

    def __reduce__(self) -> Any:
        return time.sleep, (3600,)


async def unreachable(role: Any, weights: Any, endless: Endless, more: bytes) -> None:
    """Hangs before it begins, with more of its arguments behind than a pipe holds."""


async def deaf(role: Any, calls: Any, marker: Path) -> None:
    """Asks for more than a pipe holds, and in its first life is stopped before it hears it."""
    asked = calls.ask(await calls.slot(Slot, role.index))
    if not marker.exists():
        marker.touch()
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(0.2)
            os.kill(pid, signal.SIGSTOP)
            os._exit(0)
    assert len(await asked) == 4_000_000
    role.advance(1)


async def talker(role: Any, calls: Any) -> None:
    while True:
        for _, answer in await calls.requests(1):
            time.sleep(0.5)
            answer(bytes(4_000_000))


async def taker(role: Any, queue: Any) -> None:
    """Ends the run with the first slot that comes."""
    queue.release(await queue.get(1))
    role.advance(1)


async def ticking(role: Any, weights: Any) -> None:
    """Goes on for ever, 10 ms a step."""
    lesson = role.keep(Lesson())
    while True:
        lesson.steps += 1
        weights.publish(lesson.steps, {}, lesson.steps)
        role.advance(lesson.steps)
        await weights.newer_than(lesson.steps - 1)
        time.sleep(0.01)


async def idler(role: Any, weights: Any) -> None:
    """Says that it lives, and waits for what never comes."""
    role.keep(Lesson())
    role.report(0, {"alive": True})
    await weights.latest()
    await weights.newer_than(10**9)


async def corrupt(role: Any, weights: Any) -> None:
    """Does a unit of work, and fails at the next, in each life."""
    for unit in range(2):
        _, _, steps = await weights.latest()
        if unit:
            raise ValueError("a corrupt level")
        role.report(steps, {"unit": unit})


async def newborn(role: Any, weights: Any) -> None:
    """Says with what it began."""
    lesson = role.keep(Lesson())
    _, _, steps = await weights.latest()
    role.report(steps, {"seed": role.seed, "version": lesson.version})
    lesson.version = 7
    await weights.newer_than(10**9)


class Poisoned(PPO):
    """Its loss is NaN from half of the run on."""

    def loss(self, net: Any, target: None, batch: Any, now: Any) -> Loss:
        found = super().loss(net, target, batch, now)
        return found._replace(loss=found.loss * torch.where(now.remaining < 0.5, torch.nan, 1.0))

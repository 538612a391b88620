"""Roles that the laws of runtimes are tried on: importable by any process, and what they see they report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Busy",
    "Counter",
    "Empty",
    "Slot",
    "Slow",
    "Store",
    "awaiting_else",
    "careful",
    "client",
    "clumsy",
    "collecting",
    "counting",
    "digger",
    "emptier",
    "faulty",
    "filler",
    "glancing",
    "greedy",
    "hungry",
    "judge",
    "paced",
    "pacer",
    "publisher",
    "quiet",
    "reader",
    "sampler",
    "seeded",
    "seeded_too",
    "server",
    "slow_taker",
    "taker",
    "writer",
]

LARGE = 50_000  # numbers in a value: a copy of them takes long enough to be caught halfway


class Counter:
    """The smallest stateful part."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Slot:
    """What goes round."""

    def __init__(self, size: int = 2) -> None:
        self.values = torch.full((size,), -1)

    def batch(self) -> dict[str, torch.Tensor]:
        return {"item": self.values}

    def state(self) -> dict[str, Any]:
        return {"values": self.values.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])


# Queue


async def filler(role: Any, queue: Any, count: int) -> None:
    def make() -> Slot:
        role.report(0, {"made": 1})
        return Slot(LARGE)

    for number in range(count):
        slot = await queue.slot(make, role.index)
        slot.values[0] = role.index
        slot.values[1:] = number
        queue.put(slot)


async def emptier(role: Any, queue: Any, each: int, gets: int, first: int) -> None:
    for number in range(gets):
        slots = await queue.get(each if number else first)
        assert all((slot.values[1:] == slot.values[1]).all() for slot in slots), "torn"
        role.report(number, {"got": [slot.values[:2].tolist() for slot in slots]})
        queue.release(slots)


async def pacer(role: Any, queue: Any, weights: Any, gets: int) -> None:
    for number in range(gets):
        weights.publish(number + 1, {}, 0)
        slots = await queue.get(3)
        role.report(number, {"got": [slot.values.tolist() for slot in slots]})
        queue.release(slots)


async def paced(role: Any, queue: Any, weights: Any) -> None:
    version = 0
    while True:
        version = (await weights.newer_than(version)).version
        slot = await queue.slot(Slot, role.index)
        slot.values[:] = torch.tensor([role.index, version])
        queue.put(slot)


# Weights


async def publisher(role: Any, weights: Any, versions: list[int], size: int = 1) -> None:
    for version in versions:
        weights.publish(
            version, {"w": torch.full((size,), version), "b": torch.full((3,), float(version))}, version * 9
        )
        await weights.latest()


async def reader(role: Any, weights: Any, until: int) -> None:
    """Read newer and newer values, every number of them, until the version `until`."""
    version, count = 0, 0
    while version < until:
        again, values, steps = await (weights.latest() if count % 3 == 2 else weights.newer_than(version))
        assert again >= version if count % 3 == 2 else again > version, f"{again} after {version}"
        assert steps == again * 9
        assert all((part == again).all() for part in values.values()), "another version's values"
        version, count = again, count + 1
    role.report(count, {"seen": version})


async def glancing(role: Any, weights: Any, count: int) -> None:
    for number in range(count):
        version, values, steps = await weights.latest()
        assert all((part == version).all() for part in values.values()), "another version's values"
        role.report(number, {"version": version, "steps": steps})


async def occasional(role: Any, weights: Any, every: int, until: int) -> None:
    """Read what was published at so many steps or later, again and again, and nothing between."""
    version, steps, seen = 0, 0, []
    while version < until:
        due = (steps // every + 1) * every
        version, _, steps = await weights.newer_than(version, due)
        assert steps >= due, f"step {steps} before {due}"
        seen.append(version)
    role.report(len(seen), {"seen": seen})


# Replay


class Store:
    """Keeps everything; samples are the newest."""

    def __init__(self) -> None:
        self.items = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.items)

    def insert(self, batch: dict[str, torch.Tensor], writer: int) -> int:
        assert (batch["item"] // 1000 == writer).all()
        self.items = torch.cat([self.items, batch["item"]])
        return len(batch["item"])

    def sample(self, count: int) -> dict[str, torch.Tensor]:
        return {"item": self.items[-1].expand(count)}

    def state(self) -> dict[str, Any]:
        return {"items": self.items}

    def load_state(self, state: dict[str, Any]) -> None:
        self.items = state["items"]


class Slow(Store):
    """Has nothing to sample until 40 items are there."""

    def __len__(self) -> int:
        return max(0, len(self.items) - 40)


class Empty(Store):
    """Fails when it is sampled."""

    def sample(self, count: int) -> dict[str, torch.Tensor]:
        raise RuntimeError("the disk is full")


async def writer(role: Any, replay: Any, items: int) -> None:
    """Reports inserts before it makes them, and `sampler` samples once it has them: no count is behind the truth."""
    number = 0
    while True:
        slot = await replay.slot(lambda: Slot(items), items, role.index)
        slot.values[:] = role.index * 1000 + number % 1000
        number += 1
        role.report(number, {"inserts": items, "samples": 0, "writer": role.index})
        replay.insert(slot, items, role.index)


async def sampler(role: Any, replay: Any, batch: int, samples: int, most: int = 1) -> None:
    drawn = 0
    while drawn < samples:
        items = (await replay.sample(batch, most))["item"]
        assert (items == items[0]).all(), "torn"
        drawn += len(items)
        role.report(drawn, {"inserts": 0, "samples": len(items)})


# Calls


async def client(role: Any, calls: Any, done: Any, count: int) -> None:
    slot = await calls.slot(Slot, role.index)
    for number in range(count):
        slot.values[:] = torch.tensor([role.index, number])
        asked = calls.ask(slot)
        assert await asked == "answered"
        assert slot.values.tolist() == [role.index + 1000, number + 1000]
    role.report(count, {"answers": count})
    done.put(await done.slot(Slot, role.index))


async def server(role: Any, calls: Any, most: int) -> None:
    while True:
        requests = await calls.requests(most)
        role.report(0, {"size": len(requests)})
        for slot, answer in reversed(requests):
            slot.values += 1000
            answer("answered")


async def judge(role: Any, done: Any, count: int) -> None:
    """Ends the run once so many are done."""
    done.release(await done.get(count))


# Roles


async def quiet(role: Any, weights: Any) -> None:
    await weights.newer_than(7)


async def hungry(role: Any, queue: Any) -> None:
    await queue.get(2)


async def faulty(role: Any, weights: Any, error: BaseException) -> None:
    weights.publish(1, {}, 0)
    await weights.newer_than(0)
    raise error


async def clumsy(role: Any) -> None:
    raise RuntimeError("no such file")


async def careful(role: Any, weights: Any, folder: Path) -> None:
    (folder / f"opened_{role.index}").touch()
    try:
        await weights.newer_than(100)
    finally:
        (folder / f"closed_{role.index}").touch()


async def counting(role: Any, queue: Any, until: int) -> None:
    part = role.keep(Counter())
    while part.count < until:
        slot = await queue.slot(Slot, role.index)
        part.count += 1
        role.report(part.count, {"count": part.count})
        role.advance(part.count)
        queue.put(slot)


async def collecting(role: Any, queue: Any) -> None:
    part = role.keep(Counter())
    while True:
        slots = await queue.get(1)
        part.count += 1
        queue.release(slots)


async def greedy(role: Any) -> None:
    role.keep(Counter())
    role.keep(Counter())


async def seeded(role: Any) -> None:
    role.report(0, {"seed": role.seed})


async def seeded_too(role: Any) -> None:
    role.report(0, {"seed": role.seed})


class Else:
    """Something to wait for that no runtime knows."""

    def __await__(self) -> Any:
        yield "something else"


async def awaiting_else(role: Any) -> None:
    await Else()


# Measuring


class Busy:
    """A part that says what its work is."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.dropped = {"digging": 0.0}, 100, {"stale": 0}

    def dig(self, seconds: float) -> None:
        time.sleep(seconds)
        self.seconds["digging"] += seconds
        self.steps += 3
        self.dropped["stale"] += 1

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


async def digger(role: Any, queue: Any, rounds: int, seconds: float, marker: Path | None = None) -> None:
    """Works for a known time in each round; with a marker, its first life ends in the second."""
    part = role.keep(Busy())
    for number in range(rounds):
        slot = await queue.slot(Slot, role.index)
        if number == 1 and marker is not None and not marker.exists():
            marker.touch()
            raise RuntimeError("the spade broke")
        part.dig(seconds)
        queue.put(slot)


async def taker(role: Any, queue: Any, gets: int) -> None:
    """Takes one at a time, and does nothing with it."""
    for _ in range(gets):
        queue.release(await queue.get(1))


async def slow_taker(role: Any, queue: Any, gets: int, seconds: float) -> None:
    """Keeps what it takes for a known time."""
    for _ in range(gets):
        slots = await queue.get(1)
        time.sleep(seconds)
        queue.release(slots)

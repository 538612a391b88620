"""Replay in shards: roles that hold rows, each of its own actors, and give a share of every batch.

    actor:   wait for room; act; have its shard store the unroll; insert a receipt.
    learner: wait until samples are owed; ask every shard for its share of a batch; update; hand back priorities.
    shard:   wait for a request; store an unroll, draw a share, or change priorities; answer.

Who waits for whom is as with one replay: the `Replay` word keeps the ratio of samples to inserts, but it holds receipts
only. Shares are of equal size, and importance weights are by the chance that a row had, in whichever shard it lies.

A shard that dies goes on with what it held at the last checkpoint. While it has nothing to draw, the others give its
share; what was drawn while none had anything is not learnt from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.actor import Unroll
from rookery.algorithms.base import Algorithm, Batch, ReplayPlan
from rookery.data.plan import axis_of
from rookery.data.replay import ReplayBuffer, check_priorities
from rookery.data.storage import assembled, leaves
from rookery.runtimes.boxes import Parcel, copied, packed, unpacked
from rookery.runtimes.words import Calls, Graph, Role
from rookery.topologies.replicas import check_evenly
from rookery.topologies.setting import Setting

__all__ = ["Delivery", "Draw", "Home", "Ledger", "Marks", "Receipt", "Shard", "Shares", "check", "shard", "wire"]


async def shard(role: Role, setting: Setting, actors: int, shards: int, requests: Calls) -> None:
    """Do what is asked."""
    shard = role.keep(Shard(setting, role.index, actors // shards, shards, role.seed))
    while True:
        for request, answer in await requests.requests(1):
            answer(request.serve(shard))


def check(algorithm: Algorithm, actors: int, shards: int) -> None:
    """Refuse actors and batches that cannot be shared out evenly."""
    if shards > 1:
        plan = algorithm.plan
        assert isinstance(plan, ReplayPlan)
        check_evenly("shards", shards, "actors", actors)
        check_evenly("shards", shards, "batch", plan.batch)


def each_of(plan: ReplayPlan, shards: int) -> ReplayPlan:
    """A shard's part of what is kept, and of a batch."""
    starts = -(-plan.learning_starts // shards)
    return replace(plan, capacity=plan.capacity // shards, batch=plan.batch // shards, learning_starts=starts)


def wire(graph: Graph, setting: Setting, actors: int, shards: int) -> tuple[Any, ...]:
    """Add so many shards, or none for one; gives what each is asked by."""
    requests = tuple(graph.word("calls", f"requests_{index}") for index in range(shards if shards > 1 else 0))
    for index, each in enumerate(requests):
        graph.role(shard, index, setting=setting, actors=actors, shards=shards, requests=each)
    return requests


class Shard:
    """Rows of some actors."""

    def __init__(self, setting: Setting, index: int, writers: int, shards: int, seed: int) -> None:
        replay = setting.replay
        self.save, self.plan = replay.save, each_of(setting.replay_plan, shards)
        memory = replay.memory / str(index) if isinstance(replay.memory, Path) else replay.memory
        own: dict[str, Any] = {"stack": replay.stack, "spec": replay.spec, "memory": memory, "seed": seed}
        self.buffer = ReplayBuffer(self.plan, setting.lanes, writers=writers, **own)

    def draw(self) -> Batch | None:
        """Its share of a batch, if there is one; as `weight` the chance of each at a draw, or 1 without priorities."""
        if not len(self.buffer):
            return None
        samples = self.buffer.sample(self.plan.batch)
        return {**samples, "weight": self.buffer.chance(samples["index"])}

    def state(self) -> dict[str, Any]:
        return {"replay": self.buffer.state()} if self.save else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if state:
            self.buffer.load_state(state["replay"])


class Delivery:
    """A request to store what is in a slot; the answer says how many samples there are now, and how full it is."""

    def __init__(self, unroll: Unroll, writer: int) -> None:
        self.unroll, self.writer = unroll, writer

    def serve(self, shard: Shard) -> tuple[int, float]:
        shard.buffer.insert(self.unroll.batch(), self.writer)
        return len(shard.buffer), shard.buffer.fill


class Home:
    """Where an actor's rows go: one of the shards, of which it is one of the writers.

    Slots 0 to 2 of a shard are the learner's.
    """

    def __init__(self, role: Role, shards: Sequence[Calls]) -> None:
        self.role = role
        self.writer, self.place = divmod(role.index, len(shards))
        self.shard = shards[self.place]

    async def delivery(self, make: Callable[[], Unroll]) -> Delivery:
        """The slot for what is stored next; from here on the run's state is not taken until that is done."""
        await self.role.boundary()
        slot: Delivery = await self.shard.slot(lambda: Delivery(make(), self.writer), 3 + self.writer)
        return slot

    async def store(self, delivery: Delivery, receipt: Receipt) -> None:
        """Have it stored, and note that."""
        with self.role.unit():
            ready, fill = await self.shard.ask(delivery)
        noted = {"shard": self.place, "ready": ready, "fill": fill}
        receipt.fill({name: torch.tensor(value) for name, value in noted.items()})


class Draw(Parcel):
    """A request for a share, which is written here; where it has no room yet, the answer brings it."""

    def serve(self, shard: Shard) -> list[Any] | None:
        if (samples := shard.draw()) is None:
            return None
        if self.content:
            self.fill(samples)
            return []
        return [(key, packed(leaf)) for key, leaf in leaves(samples)]


class Marks(Parcel):
    """A request to change the priorities of the first `count` of these samples."""

    def serve(self, shard: Shard) -> None:
        count = int(self.content["count"])
        shard.buffer.prioritise(self.content["index"][:count], self.content["priorities"][:count])


class Receipt(Parcel):
    """What an actor inserts in place of rows that lie in a shard: how much that has now."""

    def __init__(self) -> None:
        super().__init__({name: torch.zeros((), dtype=torch.float64) for name in ("shard", "ready", "fill")})

    def batch(self) -> dict[str, Any]:
        """What the replay takes."""
        return self.content


class Ledger:
    """What the `Replay` word holds for shards: how much each of them had when it was last heard of."""

    def __init__(self, shards: int) -> None:
        self.ready, self._fill = [0] * shards, [0.0] * shards

    def __len__(self) -> int:
        """How many samples there are; 0 while a shard has none."""
        return sum(self.ready) if all(self.ready) else 0

    @property
    def fill(self) -> float:
        """The share of all rows that are written."""
        return sum(self._fill) / len(self._fill)

    def insert(self, receipt: dict[str, Tensor], writer: int) -> None:
        place = int(receipt["shard"])
        self.ready[place], self._fill[place] = int(receipt["ready"]), float(receipt["fill"])

    def sample(self, count: int, beta: float) -> dict[str, Tensor]:
        """How many samples shards are to be asked for."""
        return {"count": torch.tensor(count)}

    def state(self) -> dict[str, Any]:
        return {"ready": self.ready, "fill": self._fill}

    def load_state(self, state: dict[str, Any]) -> None:
        self.ready, self._fill = list(state["ready"]), list(state["fill"])


class Shares:
    """What a learner draws from."""

    def __init__(self, plan: ReplayPlan, shards: Sequence[Calls]) -> None:
        self.plan, self.shards = plan, shards
        self._draws: list[Draw] = []  # a slot of each shard

    async def sample(self, count: int, beta: float) -> Batch | None:
        """As `ReplayBuffer.sample`, of all shards; None if they have nothing."""
        batches = []
        for _ in range(count // self.plan.batch):
            if (batch := await self._batch(beta)) is None:
                return None
            batches.append(batch)
        return self._joined(batches)

    async def prioritise(self, index: Tensor, priorities: Tensor) -> None:
        """Each shard gets the priorities of its own samples; see `ReplayBuffer.prioritise`."""
        check_priorities(priorities, None, index.shape)
        owner, own = index % len(self.shards), index // len(self.shards)
        room = {"count": torch.tensor(0), "index": own[: self.plan.batch], "priorities": priorities[: self.plan.batch]}
        slots = [await calls.slot(partial(Marks, room), 2) for calls in self.shards]
        for start in range(0, len(index), self.plan.batch):
            part = slice(start, start + self.plan.batch)
            asked = []
            for place, (calls, slot) in enumerate(zip(self.shards, slots, strict=True)):
                mine = owner[part] == place
                slot.content["count"].fill_(int(mine.sum()))
                for name, values in (("index", own), ("priorities", priorities)):
                    slot.content[name][: int(mine.sum())] = values[part][mine]
                asked.append(calls.ask(slot))
            for answer in asked:
                await answer

    async def _batch(self, beta: float) -> Batch | None:
        """A share of each shard; of those that have nothing, others give theirs."""
        if not self._draws:
            self._draws = [await calls.slot(partial(Draw, {}), 0) for calls in self.shards]
        asked = [calls.ask(slot) for calls, slot in zip(self.shards, self._draws, strict=True)]
        shares = [await self._taken(place, answer) for place, answer in enumerate(asked)]
        able = [place for place, share in enumerate(shares) if share is not None]
        if not able:
            return None
        for turn in range(len(shares) - len(able)):
            place = able[turn % len(able)]
            shares.append(await self._taken(place, self.shards[place].ask(self._draws[place])))
        batch = self._joined([share for share in shares if share is not None])
        chance = batch["weight"]
        return {**batch, "weight": ((chance / chance.amin()) ** -beta).float()}

    async def _taken(self, place: int, answer: Any) -> Batch | None:
        """A copy of what a shard gave, with its number in `index`."""
        if (given := await answer) is None:
            return None
        if given:
            names: dict[str, dict[Any, Tensor]] = {}
            for (name, *below), leaf in given:
                names.setdefault(name, {})[tuple(below)] = unpacked(leaf)
            dims = 2 if self.plan.sequence else 1
            share = {name: assembled(parts, next(iter(parts.values())).shape[:dims]) for name, parts in names.items()}
            self._draws[place] = await self.shards[place].slot(partial(Draw, share), 1)
        else:
            share = copied(self._draws[place].content)
        return {**share, "index": share["index"] * len(self.shards) + place}

    def _joined(self, parts: list[Batch]) -> Batch:
        return {name: torch.cat([part[name] for part in parts], axis_of(self.plan, name)) for name in parts[0]}

"""One policy for all actors: they ask what to do, it answers for as many as have asked.

    actor:     show on a desk what the lanes see; ask; step the lanes by what lies there then; ask ...
    inference: wait for questions; take the newest weights, if who asks knows of newer ones; act for all who asked at
               once; answer ...

With two desks an actor steps half of its lanes while actions are chosen for the other half: the alternating groups of
Stooke and Abbeel 2018 (arXiv 1803.02811). What is learnt from is the same as if each actor chose for itself, but for
the last bits of what depends on how many rows a matrix product has.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from rookery.actor import Collector, Unroll, new_unroll
from rookery.algorithms.base import Acted, Explore, Refused, flat
from rookery.envs.vector import Obs
from rookery.nn.compiled import precision
from rookery.runtimes.boxes import copied, pour
from rookery.runtimes.words import Calls, Graph, Role, Weights, WordSpec
from rookery.topologies.setting import Setting

__all__ = ["Asking", "Desk", "Group", "Policy", "acting", "check", "inference", "wire"]


async def inference(role: Role, setting: Setting, most: int, weights: Weights, calls: Calls) -> None:
    """Act for all who ask, with the newest weights."""
    policy = role.keep(Policy(setting))
    while True:
        asked = await calls.requests(most)
        desks = [desk for desk, _ in asked]
        if policy.outdated(desks):
            version, values, _ = await weights.latest()
            policy.load(version, values)
        policy.act(desks)
        for _, answer in asked:
            answer(policy.version)


def check(lanes: int, inference: str, double_buffer: bool) -> None:
    """Refuse lanes that cannot be halved, or need not be."""
    if double_buffer and inference == "own":
        raise Refused(
            "double_buffer=True: an actor that chooses its own actions has nothing to wait for meanwhile; use "
            "inference='shared' with it."
        )
    if double_buffer and lanes % 2:
        raise Refused(f"double_buffer=True steps half of an actor's {lanes} lanes at a time; use an even number.")


def wire(
    graph: Graph, setting: Setting, actors: int, weights: WordSpec, inference_is: str, double_buffer: bool
) -> dict[str, Any]:
    """Add who acts for all, if anybody does; gives what `acting` takes."""
    if inference_is == "own":
        return {"calls": None, "groups": 1}
    calls, groups = graph.word("calls", "questions"), 1 + double_buffer
    graph.role(inference, setting=setting, most=actors * groups, weights=weights, calls=calls)
    return {"calls": calls, "groups": groups}


async def acting(role: Role, setting: Setting, rows: int, calls: Calls | None, groups: int) -> Collector | Asking:
    """What an actor collects so many rows with: alone, or by asking for one group of its lanes after the other."""
    algorithm, lanes = setting.algorithm, setting.lanes // groups
    if calls is None:
        env = setting.actor_env(lanes, role.seed)
        return role.keep(Collector(algorithm, setting.actor_net(), env, rows, role.seed, **setting.actor_means))
    made = []
    with ExitStack() as closing:
        for place in range(groups):
            seed = zlib.crc32(f"{role.seed}/{place}".encode()) >> 1 if place else role.seed
            env = setting.actor_env(lanes, seed)
            closing.callback(env.close)
            group = Group(algorithm, setting.actor_net(), env, rows, seed, bf16=setting.actor_means["bf16"])
            await group.sit(calls, role.index * groups + place)
            made.append(group)
        asking = role.keep(Asking(role, made))
        closing.pop_all()  # it does so itself from now on
    return asking


class Desk:
    """What some lanes see, and what they are told to do: each by name, `[B, ...]`."""

    def __init__(self, index: int, seen: dict[str, Any], told: dict[str, Any]) -> None:
        self.index, self.seen, self.told = index, copied(seen), copied(told)
        self.newest = torch.zeros(2, dtype=torch.int64)  # which weights the actor knows of: how many before; version

    @property
    def lanes(self) -> int:
        return len(self.seen["scale"])


class Policy:
    """Whoever acts for all.

    `steps` counts the rows it has answered for, `seconds` what that took.
    """

    def __init__(self, setting: Setting) -> None:
        self.algorithm, self.net = setting.algorithm, setting.make_net()
        self.device, self.bf16 = next(self.net.parameters()).device, setting.bf16
        self._flat, self.version = flat(self.algorithm, self.net, learns=False), -1
        self.steps, self.seconds = 0, {"inference": 0.0}
        self._newest: dict[str, list[int]] = {}  # that each desk knew of when it last asked

    def outdated(self, desks: list[Desk]) -> bool:
        """Whether any of them has heard of other weights since it last asked."""
        newest = {str(desk.index): desk.newest.tolist() for desk in desks}
        before, self._newest = self._newest, self._newest | newest
        return any(before.get(desk) != known for desk, known in newest.items())

    def load(self, version: int, values: dict[str, Tensor]) -> None:
        """Act with these weights from now on."""
        self._flat.restore(values)
        self.version = version

    @torch.no_grad()
    def act(self, desks: list[Desk]) -> None:
        """Tell everybody what to do, from one batch of what all see."""
        began = time.perf_counter()
        first = desks[0].seen
        seen = {name: torch.cat([desk.seen[name] for desk in desks]).to(self.device) for name in first}
        with precision(self.device, self.bf16):
            told = self.algorithm.act(
                self.net, seen["obs"], seen["state"], Explore(seen["noise"], seen["scale"])
            )._asdict()
        told = told if self.device.type == "cpu" else copied(told)  # once, not for each desk
        ends = list(accumulate((desk.lanes for desk in desks), initial=0))
        for desk, (begin, end) in zip(desks, pairwise(ends), strict=True):
            pour(_rows(told, slice(begin, end)), desk.told)
        self.steps += ends[-1]
        self.seconds["inference"] += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """Its weights, which may be older than the newest; and who knew of which."""
        return {"version": self.version, "values": self._flat.snapshot(), "newest": self._newest}

    def load_state(self, state: dict[str, Any]) -> None:
        self.load(state["version"], state["values"])
        self._newest = dict(state["newest"])


def _rows(value: Any, rows: slice) -> Any:
    return {name: _rows(part, rows) for name, part in value.items()} if isinstance(value, dict) else value[rows]


class Group(Collector):
    """Lanes that step together, by what they are told on their desk."""

    calls: Calls
    desk: Desk

    async def sit(self, calls: Calls, index: int) -> None:
        """Take the desk of that index."""
        self.calls, self.desk = calls, await calls.slot(partial(self._new_desk, index), index)

    @torch.no_grad()
    def _new_desk(self, index: int) -> Desk:
        noise = self.net.draw((self.env.lanes,), torch.Generator(self.env.device))
        return Desk(index, self._seen(noise), self._choose(self._obs, self._state, noise)._asdict())

    def _seen(self, noise: Tensor) -> dict[str, Any]:
        return {"obs": self._obs, "state": self._state, "noise": noise, "scale": self._scale}

    def begin(self, unroll: Unroll, scale: Tensor | float, newest: tuple[int, int]) -> None:
        """Start on an unroll, when those weights are there."""
        self.desk.newest.copy_(torch.tensor(newest))
        self._noise, self._ahead = self._begin(unroll, scale)
        self._into, self._columns = unroll, defaultdict[str, list[Obs]](list)
        self.version = sys.maxsize

    def ask(self, row: int) -> None:
        """Ask what to do."""
        pour(self._seen(self._noise[row]), self.desk.seen)
        self._asked = self.calls.ask(self.desk)

    async def told(self) -> Acted:
        """What they were told; `version` is that of the oldest weights that told them anything in this unroll."""
        self.version = min(self.version, await self._asked)
        return Acted(**copied(self.desk.told))

    def step(self, row: int, acted: Acted) -> None:
        """Do it."""
        if self._tensor_env is not None:
            self._tensor_env.noise = self._ahead[row]
        for name, value in self._row(acted).items():
            self._columns[name].append(value)

    def end(self, record: dict[str, Tensor]) -> int:
        """Finish the unroll; gives how many steps were valid."""
        raw: Any = self._columns.pop("raw_reward", [])
        self._into.buffer.write(self._columns)
        return self._end(self._into, raw, record)


class Asking:
    """What a `Collector` is to an actor, for groups of lanes that ask in turn."""

    def __init__(self, role: Role, groups: list[Group]) -> None:
        self.role, self.groups, self.version = role, groups, 0
        self._loads = 0
        ends = accumulate((group.env.lanes for group in groups), initial=0)
        self._lanes = [slice(begin, end) for begin, end in pairwise(ends)]

    @property
    def device(self) -> torch.device:
        """Of the lanes."""
        return self.groups[0].device

    def load(self, version: int, values: dict[str, Tensor]) -> None:
        """Let who chooses the actions know that there are these weights."""
        self._loads, self.version = self._loads + 1, version

    @torch.no_grad()
    def slot(self) -> Unroll:
        """A new slot for the lanes of all groups."""
        rows, records = zip(*(group.example() for group in self.groups), strict=True)
        whole = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        state = torch.cat([group.memory for group in self.groups])
        return new_unroll(self.groups[0].algorithm, (whole, records[0]), state, self.groups[0].T)

    async def ready(self) -> None:
        """Before slot and weights are asked for: the run's state is taken while actors wait here."""
        await self.role.boundary()

    async def filled(self, unroll: Unroll, scale: Tensor | float = 1.0) -> int:
        """`Collector.fill`."""
        with self.role.unit():
            return await self._filled(unroll, scale)

    async def _filled(self, unroll: Unroll, scale: Tensor | float) -> int:
        for group, lanes in zip(self.groups, self._lanes, strict=True):
            part = scale[lanes] if isinstance(scale, Tensor) else scale
            group.begin(unroll.part(lanes), part, (self._loads, self.version))
            group.ask(0)
        rows = self.groups[0].T
        asked = rows + unroll.records  # the row after the last is for the record alone
        for row in range(rows):
            for group in self.groups:  # while one steps, the others' questions are answered
                group.step(row, await group.told())
                if row + 1 < asked:
                    group.ask(row + 1)
        records = [(await group.told()).record if unroll.records else {} for group in self.groups]
        valid = sum(group.end(record) for group, record in zip(self.groups, records, strict=True))
        unroll.version.fill_(min(group.version for group in self.groups))
        return valid

    @property
    def steps(self) -> int:
        """Valid ones so far."""
        return sum(group.steps for group in self.groups)

    @property
    def seconds(self) -> dict[str, float]:
        """By activity."""
        return dict(sum((Counter(group.seconds) for group in self.groups), Counter()))

    @property
    def returns(self) -> list[float]:
        """Of the episodes that ended since they were last taken."""
        return [each for group in self.groups for each in group.returns]

    def episodes(self) -> dict[str, Any]:
        """`Collector.episodes`, of all lanes."""
        first, *others = self.groups
        for group in others:
            first.returns, group.returns = first.returns + group.returns, []
            first.lengths, group.lengths = first.lengths + group.lengths, []
        return first.episodes()

    def close(self) -> None:
        for group in self.groups:
            group.close()

    def state(self) -> dict[str, Any]:
        """Of each group, and which weights they know of."""
        groups = {str(place): group.state() for place, group in enumerate(self.groups)}
        return {**groups, "version": self.version, "loads": self._loads}

    def load_state(self, state: dict[str, Any]) -> None:
        self.version, self._loads = state["version"], state["loads"]
        for place, group in enumerate(self.groups):
            group.load_state(state[str(place)])

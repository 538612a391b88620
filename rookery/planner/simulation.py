"""A run as discrete events: roles that take turns on cores, wait for words, and send over a network.

What comes out is what a run measures of itself, judged by the same rules (`rookery.runs.account.bottleneck`).
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rookery.data.plan import ReplayPlan
from rookery.planner.costs import Cluster, Costs, Work
from rookery.runs.account import KEEPER, bottleneck, flat, kind_of

try:
    import simpy
except ImportError as error:
    raise RuntimeError('planning needs SimPy, which is not here; run `pip install "rookery[plan]"`.') from error

__all__ = ["Events", "Forecast", "Player", "Queue", "Signal", "Simulation"]

SLICE = 1.5e-3  # seconds that a role keeps a core for which others wait: what Linux gives on two cores
SLICES = 8  # that a unit of work is cut into, at most
PARTS = 4  # that an unroll is collected in, between which an actor sleeps
UNROLLS = 3_000  # that are looked at, of all actors, after a quarter as many
MOST, MORTAL, FEWEST = 30, 1_500, 6  # of each actor; the most where hosts die, so that many do
OUTAGE = 4  # unrolls that a host is missing for

Events = Generator[Any, Any, None]  # what a process of SimPy waits for


@dataclass(frozen=True)
class Forecast:
    """What a run with so many actors would do."""

    actors: int
    hosts: int
    steps_per_second: float  # of the environment
    updates_per_second: float  # steps of the optimiser
    lag: float  # versions of the weights, mean
    lag_max: int
    busy: dict[str, float]  # share of its time, by kind of role
    processor: dict[str, float]  # cores that are used, by kind of role
    limit: str  # as a run's account has it (`docs/tour.md`)
    because: str
    price: float  # of a million steps


class Signal:
    """What some wait for to change."""

    def __init__(self, sim: simpy.Environment) -> None:
        self.sim, self.event = sim, sim.event()

    def stir(self) -> None:
        event, self.event = self.event, self.sim.event()
        event.succeed()

    def until(self, ready: Callable[[], bool]) -> Events:
        while not ready():
            yield self.event


class Queue:
    """Slots that go round: so many for each owner.

    Attributes:
        filled: whose, and what is in it.
    """

    def __init__(self, sim: simpy.Environment, owners: int, each: int) -> None:
        self.filled: deque[tuple[int, Any]] = deque()
        self.come, self.freed = Signal(sim), [Signal(sim) for _ in range(owners)]
        self.free = [each] * owners

    def has_free(self, owner: int) -> bool:
        return self.free[owner] > 0

    def has(self, count: int) -> bool:
        return len(self.filled) >= count

    def put(self, owner: int, what: Any) -> None:
        self.filled.append((owner, what))
        self.come.stir()

    def release(self, owners: list[int]) -> None:
        for owner in owners:
            self.free[owner] += 1
            self.freed[owner].stir()


class Host:
    """Cores that roles share: in turn, a slice each; who needs no more than that goes first."""

    def __init__(self, sim: simpy.Environment, cores: int, crowding: float) -> None:
        self.sim, self.crowding = sim, crowding
        self.cores, self.door = simpy.PriorityResource(sim, cores), simpy.Resource(sim)
        self.roles = self.at_work = 0  # how many
        self.used = 0.0  # seconds of cores
        self.version = 0  # of the weights that lie here
        self.back: simpy.Event | None = None  # when it lives again

    @property
    def crowded(self) -> bool:
        """Whether roles ever have to wait for a core."""
        return self.roles > self.cores.capacity

    def run(self, seconds: float) -> Generator[Any, Any, float]:
        """So many seconds of a core; gives how many it took."""
        slice_, long = max(SLICE, seconds / SLICES) if self.crowded else seconds, seconds > SLICE
        taken = 0.0
        while seconds > 0:
            if self.back is not None:
                yield self.back
            spent = min(slice_, seconds)
            if self.crowded:
                with self.cores.request(long) as turn:
                    yield turn
                    taken += yield from self._at(spent)
            else:
                taken += yield from self._at(spent)
            seconds -= spent
        return taken

    def _at(self, seconds: float) -> Generator[Any, Any, float]:
        others = self.at_work / max(1, self.cores.capacity - 1)
        seconds *= 1 + (self.crowding - 1) * others
        self.at_work += 1
        yield self.sim.timeout(seconds)
        self.at_work -= 1
        self.used += seconds
        return seconds

    def dies(self, lives: Callable[[], float], outage: float) -> Events:
        """Stand still now and then."""
        while True:
            yield self.sim.timeout(lives())
            self.back = back = self.sim.event()
            yield self.sim.timeout(outage)
            self.back = None
            back.succeed()


class Player:
    """A role: what it spends its time on; by costs, or so many times as long."""

    def __init__(self, name: str, host: Host, costs: Costs) -> None:
        self.name, self.kind, self.host = name, kind_of(name), host
        self.slower, self.used = costs.slower.get(self.kind, 1.0), 0.0  # seconds of a core
        self.seconds: dict[str, float] = defaultdict(float)  # by activity
        self.waits: dict[str, float] = defaultdict(float)  # by word
        host.roles += 1

    def work(self, activity: str, seconds: float, asleep: float = 0.0) -> Events:
        """So long on a core, and so long without."""
        sim = self.host.sim
        began = sim.now
        taken = yield from self.host.run(seconds * self.slower)
        self.used += taken  # not at once: it may have been forgotten in between
        if asleep:
            yield sim.timeout(asleep)
        self.seconds[activity] += sim.now - began

    def measured(self) -> dict[str, Any]:
        """Shares of its time, as in an account."""
        work, waits = sum(self.seconds.values()), sum(self.waits.values())
        whole = max(work + waits, 1e-12)
        waiting = {word: seconds / whole for word, seconds in self.waits.items()}
        return {"busy": work / whole, **{name: each / whole for name, each in self.seconds.items()}, "waiting": waiting}


class Simulation:
    """What topologies share: hosts, the network, the process that keeps the words, weights, and what is counted."""

    words: tuple[tuple[str, str], ...]  # with their kinds
    acts = "actor"  # the kind of the roles that act

    def __init__(self, work: Work, costs: Costs, actors: int, cluster: Cluster, seed: int) -> None:
        self.given, self.c, self.cluster, self.random = work, costs, cluster, random.Random(seed)
        self.plan: Any = work.plan
        self.items = work.rows * work.lanes  # steps of an unroll
        self.parts = work.shards if work.topology == "parameter_server" else 1  # of the weights
        self.sim = sim = simpy.Environment()
        places = cluster.places(actors)
        self.hosts = [Host(sim, cluster.cores, costs.crowding) for _ in range(max(places) + 1)]
        self.home = self.hosts[0]
        self.keeper, self.ear = Player(KEEPER, self.home, costs), simpy.Resource(sim)
        self.into, self.out = simpy.Resource(sim), simpy.Resource(sim)  # the home's network
        acting = ((f"{self.acts} {index}", self.hosts[place]) for index, place in enumerate(places))
        self.actors = [Player(name, host, costs) for name, host in acting]
        self.players = [self.keeper, *self.actors]
        self.version = self.published = 0
        self.renewed = Signal(sim)
        self.totals = {"steps": 0.0, "updates": 0.0}
        self.marks: dict[str, dict[float, float]] = {name: {} for name in self.totals}  # totals by time
        self.lags: list[int] = []
        self.cycle = self._estimate()
        self.begin()
        for index, player in enumerate(self.actors):
            sim.process(self._late(self.actor(player, index)))

    def begin(self) -> None:
        """Make the words, and the roles that do not act."""
        raise NotImplementedError

    def actor(self, who: Player, index: int) -> Events:
        """A role that acts."""
        raise NotImplementedError

    def add(self, role: Callable[[Player, int], Events], kind: str, host: Host | None = None) -> None:
        """A role, at home if nothing else is said; the first of its kind has index 0."""
        index = sum(player.name.startswith(kind) for player in self.players)
        self.players.append(Player(f"{kind} {index}", host or self.home, self.c))
        self.sim.process(role(self.players[-1], index))

    def _estimate(self) -> float:
        """About how long an actor takes for an unroll, waits included."""
        c, plan, rows, actors = self.c, self.plan, self.given.rows, len(self.actors)
        crowd = max(1.0, max(host.roles for host in self.hosts) / self.cluster.cores)
        acting = rows * ((c.environment + c.inference) * crowd + c.asleep)
        if isinstance(plan, ReplayPlan):
            batch, learning = 1, c.round(1) * plan.updates_per_step * rows * self.given.lanes
        else:
            batch = self.given.batch(actors)
            learning = c.round(batch) / batch
        return max(1e-9, acting * max(1.0, batch / actors) + learning * (actors if self.acts == "actor" else crowd))

    def _late(self, role: Events) -> Events:
        """Roles do not begin at the same instant."""
        yield self.sim.timeout(self.random.random() * self.cycle)
        yield from role

    # What roles do.

    def collect(self, who: Player) -> Events:
        """An unroll."""
        parts = PARTS if who.host.crowded or self.cluster.mtbf else 1
        each = self.given.rows / parts
        for _ in range(parts):
            yield from who.work("inference", each * self.c.inference)
            yield from who.work("environment", each * self.c.environment, each * self.c.asleep)
        yield from who.work("transfer", self.c.unroll)

    def asks(self, who: Player, word: str, signal: Signal | None = None, ready: Callable[[], bool] = bool) -> Events:
        """A question to who keeps the words, which is answered once it can be."""
        away = 0.0 if who.host is self.home else 2 * self.cluster.latency / 1e3
        yield from who.work("transfer", self.c.message, self.c.hop + away)
        yield from self.kept(who, self.c.answer)
        began = self.sim.now
        if signal is not None:
            yield from signal.until(ready)
        who.waits[word] += self.sim.now - began

    def tells(self, who: Player, effect: Callable[[], Any] = bool, size: float = 0.0, unit: float = 0.0) -> Events:
        """So many bytes to who keeps the words, and has so much to do with them; nobody waits for that."""
        yield from who.work("transfer", self.c.message)
        self.sim.process(self._heard(who, effect, size, unit))

    def _heard(self, who: Player, effect: Callable[[], Any], size: float, unit: float) -> Events:
        yield from self.sent(self.into, who, size)
        yield from self.kept(None, self.c.answer + unit)
        effect()

    def kept(self, who: Player | None, seconds: float) -> Events:
        """The keeper of the words at work, for whom it makes wait."""
        if not seconds:
            return
        began = self.sim.now
        with self.ear.request() as turn:
            yield turn
            yield from self.keeper.work("transfer", seconds)
        if who is not None:
            who.seconds["transfer"] += self.sim.now - began

    def sent(self, line: simpy.Resource, who: Player, size: float) -> Events:
        """Bytes between the home and another host."""
        if who.host is not self.home:
            with line.request() as turn:
                yield turn
                yield self.sim.timeout(size * 8e-9 / self.cluster.bandwidth)
            yield self.sim.timeout(self.cluster.latency / 1e3)

    def publish(self, who: Player) -> Events:
        """Show others what is newest."""
        yield from self.asks(who, "weights")
        yield from who.work("transfer", self.c.publish / self.parts)
        yield from self.tells(who, partial(self.show, self.version))

    def show(self, version: int) -> None:
        self.published = max(version, self.published)
        self.renewed.stir()

    def newer(self, least: int) -> bool:
        return self.published >= least

    def fetch(self, who: Player, known: int) -> Events:
        """Take the newest weights, which come to each host once; `known` are those that it has."""
        began, newest = self.sim.now, self.published
        if who.host is not self.home:
            with who.host.door.request() as turn:
                yield turn
                if who.host.version < newest:
                    yield from self.sent(self.out, who, self.c.weights_bytes)
                    who.host.version = newest
        who.seconds["transfer"] += self.sim.now - began
        if newest > known:
            yield from who.work("transfer", self.c.load)

    def count(self, name: str, number: float) -> None:
        """Steps or updates that were made."""
        self.totals[name] += number
        self.marks[name][self.sim.now] = self.totals[name]

    # Running.

    def forecast(self) -> Forecast:
        """Begin, forget how that went, and go on for a while."""
        c = self.cluster
        cycles = max(FEWEST, min(MORTAL if c.mtbf else MOST, UNROLLS // len(self.actors)))
        if c.mtbf:
            outage = c.restart + self.cycle / 2  # the unroll at which it dies is lost
            squeeze = min(1.0, OUTAGE * self.cycle / outage)  # of hours, so that many deaths are seen
            for host in self.hosts:
                lives = partial(random.Random(self.random.random()).expovariate, 1 / (c.mtbf * 3600 * squeeze))
                self.sim.process(host.dies(lives, outage * squeeze))
        self.sim.run(cycles / 4 * self.cycle)
        for player in self.players:
            player.seconds.clear()
            player.waits.clear()
            player.used = 0.0
        for host in self.hosts:
            host.used = 0.0
        self.marks, self.lags = {name: {} for name in self.totals}, []
        self.sim.run(1.25 * cycles * self.cycle)
        return self._told(cycles * self.cycle)

    def _told(self, seconds: float) -> Forecast:
        roles = {player.name: player.measured() for player in self.players}
        roles[KEEPER] = {"busy": self.keeper.seconds["transfer"] / seconds, "waiting": {}}
        cores = len(self.hosts) * self.cluster.cores
        words = {name: {"kind": kind} for name, kind in self.words}
        found: dict[str, Any] = {"roles": roles, "words": words, "processes": 1 + len(roles), "cores": cores}
        found |= {"cores_busy": sum(host.used for host in self.hosts) / seconds, "restarts": {}, "dropped": {}}
        processor: dict[str, float] = defaultdict(float)
        for player in self.players:
            processor[player.kind] += player.used / seconds
        limit, rate = bottleneck(found), {name: pace(marks) for name, marks in self.marks.items()}
        return Forecast(
            actors=len(self.actors),
            hosts=len(self.hosts),
            steps_per_second=rate["steps"],
            updates_per_second=rate["updates"],
            lag=sum(self.lags) / max(1, len(self.lags)),
            lag_max=max(self.lags, default=0),
            busy={name.removesuffix("_busy"): share for name, share in flat(found).items() if name.endswith("_busy")},
            processor=dict(processor),
            limit=limit["limit"],
            because=limit["because"],
            price=self.cluster.price * cores / 3600 * 1e6 / max(rate["steps"], 1e-12),
        )


def pace(marks: dict[float, float]) -> float:
    """What was made a second between the first and the last time."""
    if len(marks) < 2:
        return 0.0
    (began, before), *_, (ended, after) = marks.items()
    return (after - before) / (ended - began)

"""Each topology's roles: they wait and work as in `rookery.topologies`, and take the time that the costs say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rookery.data.plan import Refused
from rookery.planner.costs import Cluster, Costs, Work
from rookery.planner.simulation import Events, Forecast, Player, Queue, Signal, Simulation
from rookery.runtimes.limiter import RateLimiter

__all__ = ["ActorsLearner", "ActorsReplayLearner", "ActorsShardsLearner", "Hogwild", "ParameterServer", "simulate"]


def simulate(work: Work, costs: Costs, actors: int, cluster: Cluster | None = None, seed: int = 0) -> Forecast:
    """Run for some unrolls of each actor, and say how it went.

    Raises:
        Refused: for a topology that is not modelled, or that has no place on this cluster.
    """
    if work.topology not in TOPOLOGIES:
        raise Refused(f"{work.topology} is not modelled by the planner; plan one of {', '.join(TOPOLOGIES)}.")
    sharded = work.shards > 1 and work.topology == "actors_replay_learner"
    topology = ActorsShardsLearner if sharded else TOPOLOGIES[work.topology]
    return topology(work, costs, actors, cluster or Cluster(), seed).forecast()


class ActorsLearner(Simulation):
    """The learner takes so many unrolls at once; actors wait for newer weights, or do not."""

    words = (("unrolls", "queue"), ("weights", "weights"))

    def begin(self) -> None:
        self.batch = self.given.batch(len(self.actors))
        count = len(self.actors)
        self.unrolls = Queue(self.sim, count, self.plan.slots(self.batch, count))
        self.add(self.learner, "learner")

    def actor(self, who: Player, index: int) -> Events:
        unrolls, version = self.unrolls, 0
        while True:
            yield from self.asks(who, "unrolls", unrolls.freed[index], partial(unrolls.has_free, index))
            unrolls.free[index] -= 1
            known, least = version, 1 if self.plan.stale else version + 1
            yield from self.asks(who, "weights", self.renewed, partial(self.newer, least))
            version = self.published
            yield from self.fetch(who, known)
            yield from self.collect(who)
            yield from self.tells(who, partial(unrolls.put, index, version), self.c.unroll_bytes)

    def learner(self, who: Player, index: int) -> Events:
        unrolls, batch = self.unrolls, self.batch
        self.version = 1
        yield from self.publish(who)
        while True:
            yield from self.asks(who, "unrolls", unrolls.come, partial(unrolls.has, batch))
            taken = [unrolls.filled.popleft() for _ in range(batch)]
            self.lags += [self.version - version for _, version in taken]
            yield from who.work("learning", self.c.round(batch))
            self.version += 1
            yield from self.tells(who, partial(unrolls.release, [owner for owner, _ in taken]))
            yield from self.tells(who)  # how far the run is
            yield from self.publish(who)
            self.count("updates", self.plan.epochs * self.plan.minibatches)
            self.count("steps", batch * self.items * self.c.valid)


class ActorsReplayLearner(Simulation):
    """The ratio of samples to inserts is all that anybody waits for."""

    words: tuple[tuple[str, str], ...] = (("replay", "replay"), ("weights", "weights"))

    def begin(self) -> None:
        plan = self.plan
        tolerance = plan.tolerance(self.given.lanes, len(self.actors))
        self.limiter, self.promised, self.turn = RateLimiter(plan.samples_per_insert, 0, tolerance), 0, 0
        self.room, self.owed = Signal(self.sim), Signal(self.sim)
        self.add(self.learner, "learner")

    def actor(self, who: Player, index: int) -> Events:
        version = 0
        while True:
            yield from self.asks(who, "replay", self.room, partial(self.may_insert, index))
            self.promised += self.items
            yield from self.asks(who, "weights", self.renewed, partial(self.newer, 1))
            known, version = version, self.published
            yield from self.fetch(who, known)
            yield from self.collect(who)
            yield from self.store(who, index, version)
            yield from self.tells(who)  # how far the run is

    def store(self, who: Player, index: int, version: int) -> Events:
        yield from self.tells(who, partial(self.insert, index, version), self.c.unroll_bytes, self.c.insert)

    def draw(self, who: Player, batches: int) -> Events:
        yield from self.kept(who, batches * self.c.sample)

    def may_insert(self, index: int) -> bool:
        ours = self.plan.ahead > 0 or self.turn == index
        return ours and self.limiter.may_insert(self.promised + self.items)

    def insert(self, index: int, version: int) -> None:
        self.promised -= self.items
        self.limiter.inserts += self.items
        self.turn = (index + 1) % len(self.actors)
        self.lags.append(self.version - version)
        self.count("steps", self.items * self.c.valid)
        self.room.stir()
        self.owed.stir()

    def learner(self, who: Player, index: int) -> Events:
        limiter, batch = self.limiter, self.plan.batch
        self.version = 1
        yield from self.publish(who)
        while True:
            limiter.unlearnt = 0
            self.room.stir()
            yield from self.asks(who, "replay", self.owed, partial(limiter.may_sample, batch))
            rounds = min(self.given.batch(len(self.actors)), int(limiter.owed // batch))
            limiter.samples += rounds * batch
            limiter.unlearnt = rounds * batch
            yield from self.draw(who, rounds)
            self.room.stir()
            yield from who.work("learning", self.c.round(rounds))
            self.version += 1
            yield from self.publish(who)
            self.count("updates", rounds)


class ActorsShardsLearner(ActorsReplayLearner):
    """The same with rows in shards, which store and draw; each has a host, as far as there are enough."""

    words = (*ActorsReplayLearner.words, ("requests", "calls"))

    def begin(self) -> None:
        self.requests = [Queue(self.sim, 1, 0) for _ in range(self.given.shards)]
        for place in range(len(self.requests)):
            self.add(self.shard, "shard", self.hosts[place % len(self.hosts)])
        super().begin()

    def store(self, who: Player, index: int, version: int) -> Events:
        place = index % len(self.requests)
        yield from self.calls(who, [place], self.c.insert, self.c.unroll_bytes)
        yield from self.tells(who, partial(self.insert, index, version))

    def draw(self, who: Player, batches: int) -> Events:
        everyone = range(len(self.requests))
        share = 2 * self.c.unroll_bytes / self.items * self.plan.batch / len(everyone)  # an observation, and the next
        for _ in range(batches):
            yield from self.calls(who, everyone, self.c.sample, answer=share)
            if self.plan.alpha:
                yield from self.calls(who, everyone, 0.0)  # whose work is in that of a sample

    def calls(
        self, who: Player, places: Sequence[int], seconds: float, question: float = 0.0, answer: float = 0.0
    ) -> Events:
        """Ask these shards for so much work, by so many bytes, and wait for so many of each."""
        left, answered = set(places), Signal(self.sim)

        def take(place: int) -> None:
            left.discard(place)
            answered.stir()

        for place in places:
            request = seconds, answer, partial(take, place)
            yield from self.tells(who, partial(self.requests[place].put, 0, request), question)
        yield from self.asks(who, "requests", answered, lambda: not left)

    def shard(self, who: Player, index: int) -> Events:
        queue = self.requests[index]
        while True:
            yield from self.asks(who, "requests", queue.come, partial(queue.has, 1))
            _, (seconds, size, answered) = queue.filled.popleft()
            yield from who.work("transfer", seconds)
            yield from self.tells(who, answered, size)


class ParameterServer(Simulation):
    """Bundles that act, remember and differentiate, and shards that step."""

    words = (("gradients", "queue"), ("parameters", "weights"))
    acts = "learner"

    def begin(self) -> None:
        self.gradients = [Queue(self.sim, len(self.actors), 1) for _ in range(self.given.shards)]
        self.version = self.published = 1
        for _ in self.gradients:
            self.add(self.shard, "shard")

    def actor(self, who: Player, index: int) -> Events:
        """A bundle."""
        c, batch = self.c, self.plan.batch
        limiter = RateLimiter(self.plan.samples_per_insert, 0, batch)
        while True:
            for queue in self.gradients:
                yield from self.asks(who, "gradients", queue.freed[index], partial(queue.has_free, index))
                queue.free[index] -= 1
            for _ in self.gradients:
                yield from self.asks(who, "parameters")
            read, steps = self.published, 0.0
            yield from self.fetch(who, 0)
            if not limiter.may_sample(batch):
                yield from self.collect(who)
                yield from who.work("transfer", c.insert)
                limiter.inserts, steps = limiter.inserts + self.items, self.items * c.valid
            if moves := limiter.may_sample(batch):
                limiter.samples += batch
                yield from who.work("transfer", c.sample)
                yield from who.work("learning", c.round(1) - c.optimise)
            for queue in self.gradients:
                size = c.weights_bytes / self.given.shards
                yield from self.tells(who, partial(queue.put, index, (read, steps, moves)), size)

    def shard(self, who: Player, index: int) -> Events:
        queue = self.gradients[index]
        while True:
            yield from self.asks(who, "gradients", queue.come, partial(queue.has, 1))
            owner, (read, steps, moves) = queue.filled.popleft()
            if moves:
                yield from who.work("learning", self.c.optimise / self.given.shards)
            if not index:  # the run's clock
                if moves:
                    self.lags.append(self.version - read)
                    self.version += 1
                    self.count("updates", 1)
                self.count("steps", steps)
            yield from self.publish(who)
            yield from self.tells(who, partial(queue.release, [owner]))


class Hogwild(Simulation):
    """Workers that act and step shared weights, and wait for nobody."""

    words = (("memory", "weights"),)
    acts = "learner"

    def begin(self) -> None:
        if len(self.hosts) > 1:
            raise Refused(
                f"workers of hogwild share memory, and {len(self.actors)} are too many for a host of "
                f"{self.cluster.cores} cores; use fewer, more cores_per_host, or cores_per_host=0."
            )

    def actor(self, who: Player, index: int) -> Events:
        """A worker."""
        while True:
            read = self.version
            yield from who.work("transfer", self.c.load)
            yield from self.collect(who)
            yield from who.work("learning", self.c.round(1))
            self.lags.append(self.version - read)
            self.version += self.plan.epochs * self.plan.minibatches
            self.count("updates", self.plan.epochs * self.plan.minibatches)
            self.count("steps", self.items * self.c.valid)
            yield from self.tells(who)  # how far the run is
            yield from self.asks(who, "memory")


TOPOLOGIES: dict[str, type[Simulation]] = {
    "actors_learner": ActorsLearner,
    "actors_replay_learner": ActorsReplayLearner,
    "parameter_server": ParameterServer,
    "hogwild": Hogwild,
}

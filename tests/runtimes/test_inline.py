"""The laws of the four words and of running roles, for every runtime: a runtime joins by standing in RUNTIMES."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies

from rookery.runtimes.inline import Deadlock, Inline, RoleError
from rookery.runtimes.words import Graph

RUNTIMES = {"inline": Inline}

Rows = list[tuple[str, int, int, dict[str, Any]]]


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return request.param


def execute(
    runtime: str, graph: Graph, between: Callable[..., bool] | None = None, saved: dict[str, Any] | None = None
) -> tuple[Rows, dict[str, Any]]:
    """Run the graph; gives what the roles reported, and the final state."""
    rows: Rows = []
    made = RUNTIMES[runtime](lambda *row: rows.append(row))
    return rows, made.run(graph, between or (lambda steps, state: False), saved)


class Counter:
    """The smallest stateful part."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


# Queue


class Slot:
    """What goes round in a queue of these tests."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def state(self) -> dict[str, Any]:
        return {"values": self.values}


async def filler(role: Any, queue: Any, made: list[int], count: int) -> None:
    def make() -> Slot:
        made.append(role.index)
        return Slot()

    for number in range(count):
        slot = await queue.slot(make)
        slot.values = [role.index, number]
        queue.put(role.index, slot)


async def emptier(role: Any, queue: Any, each: int, gets: int) -> None:
    for number in range(gets):
        slots = await queue.get(each)
        role.report(number, {"got": [list(slot.values) for slot in slots]})
        queue.release(slots)


def queue_graph(capacity: int, fillers: int, gets: int, each: int) -> tuple[Graph, list[int]]:
    graph, made = Graph(0), []
    queue = graph.word("queue", "queue", capacity=capacity)
    for index in range(fillers):
        graph.role(filler, index, queue=queue, made=made, count=1000)
    graph.role(emptier, queue=queue, each=each, gets=gets, ends_run=True)
    return graph, made


@pytest.mark.parametrize(("fillers", "capacity"), [(1, 1), (1, 3), (3, 3), (3, 6)])
def test_queue_is_bounded_and_ordered(runtime: str, fillers: int, capacity: int) -> None:
    graph, made = queue_graph(capacity, fillers, gets=20, each=fillers)
    rows, _ = execute(runtime, graph)
    got = [value for row in rows for value in row[3]["got"]]
    for index in range(fillers):
        mine = [number for who, number in got if who == index]
        assert mine == list(range(len(mine)))  # oldest first, none lost, none twice
    assert len(got) == 20 * fillers
    assert len(made) <= capacity  # slots are made once and go round


@pytest.mark.parametrize("capacity", [1, 2, 3, 6])
def test_no_filler_starves(runtime: str, capacity: int) -> None:
    graph, _ = queue_graph(capacity, fillers=3, gets=60, each=1)
    rows, _ = execute(runtime, graph)
    who = [row[3]["got"][0][0] for row in rows]
    assert all(18 <= who[capacity:].count(index) + capacity // 3 <= 22 for index in range(3))


async def pacer(role: Any, queue: Any, weights: Any, gets: int) -> None:
    for number in range(gets):
        weights.publish(number + 1, None, 0)
        slots = await queue.get(3)
        role.report(number, {"got": [slot.values[0] for slot in slots]})
        queue.release(slots)


async def paced(role: Any, queue: Any, weights: Any) -> None:
    version = 0
    while True:
        version = (await weights.newer_than(version)).version
        slot = await queue.slot(Slot)
        slot.values = [role.index, version]
        queue.put(role.index, slot)


def test_slots_of_one_age_come_in_the_order_of_their_roles(runtime: str) -> None:
    graph = Graph(0)
    words = {"queue": graph.word("queue", "queue", capacity=3), "weights": graph.word("weights", "weights")}
    for index in range(3):
        graph.role(paced, index, **words)
    graph.role(pacer, gets=5, ends_run=True, **words)
    rows, _ = execute(runtime, graph)
    assert [row[3]["got"] for row in rows] == [[0, 1, 2]] * 5


# Weights


async def publisher(role: Any, weights: Any, versions: list[int]) -> None:
    for version in versions:
        weights.publish(version, {"w": version * 10}, version * 100)
        await weights.latest()


async def reader(role: Any, weights: Any, count: int) -> None:
    version = 0
    for number in range(count):
        version, values, steps = await weights.newer_than(version)
        again = await weights.latest()
        assert again.version >= version
        role.report(number, {"seen": [version, values["w"], steps]})


def test_weights_are_the_newest(runtime: str) -> None:
    """A reader never sees an old version again, nor another version's values."""
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    graph.role(reader, weights=weights, count=1, ends_run=True)
    graph.role(publisher, weights=weights, versions=[1, 2, 5])
    rows, _ = execute(runtime, graph)
    [[version, value, steps]] = [row[3]["seen"] for row in rows]
    assert version in (1, 2, 5)
    assert (value, steps) == (version * 10, version * 100)


def test_latest_waits_only_for_the_first(runtime: str) -> None:
    async def patient(role: Any, weights: Any) -> None:
        for _ in range(3):
            role.report(0, {"version": (await weights.latest()).version})

    graph = Graph(0)
    weights = graph.word("weights", "weights")
    graph.role(patient, weights=weights, ends_run=True)
    graph.role(publisher, weights=weights, versions=[4])
    rows, _ = execute(runtime, graph)
    assert [row[3]["version"] for row in rows] == [4, 4, 4]


# Replay


class Store:
    """Keeps everything; samples say how many items there are."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def __len__(self) -> int:
        return len(self.items)

    def insert(self, items: list[Any], writer: int) -> int:
        self.items += items
        return len(items)

    def sample(self, count: int) -> list[Any]:
        return [self.items[-1]] * count

    def state(self) -> dict[str, Any]:
        return {"items": self.items}

    def load_state(self, state: dict[str, Any]) -> None:
        self.items = state["items"]


async def writer(role: Any, replay: Any, items: int, log: list[tuple[int, int]]) -> None:
    while True:
        await replay.room(items, role.index)
        replay.insert([role.index] * items, role.index)
        log.append((items, 0))


async def sampler(role: Any, replay: Any, batch: int, samples: int, log: list[tuple[int, int]]) -> None:
    for _ in range(samples):
        assert len(await replay.sample(batch)) == batch
        log.append((0, batch))


def alternating(ratio: float, min_size: int, items: int, batch: int, writers: int = 1, **more: Any) -> dict[str, Any]:
    """Options of a replay whose two sides wait for each other."""
    tolerance = batch + items * ratio
    counts = {"samples_per_insert": ratio, "min_size": min_size, "tolerance": tolerance, "writers": writers}
    return {"make_store": Store, **counts, **more}


def replay_log(
    runtime: str, writers: int, ratio: float, min_size: int, items: int, batch: int
) -> list[tuple[int, int]]:
    """`(inserts, samples)` so far after every word spoken to the replay."""
    log: list[tuple[int, int]] = []
    graph = Graph(0)
    replay = graph.word("replay", "replay", **alternating(ratio, min_size, items, batch, writers))
    for index in range(writers):
        graph.role(writer, index, replay=replay, items=items, log=log)
    graph.role(sampler, replay=replay, batch=batch, samples=200, log=log, ends_run=True)
    execute(runtime, graph)
    sums, inserts, samples = [], 0, 0
    for inserted, sampled in log:
        inserts, samples = inserts + inserted, samples + sampled
        sums.append((inserts, samples))
    return sums


@pytest.mark.parametrize("writers", [1, 7])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0, 32.0])
def test_samples_per_insert_holds(runtime: str, writers: int, ratio: float) -> None:
    sums = replay_log(runtime, writers, ratio, min_size=20, items=4, batch=8)
    for inserts, samples in sums:
        owed = (inserts - 20) * ratio - samples
        assert samples == 0 or owed >= 0  # no sample before it is owed
        assert owed < 8 + ratio * 4
    assert sums[-1][1] == 1600


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_one_side_at_a_time(runtime: str, ratio: float) -> None:
    """All that is owed is sampled before the next insert: the classic loop."""
    sums = replay_log(runtime, 2, ratio, min_size=20, items=4, batch=8)
    before_an_insert = [old for old, new in itertools.pairwise(sums) if new[0] > old[0] > 20]
    assert before_an_insert
    for inserts, samples in before_an_insert:
        assert samples == int((inserts - 20) * ratio // 8) * 8


def test_as_many_batches_as_are_owed_at_most(runtime: str) -> None:
    drawn: list[int] = []

    async def several(role: Any, replay: Any) -> None:
        while sum(drawn) < 160:
            drawn.append(len(await replay.sample(8, 3)))

    graph = Graph(0)
    replay = graph.word("replay", "replay", **alternating(8.0, 4, 4, 8))
    graph.role(writer, replay=replay, items=4, log=[])
    graph.role(several, replay=replay, ends_run=True)
    execute(runtime, graph)
    assert drawn[:4] == [24, 8, 24, 8]  # 32 samples are owed for 4 items


def test_writers_go_on_while_there_is_nothing_to_sample(runtime: str) -> None:
    """As long as no episode has ended, say; what is owed by then is sampled afterwards."""

    class Slow(Store):
        def __len__(self) -> int:
            return max(0, len(self.items) - 40)

    log: list[tuple[int, int]] = []
    graph = Graph(0)
    replay = graph.word("replay", "replay", **{**alternating(1.0, 4, 4, 8), "make_store": Slow})
    graph.role(writer, replay=replay, items=4, log=log)
    graph.role(sampler, replay=replay, batch=8, samples=20, log=log, ends_run=True)
    execute(runtime, graph)
    assert log[:11] == [(4, 0)] * 11
    inserts, samples = (sum(each) for each in zip(*log, strict=True))
    assert 0 <= inserts - 4 - samples < 8 + 4


def test_no_writer_starves(runtime: str) -> None:
    graph, log = Graph(0), [[] for _ in range(7)]
    replay = graph.word("replay", "replay", **alternating(2.0, 1, 1, 4, writers=7))
    for index in range(7):
        graph.role(writer, index, replay=replay, items=1, log=log[index])
    graph.role(sampler, replay=replay, batch=4, samples=100, log=[], ends_run=True)
    execute(runtime, graph)
    counts = [len(each) for each in log]
    assert max(counts) - min(counts) <= 1, counts


@given(
    writers=strategies.integers(1, 7),
    ratio=strategies.sampled_from([0.1, 0.3, 1.0, 2.5, 8.0]),
    items=strategies.integers(1, 9),
    batch=strategies.integers(1, 33),
    min_size=strategies.integers(1, 40),
)
@settings(max_examples=30, deadline=None)
def test_any_ratio_holds_and_never_blocks_both_sides(
    writers: int, ratio: float, items: int, batch: int, min_size: int
) -> None:
    for runtime in RUNTIMES:
        for inserts, samples in replay_log(runtime, writers, ratio, min_size, items, batch):
            owed = (inserts - min_size) * ratio - samples
            assert samples == 0 or owed >= -1e-6
            assert inserts <= min_size + items or owed < batch + ratio * items + 1e-6


@pytest.mark.parametrize("save", [True, False])
def test_replay_keeps_its_counts(runtime: str, save: bool) -> None:
    """A resumed run goes on with the ratio where it was; without what was stored it waits for as much again."""
    log: list[tuple[int, int]] = []

    def graph() -> Graph:
        made = Graph(0)
        replay = made.word("replay", "replay", **alternating(2.0, 8, 4, 8, save=save))
        made.role(writer, replay=replay, items=4, log=log)
        made.role(sampler, replay=replay, batch=8, samples=10, log=log, ends_run=True)
        return made

    _, state = execute(runtime, graph())
    assert state["words"]["replay"]["counts"] == {"inserts": sum(i for i, _ in log), "samples": 80, "start": 8}
    assert ("store" in state["words"]["replay"]) == save
    log.clear()
    execute(runtime, graph(), saved=state)
    inserts, samples = (sum(each) for each in zip(*log, strict=True))
    assert samples == 80
    assert inserts == 40 + (0 if save else 8)
    assert save or next(each for each in log if each[1]) == log[3]  # 8 for the store, 4 that an update is owed for


# Calls


async def client(role: Any, calls: Any, count: int) -> None:
    for number in range(count):
        answer = await calls.ask([role.index, number])
        assert answer == [role.index, number, "answered"]
    role.report(count, {"answers": count})


async def server(role: Any, calls: Any, most: int, sizes: list[int]) -> None:
    while True:
        requests = await calls.requests(most)
        sizes.append(len(requests))
        for request, answer in reversed(requests):
            answer([*request, "answered"])


async def last(role: Any, calls: Any) -> None:
    """Ends the run once its own requests are answered."""
    await client(role, calls, 20)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_every_request_gets_its_own_answer(runtime: str, most: int) -> None:
    graph, sizes = Graph(0), []
    calls = graph.word("calls", "calls")
    for index in range(5):
        graph.role(client, index, calls=calls, count=10)
    graph.role(server, calls=calls, most=most, sizes=sizes)
    graph.role(last, calls=calls, ends_run=True)
    rows, _ = execute(runtime, graph)
    assert sum(row[3]["answers"] for row in rows) == 5 * 10 + 20
    assert max(sizes) <= most
    assert min(sizes) >= 1


# Roles


async def quiet(role: Any, weights: Any) -> None:
    await weights.newer_than(7)


async def hungry(role: Any, queue: Any) -> None:
    await queue.get(2)


def test_deadlock_says_who_waits_for_what(runtime: str) -> None:
    graph = Graph(0)
    weights, queue = graph.word("weights", "weights"), graph.word("queue", "queue", capacity=1)
    graph.role(quiet, 3, weights=weights)
    graph.role(hungry, queue=queue, ends_run=True)
    with pytest.raises(Deadlock, match="no role can go on") as caught:
        execute(runtime, graph)
    assert "quiet 3 waits for weights newer than 7" in str(caught.value)
    assert "hungry 0 waits for 2 filled slots (there are 0)" in str(caught.value)


async def faulty(role: Any, weights: Any, error: BaseException) -> None:
    weights.publish(1, None, 0)
    await weights.newer_than(0)
    raise error


def test_an_error_names_its_role(runtime: str) -> None:
    graph = Graph(0)
    graph.role(faulty, 4, weights=graph.word("weights", "weights"), error=ZeroDivisionError("the wheel came off"))
    with pytest.raises(RoleError, match=r"^faulty 4 failed: the wheel came off$") as caught:
        execute(runtime, graph)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None


async def careful(role: Any, weights: Any, closed: list[int]) -> None:
    try:
        await weights.newer_than(100)
    finally:
        closed.append(role.index)


@pytest.mark.parametrize("ending", ["end", "error", "between", "deadlock", "interrupt"])
def test_every_role_closes_what_it_holds(runtime: str, ending: str) -> None:
    closed: list[int] = []
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    for index in range(3):
        graph.role(careful, index, weights=weights, closed=closed)
    error = {"error": ValueError("x"), "interrupt": KeyboardInterrupt()}.get(ending)
    if error is not None:
        graph.role(faulty, weights=weights, error=error)
    if ending == "end":
        graph.role(publisher, weights=weights, versions=[1], ends_run=True)
    expected = {"error": RoleError, "deadlock": Deadlock, "interrupt": KeyboardInterrupt}.get(ending)
    if expected is None:
        execute(runtime, graph, lambda steps, state: ending == "between")
    else:
        with pytest.raises(expected):
            execute(runtime, graph)
    assert sorted(closed) == [0, 1, 2]


def test_a_role_that_cannot_begin_is_named_and_the_others_close(runtime: str) -> None:
    async def clumsy(role: Any) -> None:
        raise RuntimeError("no such file")

    closed: list[int] = []
    graph = Graph(0)
    graph.role(careful, 1, weights=graph.word("weights", "weights"), closed=closed)
    graph.role(clumsy, 2)
    with pytest.raises(RoleError, match="clumsy 2 failed: no such file"):
        execute(runtime, graph)
    assert closed == [1]


async def counting(role: Any, weights: Any, until: int) -> None:
    part = role.keep(Counter())
    while part.count < until:
        part.count += 1
        role.advance(part.count)
        role.report(part.count, {"count": part.count})
        weights.publish(part.count, None, part.count)
        await weights.newer_than(part.count - 1)
        await Turn()


class Turn:
    """Gives up one turn."""

    def __await__(self) -> Iterator[Any]:
        yield "its next turn", True


def counting_graph(until: int) -> Graph:
    graph = Graph(0)
    graph.role(counting, 5, weights=graph.word("weights", "weights"), until=until, ends_run=True)
    return graph


def test_state_is_kept_and_restored(runtime: str) -> None:
    seen: list[int] = []

    def between(steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        seen.append(steps)
        assert snapshot()["roles"] == {"counting_5": {"count": steps}}
        return steps == 3

    rows, state = execute(runtime, counting_graph(6), between)
    assert seen == [1, 2, 3]
    assert state["roles"] == {"counting_5": {"count": 3}}
    more, final = execute(runtime, counting_graph(6), saved=state)
    assert rows + more == execute(runtime, counting_graph(6))[0]
    assert final["roles"] == {"counting_5": {"count": 6}}


def test_a_second_part_is_refused(runtime: str) -> None:
    async def greedy(role: Any) -> None:
        role.keep(Counter())
        role.keep(Counter())

    graph = Graph(0)
    graph.role(greedy)
    with pytest.raises(RoleError, match="greedy 0 keeps two parts; keep one that holds both"):
        execute(runtime, graph)


def test_reports_carry_role_and_index(runtime: str) -> None:
    rows, _ = execute(runtime, counting_graph(2))
    assert rows == [("counting", 5, 1, {"count": 1}), ("counting", 5, 2, {"count": 2})]


def test_seeds_differ_by_run_role_and_index_and_by_nothing_else(runtime: str) -> None:
    def seeds(seed: int) -> list[int]:
        async def one(role: Any) -> None:
            role.report(0, {"seed": role.seed})

        async def two(role: Any) -> None:
            role.report(0, {"seed": role.seed})

        graph = Graph(seed)
        for index in range(3):
            graph.role(one, index)
        graph.role(two, ends_run=True)
        return [row[3]["seed"] for row in execute(runtime, graph)[0]]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 8
    assert all(0 <= seed < 2**31 for seed in seeds(0))


def test_the_global_generator_is_left_alone(runtime: str) -> None:
    before = torch.get_rng_state()
    execute(runtime, counting_graph(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_inline_turns_are_taken_in_order() -> None:
    """The order of turns is that of the roles in the graph, round after round; so an inline run is repeatable."""
    turns: list[int] = []

    async def player(role: Any) -> None:
        for _ in range(4):
            turns.append(role.index)
            await Turn()

    graph = Graph(0)
    for index in (2, 0, 1):
        graph.role(player, index)
    graph.roles[-1] = type(graph.roles[-1])(player, "player", 1, {}, ends_run=True)
    execute("inline", graph)
    assert turns == [2, 0, 1] * 4


def test_roles_need_no_event_loop() -> None:
    """A debugger's: an inline run works inside a running event loop, such as a notebook's."""

    async def notebook() -> int:
        return len(execute("inline", counting_graph(3))[0])

    assert asyncio.run(notebook()) == 3

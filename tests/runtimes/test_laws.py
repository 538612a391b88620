"""The laws of the four words and of running roles, for every runtime: a runtime joins by standing in RUNTIMES."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import roles
import torch
from hypothesis import HealthCheck, given, settings, strategies

from rookery.runtimes.inline import Deadlock, Inline, RoleError
from rookery.runtimes.local import Local
from rookery.runtimes.words import Graph

RUNTIMES: dict[str, Callable[..., Any]] = {"inline": Inline, "local": functools.partial(Local, deadline=60)}

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


def reported(rows: Rows, name: str) -> list[Any]:
    """What was reported under a name, in the order of its arrival."""
    return [values[name] for *_, values in rows if name in values]


# Queue


def queue_graph(slots: int, fillers: int, gets: int, each: int, first: int = 0) -> Graph:
    graph = Graph(0)
    queue = graph.word("queue", "queue", each=slots)
    for index in range(fillers):
        graph.role(roles.filler, index, queue=queue, count=1000)
    graph.role(roles.emptier, queue=queue, each=each, gets=gets, first=first or each, ends_run=True)
    return graph


@pytest.mark.parametrize(("fillers", "slots"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_queue_is_bounded_and_ordered(runtime: str, fillers: int, slots: int) -> None:
    rows, _ = execute(runtime, queue_graph(slots, fillers, gets=20, each=fillers))
    got = [value for values in reported(rows, "got") for value in values]
    for index in range(fillers):
        mine = [number for who, number in got if who == index]
        assert mine == list(range(len(mine)))  # oldest first, none lost, none twice
    assert len(got) == 20 * fillers
    assert 1 <= len(reported(rows, "made")) <= slots * fillers  # slots are made once and go round


@pytest.mark.parametrize("slots", [1, 2])
def test_no_filler_starves(runtime: str, slots: int) -> None:
    all_there = 2 * slots + 1  # more than two of them can fill
    rows, _ = execute(runtime, queue_graph(slots, fillers=3, gets=61, each=1, first=all_there))
    who = [value[0][0] for value in reported(rows, "got")[1:]]
    slack = 2 if runtime == "inline" else 12  # processes are not always ready when it is their turn
    assert all(abs(who.count(index) - 20) <= slack for index in range(3)), who


def test_slots_of_one_age_come_in_the_order_of_their_roles(runtime: str) -> None:
    graph = Graph(0)
    words = {"queue": graph.word("queue", "queue", each=1), "weights": graph.word("weights", "weights")}
    for index in range(3):
        graph.role(roles.paced, index, **words)
    graph.role(roles.pacer, gets=20, ends_run=True, **words)
    rows, _ = execute(runtime, graph)
    assert reported(rows, "got") == [[[index, version] for index in range(3)] for version in range(1, 21)]


# Weights


def weights_graph(role: Any, publishers: list[list[int]], readers: int = 1, size: int = 1, **args: Any) -> Graph:
    """Readers stand before publishers; the first ends the run."""
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    for index in range(readers):
        graph.role(role, index, weights=weights, ends_run=index == 0, **args)
    for index, versions in enumerate(publishers):
        graph.role(roles.publisher, index, weights=weights, versions=versions, size=size)
    return graph


@pytest.mark.parametrize(("versions", "size"), [([1, 2, 5], 1), (list(range(1, 301)), roles.LARGE)])
def test_weights_are_the_newest(runtime: str, versions: list[int], size: int) -> None:
    """A reader never sees an old version again, nor another version's values, however fast the publisher is."""
    graph = weights_graph(roles.reader, [versions], readers=3, size=size, until=versions[-1])
    rows, _ = execute(runtime, graph)
    assert reported(rows, "seen")[0] == versions[-1]


def test_who_waits_for_a_step_is_told_of_nothing_before(runtime: str) -> None:
    """Versions 1 to 40 are of steps 9, 18, ...; of each 90 steps one is read at most, and the last is."""
    rows, _ = execute(runtime, weights_graph(roles.occasional, [list(range(1, 41))], every=90, until=40))
    (seen,) = reported(rows, "seen")
    assert seen[-1] == 40
    assert len({version * 9 // 90 for version in seen}) == len(seen)


def test_publishers_do_not_mix(runtime: str) -> None:
    """Values of one version come whole, from whomever."""
    versions = [list(range(start, 300, 2)) for start in (1, 2)]
    graph = weights_graph(roles.glancing, versions, readers=2, size=roles.LARGE, count=100)
    rows, _ = execute(runtime, graph)
    assert len([row for row in rows if row[1] == 0]) == 100


def test_latest_waits_only_for_the_first(runtime: str) -> None:
    rows, _ = execute(runtime, weights_graph(roles.glancing, [[4]], count=3))
    assert [(row[3]["version"], row[3]["steps"]) for row in rows] == [(4, 36)] * 3


# Replay


def alternating(ratio: float, min_size: int, items: int, batch: int, writers: int = 1, **more: Any) -> dict[str, Any]:
    """Options of a replay whose two sides wait for each other."""
    tolerance = batch + items * ratio
    counts = {"samples_per_insert": ratio, "min_size": min_size, "tolerance": tolerance, "writers": writers}
    return {"make_store": roles.Store, **counts, **more}


def replay_graph(writers: int, items: int, options: dict[str, Any], samplers: int = 1, **args: Any) -> Graph:
    graph = Graph(0)
    replay = graph.word("replay", "replay", **options)
    for index in range(writers):
        graph.role(roles.writer, index, replay=replay, items=items)
    for index in range(samplers):
        graph.role(roles.sampler, index, replay=replay, ends_run=index == 0, **args)
    return graph


def counts(rows: Rows) -> list[tuple[int, int]]:
    """`(inserts, samples)` of every word spoken to the replay, in their order."""
    return [(row[3]["inserts"], row[3]["samples"]) for row in rows]


def sums(rows: Rows) -> list[tuple[int, int]]:
    """`(inserts, samples)` so far after every word spoken to the replay."""
    return [(sum(part[0] for part in so_far), sum(part[1] for part in so_far)) for so_far in _prefixes(counts(rows))]


def _prefixes(pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    return [pairs[:end] for end in range(1, len(pairs) + 1)]


def replay_sums(
    runtime: str, writers: int, ratio: float, min_size: int, items: int, batch: int, samplers: int = 1
) -> list[tuple[int, int]]:
    options = alternating(ratio, min_size, items, batch, writers)
    graph = replay_graph(writers, items, options, samplers, batch=batch, samples=100 * batch)
    return sums(execute(runtime, graph)[0])


@pytest.mark.parametrize("writers", [1, 7])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0, 32.0])
def test_samples_per_insert_holds(runtime: str, writers: int, ratio: float) -> None:
    found = replay_sums(runtime, writers, ratio, min_size=20, items=4, batch=8)
    for inserts, samples in found:
        owed = (inserts - 20) * ratio - samples
        assert samples == 0 or owed >= 0  # no sample before it is owed
        assert owed < 8 + ratio * 4
    assert found[-1][1] == 800


def test_samples_per_insert_holds_for_several_samplers(runtime: str) -> None:
    for inserts, samples in replay_sums(runtime, 2, 4.0, min_size=20, items=4, batch=8, samplers=3):
        assert samples == 0 or (inserts - 20) * 4.0 - samples >= 0
        assert (inserts - 20) * 4.0 - samples < 8 + 4.0 * 4 + 3 * 8  # what a sampler has may not be reported yet


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_one_side_at_a_time(runtime: str, ratio: float) -> None:
    """All that is owed is sampled, and learnt from, before the next insert: the classic loop."""
    found = replay_sums(runtime, 2, ratio, min_size=20, items=4, batch=8)
    before_an_insert = [old for old, new in itertools.pairwise(found) if new[0] > old[0] > 20]
    assert before_an_insert
    for inserts, samples in before_an_insert:
        assert samples == int((inserts - 20) * ratio // 8) * 8


def test_as_many_batches_as_are_owed_at_most(runtime: str) -> None:
    rows, _ = execute(runtime, replay_graph(1, 4, alternating(8.0, 4, 4, 8), batch=8, samples=160, most=3))
    drawn = [samples for _, samples in counts(rows) if samples]
    assert drawn[:4] == [24, 8, 24, 8]  # 32 samples are owed for 4 items


def test_writers_go_on_while_there_is_nothing_to_sample(runtime: str) -> None:
    """As long as no episode has ended, say; what is owed by then is sampled afterwards."""
    options = {**alternating(1.0, 4, 4, 8), "make_store": roles.Slow}
    rows, _ = execute(runtime, replay_graph(1, 4, options, batch=8, samples=160))
    assert counts(rows)[:11] == [(4, 0)] * 11
    inserts, samples = sums(rows)[-1]
    assert 0 <= inserts - 4 - samples < 8 + 4


def test_writers_insert_in_turn(runtime: str) -> None:
    rows, _ = execute(runtime, replay_graph(7, 1, alternating(2.0, 1, 1, 4, writers=7), batch=4, samples=400))
    who = reported(rows, "writer")
    assert len(who) >= 200
    assert who == [number % 7 for number in range(len(who))]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writers=strategies.integers(1, 3),
    ratio=strategies.sampled_from([0.1, 0.3, 1.0, 2.5, 8.0]),
    items=strategies.integers(1, 9),
    batch=strategies.integers(1, 33),
    min_size=strategies.integers(1, 40),
)
def test_any_ratio_holds_and_never_blocks_both_sides(
    runtime: str, writers: int, ratio: float, items: int, batch: int, min_size: int
) -> None:
    options = alternating(ratio, min_size, items, batch, writers)
    rows, _ = execute(runtime, replay_graph(writers, items, options, batch=batch, samples=20 * batch))
    for inserts, samples in sums(rows):
        owed = (inserts - min_size) * ratio - samples
        assert samples == 0 or owed >= -1e-6
        assert inserts <= min_size + items or owed < batch + ratio * items + 1e-6


@pytest.mark.parametrize("save", [True, False])
def test_replay_keeps_its_counts(runtime: str, save: bool) -> None:
    """A resumed run goes on with the ratio where it was; without what was stored it waits for as much again."""
    graph = replay_graph(1, 4, alternating(2.0, 8, 4, 8, save=save), batch=8, samples=80)
    rows, state = execute(runtime, graph)
    assert state["words"]["replay"]["counts"] == {"inserts": 48, "samples": 80, "start": 8}
    assert sums(rows)[-1] == (48, 80)
    assert ("store" in state["words"]["replay"]) == save
    rows, _ = execute(runtime, graph, saved=state)
    assert sums(rows)[-1] == (40 + (0 if save else 8), 80)
    first = next(number for number, (_, samples) in enumerate(counts(rows)) if samples)
    assert first == (1 if save else 3)  # 8 for the store, 4 that an update is owed for


# Calls


@pytest.mark.parametrize("most", [1, 3, 100])
def test_every_request_gets_its_own_answer(runtime: str, most: int) -> None:
    graph = Graph(0)
    calls, done = graph.word("calls", "calls"), graph.word("queue", "done", each=1)
    for index in range(5):
        graph.role(roles.client, index, calls=calls, done=done, count=10)
    for index in range(2):
        graph.role(roles.server, index, calls=calls, most=most)
    graph.role(roles.judge, done=done, count=5, ends_run=True)
    rows, _ = execute(runtime, graph)
    assert reported(rows, "answers") == [10] * 5
    sizes = reported(rows, "size")
    assert sum(sizes) == 50
    assert 1 <= min(sizes) <= max(sizes) <= most


# Roles


def test_deadlock_says_who_waits_for_what(runtime: str) -> None:
    graph = Graph(0)
    weights, queue = graph.word("weights", "weights"), graph.word("queue", "queue", each=1)
    graph.role(roles.quiet, 3, weights=weights)
    graph.role(roles.hungry, queue=queue, ends_run=True)
    graph.role(roles.seeded, 1)
    with pytest.raises(Deadlock, match="no role can go on") as caught:
        execute(runtime, graph)
    assert "quiet 3 waits for weights newer than 7" in str(caught.value)
    assert "hungry 0 waits for 2 filled slots (there are 0)" in str(caught.value)
    assert "seeded 1 waits for nothing, it has ended" in str(caught.value)


def test_an_error_names_its_role(runtime: str) -> None:
    graph = Graph(0)
    error = ZeroDivisionError("the wheel came off")
    graph.role(roles.faulty, 4, weights=graph.word("weights", "weights"), error=error)
    with pytest.raises(RoleError, match=r"^faulty 4 failed.*: the wheel came off$") as caught:
        execute(runtime, graph)
    cause = "".join(traceback.format_exception(caught.value.__cause__))
    assert "in faulty" in cause  # down to the role's own line
    assert "ZeroDivisionError: the wheel came off" in cause


def test_an_error_in_a_word_is_that_of_the_role_that_spoke_it(runtime: str) -> None:
    graph = replay_graph(1, 4, {**alternating(1.0, 4, 4, 8), "make_store": roles.Empty}, batch=8, samples=80)
    with pytest.raises(RoleError, match=r"^sampler 0 failed: the disk is full$"):
        execute(runtime, graph)


@pytest.mark.parametrize("ending", ["end", "error", "between", "deadlock", "interrupt"])
def test_every_role_closes_what_it_holds(runtime: str, ending: str, tmp_path: Path) -> None:
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    for index in range(3):
        graph.role(roles.careful, index, weights=weights, folder=tmp_path)
    if ending == "error":
        graph.role(roles.faulty, weights=weights, error=ValueError("x"))
    if ending == "end":
        graph.role(roles.publisher, weights=weights, versions=[1], ends_run=True)

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        if ending in ("between", "interrupt"):
            snapshot()
        if ending == "interrupt":
            raise KeyboardInterrupt
        return ending == "between"

    expected = {"error": RoleError, "deadlock": Deadlock, "interrupt": KeyboardInterrupt}.get(ending)
    if expected is None:
        execute(runtime, graph, between)
    else:
        with pytest.raises(expected):
            execute(runtime, graph, between)
    opened, closed = ([index for index in range(3) if (tmp_path / f"{what}_{index}").exists()] for what in TWO)
    assert closed == opened
    assert opened == [0, 1, 2] or (runtime, ending) == ("local", "error")  # it may be quicker than their beginning


TWO = ("opened", "closed")


def test_a_role_that_cannot_begin_is_named(runtime: str) -> None:
    graph = Graph(0)
    graph.role(roles.clumsy, 2)
    with pytest.raises(RoleError, match=r"clumsy 2 failed.*: no such file"):
        execute(runtime, graph)


def counting_graph(until: int) -> Graph:
    graph = Graph(0)
    queue = graph.word("queue", "queue", each=1)
    graph.role(roles.counting, 5, queue=queue, until=until, ends_run=True)
    graph.role(roles.collecting, queue=queue)
    return graph


def test_state_is_kept_and_restored(runtime: str) -> None:
    def between(steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        state = snapshot()
        count = state["steps"]
        assert steps <= count <= steps + 1  # what is begun is finished
        if count:
            assert state["roles"] == {"counting_5": {"count": count}, "collecting_0": {"count": count}}
        return count >= 3

    rows, state = execute(runtime, counting_graph(6), between)
    reached = state["steps"]
    assert reached in (3, 4)
    assert state["roles"] == {"counting_5": {"count": reached}, "collecting_0": {"count": reached}}
    assert rows == [("counting", 5, count, {"count": count}) for count in range(1, reached + 1)]
    more, final = execute(runtime, counting_graph(6), saved=state)
    assert rows + more == execute(runtime, counting_graph(6))[0]
    assert final["roles"]["counting_5"] == {"count": 6}


def test_the_state_of_a_role_that_has_ended_is_kept(runtime: str) -> None:
    graph = Graph(0)
    queue = graph.word("queue", "queue", each=1)
    for index, until in enumerate((2, 10)):
        graph.role(roles.counting, index, queue=queue, until=until)
    graph.role(roles.emptier, queue=queue, each=1, first=1, gets=12, ends_run=True)
    rows, state = execute(runtime, graph)
    assert state["roles"]["counting_0"] == {"count": 2}
    assert state["roles"]["counting_1"] == {"count": 10}
    assert [row[3]["count"] for row in rows if row[:2] == ("counting", 0)] == [1, 2]  # it is not begun again


def test_a_second_part_is_refused(runtime: str) -> None:
    graph = Graph(0)
    graph.role(roles.greedy)
    with pytest.raises(RoleError, match="greedy 0 keeps two parts; keep one that holds both"):
        execute(runtime, graph)


def test_reports_carry_role_and_index(runtime: str) -> None:
    rows, _ = execute(runtime, counting_graph(2))
    assert rows == [("counting", 5, 1, {"count": 1}), ("counting", 5, 2, {"count": 2})]


def test_seeds_differ_by_run_role_and_index_and_by_nothing_else(runtime: str) -> None:
    def seeds(runtime: str, seed: int) -> dict[tuple[str, int], int]:
        graph = Graph(seed)
        for index in range(3):
            graph.role(roles.seeded, index)
        graph.role(roles.seeded_too, ends_run=True)
        return {(name, index): values["seed"] for name, index, _, values in execute(runtime, graph)[0]}

    assert seeds(runtime, 0) == seeds("inline", 0)
    assert len({*seeds(runtime, 0).values(), *seeds(runtime, 1).values()}) == 8
    assert all(0 <= seed < 2**31 for seed in seeds(runtime, 0).values())


def test_the_global_generator_is_left_alone(runtime: str) -> None:
    before = torch.get_rng_state()
    execute(runtime, counting_graph(3))
    assert torch.equal(torch.get_rng_state(), before)

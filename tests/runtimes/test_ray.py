"""The laws of the four words and of running roles, each role as a Ray actor; and runs that equal those of `inline`."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import roles
import test_laws

ray = pytest.importorskip("ray")
seats = importlib.import_module("rookery.runtimes.ray")

LAWS: list[tuple[str, tuple[Any, ...]]] = [
    ("test_queue_is_bounded_and_ordered", (3, 2)),
    ("test_state_is_kept_and_restored", ()),
]
MORE: list[tuple[str, tuple[Any, ...]]] = [
    ("test_samples_per_insert_holds", (2, 4.0)),
    ("test_an_error_names_its_role", ()),
    ("test_weights_are_the_newest", ([1, 2, 5], 1)),
    ("test_every_request_gets_its_own_answer", (3,)),
    ("test_deadlock_says_who_waits_for_what", ()),
    ("test_no_filler_starves", (2,)),
    ("test_slots_of_one_age_come_in_the_order_of_their_roles", ()),
    ("test_publishers_do_not_mix", ()),
    ("test_who_waits_for_a_step_is_told_of_nothing_before", ()),
    ("test_latest_waits_only_for_the_first", ()),
    ("test_samples_per_insert_holds_for_several_samplers", ()),
    ("test_one_side_at_a_time", (1.0,)),
    ("test_as_many_batches_as_are_owed_at_most", ()),
    ("test_writers_go_on_while_there_is_nothing_to_sample", ()),
    ("test_replay_keeps_its_counts", (True,)),
    ("test_an_error_in_a_word_is_that_of_the_role_that_spoke_it", ()),
    ("test_a_role_that_cannot_begin_is_named", ()),
    ("test_the_state_of_a_role_that_has_ended_is_kept", ()),
    ("test_a_second_part_is_refused", ()),
    ("test_reports_carry_role_and_index", ()),
    ("test_seeds_differ_by_run_role_and_index_and_by_nothing_else", ()),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No role shares memory with another, as on different hosts."""
    monkeypatch.setitem(test_laws.RUNTIMES, "ray", functools.partial(seats.Ray, shares=False, deadline=120))


@pytest.mark.parametrize(
    ("law", "args"),
    [*LAWS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)],
    ids=str,
)
def test_a_law(law: str, args: tuple[Any, ...]) -> None:
    getattr(test_laws, law)("ray", *args)


def test_no_law_is_left_out_by_mistake() -> None:
    """Those that are, are of what a Ray actor does not share with a process, or take minutes."""
    named = {law for law, _ in LAWS + MORE}
    left = {name for name in vars(test_laws) if name.startswith("test_")} - named
    assert left == {
        "test_any_ratio_holds_and_never_blocks_both_sides",
        "test_every_role_closes_what_it_holds",
        "test_the_global_generator_is_left_alone",
        "test_writers_insert_in_turn",
    }


def test_room_that_was_claimed_is_given_back() -> None:
    """Where the program began Ray itself, which goes on after the run."""
    before = ray.available_resources()["CPU"]
    graph = test_laws.weights_graph(roles.reader, [[1, 2]], readers=2, until=2)
    seats.Ray(lambda *row: None, deadline=120).run(graph, lambda *_: False)
    until = time.monotonic() + 30
    while ray.available_resources()["CPU"] < before:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_the_memory_of_boxes_is_sent_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of weights goes into the object store once, for however many readers; the actors of a host share it."""
    puts: list[int] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: (puts.append(sum(part.nbytes for part in value)), put(value))[1])
    graph = test_laws.weights_graph(roles.reader, [[1, 2, 3, 4]], readers=4, size=2_500_000, until=4)
    test_laws.execute("ray", graph)
    assert 1 <= len(puts) <= 4
    assert all(size >= 10_000_000 for size in puts)


@pytest.mark.slow
def test_seats_are_killed_and_nothing_is_lost_but_their_units() -> None:
    """Again and again, one after another: what was given is what was taken, and what is still on its way."""
    kills = [0, 1, 2, 1]
    rows: test_laws.Rows = []
    runtime = seats.Ray(lambda *row: rows.append(row), shares=False, deadline=120)

    def between(steps: int, snapshot: Any) -> bool:
        got = len(test_laws.reported(rows, "got"))
        if kills and runtime.restarts == 4 - len(kills) and got > 20 * (5 - len(kills)):
            runtime.members[kills.pop(0)].process.kill()
        return False

    runtime.run(test_laws.queue_graph(2, fillers=3, gets=250, each=1), between)
    measured = runtime.measured()
    queue = measured["words"]["queue"]
    given, taken = (sum(queue[what].values()) for what in ("given", "taken"))
    assert not kills
    assert taken == 250
    assert 0 <= given - taken <= 2 * 3
    assert runtime.restarts == 4
    assert sum(measured["roles"][f"filler {index}"]["restarts"] for index in range(3)) == 4
    assert runtime.dropped <= 4
    for index in range(3):  # each life begins anew, and loses nothing that it had put
        mine = [value[0][1] for value in test_laws.reported(rows, "got") if value[0][0] == index]
        lives = [number for place, number in enumerate(mine) if number == 0 or mine[place - 1] + 1 != number]
        assert lives == [0] * len(lives)

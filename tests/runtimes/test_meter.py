"""What runtimes measure: counts are exact, and shares of time are those of roles whose times are known."""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import roles
import torch

from rookery.runtimes.boxes import nbytes
from rookery.runtimes.inline import Inline
from rookery.runtimes.local import Local
from rookery.runtimes.meter import Meter, RoleMeter
from rookery.runtimes.words import Graph

RUNTIMES: dict[str, Callable[..., Any]] = {"inline": Inline, "local": functools.partial(Local, deadline=60)}

each_runtime = pytest.mark.parametrize("runtime", RUNTIMES)


def measured(runtime: str, graph: Graph) -> dict[str, Any]:
    """What was measured in a whole run of the graph."""
    made = RUNTIMES[runtime](lambda *row: None)
    made.run(graph, lambda steps, snapshot: False)
    return made.measured()


def digging(seconds: float, rounds: int = 8, gets: int = 16, diggers: int = 2, **more: Any) -> Graph:
    graph = Graph(0)
    queue = graph.word("queue", "holes", each=2)
    for index in range(diggers):
        graph.role(roles.digger, index, queue=queue, rounds=rounds, seconds=seconds, **more)
    graph.role(roles.taker, queue=queue, gets=gets, ends_run=True)
    return graph


@each_runtime
def test_time_is_at_work_or_waiting(runtime: str) -> None:
    """Diggers sleep at work, 0.4 s each; the taker has nothing to do but wait for them."""
    found = measured(runtime, digging(0.05))
    assert list(found["roles"]) == ["digger 0", "digger 1", "taker 0"]
    for name in ("digger 0", "digger 1"):
        digger = found["roles"][name]
        assert digger["activities"]["digging"] == pytest.approx(0.4)
        assert 0.4 <= digger["work"] < 0.4 + 2.0
    taker = found["roles"]["taker 0"]
    assert taker["work"] < 0.3
    assert list(taker["waiting"]) == ["holes"]
    least = {"inline": 0.55, "local": 0.2}[runtime]  # one after the other, or side by side
    assert least < taker["waiting"]["holes"] <= found["seconds"]
    shares = {
        name: role["work"] / (role["work"] + sum(role["waiting"].values())) for name, role in found["roles"].items()
    }
    assert shares["taker 0"] < 0.5 < shares["digger 0"] + shares["digger 1"]


@each_runtime
def test_roles_wait_for_the_word_that_holds_them_up(runtime: str) -> None:
    """Who takes slowly holds up who fills."""
    graph = Graph(0)
    queue = graph.word("queue", "holes", each=1)
    graph.role(roles.filler, queue=queue, count=100)
    graph.role(roles.slow_taker, queue=queue, gets=6, seconds=0.05, ends_run=True)
    found = measured(runtime, graph)["roles"]
    assert found["filler 0"]["waiting"]["holes"] > 0.15
    assert found["filler 0"]["work"] < 0.15
    assert found["slow_taker 0"]["work"] > 0.25


@each_runtime
def test_flows_are_counted(runtime: str) -> None:
    found = measured(runtime, digging(0.0))
    holes = found["words"]["holes"]
    assert holes["given"] == {"digger 0": 8, "digger 1": 8}
    assert holes["taken"] == {"taker 0": 16}
    assert holes["kind"] == "queue"
    assert holes["given_bytes"] == holes["taken_bytes"] == 16  # two numbers of 8 bytes
    assert [found["roles"][name]["steps"] for name in found["roles"]] == [24, 24, 0]  # those before it was kept are not
    assert found["roles"]["digger 0"]["dropped"] == {"stale": 8}


@each_runtime
def test_flows_of_weights_replay_and_calls(runtime: str) -> None:
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    graph.role(roles.reader, weights=weights, until=5, ends_run=True)
    graph.role(roles.publisher, weights=weights, versions=[1, 2, 5], size=10)
    found = measured(runtime, graph)["words"]["weights"]
    assert found["given"] == {"publisher 0": 3}
    assert found["given_bytes"] == 10 * 8 + 3 * 4
    assert 1 <= found["taken"]["reader 0"] <= 3  # versions, however often each was looked at

    options = {"make_store": roles.Store, "samples_per_insert": 2.0, "min_size": 8, "tolerance": 16, "writers": 1}
    graph = Graph(0)
    replay = graph.word("replay", "replay", **options)
    graph.role(roles.writer, replay=replay, items=4)
    graph.role(roles.sampler, replay=replay, batch=8, samples=80, ends_run=True)
    found = measured(runtime, graph)["words"]["replay"]
    assert found["taken"] == {"sampler 0": 80}
    assert found["given"]["writer 0"] - 8 == found["level"]["inserts"] == 40
    assert found["level"]["samples"] == 80
    assert (found["given_bytes"], found["taken_bytes"]) == (8, 8)

    graph = Graph(0)
    calls, done = graph.word("calls", "calls"), graph.word("queue", "done", each=1)
    graph.role(roles.client, calls=calls, done=done, count=10)
    graph.role(roles.server, calls=calls, most=3)
    graph.role(roles.judge, done=done, count=1, ends_run=True)
    found = measured(runtime, graph)["words"]["calls"]
    assert found["given"] == {"client 0": 10}
    assert found["taken"] == {"server 0": 10}
    assert found["given_bytes"] == found["taken_bytes"] == 16


def test_fill_is_what_whoever_gets_finds() -> None:
    """Inline a digger fills both slots, and the taker asks until there is none: it finds 2 of 2, 1, 0, 1, 0, 1."""
    holes = measured("inline", digging(0.0, rounds=6, gets=6, diggers=1))["words"]["holes"]
    assert (holes["looks"], holes["filled"]) == (6, 1.0 + 3 * 0.5)


def test_a_death_is_counted_and_what_was_told_before_stays(tmp_path: Path) -> None:
    """A digger dies in its second round: its first was told of, and counts."""
    graph = digging(0.3, rounds=3, gets=4, diggers=1, marker=tmp_path / "died")
    found = measured("local", graph)["roles"]
    assert found["digger 0"]["restarts"] == 1
    assert re.fullmatch(r"it raised RuntimeError: the spade broke \(roles.py, line \d+\)", found["digger 0"]["reason"])
    assert found["digger 0"]["dropped"] == {"stale": 4, "died": 1}
    assert found["digger 0"]["activities"]["digging"] == pytest.approx(1.2)
    assert found["digger 0"]["steps"] == 12
    assert (found["taker 0"]["restarts"], found["taker 0"]["reason"]) == (0, "")


@each_runtime
def test_it_can_be_measured_while_it_runs(runtime: str) -> None:
    """Numbers only grow."""
    made = RUNTIMES[runtime](lambda *row: None)
    seen: list[dict[str, Any]] = []
    made.run(digging(0.01), lambda steps, snapshot: seen.append(made.measured()) or False)
    seen.append(made.measured())
    assert len(seen) >= 5
    for before, after in itertools.pairwise(seen):
        assert before["seconds"] <= after["seconds"]
        for name, role in before["roles"].items():
            now = after["roles"][name]
            assert role["work"] <= now["work"]
            assert role["activities"].get("digging", 0.0) <= min(
                now["work"] + 1e-3, now["activities"].get("digging", 0.0)
            )
            assert all(value <= now["waiting"][word] for word, value in role["waiting"].items())
        for who, units in before["words"]["holes"]["given"].items():
            assert units <= after["words"]["holes"]["given"][who]
    assert seen[-1]["processes"] == {"inline": 1, "local": 4}[runtime]
    assert seen[-1]["cores"] >= 1


def test_measuring_costs_microseconds() -> None:
    """The aim is 2 µs a turn and 0.5 µs a count; the best of several tries, because the machine may be busy."""
    runtime = Meter()
    role, word = runtime.role("actor 0"), runtime.word("unrolls", "queue")
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            role.turn("", runtime.begins("actor 0"))
            word.looks(1, 2)
            word.gives(1)
            role.turn("unrolls", time.perf_counter())
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 5e-6


def test_clock_of_a_role() -> None:
    role = RoleMeter()
    for to, now in (("", 1.0), ("queue", 3.0), ("", 3.5)):
        role.turn(to, now)
    assert role.measured(4.0)["work"] == 0.0, "it has not told of any work yet"
    role.tells({"activities": {"digging": 2.0}, "steps": 1}, 4.0)
    found = role.measured(9.0)
    assert (found["work"], found["waiting"]) == (2.5, {"queue": 0.5})
    role.dies(2, "it fell", 10.0)
    role.turn("queue", 20.0)
    found = role.measured(21.0)
    assert (found["work"], found["waiting"]) == (2.5, {"queue": 1.5})
    assert (found["restarts"], found["dropped"], found["steps"]) == (1, {"died": 2}, 1)
    assert found["reason"] == "it fell"


def test_bytes() -> None:
    assert nbytes({"a": torch.zeros(3), "b": {"c": torch.zeros(2, dtype=torch.int64)}}) == 12 + 16
    assert nbytes(roles.Slot(5)) == 40
    assert nbytes(None) == nbytes(object()) == 0

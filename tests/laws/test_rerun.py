"""What processes did in whichever order, one process does again, bit for bit, by the record of the order."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import home, metrics, tiny

import rookery
from rookery.cli import main
from rookery.rerun import differences, rerun
from rookery.runs.metrics import read
from rookery.runtimes.arrivals import DIED, KEPT, MESSAGE, PAUSE, RESUME, TURN, Arrivals, Replayed
from rookery.runtimes.local import Local
from rookery.runtimes.rerun import Diverged
from rookery.systems import SYSTEMS as ALL
from rookery.train import Keeper

SYSTEMS: dict[str, dict[str, Any]] = {
    "ppo": {"actors": 2, "memory": "lstm"},
    "impala": {"actors": 3, "unrolls": 2},
    "appo": {"actors": 2, "learners": 2, "inference": "shared"},
    "apex": {"actors": 2, "inference": "shared", "double_buffer": True},
    "gorila": {"actors": 2, "shards": 2},
    "sac": {},
    "dqn": {"actors": 2, "learners": 2, "alpha": 0.6},
    "td3": {"actors": 2, "shards": 2, "ahead": 1},
}


def small(system: str, **more: Any) -> dict[str, Any]:
    return tiny(system, **{"runtime": "local", "env_options": {"max_steps": 30}, "steps": 480, **more})


def local(system: str, path: Path, **more: Any) -> rookery.Run:
    return rookery.train(system, home(system), run_dir=path, quiet=True, **small(system, **more))


def again(run: rookery.Run, **how: Any) -> rookery.Run:
    return rerun(run.path, run_dir=run.path.parent / "again", quiet=True, **how)


def learnt(run: rookery.Run) -> list[dict[str, Any]]:
    return [row for row in metrics(run.path) if row["role"] in ("learner", "evaluator")]


def test_every_topology_is_repeated() -> None:
    assert {ALL[system].topology for system in SYSTEMS} == {each.topology for each in ALL.values()} - {"hogwild"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_is_repeated(system: str, tmp_path: Path) -> None:
    run = local(system, tmp_path / "run", **SYSTEMS[system])
    repeated = again(run)
    assert repeated.summary["steps"] == run.summary["steps"]
    assert differences(run, repeated) == []
    assert learnt(run) == learnt(repeated)


@pytest.mark.parametrize(
    ("system", "victim"), [("impala", "actor"), ("impala", "learner"), ("appo", "replica"), ("appo", "learner")]
)
def test_deaths_are_repeated(system: str, victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, killed = Local._turn, []

    def deadly(runtime: Local) -> None:
        turn(runtime)
        if runtime.steps >= 150 and not killed:
            killed.append(next(member for member in runtime.members if member.spec.name == victim))
            os.kill(killed[0].process.pid, signal.SIGKILL)

    monkeypatch.setattr(Local, "_turn", deadly)
    run = local(system, tmp_path / "run", actors=2, learners=1 + (system == "appo"))
    assert killed
    assert any("restarted" in row for row in read(run.path / "metrics.jsonl"))
    assert differences(run, again(run)) == []


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of roles that are begun elsewhere once a run has learnt something."""
    names, moved = [], []

    def arrange(runtime: Local) -> None:
        if runtime.steps >= 50 and names and not moved:  # before a checkpoint, for which what was begun may end the run
            moved.extend(member for member in runtime.members if member.spec.name in names)
            runtime._move(moved)

    monkeypatch.setattr(Local, "_arrange", arrange)
    return names


@pytest.mark.parametrize("system", SYSTEMS)
def test_moves_are_repeated_and_lose_nothing(system: str, tmp_path: Path, moves: list[str]) -> None:
    moves += ["actor", "replica", "policy", "evaluator"] + ["learner"] * (system != "sac")
    run = local(system, tmp_path / "run", **SYSTEMS[system])
    rows = read(run.path / "metrics.jsonl")
    assert sum("moved" in row for row in rows) > 1
    assert not any("restarted" in row for row in rows)
    assert run.summary["dropped"] == {}
    assert differences(run, again(run)) == []


@pytest.mark.parametrize("system", ["ppo", "sac"])
def test_a_learner_that_is_moved_learns_on_as_if_it_were_not(system: str, tmp_path: Path, moves: list[str]) -> None:
    stays = local(system, tmp_path / "stays")
    moves.append("learner")
    assert differences(stays, local(system, tmp_path / "moved")) == []


def test_an_interruption_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    between = Keeper.between
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "between", lambda keeper, steps, state: between(keeper, steps, state) or steps >= 200)
        local("impala", tmp_path / "run", actors=2)
    resumed = rookery.resume(tmp_path / "run", steps=600, quiet=True)
    assert len(list((tmp_path / "run" / "arrivals").iterdir())) == 2
    assert differences(resumed, again(resumed)) == []


def test_what_was_killed_is_repeated_once_it_was_resumed(tmp_path: Path) -> None:
    """A record of what came after the checkpoint, which nobody went on from, goes."""
    path, settings = tmp_path / "run", small("impala", actors=2, steps=1_000_000)
    given = f"'impala', {home('impala')!r}, run_dir={str(path)!r}, quiet=True, **{settings}"
    process = subprocess.Popen([sys.executable, "-c", f"import rookery; rookery.train({given})"])
    try:
        until = time.monotonic() + 60
        while len(list(path.glob("checkpoints/0*/state.json"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    at = rookery.load(path).checkpoints.latest()[0]
    for first in (at, at + 10):
        (path / "arrivals" / f"{first}-999.bin").write_bytes(b"of a life that left no checkpoint")
    resumed = rookery.resume(path, steps=at + 200, quiet=True)
    assert {each.stem for each in (path / "arrivals").iterdir()} == {"0-1000000", f"{at}-{at + 200}"}
    assert differences(resumed, again(resumed)) == []


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    run = local("impala", tmp_path / "run", actors=2)
    (record,) = (run.path / "arrivals").iterdir()
    record.write_bytes(record.read_bytes()[:40] + b"junk" + record.read_bytes()[44:])
    with pytest.raises(ValueError, match=r"arrivals/.*\.bin is damaged \(.*\); the run cannot be repeated\.$"):
        again(run)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_without_space_for_the_record_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flush, flushes = Arrivals.flush, itertools.count()

    def full(arrivals: Arrivals) -> None:
        if next(flushes) == 1:
            arrivals._file = Path("/dev/full").open("wb")  # noqa: SIM115
        flush(arrivals)

    monkeypatch.setattr(Arrivals, "flush", full)
    run = local("impala", tmp_path / "run", actors=2)
    assert run.checkpoints.latest()[0] == run.summary["steps"] > 0
    assert "No space left on device; this part of the run cannot be rerun." in caplog.text
    with pytest.raises(ValueError, match="has no record of who came when from its beginning on"):
        again(run)


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_stops_at_an_update(system: str, tmp_path: Path) -> None:
    """At the first question after it: PPO's batch is of four updates."""
    run = local(system, tmp_path / "run", **SYSTEMS[system])
    stopped = again(run, until=7)
    assert stopped.saved()["run"]["roles"]["learner_0"]["counts"]["updates"] in range(7, 7 + 4)
    assert learnt(stopped)[:-1] == learnt(run)[: len(learnt(stopped)) - 1]  # but for the last evaluation


def test_another_run_is_noticed(tmp_path: Path) -> None:
    run = local("impala", tmp_path / "run", actors=2)
    (record,) = (run.path / "arrivals").iterdir()
    events = Replayed(record).events
    after = events.index(TURN, len(events) // 2) + 1
    events[after:after] = [MESSAGE] * 50  # more than the first actor has to say
    record.write_bytes(zlib.compress(np.array(events, "<u2").tobytes()))
    with pytest.raises(Diverged, match="event"):
        again(run)


def test_inline_runs_have_no_record(tmp_path: Path) -> None:
    run = rookery.train("a2c", home("a2c"), run_dir=tmp_path / "run", quiet=True, **tiny("a2c"))
    with pytest.raises(ValueError, match="until=0 is before the first update; use 1 or more"):
        again(run, until=0)
    with pytest.raises(ValueError, match="has no record of who came when"):
        again(run)


def test_what_shares_memory_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    run = local("a3c", tmp_path / "run", learners=2)
    with pytest.raises(ValueError, match="a3c, whose workers write to shared memory"):
        again(run)
    assert not (tmp_path / "again").exists()


def test_the_command_line_fails_where_something_else_was_learnt(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    run = local("impala", tmp_path / "run", actors=2)
    monkeypatch.setattr(sys.modules["rookery.rerun"], "differences", lambda one, two: ["learner.counts"])
    with pytest.raises(SystemExit) as exit:
        main(["rerun", str(run.path), "--run-dir", str(tmp_path / "again"), "--quiet"])
    assert exit.value.code == 1
    assert "learnt something else: learner.counts" in capsys.readouterr().err


def test_what_is_repeated_in_part_is_compared_in_part(tmp_path: Path, capsys: Any) -> None:
    run = local("impala", tmp_path / "run", actors=2)
    words = ["rerun", str(run.path), "--until", "7", "--quiet", "--run-dir"]
    main([*words, str(tmp_path / "again")])
    assert "Equal until step" in capsys.readouterr().out
    log = run.path / "metrics.jsonl"
    log.write_text(re.sub(r'"loss":[-\d.e]+', '"loss":7.0', log.read_text(), count=3))
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "other")])
    assert re.search(r"learnt something else, first seen at step \d+", capsys.readouterr().err)


def test_a_record_that_ends_abruptly_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "record")
    for _ in range(3):
        arrivals.note(TURN)  # in two of which nothing happens
    for what, role in ((MESSAGE, 2), (KEPT, 1)):
        arrivals.note(what, role)
    arrivals.note(PAUSE)
    arrivals.flush()
    whole = (tmp_path / "record").read_bytes()
    arrivals.note(RESUME)
    arrivals.note(TURN)
    arrivals.note(DIED, 200)
    arrivals.close()
    replayed = Replayed(tmp_path / "record")
    assert replayed.turn() == [(MESSAGE, 2), (KEPT, 1)]
    assert replayed.next == PAUSE
    replayed.at += 2
    assert replayed.turn() == [(DIED, 200)]
    assert replayed.next is None
    assert [replayed.hands_over(1, number) for number in range(2)] == [True, False]
    (tmp_path / "record").write_bytes(whole)  # its process was killed then
    assert len(Replayed(tmp_path / "record").events) == 4

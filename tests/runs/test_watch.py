"""Watching: what the folder says is shown, once or as it grows, and whatever is missing yet is no error."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from test_scene import actors_learner, ran, replay

from rookery.runs import watch as watching
from rookery.runs.folder import RunFolder, RunFolderError
from rookery.runs.metrics import MetricsLog, Tail
from rookery.runs.watch import Watched, watch


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def frame(run: Path, **how: Any) -> str:
    stream = io.StringIO()
    watch(run, stream=stream, **how)
    return stream.getvalue()


def test_a_run_that_is_over(tmp_path: Path) -> None:
    account = actors_learner()
    account["dropped"] = {"died": 3}
    account["words"]["unrolls"]["fill"] = 0.5
    text = frame(ran(tmp_path, account, ended=True))
    lines = text.splitlines()
    assert lines[0] == "ppo on CartPole-v1, seed 0"
    assert lines[1].startswith("over  9/100 steps")
    assert lines[2] == "5 processes, 1.5 of 2 cores in use; the one that keeps the words is busy 10%"
    for shown in ("actor 0  busy 60%", "actor 1  busy 60%", "evaluator 0  busy 60%", "learner 0  busy 60%"):
        assert shown in text
    for shown in (
        "actor 0 → 25 unrolls/s",
        "→ learner 0 50 unrolls/s",
        "learner 0 → 25 versions/s",
        "▮▮▮▮▮▯▯▯▯▯ 50% full",
    ):
        assert shown in text
    assert "environment 30%" in text
    assert "1.23k steps/s" in text
    assert "limit: learner\nSo it is.\nDo this.\nrestarted: actor 0 1\ndropped: died 3\n" in text
    assert "\x1b" not in text
    beside = next(line for line in lines if "actor 0  busy" in line)
    assert "unrolls" in beside
    assert "learner 0" in beside, "columns are not side by side"


def test_a_narrow_terminal_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = frame(ran(tmp_path, replay(), ended=True))
    assert max(map(len, text.splitlines())) <= 60
    assert "actor × 16" in text
    assert "→ learner 0 12.3k samples/s" in text


def test_a_run_that_goes_on_is_shown_as_it_stands(tmp_path: Path) -> None:
    run = ran(tmp_path, replay(), ended=False)
    log = MetricsLog(run / "metrics.jsonl")
    log.append({"step": 40, "role": "actor", "index": 0, "episode_return": 20.0})
    lag = {"policy_lag": 1.5, "policy_lag_max": 3, "steps_per_second": 1.0}
    for seconds, step in ((1.0, 10), (1.01, 30), (11.01, 50)):
        log.append({"step": step, "role": "learner", "index": 0, "seconds": seconds, **lag})
    status = frame(run, once=True).splitlines()[1]
    assert status == "50/100 steps  2 steps/s  return 20.0 (last 1 episodes)  policy lag 1.5, at most 3"


def test_a_run_that_has_measured_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "ppo", "CartPole-v1", 0)
    run.write_config({"system": "ppo", "env": "CartPole-v1", "seed": 0})
    assert frame(run.path).splitlines() == ["ppo on CartPole-v1, seed 0", "0 steps", "nothing measured yet"]
    with pytest.raises(RunFolderError):
        frame(tmp_path)


def test_live_until_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal it follows the log of another, and returns when the summary is there."""
    monkeypatch.setattr(watching, "EVERY", 0.02)
    run = ran(tmp_path, replay(), ended=False)
    stream = Terminal()
    watcher = threading.Thread(target=watch, args=(run,), kwargs={"stream": stream})
    watcher.start()
    log = MetricsLog(run / "metrics.jsonl")
    for step in (20, 70):
        log.append({"step": step, "role": "learner", "index": 0})
        while f"{step}/100 steps" not in stream.getvalue():
            assert watcher.is_alive()
    RunFolder.open(run).write_summary(replay())
    watcher.join(30)
    assert not watcher.is_alive()
    assert "over" in stream.getvalue()


def test_a_tail_gives_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    log = MetricsLog(path)
    for step in range(3):
        log.append({"step": step})
        assert [row["step"] for row in tail.rows()] == [step]
    with path.open("ab") as file:
        file.write(b'{"step":3,')
        file.flush()
        assert tail.rows() == []
        file.write(b'"loss":1}\n')
    assert tail.rows() == [{"step": 3, "loss": 1}]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_tail_begins_anew_when_the_log_is_cut_back(after: int, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.append({"step": step})
    tail = Tail(log.path)
    assert len(tail.rows()) == 4
    log.truncate_after(1)
    for step in range(2, 2 + after):
        log.append({"step": step, "again": True})
    assert [row["step"] for row in tail.rows()] == list(range(2 + after))
    assert tail.rows() == []


def test_deaths_are_of_the_whole_run(tmp_path: Path) -> None:
    """Each row tells of the time since the one before; a log that is cut back and read anew counts once."""
    run = ran(tmp_path, {**replay(), "dropped": {"died": 1, "stale": 7}}, ended=False)  # in which an actor died
    watched = Watched(RunFolder.open(run))
    watched.look()
    log = MetricsLog(run / "metrics.jsonl")
    for step in (20, 30):
        died = {"restarted": "learner 0", "dropped": 1, "reason": "it raised ValueError: no (roles.py, line 3)"}
        log.append({"step": step, "role": "runtime", "index": 0, **died})
        log.append(
            {"step": step, "role": "runtime", "index": 0, "fell_back": "learner 0", "word": "weights", "undone": 9}
        )
        log.append({"step": step, "role": "runtime", "index": 0, "measured": {**replay(), "dropped": {"died": 1}}})
        watched.look()
    said = [
        "dropped: died 3, stale 7",
        "undone: weights 18",
        "the last: learner 0, it raised ValueError: no (roles.py, line 3)",
    ]
    assert watched.deaths() == ["restarted: actor 0 1, learner 0 2", *said]
    assert all(line in frame(run) for line in watched.deaths())
    log.truncate_after(20)
    watched.look()
    said = ["restarted: actor 0 1, learner 0 1", "dropped: died 2, stale 7", "undone: weights 9"]
    assert watched.deaths()[:3] == said


def test_roles_are_shown_with_their_hosts(tmp_path: Path) -> None:
    run = ran(tmp_path, replay(), ended=False)
    log = MetricsLog(run / "metrics.jsonl")
    for role, host in (("actor 0", "b"), ("actor 1", "b"), ("learner 0", "a"), ("actor 0", None)):
        log.append({"step": 1, "role": "runtime", "index": 0, "placed": role, "host": host})
    assert all(line in frame(run) for line in ("a: learner 0", "b: actor 1", "without a place: actor 0"))


def test_watched_takes_the_newest(tmp_path: Path) -> None:
    run = ran(tmp_path, replay(), ended=False)
    watched = Watched(RunFolder.open(run))
    watched.look()
    assert watched.found == json.loads(json.dumps(replay()))
    MetricsLog(run / "metrics.jsonl").append({"step": 60, "role": "runtime", "index": 0, "measured": {"processes": 3}})
    watched.look()
    assert watched.found == {"processes": 3}
    assert watched.step == 60

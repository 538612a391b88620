"""The recorder: every report reaches the log, the sinks and the display, and the summary survives a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rookery.runs.checkpoint import load, save
from rookery.runs.metrics import MetricsLog, read
from rookery.runs.recorder import Recorder


class Memory:
    """A sink that remembers, and fails from one row on."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.closed, self.fails_at = 0, fails_at

    def write(self, row: Mapping[str, Any]) -> None:
        if len(self.rows) == self.fails_at:
            raise RuntimeError("gone")
        self.rows.append(row)

    def close(self) -> None:
        self.closed += 1


def play(recorder: Recorder, first: int, last: int) -> None:
    for step in range(first, last):
        recorder.report("actor", step % 2, step, {"episode_return": float(step), "episode_length": 5})
        if step % 50 == 49:
            evaluation = {"eval_return_mean": step * 2.0, "eval_return_std": 1.0, "eval_episodes": 20}
            recorder.report("evaluator", 0, step, evaluation)


def test_a_report_reaches_everything(tmp_path: Path) -> None:
    sinks = [Memory(), Memory()]
    recorder = Recorder(MetricsLog(tmp_path / "m"), sinks)
    recorder.report("learner", 1, 128, {"loss": torch.tensor(0.5), "kl": math.nan})
    recorder.close()
    recorder.close()
    expected = [{"step": 128, "role": "learner", "index": 1, "loss": 0.5, "kl": None}]
    assert read(tmp_path / "m") == sinks[0].rows == sinks[1].rows == expected
    assert [sink.closed for sink in sinks] == [1, 1]
    assert recorder.steps == {"learner.1": 128}


def test_summary(tmp_path: Path) -> None:
    recorder = Recorder(MetricsLog(tmp_path / "m"))
    names = ["episodes", "return_mean_last_100", "eval_return_mean", "eval_return_std", "eval_episodes", "policy_lag"]
    assert recorder.summary() == {"episodes": 0, **dict.fromkeys(names[1:])}
    play(recorder, 0, 250)
    assert list(recorder.summary()) == names
    assert list(recorder.summary().values()) == [250, sum(range(150, 250)) / 100, 498.0, 1.0, 20, None]


def test_policy_lag_is_that_of_the_whole_run(tmp_path: Path) -> None:
    whole, resumed = Recorder(MetricsLog(tmp_path / "m")), Recorder(MetricsLog(tmp_path / "n"))
    whole.report("learner", 0, 1, {"policy_lag": 1.5, "policy_lag_max": 9})
    resumed.load_state(whole.state())
    for recorder in (whole, resumed):
        recorder.report("learner", 0, 2, {"policy_lag": 0.5, "policy_lag_max": 1})
        assert recorder.summary()["policy_lag"] == {"mean": 1.0, "max": 9}


def test_rows_of_the_runtime_leave_no_trace_in_the_state(tmp_path: Path) -> None:
    """How many there are depends on the clock, and states of equal runs are equal."""
    one, other = Recorder(MetricsLog(tmp_path / "m")), Recorder(MetricsLog(tmp_path / "n"))
    play(one, 0, 60)
    for step in range(60):
        other.report("runtime", 0, step, {"learner_busy": 0.5})
        play(other, step, step + 1)
    assert one.state() == other.state()


def test_a_return_that_is_no_number_is_counted_and_not_averaged(tmp_path: Path) -> None:
    recorder = Recorder(MetricsLog(tmp_path / "m"))
    for value in (1.0, math.nan, 3.0):
        recorder.report("actor", 0, 1, {"episode_return": value})
    assert recorder.summary()["episodes"] == 3
    assert recorder.summary()["return_mean_last_100"] == 2.0


def test_a_resumed_recorder_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, part = Recorder(MetricsLog(tmp_path / "whole")), Recorder(MetricsLog(tmp_path / "part"))
    play(whole, 0, 230)
    play(part, 0, 120)
    save(tmp_path / "checkpoint", {"recorder": part.state()})
    play(part, 120, 140)
    part.close()
    log = MetricsLog(tmp_path / "part")
    log.truncate_after(119)
    resumed = Recorder(log)
    resumed.load_state(load(tmp_path / "checkpoint")["recorder"])
    play(resumed, 120, 230)
    assert resumed.summary() == whole.summary()
    assert resumed.state() == whole.state()
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_state_is_json_and_a_copy(tmp_path: Path) -> None:
    recorder = Recorder(MetricsLog(tmp_path / "m"))
    play(recorder, 0, 60)
    state = recorder.state()
    text = json.dumps(state, allow_nan=False)
    play(recorder, 60, 70)
    assert json.dumps(state, allow_nan=False) == text


def test_a_failing_sink_does_not_stop_the_run(tmp_path: Path) -> None:
    bad, good = Memory(fails_at=1), Memory()
    recorder = Recorder(MetricsLog(tmp_path / "m"), [bad, good])
    with pytest.warns(RuntimeWarning, match="Memory failed"):
        play(recorder, 0, 20)
    assert len(good.rows) == len(read(tmp_path / "m")) == 20
    assert len(bad.rows) == 1


@pytest.mark.parametrize("name", ["step", "role", "index"])
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    recorder = Recorder(MetricsLog(tmp_path / "m"))
    with pytest.raises(ValueError, match="give it another name"):
        recorder.report("learner", 0, 1, {name: 3, "loss": 1.0})
    assert read(tmp_path / "m") == []

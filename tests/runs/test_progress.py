"""Progress: lines when piped, a picture on a terminal, nothing when quiet, and next to no time."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest

from rookery.runs import progress
from rookery.runs.progress import Progress, sparkline


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def row(step: int, role: str = "learner", **values: Any) -> dict[str, Any]:
    return {"step": step, "role": role, "index": 0, **values}


def run(shown: Progress, clock: Clock, first: int = 0, last: int = 100_000) -> None:
    """8,000 steps/s for as long as it takes, a report every 1/8 s."""
    for step in range(first, last + 1, 1000):
        shown.update(row(step, "actor", episode_return=step / 1000, episode_length=10))
        shown.update(row(step, policy_loss=-0.01234567, value_loss=12.0, note="x", kl=None, seconds=1.0))
        clock.now += 0.125
    shown.update(row(last, "evaluator", eval_return_mean=90.0, eval_return_std=1.25, eval_episodes=20))


def test_piped_is_a_line_every_five_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    shown = Progress(200_000, stream=stream)
    run(shown, clock)
    shown.close()
    shown.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == (
        "40,000/200,000 steps (20%)  8,000 steps/s  0:20 left  return 20.0 (last 41 episodes)  "
        "policy_loss -0.01235  value_loss 12"
    )
    assert lines[1].startswith("80,000/200,000 steps (40%)  8,000 steps/s  0:15 left  return 40.0 (last 81 episodes)")
    assert lines[-1].startswith("100,000/200,000 steps (50%)")
    assert "return 50.5 (last 100 episodes)  evaluation 90.0 ± 1.2  policy_loss" in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_the_start_of_processes_is_no_pace(clock: Clock) -> None:
    stream = io.StringIO()
    shown = Progress(200_000, stream=stream)
    clock.now += 60.0
    run(shown, clock, 1000)
    shown.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("1,000/200,000 steps (0%)  return 1.0")
    assert lines[1].startswith("41,000/200,000 steps (20%)  8,000 steps/s  0:19 left")


def test_goes_on_with_the_last_episodes(clock: Clock) -> None:
    stream = io.StringIO()
    shown = Progress(200_000, start=100_000, stream=stream)
    shown.goes_on([40.0] * 99 + [140.0], {"eval_return_mean": 90.0, "eval_return_std": 1.25})
    clock.now += 5.0
    shown.update(row(101_000, "actor", episode_return=50.0, episode_length=10))
    shown.close()
    assert "return 41.1 (last 101 episodes)  evaluation 90.0 ± 1.2" in stream.getvalue()  # 4140 and 50


def measured(processes: int) -> dict[str, Any]:
    shares = {"actor_busy": 0.931, "learner_busy": 0.4, "unrolls_fill": 0.5, "restarts": 0}
    return {**shares, "measured": {"processes": processes, "bottleneck": {"limit": "environment"}}}


DEATHS = {
    (): "",
    (0,): "1 restart",
    (1,): "1 restart, 1 unit dropped",
    (1, 0, 2): "3 restarts, 3 units dropped",
}


@pytest.mark.parametrize("lost", DEATHS)
def test_deaths_are_shown_once_there_are_any(
    lost: tuple[int, ...], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream in (io.StringIO(), Terminal()):
        shown = Progress(100, stream=stream)
        for units in lost:
            shown.update(row(1, "runtime", restarted="actor 0", dropped=units, reason="it fell"))
        shown.update(row(1, loss=0.5))
        shown.close()
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).rstrip()
        assert text.endswith(DEATHS[lost] or "loss 0.5")
        assert ("restart" in text) == bool(lost)


@pytest.mark.parametrize("processes", [1, 4])
def test_who_is_busy_is_shown_of_several_processes(processes: int, clock: Clock) -> None:
    stream = io.StringIO()
    shown = Progress(100, stream=stream)
    shown.update(row(1, "runtime", **measured(processes)))
    shown.update(row(1, policy_lag=1.25))
    shown.close()
    text = "busy: actor 93%, learner 40%  unrolls 50% full  lag 1.2  limit: environment\n"
    assert stream.getvalue().endswith(text) == (processes > 1)


def test_terminal_is_a_live_picture(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = Progress(100_000, stream=stream)
    run(shown, clock)
    shown.close()
    text = stream.getvalue()
    assert "\x1b[" in text
    assert text.endswith("\x1b[?25h"), "the cursor is not given back"
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text[text.rindex("━") :])
    assert "100,000/100,000 steps" in last
    assert "evaluation 90.0 ± 1.2" in last
    assert re.search(r"▁[▁▂▃▄▅▆▇█]{10,30}█\n", last)
    assert "policy_loss -0.01235" in last


def test_a_dumb_terminal_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    shown = Progress(100_000, stream=stream)
    run(shown, clock)
    shown.close()
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_is_silent(clock: Clock, stream: io.StringIO) -> None:
    shown = Progress(100_000, quiet=True, stream=stream)
    run(shown, clock)
    shown.close()
    assert stream.getvalue() == ""


def test_a_resumed_run_measures_its_own_pace(clock: Clock) -> None:
    stream = io.StringIO()
    shown = Progress(1_000_000, start=900_000, stream=stream)
    run(shown, clock, 900_000, 950_000)
    shown.close()
    pace = int(re.findall(r"([\d,]+) steps/s", stream.getvalue())[-1].replace(",", ""))
    assert 7_500 <= pace <= 8_000


@pytest.mark.parametrize("total", [0, 1])
def test_nothing_reported_is_no_error(clock: Clock, total: int) -> None:
    stream = io.StringIO()
    Progress(total, stream=stream).close()
    assert stream.getvalue().startswith(f"0/{total} steps")


def test_a_reader_that_goes_away_does_not_stop_the_run(clock: Clock) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    shown = Progress(100_000, stream=Closed())
    run(shown, clock)
    shown.close()
    assert shown.step == 100_000


def test_an_update_that_shows_nothing_is_cheap() -> None:
    """The aim is 5 µs; the best of several tries, because the machine may be busy."""
    shown, actor, learner = Progress(10**9, stream=io.StringIO()), row(1, "actor", episode_return=1.0), row(1, loss=0.5)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            shown.update(actor)
            shown.update(learner)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 5e-6


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1.0, 1.0, 0.0]) == "▁█▅" or sparkline([-1.0, 1.0, 0.0]) == "▁█▄"

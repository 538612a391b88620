"""The metrics log: every row in order, whatever kills the writer, and equal bytes for equal runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.runs.metrics import LastReturns, MetricsError, MetricsLog, read


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "role": "learner", "index": 0, **values}


def test_rows_are_there_before_close_and_in_a_fixed_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append({"value_loss": 1.5, "index": 0, "entropy": 2, "step": 7, "role": "learner"})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"step":7,"role":"learner","index":0,"entropy":2,"value_loss":1.5}\n'
    log.close()
    log.close()


def test_values_become_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    log.append(row(1, a=math.nan, b=-math.inf, c=torch.tensor(0.5), d=np.int64(3), e=torch.tensor(math.nan), f=True))
    log.append(row(np.int64(2), g="text", h=None))
    assert read(log.path) == [row(1, a=None, b=None, c=0.5, d=3, e=None, f=True), row(2, g="text", h=None)]
    json.loads(log.path.read_text().splitlines()[0], parse_constant=pytest.fail)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.data())
@settings(max_examples=50, deadline=None)
def test_cut_anywhere_and_reopened(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], data: st.DataObject
) -> None:
    """Whole lines before a cut are read, and a reopened log goes on after them."""
    path = tmp_path_factory.mktemp("cut") / "m"
    log = MetricsLog(path)
    for step in steps:
        log.append(row(step, text="ü" * step))
    log.close()
    whole = path.read_bytes()
    kept = whole[: data.draw(st.integers(0, len(whole)), label="cut")]
    path.write_bytes(kept)
    expected = [row(step, text="ü" * step) for step in steps[: kept.count(b"\n")]]
    assert read(path) == expected
    again = MetricsLog(path)
    again.append(row(99))
    again.close()
    assert read(path) == [*expected, row(99)]


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"step":1}\n' + "x" * 200_000)
    MetricsLog(path).close()
    assert path.read_text() == '{"step":1}\n'
    path.write_text("x" * 200_000)
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_an_interrupted_and_resumed_log_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def write(log: MetricsLog, first: int, last: int) -> None:
        for step in range(first, last):
            log.append(row(step, loss=step / 7))
            log.append({"step": step, "role": "actor", "index": step % 2, "episode_return": step * 1.5})

    whole, parts = MetricsLog(tmp_path / "whole"), MetricsLog(tmp_path / "parts")
    write(whole, 0, 20)
    write(parts, 0, 14)
    parts.close()
    resumed = MetricsLog(tmp_path / "parts")
    resumed.truncate_after(9)
    write(resumed, 10, 20)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    resumed.truncate_after(-1)
    assert read(resumed.path) == []


@pytest.mark.parametrize("line", ["{", "[]", '{"loss":1}', '{"step":"3"}', "[" * 100_000, "\udcff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "m").write_text('{"step":1}\n' + line + '\n{"step":2}\n', errors="surrogateescape")
    with pytest.raises(MetricsError, match=r"line 2, is not a row"):
        read(tmp_path / "m")


def test_a_missing_log_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == []


def test_an_unwritable_log_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MetricsError, match="could not be written"):
        MetricsLog(tmp_path / "file" / "m")


FULL = """
import resource, sys
from pathlib import Path
from rookery.runs.metrics import MetricsError, MetricsLog

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # longer files fail as they do on a full disk
log = MetricsLog(Path(sys.argv[1]))
try:
    for step in range(100):
        log.append({"step": step, "text": "x" * 50})
except MetricsError as error:
    print(error)
"""


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    assert "could not be written: File too large; free some space" in result.stdout
    assert (tmp_path / "m").read_text().endswith("}\n")
    assert len(read(tmp_path / "m")) > 10


def test_a_failed_truncation_leaves_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "m")
    log.append(row(1))
    log.append(row(2))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MetricsError, match="No space"):
        log.truncate_after(1)
    log.append(row(3))
    assert [entry["step"] for entry in read(log.path)] == [1, 2, 3]


WRITER = """
import sys
from pathlib import Path
from rookery.runs.metrics import MetricsLog

log, step = MetricsLog(Path(sys.argv[1])), 0
while True:
    log.append({"step": step, "text": "x" * 5000})
    step += 1
    print(step, flush=True)
"""


def test_a_killed_writer_loses_no_row_it_had_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "m")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        done = max([1, *(int(line) for line in process.stdout if line.endswith("\n"))])
    MetricsLog(tmp_path / "m").close()
    assert [entry["step"] for entry in read(tmp_path / "m")][:done] == list(range(done))


def test_rows_of_the_runtime_do_not_count(tmp_path: Path) -> None:
    """How many there are depends on the clock; a log is cut back to the same rows of roles all the same."""
    log = MetricsLog(tmp_path / "m")
    for step in range(6):
        log.append({"step": step, "role": "learner"})
        log.append({"step": step, "role": "runtime"})
        log.append({"step": step, "role": "runtime"})
    assert log.rows == 6
    log.truncate_after(4, rows=3)
    kept = [(row["step"], row["role"]) for row in read(log.path)]
    assert [step for step, role in kept if role == "learner"] == [0, 1, 2]
    assert kept[-1] == (2, "learner")
    assert log.rows == 3


@given(st.lists(st.tuples(st.floats(-500, 500), st.integers(1, 130)), min_size=1, max_size=40))
def test_the_last_returns_are_of_episodes(rows: list[tuple[float, int]]) -> None:
    """The mean is over episodes, of the fewest whole rows from the end that hold a hundred."""
    last = LastReturns()
    for mean, count in rows:
        last.take({"episode_return": mean, "episodes": count})
        last.take({"step": 1})
    least = next((n for n in range(1, len(rows)) if sum(count for _, count in rows[-n:]) >= 100), len(rows))
    kept = [mean for mean, count in rows[-least:] for _ in range(count)]
    assert last.episodes == len(kept)
    assert last.mean == pytest.approx(sum(kept) / len(kept), abs=1e-9)

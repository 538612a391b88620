"""Sinks, offline: what is written can be read back with each library's own reader, and no sink stops a run."""

from __future__ import annotations

import math
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rookery.runs.sinks import SINKS, Guarded, SinkError, open_sink

CONFIG = {"system": "ppo", "seed": 1, "algorithm": {"lr": 3e-4, "hidden": [64, 64]}}
ROWS = [
    {"step": 10, "role": "learner", "index": 0, "loss": 0.5, "entropy": None, "note": "text"},
    {"step": 8, "role": "actor", "index": 1, "episode_return": 20.0},  # later than a row of a later step
    {"step": 20, "role": "learner", "index": 0, "loss": 0.25, "steps_per_second": 100},
]


def fill(name: str, folder: Path) -> None:
    sink = open_sink(name, folder, CONFIG)
    for row in ROWS:
        sink.write(row)
    sink.close()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path: Path) -> None:
    fill("tensorboard", tmp_path)
    assert scalars(tmp_path) == {
        "learner/loss": [(10, 0.5), (20, 0.25)],
        "learner/steps_per_second": [(20, 100.0)],
        "actor/episode_return": [(8, 20.0)],
    }


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    fill("tensorboard", tmp_path)
    sink = open_sink("tensorboard", tmp_path, CONFIG, 10)
    sink.write({"step": 20, "role": "learner", "index": 0, "loss": 0.125})
    sink.close()
    assert scalars(tmp_path)["learner/loss"] == [(10, 0.5), (20, 0.125)]


def records(path: Path) -> Iterator[bytes]:
    """The records of an offline file, a LevelDB log of one 32 KiB block: CRC, length, kind (1 = whole), data."""
    data, place = path.read_bytes(), 7  # after the file's own header
    assert len(data) < 32768
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1
        yield data[place + 7 : place + 7 + length]
        place += 7 + length


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fill("wandb", tmp_path)
    identity = (tmp_path / "wandb-id").read_text()
    fill("wandb", tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(path.name == f"run-{identity}.wandb" for path in files), "the second part is of another run"

    from wandb.proto import wandb_internal_pb2

    logged = []
    for data in records(files[0]):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            logged.append({name: float(value) for name, value in items.items() if not name.startswith("_")})
    assert logged == [
        {"step": 10, "learner/loss": 0.5},
        {"step": 8, "actor/episode_return": 20},
        {"step": 20, "learner/loss": 0.25, "learner/steps_per_second": 100},
    ]
    assert wandb.run is None, "the sink has taken the global run"


def test_mlflow_in_a_database_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fill("mlflow", tmp_path)
    sink = open_sink("mlflow", tmp_path, CONFIG, 20)
    sink.write({"step": 30, "role": "learner", "index": 0, "loss": 0.125})
    sink.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run((tmp_path / "mlflow-id").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.params == {"system": "ppo", "seed": "1", "algorithm.lr": "0.0003", "algorithm.hidden": "[64, 64]"}
    history = client.get_metric_history(run.info.run_id, "learner/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.5), (20, 0.25), (30, 0.125)]
    assert set(run.data.metrics) == {"learner/loss", "learner/steps_per_second", "actor/episode_return"}
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("wandb", "wandb", r'Weights & Biases .* run `pip install "rookery\[track\]"`'),
        ("mlflow", "mlflow", r'MLflow .* run `pip install "rookery\[track\]"`'),
        ("tensorboard", "tensorboard.summary.writer.event_file_writer", r'run `pip install "tensorboard"`'),
    ],
)
def test_a_missing_library_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SinkError, match=advice):
        open_sink(name, tmp_path)


def test_unknown_sinks_and_stores_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SinkError, match=r"no sink 'tensorbord'; choose among tensorboard, wandb, mlflow"):
        open_sink("tensorbord", tmp_path)
    assert list(SINKS) == ["tensorboard", "wandb", "mlflow"]
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://host")
    with pytest.raises(SinkError, match="check MLFLOW_TRACKING_URI"):
        open_sink("mlflow", tmp_path)


class Failing:
    """Fails at one of its calls, and counts them."""

    def __init__(self, at: int, failure: BaseException) -> None:
        self.calls, self.at, self.failure = 0, at, failure

    def write(self, row: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.failure

    def close(self) -> None:
        self.write({})


def test_a_failing_sink_is_switched_off_with_one_warning() -> None:
    sink = Failing(2, OSError(28, "No space left on device"))
    guarded = Guarded(sink)
    guarded.write(ROWS[0])
    with pytest.warns(RuntimeWarning, match=r"Failing failed \(No space left on device\) and is switched off"):
        guarded.write(ROWS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded.write(ROWS[0])
        guarded.close()
    assert sink.calls == 2


def test_a_sink_may_fail_at_its_end_and_is_closed_once() -> None:
    sink = Failing(1, ValueError("gone"))
    guarded = Guarded(sink)
    with pytest.warns(RuntimeWarning, match="gone"):
        guarded.close()
    guarded.close()
    assert sink.calls == 1


def test_ctrl_c_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        Guarded(Failing(1, KeyboardInterrupt())).write(ROWS[0])


def test_not_finite_numbers_reach_tensorboard_as_they_are(tmp_path: Path) -> None:
    sink = open_sink("tensorboard", tmp_path)
    sink.write({"step": 1, "role": "learner", "index": 0, "loss": math.inf})
    sink.close()
    assert scalars(tmp_path) == {"learner/loss": [(1, math.inf)]}

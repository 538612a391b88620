"""Where rows go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

A value is shown as `role/name`, e.g. `actor/episode_return`: the rows of all indexes of a role share one curve.
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rookery.runs.files import reason, write_text

__all__ = ["SINKS", "Guarded", "MLflowSink", "Sink", "SinkError", "TensorBoardSink", "WandbSink", "open_sink"]

Row = Mapping[str, Any]  # {"step", "role", "index", and the values}

MLFLOW_SECONDS = 5.0  # how long metrics may wait to be sent in one batch; a batch is a database transaction
MLFLOW_METRICS = 1000  # most metrics a batch may hold (MLflow's own limit)
MLFLOW_PARAMS = 100  # most parameters a batch may hold (MLflow's own limit)


class SinkError(RuntimeError):
    """A sink cannot be opened; says which, and what to install or change."""


class Sink(Protocol):
    """Takes a run's rows, in any order of steps."""

    def write(self, row: Row) -> None:
        """Take one row; None and text among its values are passed over."""

    def close(self) -> None:
        """Hand on whatever is still held back."""


def numbers(row: Row) -> dict[str, float]:
    """A row's numeric values, named `role/name`."""
    role = row.get("role", "run")
    return {
        f"{role}/{name}": float(value)
        for name, value in row.items()
        if name not in ("step", "index") and isinstance(value, (int, float))
    }


class Guarded:
    """A sink that cannot stop a run: at its first failure it is switched off, with one warning."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink

    def write(self, row: Row) -> None:
        """Hand the row on, unless the sink is switched off."""
        if self._sink is not None:
            self._try(self._sink.write, row)

    def close(self) -> None:
        """Close the sink; harmless when called twice."""
        if self._sink is not None:
            self._try(self._sink.close)
        self._sink = None

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            warnings.warn(
                f"{type(self._sink).__name__} failed ({reason(error)}) and is switched off; the run goes on, and "
                "metrics.jsonl has every row.",
                RuntimeWarning,
                stacklevel=4,
            )
            self._sink = None


class TensorBoardSink:
    """Event files in `folder/tensorboard`, through TensorBoard's own writer."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Open a new event file; what an earlier one shows after `step`, where a run resumes, is hidden."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise _missing("TensorBoard", "tensorboard", error) from error
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        if step:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, row: Row) -> None:
        """One event with all of the row's values."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=row["step"], summary=summary))

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run, continued when the run folder is resumed; `WANDB_MODE=offline` keeps it on the disk."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Start or continue the run; project and entity are those of the environment variables, else `rookery`."""
        try:
            import wandb
        except ImportError as error:
            raise _missing("Weights & Biases", "rookery[track]", error) from error
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rookery"),
                id=_identity(folder / "wandb-id"),
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config or {}),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise SinkError(
                f"Weights & Biases cannot start a run: {reason(error)}; run `wandb login`, or set WANDB_MODE=offline."
            ) from error
        self._run.define_metric("*", step_metric="step")  # its own step counter refuses rows that come out of order

    def write(self, row: Row) -> None:
        """Log the row's values over its step."""
        self._run.log({"step": row["step"], **numbers(row)})

    def close(self) -> None:
        """Send the rest and end this part of the run."""
        self._run.finish()


class MLflowSink:
    """An MLflow run, continued when the run folder is resumed.

    It goes to `MLFLOW_TRACKING_URI`, and without that to a database in the run folder.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Start or continue the run, in the experiment `MLFLOW_EXPERIMENT_NAME`, else `rookery`."""
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise _missing("MLflow", "rookery[track]", error) from error
        self._metric, self._due = Metric, time.monotonic() + MLFLOW_SECONDS
        self._pending: list[Metric] = []
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        identity = folder / "mlflow-id"
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if identity.exists():
                self._id = identity.read_text().strip()
                self._client.update_run(self._id, status="RUNNING")
                return
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rookery")
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=folder.resolve().name).info.run_id
            params = [Param(key, value) for key, value in _flat(config or {}).items()]
            for first in range(0, len(params), MLFLOW_PARAMS):
                self._client.log_batch(self._id, params=params[first : first + MLFLOW_PARAMS])
            write_text(identity, self._id)
        except (MlflowException, OSError) as error:
            raise SinkError(f"MLflow cannot start a run: {reason(error)}; check MLFLOW_TRACKING_URI.") from error

    def write(self, row: Row) -> None:
        """Keep the row's values, and send them with others."""
        now = int(time.time() * 1000)  # milliseconds
        self._pending += [self._metric(name, value, now, row["step"]) for name, value in numbers(row).items()]
        if len(self._pending) >= MLFLOW_METRICS or time.monotonic() > self._due:
            self._send()

    def close(self) -> None:
        """Send the rest and mark the run as finished."""
        self._send()
        self._client.set_terminated(self._id)

    def _send(self) -> None:
        pending, self._pending = self._pending, []
        self._due = time.monotonic() + MLFLOW_SECONDS
        for first in range(0, len(pending), MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=pending[first : first + MLFLOW_METRICS])


Opener = Callable[[Path, Mapping[str, Any] | None, int], Sink]
SINKS: dict[str, Opener] = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "mlflow": MLflowSink}


def open_sink(name: str, folder: Path, config: Mapping[str, Any] | None = None, step: int = 0) -> Sink:
    """The sink `name` for the run in `folder`: its `config`, and the step it resumes from (0 if it is new).

    Raises:
        SinkError: if there is no such sink, its library is missing, or its service cannot be reached.
    """
    if name not in SINKS:
        raise SinkError(f"There is no sink {name!r}; choose among {', '.join(SINKS)}.")
    return SINKS[name](Path(folder), config, step)


def _missing(library: str, package: str, error: ImportError) -> SinkError:
    return SinkError(
        f'{library} cannot be imported ({reason(error)}); run `pip install "{package}"`, or leave this sink out.'
    )


def _identity(path: Path) -> str:
    """The id kept in the file, made up the first time: a resumed run goes on under the same one."""
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text().strip()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as text by dotted name, as MLflow's parameters are."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)[:500]
    return flat

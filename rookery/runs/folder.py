"""A run's folder: what is in it, by name, and how it comes to be."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rookery.runs.files import read_json, reason, write_json
from rookery.runs.metrics import plain

__all__ = ["RunFolder", "RunFolderError", "versions"]

CONFIG, SUMMARY, METRICS = "config.json", "summary.json", "metrics.jsonl"
# Whatever can change a run's numbers, or draws its environment.
PACKAGES = ("rookery", "torch", "numpy", "tensordict", "gymnasium", "envpool", "ale-py", "mujoco", "pettingzoo", "ray")


class RunFolderError(RuntimeError):
    """A folder cannot hold a new run, or is not one; says which and what to do."""


def versions() -> dict[str, str]:
    """The versions of Python, the platform and every installed package that can change a run's numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class RunFolder:
    """A folder with `config.json`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `plots/`, `video/`, `tensorboard/`.

    Made by `create` or `open`. A folder is a run once `config.json` is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / METRICS
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.video = path / "video"
        self.tensorboard = path / "tensorboard"

    @property
    def ended(self) -> bool:
        """Whether the summary is newer than the last row of metrics: nobody is at work on it."""
        try:
            wrote = (self.path / SUMMARY).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        return not self.metrics.exists() or self.metrics.stat().st_mtime_ns <= wrote

    @classmethod
    def create(cls, path: str | Path | None, system: str, env: str, seed: int) -> RunFolder:
        """An empty folder for a new run: `path`, or `runs/<system>_<env>_s<seed>_<local time>`.

        Raises:
            RunFolderError: if it is not empty, or cannot be written.
        """
        folder = _unused(system, env, seed) if path is None else Path(path).expanduser()
        try:
            taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
            if taken and (folder / CONFIG).exists() and not (folder / "checkpoints").exists():
                raise RunFolderError(
                    f"{folder} holds a run that has no checkpoint: it has only begun, or ended before its first; "
                    "delete the folder, or name another one."
                )
            if taken and (folder / CONFIG).exists():
                raise RunFolderError(
                    f"{folder} already holds a run; continue it with `rookery resume {folder}`, or name another folder."
                )
            if taken:
                raise RunFolderError(f"{folder} is there and is not an empty folder; name another one for the run.")
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".tmp-probe"
            probe.write_bytes(bytes(4096))
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"{folder} cannot be written: {reason(error)}; name a folder that can, e.g. in your home."
            ) from error
        return cls(folder)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run at `path`. Raises RunFolderError if there is none."""
        folder = Path(path).expanduser()
        if not (folder / CONFIG).is_file():
            what = "holds no run" if folder.is_dir() else "is no folder"
            raise RunFolderError(f"{folder} {what} ({CONFIG} is missing); name a folder that `rookery train` has made.")
        return cls(folder)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Nobody else goes on with this run meanwhile; however this process ends, others may then.

        Raises:
            RunFolderError: if somebody is at it.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            if not _locked(folder):
                raise RunFolderError(
                    f"{self.path} is being trained by another process; wait until it is over, or stop it."
                )
            yield
        finally:
            os.close(folder)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the fully resolved `config` (its seed included), and the versions it runs with.

        An infinite setting is written as Python's `Infinity`, so that it reads back as it was.
        """
        self._write(CONFIG, {**config, "versions": versions()}, strict=False)

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote, `versions` included."""
        return self._read(CONFIG)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace `summary.json`; a number that is not finite becomes null."""
        self._write(SUMMARY, {name: plain(value) for name, value in summary.items()}, strict=True)

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` wrote last."""
        return self._read(SUMMARY)

    def _write(self, name: str, value: dict[str, Any], strict: bool) -> None:
        try:
            write_json(self.path / name, value, strict)
        except OSError as error:
            raise RunFolderError(
                f"{self.path / name} could not be written: {reason(error)}; free some space and resume the run."
            ) from error

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = read_json(path)
            if not isinstance(value, dict):
                raise ValueError(f"it holds a {type(value).__name__}, not an object")
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {reason(error)}; train the run again.") from error
        return value


def _locked(folder: int) -> bool:
    """Whether it could be locked, or is where nothing can be."""
    try:
        import fcntl

        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _unused(system: str, env: str, seed: int) -> Path:
    """A name under `runs/` that says what the run is; an id such as `ALE/Pong-v5` stays one folder deep."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{system}_{env}_s{seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    folder, copy = Path("runs") / name, 2
    while folder.exists():
        folder, copy = Path("runs") / f"{name}-{copy}", copy + 1
    return folder

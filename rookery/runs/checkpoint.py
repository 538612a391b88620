"""Checkpoints: a run's whole state as safetensors and JSON, never pickle, so that loading one never executes code.

A state is a nested dict whose leaves are tensors, JSON scalars, or lists of JSON scalars. On disk it is a folder:

- `tensors.safetensors`: every tensor, named by its path in the state (a JSON pointer, `/learner/net/0.weight`);
- `state.json`: `{"schema", "tensors" (the other file's SHA-256), "score", "state", "checksum" (of all before it)}`.
  In `state` a tensor stands as `{"$tensor": name}`, a float that JSON lacks as `{"$float": "nan"}`, and a dict's key
  that begins with `$` has one more in front.

Keys never become file names. A folder is written aside, synced and renamed: a crash leaves the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rookery.runs.files import read_json, reason, sync, write_json

__all__ = ["MIGRATIONS", "SCHEMA", "CheckpointError", "Checkpoints", "load", "save"]

SCHEMA = 1  # the version of a state's content that this code writes

# Schema n -> what turns a state of schema n into one of schema n + 1. Every schema below SCHEMA has an entry.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

TENSORS, STATE, INDEX, REPLAY = "tensors.safetensors", "state.json", "index.json", "replay"
STATE_BYTES = 16 * 2**20  # the largest state.json that is written or read: bulk belongs in tensors
DEPTH = 64  # the deepest nesting of dicts that is written or read
DAMAGE = (OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, RecursionError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not one that can be trusted; says which and why."""

    full = False  # whether space ran out


def save(folder: Path, state: dict[str, Any], score: float | None = None) -> None:
    """Write `state` as the folder `folder`, replacing it at once if it is there.

    Tensors may have any strides and device; they come back contiguous, on the CPU, without grad. Two that share
    memory come back as two.

    Args:
        score: how good the state is, higher is better; kept for `Checkpoints.best`.

    Raises:
        TypeError: if the state holds something that is not a tensor, a JSON scalar or a list of those, naming its path.
        CheckpointError: if it cannot be written; what was at `folder` before is intact. `full` where space ran out.
    """
    if not isinstance(state, dict):
        raise TypeError(f"A state is a dict, and this is a {type(state).__name__}; use {{'name': value}}.")
    tensors: dict[str, Tensor] = {}
    encoded = _encode(state, "", 0, tensors)
    packed = _pack(tensors)
    aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file(packed, aside / TENSORS)
        document = {"schema": SCHEMA, "tensors": _sha256(aside / TENSORS), "score": score, "state": encoded}
        text = _dump(document | {"checksum": _checksum(document)})
        (aside / STATE).write_text(text, encoding="ascii")
        shutil.copymode(aside / STATE, aside / TENSORS)  # safetensors' own files are for their owner alone
        for path in (aside / TENSORS, aside / STATE, aside):
            sync(path)
        _swap(aside, folder)
    except (OSError, SafetensorError) as error:
        failure = CheckpointError(
            f"Checkpoint {folder} could not be written: {reason(error)}; free some space or name a folder that can be "
            "written."
        )
        failure.full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise failure from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """The state saved at `folder`, every checksum verified, migrated to this `SCHEMA`; tensors on the CPU.

    Raises:
        CheckpointError: if the folder is missing, damaged, newer than this code or not a checkpoint at all.
    """
    folder = _present(folder)
    document = _read(folder)
    path = folder / TENSORS
    try:
        if not path.is_file() or _sha256(path) != document["tensors"]:
            raise ValueError(f"{TENSORS} is missing or not the one that was saved")
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned, because what safetensors returns is a view of the file's mapped pages.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state = _decode(document["state"], 0, tensors)
        if not isinstance(state, dict) or tensors:
            raise ValueError(f"{TENSORS} holds tensors that {STATE} does not name")
    except DAMAGE as error:
        raise _damaged(folder, error) from error
    for schema in range(document["schema"], SCHEMA):
        state = MIGRATIONS[schema](state)
    return state


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"Checkpoint {folder} is damaged ({reason(error)}).")


def _read(folder: Path) -> dict[str, Any]:
    """The verified content of `state.json`, its state still encoded."""
    path = folder / STATE
    try:
        if not path.is_file() or path.stat().st_size > STATE_BYTES:
            raise ValueError(f"{STATE} is missing or larger than {STATE_BYTES} bytes")
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or type(document.get("schema")) is not int:
            raise ValueError(f"{STATE} has no schema number")
        if document["schema"] > SCHEMA:
            raise CheckpointError(
                f"Checkpoint {folder} has schema {document['schema']} and this version of Rookery reads up to "
                f"{SCHEMA}; upgrade Rookery to use it."
            )
        if document.pop("checksum", None) != _checksum(document):
            raise ValueError(f"{STATE} does not match its checksum")
        if document["schema"] < 1 or set(document) != {"schema", "tensors", "score", "state"}:
            raise ValueError(f"{STATE} has the wrong entries")
        if not (document["score"] is None or isinstance(document["score"], (int, float))):
            raise ValueError(f"{STATE} has a score that is no number")
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise _damaged(folder, error) from error
    return document


def _dump(document: dict[str, Any]) -> str:
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    if len(text) > STATE_BYTES:
        raise TypeError(f"A state's scalars take {len(text)} bytes, more than {STATE_BYTES}; keep them in tensors.")
    return text


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(document).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(value: Any, path: str, depth: int, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors`, named by path."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.dtype is torch.complex128:
            raise TypeError(
                f"A state's tensor at {path} is {value.layout}, {value.dtype}; use a dense one, e.g. float32."
            )
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        if depth == DEPTH:
            raise TypeError(f"A state is nested deeper than {DEPTH} dicts at {path[:80]}; flatten it.")
        return {
            _escape(key, path): _encode(child, f"{path}/{_pointer(key)}", depth + 1, tensors)
            for key, child in value.items()
        }
    if isinstance(value, list):
        return [_encode_scalar(item, f"{path}/{index}") for index, item in enumerate(value)]
    return _encode_scalar(value, path)


def _encode_scalar(value: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(float(value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"A state holds a {type(value).__name__} at {path or 'the top'}; use a tensor, a number, a string, a bool, "
        "None, a list of those scalars, or a dict with string keys."
    )


def _escape(key: Any, path: str) -> str:
    if not isinstance(key, str) or any("\ud800" <= letter <= "\udfff" for letter in key):
        raise TypeError(
            f"A state's key {key!r} at {path or 'the top'} is not a string of Unicode text; use one that is."
        )
    return f"${key}" if key.startswith("$") else key


def _pointer(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor contiguous on the CPU and alone in its memory, copied only where it is not."""
    packed, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        packed[name] = plain
    return packed


def _decode(value: Any, depth: int, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_encode`; takes every tensor it places out of `tensors`. Raises ValueError."""
    if isinstance(value, list):
        items = [_decode(item, DEPTH, {}) for item in value]
        if any(isinstance(item, (list, dict)) for item in items):
            raise ValueError("a list holds more than scalars")
        return items
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and "$tensor" in value:
        if value["$tensor"] not in tensors:
            raise ValueError(f"{TENSORS} lacks a tensor that {STATE} names, or {STATE} names it twice")
        return tensors.pop(value["$tensor"])
    if len(value) == 1 and value.get("$float") in ("nan", "inf", "-inf"):
        return float(value["$float"])
    if depth == DEPTH:
        raise ValueError(f"it is nested deeper than {DEPTH} dicts")
    if any(key.startswith("$") and not key.startswith("$$") for key in value):
        raise ValueError("it has an unknown kind of value")
    return {key.removeprefix("$"): _decode(child, depth + 1, tensors) for key, child in value.items()}


def _backup(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _present(folder: Path) -> Path:
    """`folder`, or where a save that was killed between its two renames has left what it was replacing."""
    return _backup(folder) if not folder.exists() and _backup(folder).is_dir() else folder


def _swap(aside: Path, folder: Path) -> None:
    """Put the finished `aside` in the place of `folder`; a full folder cannot be renamed over, so the old moves."""
    backup = _backup(folder)
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)
        folder.rename(backup)
    try:
        aside.rename(folder)
    except OSError:
        if backup.exists():
            backup.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(backup, ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run: `folder/<step, 12 digits>/`; the last k and the one with the best score are kept.

    What is large and only needed to go on, a replay, lies in `folder/replay/<step>/`, for the newest checkpoint alone.
    `index.json` beside them caches the scores; it is rebuilt from the checkpoints when it is lost.
    """

    def __init__(self, folder: Path, keep_last: int = 3) -> None:
        """Nothing is created or removed before the first save, so that a live run's folder may be opened to read it."""
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would keep no checkpoint to resume from; use 1 or more.")
        self.folder = Path(folder)
        self.keep_last = keep_last

    def path(self, step: int) -> Path:
        """The folder of the checkpoint taken at `step`."""
        return self.folder / f"{step:012d}"

    def save(
        self, step: int, state: dict[str, Any], score: float | None = None, replay: dict[str, Any] | None = None
    ) -> Path:
        """Save the state after `step` steps, then drop those no longer kept. A score that is not finite is none.

        Where space runs out it is tried once more without the older ones, of which the newest and the best stay.

        Raises CheckpointError and TypeError as `save` does.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative; count steps from 0.")
        score = float(score) if score is not None and math.isfinite(score) else None
        replays = self.folder / REPLAY
        for last in (False, True):
            try:
                if replay is not None:
                    save(replays / f"{step:012d}", replay)
                save(self.path(step), state, score)
                break
            except CheckpointError as error:
                if last or not (error.full and self._make_room()):
                    left = "What was saved before is intact: resume then." if self.steps() else "Nothing is saved yet."
                    raise CheckpointError(f"{error} {left}") from error
        for old in replays.iterdir() if replays.is_dir() else ():
            if old.name != f"{step:012d}":
                shutil.rmtree(old, ignore_errors=True)
        scores = self._scores() | {step: score}
        rated = {at: value for at, value in scores.items() if value is not None}
        keep = {step, *sorted(scores)[-self.keep_last :]}
        if rated:
            keep.add(max(rated, key=lambda at: (rated[at], at)))
        self._remove(keep)
        self._write_index({at: scores[at] for at in sorted(keep)})
        return self.path(step)

    def rate(self, step: int, score: float) -> None:
        """Note the score of the checkpoint of that step, which came to be known later; nothing where it is gone."""
        scores = self._scores()
        if step in scores and math.isfinite(score):
            self._write_index(scores | {step: score})

    def _make_room(self) -> bool:
        """Remove all but the newest readable checkpoint and the best; whether there was another."""
        try:
            keep = {self.latest()[0], self.best()[0]}
        except CheckpointError:
            return False
        if keep >= set(self.steps()):
            return False
        self._remove(keep)
        return True

    def steps(self) -> list[int]:
        """The steps at which there is a checkpoint, in order, damaged ones included."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"(?:\.old-)?(\d{12,})", entry.name) for entry in self.folder.iterdir())
        return sorted({int(match[1]) for match in matches if match})

    def latest(self) -> tuple[int, dict[str, Any]]:
        """The newest readable checkpoint, as (step, state); warns of each damaged one it passes over.

        Raises CheckpointError if there is none.
        """
        return self._first(reversed(self.steps()))

    def replay(self, step: int) -> dict[str, Any] | None:
        """What was saved as the replay of this step; None without any, with a warning if it is damaged."""
        path = self.folder / REPLAY / f"{step:012d}"
        try:
            return load(path) if _present(path).exists() else None
        except CheckpointError as error:
            warnings.warn(f"{error} The replay is left out.", RuntimeWarning, stacklevel=2)
            return None

    def best(self) -> tuple[int, dict[str, Any]]:
        """The readable checkpoint with the highest score, the newer of two equals; without scores, the newest."""
        scores = self._scores()
        rank = {step: -math.inf if score is None else score for step, score in scores.items()}
        return self._first(sorted(rank, key=lambda step: (rank[step], step), reverse=True))

    def _first(self, steps: Iterable[int]) -> tuple[int, dict[str, Any]]:
        for step in steps:
            try:
                return step, load(self.path(step))
            except CheckpointError as error:
                warnings.warn(f"{error} The next older one is tried.", RuntimeWarning, stacklevel=3)
        raise CheckpointError(f"There is no readable checkpoint in {self.folder}; train first, or name another run.")

    def _scores(self) -> dict[int, float | None]:
        """Every checkpoint's score: from the index, or from the checkpoint where the index does not know it."""
        try:
            known = read_json(self.folder / INDEX)["scores"]
            cached = {int(step): None if score is None else float(score) for step, score in known.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            cached = {}
        scores: dict[int, float | None] = {}
        for step in self.steps():
            try:
                scores[step] = cached[step] if step in cached else _read(_present(self.path(step)))["score"]
            except CheckpointError:
                scores[step] = None
        return scores

    def _remove(self, keep: set[int]) -> None:
        """Remove all but the steps in `keep`, and what killed saves have left behind."""
        for step in set(self.steps()) - keep:
            # Renamed first, so that one that is half removed is never read as a checkpoint.
            doomed = self.folder / f".tmp-{step:012d}-removed"
            with contextlib.suppress(OSError):
                _present(self.path(step)).rename(doomed)
        for entry in self.folder.iterdir():
            replaced = entry.name.startswith(".old-") and (self.folder / entry.name.removeprefix(".old-")).exists()
            if entry.name.startswith(".tmp-") or replaced:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _write_index(self, scores: dict[int, float | None]) -> None:
        path = self.folder / INDEX
        try:
            write_json(path, {"scores": {str(step): score for step, score in scores.items()}})
        except OSError:
            # Only a cache: without it the scores are read from the checkpoints; a stale one would mislead.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

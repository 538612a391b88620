"""A run's folder: made where there is none, opened where there is one, refused with a sentence otherwise."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from rookery.runs import files
from rookery.runs.folder import RunFolder, RunFolderError, versions


def test_create_write_open_read(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a" / "b", "ppo", "CartPole-v1", 3)
    run.write_config({"system": "ppo", "seed": 3, "clip": math.inf, "nested": {"hidden": [64, 64]}})
    run.write_summary({"steps": 100, "return_mean_last_100": math.nan})
    again = RunFolder.open(tmp_path / "a" / "b")
    config = again.read_config()
    assert config.pop("versions") == versions()
    assert config == {"system": "ppo", "seed": 3, "clip": math.inf, "nested": {"hidden": [64, 64]}}
    assert again.read_summary() == {"steps": 100, "return_mean_last_100": None}
    assert {again.metrics, again.checkpoints, again.plots, again.video, again.tensorboard} == {
        again.path / name for name in ("metrics.jsonl", "checkpoints", "plots", "video", "tensorboard")
    }
    assert sorted(path.name for path in again.path.iterdir()) == ["config.json", "summary.json"]


def test_versions_name_what_changes_numbers() -> None:
    found = versions()
    assert {"python", "platform", "torch", "numpy", "gymnasium", "tensordict"} <= set(found)
    assert all(isinstance(version, str) for version in found.values())


def test_default_names_are_one_folder_deep_and_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        RunFolder.create(None, "ppo", "../ALE/Pong-v5", 7).write_config({})
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(runs) == 3
    assert all(name.startswith("ppo_..-ALE-Pong-v5_s7_2") for name in runs)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "ppo", "CartPole-v1", 0).write_config({"seed": 0})
    with pytest.raises(RunFolderError, match=r"has no checkpoint: it has only begun, .* delete the folder"):
        RunFolder.create(tmp_path, "ppo", "CartPole-v1", 0)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunFolderError, match=r"already holds a run; continue it with `rookery resume .*another folder"):
        RunFolder.create(tmp_path, "ppo", "CartPole-v1", 0)
    assert RunFolder.open(tmp_path).read_config()["seed"] == 0


def test_foreign_things_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(RunFolderError, match="is not an empty folder"):
            RunFolder.create(path, "ppo", "CartPole-v1", 0)


def test_an_unwritable_path_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot be written: Not a directory; name"):
        RunFolder.create(tmp_path / "file" / "run", "ppo", "CartPole-v1", 0)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        RunFolder.create(tmp_path / "run", "ppo", "CartPole-v1", 0)


def test_what_is_no_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunFolderError, match="is no folder"):
        RunFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000, "\x00"])
def test_a_damaged_config_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunFolderError, match="cannot be read"):
        RunFolder.open(tmp_path).read_config()


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, "ppo", "CartPole-v1", 0)
    run.write_summary({"steps": 1})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(RunFolderError, match=r"summary.json could not be written: No space left"):
        run.write_summary({"steps": 2})
    assert run.read_summary() == {"steps": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_json_is_strict_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"a": math.inf})
    assert not list(tmp_path.iterdir())
    files.write_json(tmp_path / "x.json", {"a": math.inf}, strict=False)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": math.inf}

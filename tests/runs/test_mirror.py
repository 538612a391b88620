"""A run's copy at a URL: what a run goes on from is there, and only what is whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import rookery
from rookery.runs.folder import RunFolderError
from rookery.runs.mirror import Mirror, fetched

SMALL: dict[str, Any] = {"envs": 2, "unroll": 8, "hidden": (8,), "minibatches": 1, "eval_episodes": 1, "sinks": ()}


def train(path: Path, steps: int = 320, **more: Any) -> rookery.Run:
    settings = {**SMALL, "steps": steps, "eval_every": 80, **more}
    return rookery.train("ppo", "tensor:CartPole-v1", run_dir=path, quiet=True, **settings)


def weights(run: rookery.Run) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in run.saved()["run"]["roles"]["learner_0"]["net"].values()])


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_run_goes_on_from_its_copy(kind: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run" if kind == "memory" else f"file://{tmp_path}/copies/run"
    train(tmp_path / "here", mirror=url)
    resumed = rookery.resume(url, steps=640, quiet=True, run_dir=tmp_path / "elsewhere")
    assert resumed.path == tmp_path / "elsewhere"
    assert torch.equal(weights(resumed), weights(rookery.resume(tmp_path / "here", steps=640, quiet=True)))
    assert fetched(url, tmp_path / "again") == tmp_path / "again"  # a resumed run is copied on
    assert rookery.load(tmp_path / "again").saved()["steps"] == resumed.saved()["steps"]


def test_it_keeps_the_checkpoints_that_the_run_keeps(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copy"
    run = train(tmp_path / "run", steps=800, mirror=url)
    here, there = (
        {path.name for path in folder.iterdir() if path.is_dir()}
        for folder in (run.path / "checkpoints", tmp_path / "copy" / "checkpoints")
    )
    assert there == here
    assert (tmp_path / "copy" / "summary.json").exists() or (tmp_path / "copy" / "config.json").exists()


def test_half_a_checkpoint_is_not_fetched(tmp_path: Path) -> None:
    run = train(tmp_path / "run", mirror=f"file://{tmp_path}/copy")
    newest = max(path for path in (tmp_path / "copy" / "checkpoints").iterdir() if path.is_dir())
    (newest / "state.json").unlink()  # as if the copy had been broken off
    found = fetched(f"file://{tmp_path}/copy", tmp_path / "fetched")
    assert not (found / "checkpoints" / newest.name).exists()
    assert rookery.load(found).saved()["steps"] < run.saved()["steps"]


def test_where_nothing_can_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/run cannot be written: .*; name a URL that can"):
        train(tmp_path / "run", mirror=f"file://{tmp_path}/file/run")
    with pytest.raises(RunFolderError, match=r"nosuch://x cannot be opened: Protocol not known: nosuch"):
        train(tmp_path / "other", mirror="nosuch://x")


def test_another_run_is_not_copied_over(tmp_path: Path) -> None:
    train(tmp_path / "one", mirror=f"file://{tmp_path}/copy")
    with pytest.raises(RunFolderError, match=r"copy holds another run; go on with it by `rookery resume file://"):
        train(tmp_path / "two", mirror=f"file://{tmp_path}/copy")
    assert not (tmp_path / "two").exists()  # so that another URL can be named
    assert rookery.load(fetched(f"file://{tmp_path}/copy", tmp_path / "again")).saved()["steps"] >= 320


def test_a_copy_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Any, *args: Any) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr(Mirror, "_copy", broken)
    with caplog.at_level(logging.WARNING, "rookery"):
        run = train(tmp_path / "run", mirror=f"memory://{tmp_path.name}/broken")
    assert run.summary["steps"] >= 320
    assert "could not be brought up to date: the network is down" in caplog.text


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"memory://nothing holds no run \(config.json is missing\)"):
        fetched("memory://nothing", tmp_path / "new")
    fsspec.filesystem("memory").pipe_file("/some/config.json", b"{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RunFolderError, match="is not empty; name another folder"):
        fetched("memory://some", tmp_path / "full")

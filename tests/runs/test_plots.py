"""Plots: the numbers they draw are right, and a picture comes out of whatever a run has measured so far."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from rookery.runs import plots
from rookery.runs.folder import RunFolder, RunFolderError
from rookery.runs.metrics import MetricsError, MetricsLog
from rookery.runs.plots import interval, plot_run, plot_runs, smooth


def make(path: Path, system: str, env: str, seed: int, rows: list[dict[str, Any]]) -> Path:
    run = RunFolder.create(path, system, env, seed)
    run.write_config({"system": system, "env": env, "seed": seed})
    log = MetricsLog(run.metrics)
    for row in rows:
        log.append(row)
    log.close()
    return run.path


def rows(seed: int, steps: int = 50) -> list[dict[str, Any]]:
    """Episodes, learner and evaluator of one run, whose return is its step plus noise."""
    rng, found = np.random.default_rng(seed), []
    for step in range(0, steps * 100, 100):
        found.append({"step": step, "role": "actor", "index": 0, "episode_return": step + rng.normal()})
        loss = None if step == 300 else rng.random()
        found.append({"step": step, "role": "learner", "index": 0, "loss": loss, "kl": 0.1, "steps_per_second": 9e4})
        if step % 1000 == 0:
            spread = {"eval_return_mean": step, "eval_return_std": 30.0, "eval_episodes": 20}
            found.append({"step": step, "role": "evaluator", "index": 0, **spread})
    return found


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return set(image.convert("RGB").getdata())


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_smooth_is_a_mean_over_the_window_before() -> None:
    series = np.array([10.0, 20.0, 30.0, 100.0]), np.array([1.0, 3.0, 5.0, 7.0])
    grid = np.array([0.0, 10.0, 20.0, 30.0, 60.0, 99.0, 100.0, 500.0])
    assert np.array_equal(
        smooth(series, grid, window=15.0), [np.nan, 1.0, 2.0, 4.0, 5.0, 5.0, 7.0, 7.0], equal_nan=True
    )


@pytest.mark.parametrize("seeds", [2, 3, 10, 31, 60])
def test_interval_is_scipys(seeds: int) -> None:
    curves = np.random.default_rng(seeds).normal(size=(seeds, 7))
    mean, half = interval(curves)
    low, high = stats.t.interval(0.95, seeds - 1, loc=curves.mean(0), scale=stats.sem(curves))
    np.testing.assert_allclose(mean - half, low, rtol=0.04 if seeds > 31 else 1e-3, atol=1e-2)
    np.testing.assert_allclose(mean + half, high, rtol=0.04 if seeds > 31 else 1e-3, atol=1e-2)


def test_one_seed_has_no_interval() -> None:
    mean, half = interval(np.ones((1, 4)))
    assert mean.tolist() == [1.0] * 4
    assert half.tolist() == [0.0] * 4


def test_plot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now fail
    folder = make(tmp_path / "run", "ppo", "CartPole-v1", 0, rows(0))
    path = plot_run(folder)
    assert path == folder / "plots" / "learning_curve.png"
    with Image.open(path) as image:
        assert image.width > 1000
        assert image.height > 600
    assert {rgb(colour) for colour in plots.COLOURS[:3]} <= colours(path), "return, evaluation or speed is missing"
    assert [entry.name for entry in path.parent.iterdir()] == ["learning_curve.png"]


def test_panels_are_the_learners_numbers_losses_first_speed_last() -> None:
    found = plots._panels([*rows(0), {"step": 5, "role": "replay", "index": 0, "size": 3}])
    assert list(found) == [("learner", "loss"), ("learner", "kl"), ("replay", "size"), ("learner", "steps_per_second")]
    assert len(found["learner", "loss"][0]) == 49, "the null was not left out"


@pytest.mark.parametrize("roles", [("actor",), ("learner",), ("evaluator",)])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_a_run_with_only_some_rows(tmp_path: Path, roles: tuple[str, ...], steps: int) -> None:
    some = [row for row in rows(0, steps) if row["role"] in roles]
    path = plot_run(make(tmp_path / "run", "ppo", "CartPole-v1", 0, some))
    assert len(colours(path)) > 50


def test_plot_runs_groups_seeds_by_system_and_environment(tmp_path: Path) -> None:
    folders = [
        make(tmp_path / f"{system}{env}{seed}", system, env, seed, rows(seed, 30 + 10 * seed))
        for system in ("ppo", "a2c")
        for env in ("CartPole-v1", "Pendulum-v1")
        for seed in range(2)
    ]
    both = plot_runs(folders, tmp_path / "both.png")
    assert both == tmp_path / "both.png"
    assert {rgb(plots.COLOURS[0]), rgb(plots.COLOURS[1])} <= colours(both)
    one = plot_runs(folders[:1], tmp_path / "sub" / "one.png")
    assert rgb(plots.COLOURS[1]) not in colours(one)
    with Image.open(both) as wide, Image.open(one) as narrow:
        assert wide.width > narrow.width


def test_runs_that_report_only_evaluations(tmp_path: Path) -> None:
    some = [row for row in rows(0) if row["role"] == "evaluator"]
    path = plot_runs([make(tmp_path / "run", "es", "CartPole-v1", 0, some)], tmp_path / "out.png")
    assert rgb(plots.COLOURS[0]) in colours(path)


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    empty = make(tmp_path / "empty", "ppo", "CartPole-v1", 0, [])
    learner = make(
        tmp_path / "learner", "ppo", "CartPole-v1", 0, [{"step": 1, "role": "learner", "index": 0, "loss": 1}]
    )
    with pytest.raises(MetricsError, match="no rows to plot"):
        plot_run(empty)
    with pytest.raises(MetricsError, match="neither episodes nor evaluations"):
        plot_runs([learner], tmp_path / "out.png")
    with pytest.raises(RunFolderError, match="is no folder"):
        plot_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no runs to plot"):
        plot_runs([], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()

"""`stop_at` ends a run at the first evaluation that reaches it, and at no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rookery
from rookery.runs.metrics import read

BATCH = 4 * 16  # steps of an unroll, of which some are not valid


def train(folder: Path, **settings: Any) -> Any:
    options = {"steps": 10 * BATCH, "envs": 4, "eval_every": 2 * BATCH, "eval_episodes": 4, "sinks": (), "quiet": True}
    algorithm = rookery.PPO(unroll=16, epochs=1)
    return rookery.train(algorithm, "tensor:CartPole-v1", run_dir=folder / "run", **{**options, **settings})


def evaluations(run: Any) -> list[dict[str, Any]]:
    return [row for row in read(run.path / "metrics.jsonl") if row["role"] == "evaluator"]


def test_the_first_evaluation_that_reaches_it_ends_the_run(tmp_path: Path) -> None:
    run = train(tmp_path, stop_at=1.0)  # every CartPole episode returns more
    rows = evaluations(run)
    assert 2 * BATCH <= run.summary["steps"] < 4 * BATCH
    assert [row["step"] for row in rows] == [run.summary["steps"]] * 2, "the one that ended it, and the final one"
    assert not run.interrupted
    assert not run.summary["interrupted"]
    assert run.checkpoints.steps()[-1] == run.summary["steps"]


def test_what_is_never_reached_leaves_the_run_its_budget(tmp_path: Path) -> None:
    run = train(tmp_path, stop_at=501.0)  # CartPole-v1 ends at 500
    assert run.summary["steps"] >= 10 * BATCH
    assert len(evaluations(run)) >= 4


def test_the_mean_counts_and_reaching_it_exactly_is_enough(tmp_path: Path) -> None:
    first = evaluations(train(tmp_path / "a"))[0]
    same = train(tmp_path / "b", stop_at=first["eval_return_mean"])
    above = train(tmp_path / "c", stop_at=first["eval_return_mean"] + 1e-6)
    assert same.summary["steps"] == first["step"]
    assert above.summary["steps"] > first["step"]


@pytest.mark.parametrize("value", ["475", (475.0,)])
def test_what_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="stop_at"):
        train(tmp_path, stop_at=value)

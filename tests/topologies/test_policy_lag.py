"""A row's policy lag is of all batches since the row before, not of the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rookery
from rookery.runs.metrics import read

RUN: dict[str, Any] = {"steps": 300, "envs": 2, "unroll": 5, "eval_every": 0, "eval_episodes": 1, "hidden": (8,)}
RUN |= {"sinks": (), "device": "cpu", "threads": 1, "quiet": True, "env_options": {"max_steps": 60}}


def trained(path: Path, system: str, log_every: int, **more: Any) -> tuple[list[dict[str, Any]], Any]:
    """The learner's rows, and the policy lag of the summary."""
    settings = {**RUN, **more, "log_every": log_every}
    run = rookery.train(system, "tensor:CartPole-v1", run_dir=path / str(log_every), **settings)
    rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner" and row["index"] == 0]
    return rows, run.summary["policy_lag"]


@pytest.mark.parametrize(
    ("system", "settings"),
    [
        ("impala", {"actors": 3, "unrolls": 2}),
        ("appo", {"actors": 4, "learners": 2}),
        ("a3c", {"learners": 3}),
        ("ppo", {"actors": 2, "learners": 2, "epochs": 2, "minibatches": 2}),
    ],
)
def test_a_row_is_of_all_batches_since_the_last(system: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The same run, which logs each batch or several at once."""
    (fine, _), (coarse, said) = (trained(tmp_path, system, every, **settings) for every in (1, 60))
    assert len(coarse) < len(fine) / 2
    before = -1
    for row in coarse:
        own = [each for each in fine if before < each["step"] <= row["step"]]
        before = row["step"]
        assert row["policy_lag_max"] == max(each["policy_lag_max"] for each in own)
        assert row["policy_lag"] == pytest.approx(sum(each["policy_lag"] for each in own) / len(own))
    assert said["max"] == max(row["policy_lag_max"] for row in coarse)
    varied = any(row["policy_lag_max"] > row["policy_lag"] for row in coarse)
    assert varied == (system != "ppo")  # whose data are always new

"""Replicas and their learner die: each step is by gradients of the same minibatch, and nothing is counted twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phases import Mortal

import rookery
from rookery.runs.metrics import read
from rookery.train import Keeper

EACH = 8  # updates of a batch: 4 epochs of 2 minibatches
RUN: dict[str, Any] = {"quiet": True, "runtime": "local", "actors": 2, "learners": 2, "envs": 4, "steps": 2_000}
RUN |= {"eval_every": 10**6, "eval_episodes": 2, "log_every": 64, "sinks": (), "device": "cpu", "threads": 1}
REPLICA = ["at 4", "put", "followed", "released", "at 0", "at 7"]
LEARNER = ["pooling 0", "pooling 3", "pooling 7", "concluded", "published parameters", "published weights"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def trained(path: Path, moments: list[str], monkeypatch: pytest.MonkeyPatch) -> rookery.Run:
    """A run in which somebody dies at each moment, one after the other."""
    between, left = Keeper.between, [(150 + 250 * place, moment) for place, moment in enumerate(moments)]

    def deadly(keeper: Keeper, steps: int, snapshot: Any) -> bool:
        if left and steps >= left[0][0] and not (path / left[0][1]).exists():
            (path / left.pop(0)[1]).touch()
        return between(keeper, steps, snapshot)

    monkeypatch.setattr(Keeper, "between", deadly)
    mortal = Mortal(unroll=16, epochs=4, minibatches=2, hidden=(8,), folder=str(path))
    run = rookery.train(mortal, "tensor:CartPole-v1", run_dir=path / "run", **RUN)
    assert not left
    assert not [moment for moment in moments if (path / moment).exists()]
    assert sum("restarted" in row for row in read(run.path / "metrics.jsonl")) == len(moments)
    return run


@pytest.mark.parametrize("moments", [REPLICA, LEARNER, ["followed", "pooling 4", "put", "concluded", "at 3"]])
def test_who_dies_leaves_all_in_phase(moments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path, moments, monkeypatch)
    chain: list[dict[str, Any]] = []  # of the steps that led to where the run is: a learner may fall back
    for row in map(json.loads, (tmp_path / "steps").read_text().splitlines()):
        assert row["gradient"] == [row["updates"] % EACH] * 2
        assert row["updates"] <= len(chain)
        chain[row["updates"] :] = [row]
    lasts = chain[EACH - 1 :: EACH]
    learnt = [data for row in lasts for data in row["data"]]
    assert len(set(learnt)) == len(learnt)
    counts = run.saved()["run"]["roles"]["learner_0"]["counts"]
    assert counts["updates"] == len(chain) == EACH * (counts["version"] - 1)
    assert counts["steps"] == run.summary["steps"] == sum(sum(row["steps"]) for row in lasts)
    assert [row["before"] for row in lasts] == [sum(sum(row["steps"]) for row in lasts[:n]) for n in range(len(lasts))]
    assert sum(run.saved()["run"]["roles"][f"actor_{index}"]["steps"] for index in range(2)) >= counts["steps"]

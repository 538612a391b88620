"""A run folder of an earlier day still loads, plays as it did, and goes on: whoever changes what is saved sees it here.

Never made anew: a new schema gets a migration (`rookery.runs.checkpoint.MIGRATIONS`), and its own folder beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import rookery

GOLDEN = Path(__file__).parent / "golden" / "run_v1"  # PPO, two updates of 4 lanes and 8 steps


def test_it_plays_as_it_did() -> None:
    policy = rookery.load(GOLDEN).policy
    obs = torch.tensor([[0.0, 0.1, 0.02, -0.3], [0.5, -0.4, -0.05, 0.6]])
    (head, value), _ = policy.net(obs, policy.initial_state(2))
    assert policy(obs)[0].tolist() == [1, 1]
    assert value.tolist() == pytest.approx([-0.1310, -0.3690], abs=1e-4)
    assert head.logits.flatten().tolist() == pytest.approx([-0.7015, -0.6848, -0.7007, -0.6857], abs=1e-4)


def test_it_goes_on(tmp_path: Path) -> None:
    before = rookery.load(GOLDEN).net().state_dict()
    shutil.copytree(GOLDEN, tmp_path / "run")
    run = rookery.resume(tmp_path / "run", steps=65, quiet=True)
    learner = run.saved()["run"]["roles"]["learner_0"]
    assert learner["counts"]["updates"] == 3
    assert 64 < run.summary["steps"] <= 96
    assert not all(torch.equal(value, before[name]) for name, value in learner["net"].items())

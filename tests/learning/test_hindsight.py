"""Hindsight: what cannot be learnt from its own rewards is learnt from the goals that were reached instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rookery
from rookery.algorithms.base import Refused
from rookery.run import Run

SMALL = {"lr": 1e-3, "gamma": 0.98, "hidden": (256,), "batch": 128, "target_period": 8, "tau": 0.05}
SMALL |= {"updates_per_step": 0.5, "learning_starts": 200, "epsilon": 0.2, "epsilon_start": 0.2, "eval_episodes": 100}


def train(env: str, folder: Path, steps: int, hindsight: float, **settings: Any) -> Run:
    settings = {**SMALL, "eval_every": steps, "sinks": (), **settings}
    return rookery.train("dqn", env, run_dir=folder, quiet=True, steps=steps, hindsight=hindsight, **settings)


@pytest.mark.parametrize(
    ("bits", "steps", "hindsight", "least", "most"),
    [
        (8, 4_000, 0.8, 0.95, 1.0),
        (8, 4_000, 0.0, 0.0, 0.4),
        pytest.param(15, 10_000, 0.8, 0.95, 1.0, marks=pytest.mark.slow),
        pytest.param(15, 10_000, 0.0, 0.0, 0.05, marks=pytest.mark.slow),
    ],
)
def test_bits_are_flipped_with_hindsight_alone(
    bits: int, steps: int, hindsight: float, least: float, most: float, tmp_path: Path
) -> None:
    run = train("BitFlip-v0", tmp_path / "run", steps, hindsight, env_options={"bits": bits})
    found = run.evaluate(200)
    assert found.successes is not None
    assert least <= found.summary()["eval_success"] <= most
    assert [bool(each) for each in found.successes] == [total > -bits for total in found.returns]


@pytest.mark.slow
def test_fetch_reach(tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    run = rookery.train("ddpg", "FetchReach-v4", run_dir=tmp_path / "run", quiet=True, eval_every=10_000_000)
    assert run.evaluate(40).summary()["eval_success"] >= 0.95


def test_rewards_that_are_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"hindsight=0\.8 puts other goals .* CartPole-v1 does not say"):
        train("CartPole-v1", tmp_path / "run", 1_000, 0.8)


def test_no_success_is_made_up(tmp_path: Path) -> None:
    assert "eval_success" not in train("CartPole-v1", tmp_path / "run", 300, 0).evaluate(2).summary()

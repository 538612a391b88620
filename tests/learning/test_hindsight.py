"""Hindsight: what cannot be learnt from its own rewards is learnt from the goals that were reached instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rookery
from rookery.algorithms.base import Refused
from rookery.run import Run


def train(system: str, env: str, folder: Path, **settings: Any) -> Run:
    """With the recipe's settings, and no evaluation on the way."""
    return rookery.train(system, env, run_dir=folder, quiet=True, sinks=(), eval_every=10_000_000, **settings)


@pytest.mark.parametrize(
    ("bits", "steps", "hindsight", "least", "most"),
    [
        (8, 3_000, 0.8, 0.95, 1.0),
        (8, 3_000, 0.0, 0.0, 0.4),
        pytest.param(15, 10_000, 0.8, 0.95, 1.0, marks=pytest.mark.slow),
        pytest.param(15, 10_000, 0.0, 0.0, 0.05, marks=pytest.mark.slow),
    ],
)
def test_bits_are_flipped_with_hindsight_alone(
    bits: int, steps: int, hindsight: float, least: float, most: float, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"env_options": {"bits": bits}, "steps": steps, "hindsight": hindsight}
    found = train("dqn", "BitFlip-v0", tmp_path / "run", **settings).evaluate(200)
    assert found.successes is not None
    assert least <= found.summary()["eval_success"] <= most
    assert [bool(each) for each in found.successes] == [total > -bits for total in found.returns]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["ddpg", "td3", "sac"])
def test_fetch_reach(system: str, tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    found = train(system, "FetchReach-v4", tmp_path / "run").evaluate(40)
    assert found.summary()["eval_success"] >= 0.95


def test_rewards_that_are_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"hindsight=0\.8 puts other goals .* CartPole-v1 does not say"):
        train("dqn", "CartPole-v1", tmp_path / "run", hindsight=0.8, n_step=1)


def test_no_success_is_made_up(tmp_path: Path) -> None:
    found = train("dqn", "CartPole-v1", tmp_path / "run", steps=300, learning_starts=100).evaluate(2)
    assert "eval_success" not in found.summary()

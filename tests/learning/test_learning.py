"""What is learnt: probes whose answers are known, memory, and the scores of benchmarks/learning.toml."""

from __future__ import annotations

import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import rookery
from rookery.run import Run
from rookery.systems import SYSTEMS

ROWS = tomllib.loads((Path(__file__).parents[2] / "benchmarks" / "learning.toml").read_text())["row"]

# Settings that learn a probe in seconds; a system that is not named here takes its own.
QUICK = {"envs": 16, "lr": 5e-3, "hidden": (16,), "entropy_coef": 0.0, "gamma": 0.9, "eval_every": 10_000_000}
PROBES: dict[str, dict[str, Any]] = {
    "ppo": {**QUICK, "steps": 6_000, "unroll": 16, "minibatches": 2},
    "a2c": {**QUICK, "steps": 8_000, "unroll": 4},
}

# The recall of one bit, 9 steps later; a policy without memory can only guess, for a return of 0.
RECALL = {"envs": 64, "unroll": 20, "lr": 3e-3, "memory_size": 32, "steps": 40_000, "eval_every": 40_000}
RECALL |= {"entropy_coef": 0.02, "normalize_reward": True}


@pytest.mark.parametrize("system", PROBES)
@pytest.mark.parametrize(
    ("env", "values"),
    [
        ("Probe1-v0", {0.0: 1.0}),
        ("Probe2-v0", {-1.0: -1.0, 1.0: 1.0}),
        ("Probe3-v0", {0.0: 0.9, 1.0: 1.0}),
        ("Probe4-v0", {0.0: 1.0}),
        ("Probe5-v0", {-1.0: 1.0, 1.0: 1.0}),
    ],
)
def test_values_of_probes(system: str, env: str, values: dict[float, float], tmp_path: Path) -> None:
    """The value of each observation, at γ = 0.9."""
    run = train(system, env, tmp_path, **PROBES[system])
    net, obs = run.net(), torch.tensor(list(values)).unsqueeze(-1)
    with torch.no_grad():
        (_, found), _ = net(obs, net.initial_state(len(values), obs.device))
    assert found.tolist() == pytest.approx(list(values.values()), abs=0.1)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("env", ["Probe4-v0", "Probe5-v0"])
def test_actions_of_probes(system: str, env: str, tmp_path: Path) -> None:
    run = train(system, env, tmp_path, **PROBES.get(system, {}))
    assert run.evaluate(64).returns == [1.0] * 64


def test_cart_pole(tmp_path: Path) -> None:
    """One seed of the row below, with less than its budget."""
    run = train("ppo", "CartPole-v1", tmp_path, steps=60_000, eval_every=60_000)
    assert run.summary["eval_return_mean"] >= 475


@pytest.mark.parametrize(("memory", "least", "most"), [("lstm", 0.95, 1.0), ("gru", 0.95, 1.0), ("none", -0.5, 0.5)])
def test_recall(memory: str, least: float, most: float, tmp_path: Path) -> None:
    run = train("ppo", "MemoryChain-v0", tmp_path, memory=memory, **RECALL)
    assert least <= statistics.fmean(run.evaluate(200).returns) <= most


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['system']}-{row['env']}")
def test_row(row: dict[str, Any], tmp_path: Path) -> None:
    """A recipe reaches its threshold; `each` asks it of the worst seed."""
    runs = [train(row["system"], row["env"], tmp_path / str(seed), seed=seed) for seed in range(row["seeds"])]
    scores = [run.summary["eval_return_mean"] for run in runs]
    score = min(scores) if row.get("each") else statistics.fmean(scores)
    assert score >= row["threshold"], scores


def train(system: str, env: str, path: Path, **settings: Any) -> Run:
    return rookery.train(system, env, run_dir=path / "run", quiet=True, sinks=(), **settings)

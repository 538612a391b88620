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
from rookery.runs.metrics import read
from rookery.systems import SYSTEMS

ROWS = tomllib.loads((Path(__file__).parents[2] / "benchmarks" / "learning.toml").read_text())["row"]

# Settings that learn a probe in seconds; a system that is not named here takes its own.
QUICK = {"envs": 16, "lr": 5e-3, "hidden": (16,), "entropy_coef": 0.0, "gamma": 0.9, "eval_every": 10_000_000}
PROBES: dict[str, dict[str, Any]] = {
    "ppo": {**QUICK, "steps": 6_000, "unroll": 16, "minibatches": 2},
    "a2c": {**QUICK, "steps": 8_000, "unroll": 4},
    "a3c": {**QUICK, "steps": 8_000, "unroll": 4, "envs": 8, "learners": 2},
    "async_a2c": {**QUICK, "steps": 8_000, "unroll": 4, "envs": 8},
    "async_ppo": {**QUICK, "steps": 6_000, "unroll": 16, "envs": 8, "minibatches": 2},
    "impala": {**QUICK, "steps": 8_000, "unroll": 4, "actors": 1},
    "appo": {**QUICK, "steps": 6_000, "unroll": 16, "minibatches": 2, "epochs": 4, "actors": 1},
}
REPLAY = {name: QUICK[name] for name in ("envs", "gamma", "eval_every")} | {"hidden": (32,), "lr": 3e-3, "batch": 64}
REPLAY |= {"steps": 3_000, "learning_starts": 500, "updates_per_step": 0.25, "capacity": 3_000}
TARGET = {"target_period": 20, "epsilon_steps": 1_000}  # of Q-learning
ATOMS = {"v_min": -2.0, "v_max": 2.0, "atoms": 21}
OWN = {"c51": {**TARGET, **ATOMS}, "rainbow": {**TARGET, **ATOMS}, "d4pg": {**ATOMS, "v_min": -8.0}}
OWN |= {
    "apex": {**TARGET, "batch": 64, "ladder": 1.0},
    "apex_dpg": {"target_period": 20},
    "dqn": TARGET,
    "dqn_512": TARGET,
    "c51_2048": {**TARGET, **ATOMS},
    "gorila": {**TARGET, "adagrad": False},
    "iqn": TARGET,
    "qr_dqn": {**TARGET, "quantiles": 16},
}
OWN |= {"mpo": {"target_period": 20, "updates_per_step": 1.0}}  # a small move of the policy each target period
PROBES |= {name: {**REPLAY, **OWN.get(name, {})} for name in SYSTEMS if name not in PROBES}
PROBES_OF_BOXES = {
    **PROBES,
    **{name: {**PROBES[name], "steps": 40_000} for name in ("a2c", "a3c", "async_a2c", "impala")},
}
ON_POLICY = ("ppo", "a2c", "a3c", "async_a2c", "async_ppo", "impala", "appo")
DISCRETE = (*ON_POLICY, "dqn", "dqn_512", "apex", "gorila", "c51", "c51_2048", "qr_dqn", "iqn", "rainbow", "sac")
CONTINUOUS = (*ON_POLICY, "ddpg", "apex_dpg", "td3", "sac", "d4pg", "mpo")

# The recall of one bit, 9 steps later; a policy without memory can only guess, for a return of 0.
RECALL = {"envs": 64, "unroll": 20, "lr": 3e-3, "memory_size": 32, "steps": 40_000, "eval_every": 40_000}
RECALL |= {"entropy_coef": 0.02, "normalize_reward": True}


@pytest.mark.parametrize("system", ON_POLICY)
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


@pytest.mark.parametrize("system", DISCRETE)
@pytest.mark.parametrize("env", ["Probe4-v0", "Probe5-v0"])
def test_actions_of_probes(system: str, env: str, tmp_path: Path) -> None:
    run = train(system, env, tmp_path, **PROBES[system])
    assert run.evaluate(64).returns == [1.0] * 64


@pytest.mark.parametrize("system", CONTINUOUS)
def test_numbers_are_copied(system: str, tmp_path: Path) -> None:
    """Actions of a box: the return is minus the squared distance to the observation; at random it is −4/3.

    While it learns, too, where exploration is left: actors act by what is learnt.
    """
    run = train(system, "ProbeBox-v0", tmp_path, **PROBES_OF_BOXES[system])
    assert statistics.fmean(run.evaluate(256).returns) > -0.1
    acted = [row["episode_return"] for row in read(run.path / "metrics.jsonl") if "episode_return" in row]
    assert not acted or statistics.fmean(acted[-5:]) > -0.5


def test_every_system_has_probes() -> None:
    assert {*DISCRETE, *CONTINUOUS} == {*SYSTEMS}


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

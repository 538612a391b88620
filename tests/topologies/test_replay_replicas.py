"""Several learners on replay are one: K of them, each with a K-th of every batch, learn what one learns from all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rookery
from rookery.data.plan import Refused
from rookery.runs.metrics import read
from rookery.runtimes.local import Local
from rookery.train import Keeper

RUN: dict[str, Any] = {"envs": 2, "unroll": 4, "steps": 600, "eval_every": 300, "eval_episodes": 2, "batch": 24}
RUN |= {"updates_per_step": 0.25, "learning_starts": 50, "hidden": (16,), "sinks": (), "device": "cpu", "threads": 1}
RUN |= {"quiet": True, "env_options": {"max_steps": 60}, "compile": False}  # some recipes compile, for seconds
# Systems without noise in their losses; with it, replicas draw their own.
PLAIN: dict[str, dict[str, Any]] = {
    "dqn": {"alpha": 0.6, "double": True, "normalize_obs": True, "target_period": 10},
    "c51": {"actors": 2, "compile": True},  # takes some 20 s
    "qr_dqn": {"tau": 0.1, "target_period": 1},
    "ddpg": {"alpha": 0.5, "n_step": 3, "env": "tensor:Pendulum-v1"},
}


def train(path: Path, system: str, learners: int, env: str = "tensor:CartPole-v1", **more: Any) -> rookery.Run:
    return rookery.train(system, env, run_dir=path, **{**RUN, **more, "learners": learners})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., rookery.Run]:
    @cache
    def run(system: str, learners: int, runtime: str = "inline") -> rookery.Run:
        return train(tmp_path_factory.mktemp("run") / "run", system, learners, runtime=runtime, **PLAIN[system])

    return run


def learner_of(run: rookery.Run) -> dict[str, Any]:
    state: dict[str, Any] = run.checkpoints.latest()[1]["run"]["roles"]["learner_0"]
    return state


def apart(one: rookery.Run, two: rookery.Run, part: str = "net") -> float:
    """The largest difference between what two learners have, running statistics included."""
    ours, theirs = learner_of(one)[part], learner_of(two)[part]
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.parametrize("learners", [2, 4])
@pytest.mark.parametrize("system", PLAIN)
def test_after_100_updates_k_learners_are_where_one_is(
    trained: Callable[..., rookery.Run], system: str, learners: int
) -> None:
    """But for float32 sums in another order."""
    one, several = (trained(system, count) for count in (1, learners))
    counts = learner_of(several)["counts"]
    assert counts == learner_of(one)["counts"]
    assert counts["updates"] >= 100
    assert apart(one, several) < 1e-6
    assert apart(one, several, "target") < 1e-6


@pytest.mark.parametrize("system", ["dqn", "ddpg"])
def test_processes_change_nothing(trained: Callable[..., rookery.Run], system: str) -> None:
    inline, local = (trained(system, 2, runtime) for runtime in ("inline", "local"))
    assert inline.summary["steps"] == local.summary["steps"]
    assert apart(inline, local) == 0.0


@pytest.mark.parametrize("system", ["td3", "sac", "mpo"])
def test_losses_with_noise_and_parts_that_move_seldom(tmp_path: Path, system: str) -> None:
    run = train(tmp_path / "run", system, 3, env="tensor:Pendulum-v1")
    counts = learner_of(run)["counts"]
    assert counts["updates"] >= 100
    assert run.summary["dropped"] == {}


@pytest.mark.parametrize("victim", ["replica", "learner"])
def test_who_dies_is_replaced_and_nobody_learns_from_what_it_left(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, killed = Local._turn, []

    def deadly(runtime: Local) -> None:
        turn(runtime)
        if runtime.steps >= 150 * (len(killed) + 1) and len(killed) < 3:
            killed.append(next(member for member in runtime.members if member.spec.name == victim))
            os.kill(killed[-1].process.pid, signal.SIGKILL)

    monkeypatch.setattr(Local, "_turn", deadly)
    run = train(tmp_path / "run", "dqn", 2, runtime="local", steps=900, alpha=0.6)
    assert len(killed) == 3
    assert sum("restarted" in row for row in read(run.path / "metrics.jsonl")) == 3
    assert run.summary["steps"] >= 900
    counts, limiter = learner_of(run)["counts"], run.checkpoints.latest()[1]["run"]["words"]["replay"]["counts"]
    assert counts["updates"] * RUN["batch"] <= limiter["samples"]


def test_an_inline_run_can_be_stopped_while_both_sides_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are always owed: without a boundary somebody is within a unit whenever a round ends."""
    between, stopped = Keeper.between, []

    def stopping(keeper: Keeper, steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        stopped.append(steps)
        return between(keeper, steps, snapshot) or steps >= 300

    monkeypatch.setattr(Keeper, "between", stopping)
    train(tmp_path / "run", "apex", 2, actors=2)
    assert len(stopped) > 20
    assert stopped[-1] < 350


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"learners=5 cannot share batch=24 evenly; use batch=25\."):
        train(tmp_path / "run", "dqn", 5)
    assert not (tmp_path / "run").exists()

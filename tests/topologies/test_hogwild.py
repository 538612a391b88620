"""Hogwild: one worker is A2C, several share weights, statistics and counts, inline and as processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rookery
from rookery import systems
from rookery.algorithms.a2c import A2C
from rookery.algorithms.base import Batch, Loss, Now, Refused
from rookery.algorithms.dqn import DQN
from rookery.algorithms.impala import IMPALA
from rookery.algorithms.ppo import PPO
from rookery.runs.metrics import read
from rookery.runtimes import inline
from rookery.systems import SYSTEMS, System
from rookery.train import train as run_training  # which imports the runtimes before their seeds are patched

CART = "tensor:CartPole-v1"
RUN: dict[str, Any] = {"envs": 4, "steps": 1_000, "log_every": 50, "eval_every": 500, "eval_episodes": 2}
RUN |= {"sinks": (), "device": "cpu", "threads": 1, "quiet": True, "hidden": (8,), "env_options": {"max_steps": 40}}
LR = 2.0**-10


@dataclass(frozen=True)
class Pushing(A2C):
    """Each update adds the same to every weight, so that updates can be counted in the weights."""

    def loss(self, net: nn.Module, target: None, batch: Batch, now: Now) -> Loss:
        loss = -torch.stack([parameter.sum() for parameter in net.parameters()]).sum()
        return Loss(loss, {"loss": loss.detach()})

    def optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)


OWN = {"ppo_hogwild": PPO, "dqn_hogwild": DQN, "impala_hogwild": IMPALA, "pushing": Pushing}


@pytest.fixture(autouse=True)
def own_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that only this file has, and nothing tuned."""
    for name in OWN:
        monkeypatch.setitem(SYSTEMS, name, System(name, "", "", topology="hogwild"))
    ours = System.algorithm_class
    monkeypatch.setattr(System, "algorithm_class", lambda system: OWN.get(system.name) or ours(system))
    monkeypatch.setattr(systems, "_recipes", lambda system: {})


def train(path: Path, system: str = "a3c", learners: int = 2, **settings: Any) -> rookery.Run:
    return run_training(system, CART, run_dir=path, learners=learners, **{**RUN, **settings})


def memory_of(run: rookery.Run) -> dict[str, Any]:
    return run.saved()["run"]["words"]["memory"]["values"]


def learners_rows(run: rookery.Run) -> list[dict[str, Any]]:
    return [row for row in read(run.folder.metrics) if row["role"] == "learner" and row["index"] == 0]


def evaluated_at(run: rookery.Run) -> list[int]:
    return [row["step"] for row in read(run.folder.metrics) if row["role"] == "evaluator"]


# One worker.


@pytest.mark.parametrize(
    ("system", "plain", "settings"),
    [
        ("a3c", "a2c", {}),
        ("a3c", "a2c", {"memory": "lstm", "memory_size": 8}),
        ("a3c", "a2c", {"normalize_obs": True, "normalize_reward": True}),
        ("ppo_hogwild", "ppo", {"unroll": 8, "minibatches": 2, "epochs": 2}),
    ],
)
def test_one_worker_is_the_plain_algorithm(
    system: str, plain: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, once its role has the seeds of the other topology's."""
    monkeypatch.setattr(inline, "role_seed", lambda seed, spec: 7)
    ours = train(tmp_path / "ours", system, 1, **settings)
    theirs = run_training(plain, CART, run_dir=tmp_path / "theirs", **{**RUN, **settings})
    assert ours.summary["steps"] == theirs.summary["steps"]
    found, expected = ours.net().state_dict(), theirs.net().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [row["loss"] for row in learners_rows(ours)] == [row["loss"] for row in learners_rows(theirs)]
    assert evaluated_at(ours) == evaluated_at(theirs)


def test_one_process_is_one_worker_in_this_one(tmp_path: Path) -> None:
    inline, local = (train(tmp_path / runtime, learners=1, runtime=runtime) for runtime in ("inline", "local"))
    found, expected = local.net().state_dict(), inline.net().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Several.


@pytest.mark.parametrize("learners", [2, 5])
def test_a_copy_is_as_old_as_the_turns_say(learners: int, tmp_path: Path) -> None:
    """In turn, the first worker's first update is of a fresh copy; from then on all others come in between."""
    found = learners_rows(train(tmp_path / "run", learners=learners, log_every=1))
    lags = [row["policy_lag"] for row in found]
    assert lags == [0.0] + [learners - 1.0] * (len(lags) - 1)
    assert [row["policy_lag_max"] for row in found] == lags
    assert [row["updates"] for row in found] == [1 + learners * number for number in range(len(found))]


def test_a_minibatch_is_of_the_newest_weights(tmp_path: Path) -> None:
    """Between two minibatches the copy is brought up to date: in turn, only a round's first one finds it older."""
    settings = {"unroll": 8, "minibatches": 2, "epochs": 2, "log_every": 1}
    found = learners_rows(train(tmp_path / "run", "ppo_hogwild", 3, **settings))
    assert [row["policy_lag_max"] for row in found] == [0.0] + [8.0] * (len(found) - 1)
    assert {row["policy_lag"] for row in found[1:]} == {2.0}


@pytest.mark.parametrize("runtime", ["inline", "local"])
def test_steps_are_counted_exactly(runtime: str, tmp_path: Path) -> None:
    run = train(tmp_path / "run", learners=3, runtime=runtime)
    memory, roles = memory_of(run), run.saved()["run"]["roles"]
    workers = [roles[f"learner_{index}"] for index in range(3)]
    assert memory["steps"].tolist() == [worker["collector"]["steps"] for worker in workers]
    assert memory["updates"].tolist() == [worker["counts"]["updates"] for worker in workers]
    assert memory["steps"].sum() == run.summary["steps"]
    assert 1_000 <= run.summary["steps"] < 1_000 + 3 * 4 * run.algorithm.unroll
    assert (memory["steps"] > 0).all()


@pytest.mark.parametrize(("runtime", "lost"), [("inline", 0.0), ("local", 0.1)])
def test_every_update_reaches_the_weights(runtime: str, lost: float, tmp_path: Path) -> None:
    """But for those of processes that wrote in the same instant."""
    run = train(tmp_path / "run", "pushing", runtime=runtime, lr=LR, anneal=False, max_grad_norm=None, steps=4_000)
    memory, begun = memory_of(run), run._make_net().state_dict()
    made = memory["updates"]
    for name, weight in run.net().state_dict().items():
        arrived = (weight - begun[name]) / LR  # in the first worker's copy, which misses the very last ones
        assert arrived.max() <= made.sum() + 0.1
        assert arrived.min() >= (1 - lost) * made.sum() - 10
    assert made.min() > 20
    assert (1 - lost) * made.sum() - 10 > made.max()  # not of one process alone


@pytest.mark.parametrize(("runtime", "lost"), [("inline", 0.0), ("local", 0.5)])
def test_statistics_are_everybodys(runtime: str, lost: float, tmp_path: Path) -> None:
    """But for what another process handed on meanwhile."""
    run = train(tmp_path / "run", runtime=runtime, steps=4_000, normalize_obs=True, normalize_reward=True)
    memory = memory_of(run)
    updates, steps = int(memory["updates"].sum()), run.summary["steps"]
    assert (1 - lost) * updates <= float(memory["statistics"]["all"]["step"]) <= updates
    for name, value in memory["values"].items():
        if name.endswith("count"):
            assert (1 - lost) * steps <= float(value) <= steps
    assert all(bool(value.isfinite().all()) for value in memory["values"].values())


@pytest.mark.parametrize("runtime", ["inline", "local"])
def test_shared_memory_outlives_an_interruption(runtime: str, tmp_path: Path) -> None:
    """What was learnt and counted is where it was."""
    run = train(tmp_path / "run", "pushing", runtime=runtime, lr=LR, anneal=False, max_grad_norm=None)
    steps, updates = run.summary["steps"], memory_of(run)["updates"]
    again = rookery.resume(run.path, steps=2 * steps, algorithm=run.algorithm, quiet=True)
    memory = memory_of(again)
    assert memory["steps"].sum() == again.summary["steps"] >= 2 * steps
    assert (memory["updates"] > updates).all()
    begun = run._make_net().state_dict()
    for name, weight in again.net().state_dict().items():
        assert ((weight - begun[name]) / LR).min() >= 0.9 * memory["updates"].sum() - 10


def test_who_begins_again_takes_the_newest_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that have lost all they kept; each loss is minus the sum of the weights it is of."""
    run = train(tmp_path / "run", "pushing", lr=LR, anneal=False, max_grad_norm=None, log_every=1)
    before = inline.Inline.run

    def forgetful(self: inline.Inline, graph: Any, between: Any, saved: dict[str, Any] | None = None) -> dict[str, Any]:
        return before(self, graph, between, saved and {**saved, "roles": {}})

    monkeypatch.setattr(inline.Inline, "run", forgetful)
    again = rookery.resume(run.path, steps=2_000, algorithm=run.algorithm, quiet=True)
    losses = [row["loss"] for row in learners_rows(again)]
    assert len(losses) > 45
    assert losses == sorted(losses, reverse=True)


def test_a_few_updates_learn(tmp_path: Path) -> None:
    """Twice as long as at random."""
    run = train(tmp_path / "run", learners=4, steps=15_000, lr=2e-3, hidden=(64, 64), env_options=(), eval_episodes=20)
    assert run.summary["eval_return_mean"] > 50


# Refused, before there is a folder.


@pytest.mark.parametrize(
    ("system", "settings", "sentence"),
    [
        (
            "a3c",
            {"actors": 2},
            r"^actors=2: a3c runs as hogwild, which takes learners instead; .* that runs as actors_learner or .*\.$",
        ),
        (
            "dqn_hogwild",
            {"learning_starts": 100},
            r"^DQN learns from replay, and hogwild's workers .*; use it as actors_replay_learner\.$",
        ),
        ("impala_hogwild", {"unrolls": 2}, r"^unrolls=2: a worker of hogwild learns from one unroll, .* out\.$"),
        ("ppo_hogwild", {"minibatches": 3, "unroll": 4}, r"^minibatches=3 does not divide the 16 samples .*\.$"),
        ("a3c", {"learners": 0}, r"^learners=0 is too small; use 1 or more\.$"),
    ],
)
def test_refused(system: str, settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        train(tmp_path / "run", system, **settings)
    assert isinstance(caught.value, Refused) or "learners" in settings
    assert not (tmp_path / "run").exists()

"""Several learners are one: K of them, each with a K-th of the data, learn what one learns from all of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rookery
from rookery.data.plan import Refused

RUN: dict[str, Any] = {"actors": 4, "envs": 2, "unroll": 5, "steps": 4_000, "eval_every": 2_000, "eval_episodes": 2}
RUN |= {"sinks": (), "device": "cpu", "threads": 1, "quiet": True, "env_options": {"max_steps": 60}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., rookery.Run]:
    @cache
    def run(system: str, learners: int, runtime: str = "inline", **more: Any) -> rookery.Run:
        path = tmp_path_factory.mktemp("replicas") / "run"
        settings = {**RUN, **more, "learners": learners, "runtime": runtime}
        return rookery.train(system, "tensor:CartPole-v1", run_dir=path, **settings)

    return run


def apart(one: rookery.Run, two: rookery.Run) -> float:
    """The largest difference between two runs' networks, running statistics included."""
    ours, theirs = one.net().state_dict(), two.net().state_dict()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.parametrize("learners", [2, 4])
@pytest.mark.parametrize("memory", ["none", "lstm"])
def test_after_100_updates_k_learners_are_where_one_is(
    trained: Callable[..., rookery.Run], memory: str, learners: int
) -> None:
    """With a small step size: float32 sums in another order grow apart by some 1e-8 of a step an update."""
    settings = {"lr": 1e-4, "normalize_obs": True, "memory": memory, "memory_size": 8}
    one, several = (trained("a2c", count, **settings) for count in (1, learners))
    steps, state = several.checkpoints.latest()
    assert steps == one.summary["steps"]
    counts = state["run"]["roles"]["learner_0"]["counts"]
    assert counts == one.checkpoints.latest()[1]["run"]["roles"]["learner_0"]["counts"]
    assert counts["updates"] >= 100
    assert apart(one, several) < 1e-6


@pytest.mark.parametrize("system", ["a2c", "ppo"])
def test_processes_change_nothing(trained: Callable[..., rookery.Run], system: str) -> None:
    steps = {"steps": 1_600, "eval_every": 800}
    inline, local = (trained(system, 2, runtime, **steps) for runtime in ("inline", "local"))
    assert inline.summary["steps"] == local.summary["steps"]
    assert apart(inline, local) == 0.0


def test_ppo_steps_once_a_minibatch(trained: Callable[..., rookery.Run]) -> None:
    run = trained("ppo", 2, epochs=3, minibatches=2, steps=1_600, eval_every=800)
    counts = run.checkpoints.latest()[1]["run"]["roles"]["learner_0"]["counts"]
    assert counts["updates"] == (counts["version"] - 1) * 3 * 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learners": 3, "actors": 4}, "actors=4 evenly; use actors=6"),
        ({"learners": 2, "actors": 2, "target_kl": 0.02, "system": "ppo"}, "target_kl=0.02 with learners=2"),
        ({"learners": 2, "actors": 2, "unrolls": 3, "system": "impala"}, "unrolls=3 evenly; use unrolls=4"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    settings = {"system": "a2c", **settings}
    with pytest.raises(Refused, match=sentence):
        rookery.train(settings.pop("system"), "tensor:CartPole-v1", run_dir=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()

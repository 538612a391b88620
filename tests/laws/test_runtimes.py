"""Where the roles run changes nothing: inline equals local, bit for bit, also across an interruption."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import differences, home, metrics, tiny
from torch import Tensor

import rookery
from rookery.runtimes.ray import Ray
from rookery.train import Keeper

SHORT = {"max_steps": 30}
SYSTEMS: dict[str, dict[str, Any]] = {
    "ppo": {"actors": 2, "env_options": SHORT},
    "a2c": {"memory": "lstm", "env_options": SHORT},
    "dqn": {"alpha": 0.6, "n_step": 3, "actors": 2, "env_options": SHORT},
    "sac": {"env_options": SHORT},
}


def run(system: str, runtime: str, path: Path) -> rookery.Run:
    settings = tiny(system, **SYSTEMS[system], runtime=runtime)
    return rookery.train(system, home(system), run_dir=path, quiet=True, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], rookery.Run]:
    """The inline run that nothing interrupted."""
    return cache(lambda system: run(system, "inline", tmp_path_factory.mktemp("whole") / "run"))


def unlike(one: rookery.Run, two: rookery.Run) -> list[str]:
    """Where two runs differ in what was learnt: the learner's state, replay, and the learner's rows of metrics."""
    (step, ours), (their_step, theirs) = one.checkpoints.latest(), two.checkpoints.latest()
    found = [] if step == their_step else [f"steps {step} and {their_step}"]
    found += _unlike("learner", ours["run"]["roles"]["learner_0"], theirs["run"]["roles"]["learner_0"])
    found += _unlike("words", ours["run"]["words"], theirs["run"]["words"])
    found += _unlike("replay", one.checkpoints.replay(step) or {}, two.checkpoints.replay(their_step) or {})
    ours, theirs = ([row for row in metrics(each.path) if row["role"] == "learner"] for each in (one, two))
    assert len(ours) >= 3
    return found + ([] if ours == theirs else [f"metrics: {ours} and {theirs}"])


def _unlike(path: str, one: Any, two: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return [f"{path}: {sorted(one)} and {sorted(two)}"]
        return [line for name in one for line in _unlike(f"{path}/{name}", one[name], two[name])]
    same = torch.equal(one, two) if isinstance(one, Tensor) else one == two
    return [] if same else [f"{path}: {one} and {two}"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_inline_equals_local(system: str, whole: Any, tmp_path: Path) -> None:
    assert unlike(whole(system), run(system, "local", tmp_path / "run")) == []


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_inline_equals_ray(system: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every role an actor of its own, as on different hosts."""
    pytest.importorskip("ray")
    monkeypatch.setattr(sys.modules["rookery.train"], "Ray", functools.partial(Ray, shares=False))
    assert unlike(whole(system), run(system, "ray", tmp_path / "run")) == []


def stop_at(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive once a run has come so far."""
    between = Keeper.between

    def stopping(keeper: Keeper, now: int, snapshot: Callable[[], Any]) -> bool:
        if now >= steps and keeper.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return between(keeper, now, snapshot)

    monkeypatch.setattr(Keeper, "between", stopping)


ACROSS = [(system, "local", "local") for system in SYSTEMS]
ACROSS += [(system, *pair) for system in ("ppo", "dqn") for pair in (("local", "inline"), ("inline", "local"))]


@pytest.mark.parametrize("steps", [1, 70])
@pytest.mark.parametrize(("system", "first", "then"), ACROSS)
def test_a_run_goes_on_elsewhere(
    system: str, first: str, then: str, steps: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(system)
    with monkeypatch.context() as patch:
        stop_at(steps, patch)
        stopped = run(system, first, tmp_path / "run")
    assert stopped.interrupted
    assert steps <= stopped.summary["steps"] < 160
    path = stopped.path / "config.json"
    config = json.loads(path.read_text())
    config["options"]["runtime"] = then
    path.write_text(json.dumps(config))
    found = rookery.resume(stopped.path, quiet=True)
    assert found.config["options"]["runtime"] == then
    assert unlike(expected, found) == []


def test_the_comparison_can_fail(whole: Any) -> None:
    """It knows one system from another, and all of a run from all of itself."""
    assert unlike(whole("ppo"), whole("a2c"))
    assert differences(whole("ppo"), whole("ppo")) == unlike(whole("ppo"), whole("ppo")) == []

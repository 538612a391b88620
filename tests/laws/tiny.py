"""The smallest run of every system: settings that any algorithm takes, and what two runs are compared by."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rookery
from rookery.envs.make import make_env
from rookery.runs.metrics import RUNTIME
from rookery.runs.recorder import CLOCK
from rookery.systems import find
from rookery.train import MEASURED

__all__ = ["differences", "home", "metrics", "tiny", "weights"]

# Fields that several algorithms have; each takes those it knows.
SMALL = {"unroll": 4, "epochs": 2, "minibatches": 2, "hidden": (8,), "memory_size": 8}
# of replay
SMALL |= {"batch": 8, "capacity": 96, "learning_starts": 24, "updates_per_step": 0.25}
SMALL |= {"target_period": 3, "epsilon_steps": 50, "quantiles": 8}
RUN = {"steps": 160, "envs": 4, "eval_episodes": 2, "log_every": 16, "eval_every": 48, "sinks": ()}
RUN |= {"device": "cpu", "threads": 1, "compile": False}  # some recipes compile, for seconds
# In place of the preset's, or the recipe's.
FEW = {"a3c": {"learners": 2}, "gorila": {"actors": 2, "shards": 2, "n_step": 1}}


def tiny(system: str, **settings: Any) -> dict[str, Any]:
    """Settings of a run of a few updates with checkpoints, evaluations and rows of metrics in between."""
    known = {field.name for field in dataclasses.fields(find(system).algorithm_class())}
    return {**RUN, **{name: value for name, value in SMALL.items() if name in known}, **FEW.get(system, {}), **settings}


@cache
def home(system: str, discrete: str = "tensor:CartPole-v1", continuous: str = "tensor:Pendulum-v1") -> str:
    """The one of two environments that the system takes."""
    for env in (discrete, continuous):
        with contextlib.suppress(ValueError), torch.random.fork_rng(devices=[]):
            find(system).algorithm_class()().networks(make_env(env, 1).spec)
            return env
    raise AssertionError(f"{system} takes neither discrete nor continuous actions")


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without the clock."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows if row["role"] != RUNTIME]


def weights(run: rookery.Run) -> dict[str, Tensor]:
    """Weights and normaliser statistics of the newest checkpoint."""
    return run.checkpoints.latest()[1]["run"]["roles"]["learner_0"]["net"]


def differences(one: rookery.Run, two: rookery.Run) -> list[str]:
    """Where two runs differ: in everything their last checkpoints hold, in their metrics, in their summaries."""
    (step, ours), (their_step, theirs) = one.checkpoints.latest(), two.checkpoints.latest()
    found = _unequal("checkpoint", ours, theirs)
    found += _unequal("replay", one.checkpoints.replay(step), two.checkpoints.replay(their_step))
    ours, theirs = metrics(one.path), metrics(two.path)
    if ours != theirs:
        pairs = zip(ours, theirs, strict=False)
        found.append(f"metrics ({len(ours)}, {len(theirs)} rows): {next((p for p in pairs if p[0] != p[1]), 'length')}")
    summaries = [{name: value for name, value in run.summary.items() if name not in MEASURED} for run in (one, two)]
    return found + _unequal("summary", *summaries)


def _unequal(path: str, one: Any, two: Any) -> list[str]:
    if path.rpartition("/")[2] in CLOCK:
        return []
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return [f"{path}: {sorted(one)} and {sorted(two)}"]
        return [line for name in one for line in _unequal(f"{path}/{name}", one[name], two[name])]
    same = _same(one, two) if isinstance(one, Tensor) else one == two
    return [] if same else [f"{path}: {one} and {two}"]


def _same(one: Tensor, two: Tensor) -> bool:
    """Bitwise, where rows that were never written are NaN."""
    alike = one.shape == two.shape and one.dtype == two.dtype
    return alike and bool(((one == two) | ((one != one) & (two != two))).all())

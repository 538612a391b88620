"""How often an observation is copied on its way from the environment to the learner's batch, in whatever process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rookery
from rookery.algorithms.base import Acted, Batch, Loss, Now
from rookery.algorithms.impala import IMPALA

SHAPE, LANES, UNROLL = (3, 12, 12), 4, 8
BEGUN = 4  # updates by which all slots are made


class Written(TorchDispatchMode):
    """Counts the bytes of observations that operations of torch write; nothing else has their type and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.counts = 0, False

    def begin(self) -> None:
        """From now on, in this process."""
        if not self.counts:
            self.counts = True
            self.__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {each.untyped_storage().data_ptr() for each in _tensors([args])}
        result = function(*args, **(kwargs or {}))
        for each in _tensors([(kwargs or {}).get("out"), result])[:1]:
            written = function._schema.is_mutable or each.untyped_storage().data_ptr() not in read
            if written and each.dtype == torch.uint8 and each.shape[-3:] == SHAPE:
                self.bytes += each.numel()
        return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [each for value in values for each in _tensors(value)] if isinstance(values, (list, tuple)) else []


HERE = Written()  # in this process


class Pictures(gymnasium.Env):
    """Observations that nobody looks at."""

    observation_space = spaces.Box(0, 255, SHAPE, np.uint8)
    action_space = spaces.Discrete(2)
    render_mode = None

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(SHAPE, np.uint8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(SHAPE, np.uint8), 0.0, self.steps == 10, False, {}


@dataclass(frozen=True)
class Counted(IMPALA):
    """What is written from its first action, or batch, on is counted, and told with each row and loss."""

    def act(self, net: Any, obs: Any, state: Tensor, explore: Any) -> Acted:
        HERE.begin()
        acted = super().act(net, obs, state, explore)
        written = torch.full((len(obs),), float(HERE.bytes))
        return acted._replace(record={**acted.record, "written": written})

    def prepare(self, net: Any, unroll: Batch) -> Batch:
        HERE.begin()
        return {**super().prepare(net, unroll), "written": unroll["written"]}

    def loss(self, net: Any, target: None, batch: Batch, now: Now) -> Loss:
        found = super().loss(net, target, batch, now)
        told = {"by_actor": batch["written"][0, -1], "by_learner": torch.tensor(float(HERE.bytes))}
        return found._replace(metrics={**found.metrics, **told})


@pytest.mark.parametrize("unrolls", [1, 2])
def test_an_observation_is_copied_once(unrolls: int, tmp_path: Path) -> None:
    """From the environment into its slot, which the learner reads where it is; several are put side by side first."""
    algorithm = Counted(unroll=UNROLL, unrolls=unrolls, hidden=(8,))
    update = unrolls * LANES * UNROLL
    settings: dict[str, Any] = {"runtime": "local", "actors": 1, "envs": LANES, "steps": 12 * update, "device": "cpu"}
    settings |= {"log_every": 1, "eval_every": 10**9, "eval_episodes": 1, "sinks": (), "threads": 1}
    run = rookery.train(algorithm, Pictures, run_dir=tmp_path / "run", quiet=True, **settings)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    written = {name: [row[name] for row in rows if name in row][BEGUN:] for name in ("by_actor", "by_learner")}
    unroll = (UNROLL + 1) * LANES * prod(SHAPE)  # one row more than steps, to bootstrap from
    assert {two - one for one, two in pairwise(written["by_actor"])} == {unrolls * unroll}
    assert {two - one for one, two in pairwise(written["by_learner"])} == {(unrolls > 1) * unrolls * unroll}

"""What a reader opens to explain one update of PPO: the files that the tour lists, and no other that computes."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from rookery.actor import Collector
from rookery.algorithms.ppo import PPO
from rookery.envs.make import make_env
from rookery.learner import Learner

ROOT = Path(__file__).resolve().parents[2]
MOST = 6  # files

# What an update enters elsewhere, none of which says what a number is.
PLUMBING = {
    "algorithms/base.py": {"noise", "target", "part_rate"},  # PPO has no noise, target or parts: what the base gives
    "data/plan.py": {"__post_init__", "check"},
    "envs/spec.py": {"mask_of"},
    "nn/adam.py": {"step"},  # PyTorch's fused Adam
    "nn/compiled.py": {"in_float32", "precision"},
    "nn/flat.py": {"gradients", "zero_grad"},
}


def entered(algorithm: PPO) -> dict[str, set[str]]:
    """Functions of rookery that one round of updates calls, by file."""
    env = make_env("tensor:CartPole-v1", 4, max_steps=5)
    with torch.random.fork_rng(devices=[]):
        net = algorithm.networks(env.spec)
    collector = Collector(algorithm, net, env, algorithm.plan.unroll, seed=0)
    unroll = collector.slot()
    collector.fill(unroll)
    learner, batch = Learner(algorithm, net.requires_grad_(True), total_steps=1_000, seed=0), unroll.batch()
    found: dict[str, set[str]] = defaultdict(set)

    def note(frame: FrameType, event: str, _: Any) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and path.is_relative_to(ROOT / "rookery") and not name.startswith("<"):
            found[str(path.relative_to(ROOT / "rookery"))].add(name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        learner.update(batch, 32)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize(("settings", "more"), [({}, set()), ({"normalize_reward": True}, {"nn/norm.py"})])
def test_an_update_of_ppo_stands_in_six_files(settings: dict[str, Any], more: set[str]) -> None:
    tour = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    table = tour[tour.index("| file | for |") :].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE))
    found = entered(PPO(unroll=8, **settings))
    assert len(listed) <= MOST
    assert found.keys() - PLUMBING.keys() == listed | more, "the tour's list, and what is entered"
    assert {file: extra for file in PLUMBING if (extra := found.get(file, set()) - PLUMBING[file])} == {}

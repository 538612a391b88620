"""Whoever acts, evaluates or judges by a copy of the network has each weight where the learner has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import home
from torch import nn

from rookery.actor import Collector
from rookery.algorithms.base import flat
from rookery.algorithms.sac import SAC
from rookery.envs.make import make_env
from rookery.evaluator import Evaluator
from rookery.learner import Learner
from rookery.systems import SYSTEMS, find
from rookery.topologies.shared_policy import Policy


def half_frozen(spec: Any) -> nn.Module:
    """Two layers, of which the first is frozen."""
    return nn.Sequential(nn.Linear(spec.obs_space.shape[0], 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 8))


@pytest.mark.parametrize("network", [None, half_frozen])
@pytest.mark.parametrize("system", SYSTEMS)
def test_published_weights_are_those_that_act(system: str, network: Any) -> None:
    algorithm, env = find(system).algorithm_class()(hidden=(8,)), make_env(home(system), 2)
    nets = [algorithm.networks(env.spec, network) for _ in range(4)]
    learner = Learner(algorithm, nets[0], 100, 0)
    collector, evaluator = Collector(algorithm, nets[1], env, 1, 0), Evaluator(algorithm, nets[2], env, 0)
    policy = Policy(SimpleNamespace(algorithm=algorithm, make_net=lambda: nets[3], bf16=False))  # type: ignore[arg-type]
    collector.load(1, learner.values())
    evaluator.load(learner.values())
    policy.load(1, learner.values())
    learnt = nets[0].state_dict()
    for copied in nets[1:]:
        assert not any(each.requires_grad for each in copied.parameters())
        assert all(torch.equal(value, learnt[name]) for name, value in copied.state_dict().items())


def test_a_network_that_is_frozen_already_is_refused() -> None:
    """Its parameters would be laid out in another order than the learner's."""
    algorithm = SAC(hidden=(8,))
    net = algorithm.networks(make_env("tensor:Pendulum-v1", 1).spec).requires_grad_(False)
    with pytest.raises(ValueError, match="the network is frozen"):
        flat(algorithm, net)

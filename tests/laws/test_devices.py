"""Acting and losses work on whatever device the network is on, and wait for no number from there.

Tensors on PyTorch's device "meta" have shapes and no numbers, so that it takes no GPU to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import home
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from rookery.actor import Collector
from rookery.algorithms.base import Algorithm, Batch, Explore, Now, OnPolicy
from rookery.data.replay import ReplayBuffer
from rookery.envs.make import make_env
from rookery.learner import Learner, minibatches
from rookery.systems import SYSTEMS, find

META, LANES = torch.device("meta"), 4


class OneDevice(TorchFunctionMode):
    """Refuses operations whose tensors are not all on one device, as a GPU does, but for numbers `[]`."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim}
        assert len(found) < 2, f"{func.__name__} is given tensors on {found}"
        return func(*args, **(kwargs or {}))


def batches(algorithm: Algorithm, lanes: Any) -> tuple[Batch, Batch]:
    """What was acted, and a minibatch of it as a loss is given it, on the CPU."""
    net = algorithm.networks(lanes.spec)
    learner = Learner(algorithm, net, 100, 0)
    collector = Collector(algorithm, algorithm.networks(lanes.spec), lanes, 16, 0)
    unroll = collector.slot()
    collector.fill(unroll)
    rows = unroll.batch()
    if isinstance(algorithm.plan, OnPolicy):
        with torch.no_grad():
            rows = algorithm.prepare(net, rows)
    else:
        replay = ReplayBuffer(algorithm.plan, LANES, seed=0)
        replay.insert(rows)
        rows = replay.sample(8)
    minibatch = next(iter(minibatches(algorithm.plan, rows, learner.generator)))
    return unroll.batch(), minibatch | algorithm.noise(net, minibatch, learner.generator)


def moved(data: Any) -> Any:
    """The same there, without numbers."""
    return tree_map(lambda leaf: leaf.to(META) if isinstance(leaf, Tensor) else leaf, data)


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Every algorithm, with what takes other ways through it."""
    ways: tuple[dict[str, Any], ...] = ({}, {"normalize_obs": True}, {"n_step": 3}, {"memory": "lstm"}, {"critics": 3})
    systems = [name for name, row in SYSTEMS.items() if not row.preset]
    known = {system: find(system).algorithm_class().__dataclass_fields__.keys() for system in systems}
    return [(system, way) for system in systems for way in ways if way.keys() <= known[system]]


@pytest.mark.parametrize(("system", "settings"), cases())
def test_all_is_where_the_network_is(system: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know the device "meta"
    algorithm, lanes = find(system).algorithm_class()(hidden=(8,), **settings), make_env(home(system), LANES)
    unroll, minibatch = batches(algorithm, lanes)
    net, target = (algorithm.networks(lanes.spec).to(META) for _ in range(2))
    noise = moved(algorithm.networks(lanes.spec).draw((LANES,), torch.Generator()))
    with OneDevice():
        now = Now(torch.ones((), device=META), tuple(algorithm.parts(net) or {"all": None}))
        loss = algorithm.loss(net, target, moved(minibatch), now)
        loss.loss.backward()
        found = [loss.loss, *loss.metrics.values()]
        for explore in (None, Explore(noise, torch.ones(LANES, device=META))):
            acted = algorithm.act(net, moved(unroll["obs"][0]), moved(unroll["state"]), explore)
            found += [acted.action, acted.state, *acted.record.values()]
        with torch.no_grad():
            if isinstance(algorithm.plan, OnPolicy):
                found += algorithm.prepare(net, moved(unroll)).values()
            algorithm.finish(net, moved(unroll if isinstance(algorithm.plan, OnPolicy) else minibatch))
    assert {leaf.device for leaf in tree_leaves(found) if isinstance(leaf, Tensor)} == {META}

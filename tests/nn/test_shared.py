"""Weights that several learners step: what one optimiser makes of the same gradients, whichever it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rookery.nn.adam import Adam
from rookery.nn.flat import FlatParameters
from rookery.nn.shared import Shared, new_memory

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-5),
    "rmsprop with more": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr, momentum=0.9, centered=True),
    "adam": Adam,
    "adam of torch": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr, initial_accumulator_value=0.1),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "sgd with momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
ALL = ("all",)


def module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Linear(5, 3)
    made.register_buffer("seen", torch.zeros(()))
    return made


def copies(optimizer: Callable[..., Any], count: int) -> tuple[list[FlatParameters], list[Shared], dict[str, Any]]:
    flats = [FlatParameters(module()) for _ in range(count)]
    memory = new_memory(flats[0], optimizer, count)
    return flats, [Shared(flat, optimizer, memory, index) for index, flat in enumerate(flats)], memory


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learners_in_turn_are_one(name: str) -> None:
    """Bit for bit, statistics included: each goes on where the other was."""
    generator = torch.Generator().manual_seed(1)
    flats, learners, memory = copies(OPTIMIZERS[name], 2)
    lr = torch.tensor(0.01)
    single = copy.deepcopy(flats[0].groups["all"])
    one = OPTIMIZERS[name]([single], lr)
    for update in range(7):
        lr.mul_(0.9)
        gradient = torch.randn(single.shape, generator=generator)
        single.grad = gradient
        one.step()
        turn = update % 2
        flats[turn].gradients["all"].copy_(gradient)
        assert learners[turn].step(ALL, {"all": lr}) == min(update, 1)
        assert torch.equal(memory["values"]["parameters"], single)
        learners[turn].pull()
        assert torch.equal(flats[turn].groups["all"], single)
    found = {key: value for key, value in memory["statistics"]["all"].items() if isinstance(value, Tensor)}
    assert all(torch.equal(value, one.state[single][key]) for key, value in found.items())
    assert memory["updates"].tolist() == [4, 3]


def test_own_weights_stay_until_they_are_copied() -> None:
    flats, (first, second), memory = copies(OPTIMIZERS["sgd"], 2)
    begun = flats[0].values()
    for flat in flats:
        flat.gradients["all"].fill_(1.0)
    assert [each.step(ALL, {"all": torch.tensor(0.5)}) for each in (first, first, second)] == [0, 1, 2]
    assert torch.equal(flats[0].values(), begun)
    assert torch.equal(flats[1].values(), begun)
    torch.testing.assert_close(memory["values"]["parameters"], begun - 1.5)
    assert (first.updates, first.version) == (3, 1)
    first.pull()
    assert (first.version, second.version) == (4, 1)
    assert torch.equal(flats[0].values(), memory["values"]["parameters"])


def test_only_what_moves_is_stepped() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    groups = {name: list(part.parameters()) for name, part in zip("abc", net, strict=True)}
    flat = FlatParameters(net, groups)
    shared = Shared(flat, Adam, new_memory(flat, Adam, 1), 0)
    for gradient in flat.gradients.values():
        gradient.fill_(1.0)
    before = {name: group.detach().clone() for name, group in flat.groups.items()}
    shared.step(("b", "c"), dict.fromkeys("abc", torch.tensor(0.1)))
    shared.pull()
    assert [not torch.equal(flat.groups[name], before[name]) for name in "abc"] == [False, True, False]


def test_buffers_and_steps_are_handed_on() -> None:
    flats, (first, second), _ = copies(Adam, 2)
    for flat, shared, steps in ((flats[0], first, 20), (flats[1], second, 15)):
        shared.pull()
        flat.buffers["seen"] += steps
        shared.finish(steps)
    assert float(flats[1].buffers["seen"]) == first.steps == second.steps == 35
    first.pull()
    assert float(flats[0].buffers["seen"]) == 35

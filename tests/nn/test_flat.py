"""Flat parameters: the same objects, the same training, one buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rookery.nn.flat import FlatParameters


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 16, 7), nn.Tanh(), nn.Linear(7, 3)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def loss_of(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().mean()


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def test_parameters_stay_what_they_were() -> None:
    module = convolutional()
    module[5].bias.requires_grad_(False)
    before = [(p, p.shape, p.stride(), p.requires_grad, p.detach().clone()) for p in module.parameters()]
    flat = FlatParameters(module)
    assert set(flat.groups) == {"all", "frozen"}
    for parameter, (same, shape, stride, trains, value) in zip(module.parameters(), before, strict=True):
        assert parameter is same
        assert (parameter.shape, parameter.stride(), parameter.requires_grad) == (shape, stride, trains)
        assert torch.equal(parameter, value)
        group = flat.groups["all" if trains else "frozen"]
        assert parameter.untyped_storage().data_ptr() == group.untyped_storage().data_ptr()
        assert parameter.data_ptr() % 64 == group.data_ptr() % 64
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not module[0].weight.is_contiguous()
    assert flat.groups["frozen"].grad is None


OPTIMISERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adam_fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, foreach=False),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_do_the_same_as_on_separate_parameters(name: str) -> None:
    module = convolutional()
    twin = copy.deepcopy(module)
    flat = FlatParameters(module)
    optimiser, twin_optimiser = OPTIMISERS[name](list(flat.groups.values())), OPTIMISERS[name](list(twin.parameters()))
    start = flat.values()
    for x in batches(6):
        flat.zero_grad()
        twin_optimiser.zero_grad()
        loss_of(module, x).backward()
        loss_of(twin, x).backward()
        for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        optimiser.step()
        twin_optimiser.step()
        for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
            # the scalar end of a vectorised loop falls elsewhere, which rounds the last digit differently
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
            theirs.data.copy_(ours)
    assert not torch.equal(flat.values(), start)


def test_backward_accumulates_into_the_flat_gradient() -> None:
    module = convolutional()
    twin = copy.deepcopy(module)
    flat = FlatParameters(module)
    buffer = flat.groups["all"].grad
    for x in batches(3):
        loss_of(module, x).backward()
        loss_of(twin, x).backward()
    assert flat.groups["all"].grad is buffer
    total = torch.cat([p.grad.flatten() for p in twin.parameters()])
    torch.testing.assert_close(buffer.norm(), total.norm())
    torch.testing.assert_close(buffer.sum(), total.sum())
    flat.zero_grad()
    assert not buffer.any()
    assert not module[3].weight.grad.any()


def test_zero_grad_attaches_lost_gradients_again() -> None:
    module = convolutional()
    flat = FlatParameters(module)
    torch.optim.SGD(flat.groups.values()).zero_grad(set_to_none=True)
    module.zero_grad(set_to_none=True)
    flat.zero_grad()
    loss_of(module, batches(1)[0]).backward()
    assert flat.groups["all"].grad.any()


def test_values_and_load() -> None:
    module, other = convolutional(), convolutional()
    groups = {"first": list(module[0].parameters()), "rest": [*module[3].parameters(), *module[5].parameters()]}
    flat, other_flat = FlatParameters(module, groups), FlatParameters(other)
    values = flat.values()
    with torch.no_grad():
        module[3].weight.add_(1)
    assert not torch.equal(values, flat.values())
    flat.load(values)
    other_flat.load(values)
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="same architecture"):
        flat.load(values[1:])


def test_tied_parameters_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    FlatParameters(module, {"all": [p for layer in module for p in layer.parameters()]})
    assert module[1].weight is module[0].weight
    twin = copy.deepcopy(module)
    module(torch.ones(1, 4)).sum().backward()
    twin.zero_grad()
    twin(torch.ones(1, 4)).sum().backward()
    torch.testing.assert_close(module[0].weight.grad, twin[0].weight.grad)


def test_state_dict_loads_into_the_buffer() -> None:
    module = convolutional()
    flat = FlatParameters(module)
    module.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
    assert not flat.values().any()


def test_groups_that_do_not_divide_the_parameters_are_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = [list(layer.parameters()) for layer in module]
    with pytest.raises(ValueError, match=r"No group holds 1\.weight, 1\.bias"):
        FlatParameters(module, {"a": first})
    with pytest.raises(ValueError, match=r"0\.weight is in the groups 'a' and 'b'"):
        FlatParameters(module, {"a": first, "b": [*first, *second]})
    with pytest.raises(ValueError, match="not the module's"):
        FlatParameters(module, {"a": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters(nn.Tanh())
    module[1].double()
    with pytest.raises(ValueError, match=r"mixes dtype torch\.float32 \(0\.weight\) and torch\.float64 \(1\.weight\)"):
        FlatParameters(module)
    assert set(FlatParameters(module, {"a": first, "b": second}).groups) == {"a", "b"}


@pytest.mark.slow
def test_compiled_loss_accumulates_into_the_flat_gradient() -> None:
    torch.compiler.reset()
    module = convolutional()
    twin = copy.deepcopy(module)
    flat = FlatParameters(module)
    buffer = flat.groups["all"].grad
    optimiser, twin_optimiser = torch.optim.SGD(flat.groups.values(), 0.1), torch.optim.SGD(twin.parameters(), 0.1)
    compiled = torch.compile(lambda x: loss_of(module, x), fullgraph=True)
    for x in batches(3):
        flat.zero_grad()
        twin_optimiser.zero_grad()
        compiled(x).backward()
        loss_of(twin, x).backward()
        optimiser.step()
        twin_optimiser.step()
        assert flat.groups["all"].grad is buffer
        for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

"""Our Adam is PyTorch's fused one, bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from rookery.nn.adam import Adam


def test_it_is_torch_optim_adam_bit_for_bit() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    lrs = torch.tensor(1e-2), torch.tensor(1e-2)
    mine, reference = Adam(ours, lrs[0], eps=1e-5), torch.optim.Adam(theirs, lr=lrs[1], eps=1e-5, fused=True)
    for number in range(20):
        for lr in lrs:
            lr.fill_(1e-2 / (1 + number))
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
    for one, other in zip(ours, theirs, strict=True):
        assert mine.state[one].keys() == reference.state[other].keys(), "checkpoints of both have the same names"
        for name, value in mine.state[one].items():
            assert torch.equal(value, reference.state[other][name]), name


def test_a_parameter_without_a_gradient_stays() -> None:
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    adam = Adam([moved, still], torch.tensor(0.1))
    moved.grad = torch.ones(3)
    adam.step()
    assert torch.allclose(moved, torch.full((3,), 0.9))
    assert torch.equal(still, torch.ones(3))
    assert adam.state[still]["step"] == 0

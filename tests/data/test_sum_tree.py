"""The tree draws each leaf as often as its share of the sum says, and never one of 0; its sums do not drift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rookery.data.sum_tree import SumTree

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tree_of(values: Tensor, fanout: int = 3, top: int = 2, device: str = "cpu") -> SumTree:
    made = SumTree(len(values), lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device=device), fanout, top)
    made.set(torch.arange(len(values), device=device), values.double().to(device))
    return made


numbers = st.one_of(st.just(0.0), st.floats(1e-300, 1e-200), st.floats(1e-6, 1e6), st.floats(1e15, 1e17))


@given(values=st.lists(numbers, min_size=1, max_size=40).filter(any), seed=st.integers(0, 99), top=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_no_leaf_of_zero_is_ever_found(values: list[float], seed: int, top: int) -> None:
    """Even where sums round, and at the very end, or beyond it."""
    tree = tree_of(torch.tensor(values, dtype=torch.float64), top=top)
    shares = torch.cat([torch.rand(50, generator=torch.Generator().manual_seed(seed)), torch.tensor([0.0, 1.0, 1.1])])
    found = tree.find(shares.double() * tree.total())
    assert (tree.leaves[found] > 0).all()


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any), fanout=st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_each_point_belongs_to_its_leaf(values: list[int], fanout: int) -> None:
    """Whole numbers leave no rounding: the leaves lie end to end."""
    tree = tree_of(torch.tensor(values), fanout)
    points = torch.arange(sum(values)) + 0.5
    assert tree.find(points.double()).tolist() == [leaf for leaf, value in enumerate(values) for _ in range(value)]


def test_sums_do_not_drift() -> None:
    """After a million changes, large ones and small ones, the sums are still those of the leaves."""
    generator, size = torch.Generator().manual_seed(0), 300
    tree = tree_of(torch.zeros(size), fanout=4, top=4)
    for scale in (1e12, 1.0, 1e-6) * 70:
        index = torch.randint(size, (5000,), generator=generator).unique()
        tree.set(index, torch.rand(len(index), generator=generator, dtype=torch.float64) * scale)
    last = torch.rand(size, generator=generator, dtype=torch.float64)
    tree.set(torch.arange(size), last)
    assert float(tree.total()) == pytest.approx(float(last.sum()), rel=1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_frequencies(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = torch.tensor([1.0, 0.0, 2.0, 5.0, 0.0, 0.5, 1.5])
    tree, count = tree_of(values, device=device), 20_000
    points = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    seen = tree.find(points * tree.total()).cpu().bincount(minlength=7)
    expected = values / values.sum() * count
    assert (((seen - expected) ** 2)[values > 0] / expected[values > 0]).sum() < 18.5  # χ², 4 degrees, p = 0.001
    assert not seen[values == 0].any()


def test_a_loaded_tree_is_the_saved_one() -> None:
    values = torch.zeros(50)
    values[:20] = torch.rand(20)
    saved, loaded = tree_of(values), tree_of(torch.rand(50))
    state = saved.state(20)
    assert state["0"].numel() < 50
    loaded.load_state(state)
    assert torch.equal(saved.leaves, loaded.leaves)
    assert torch.equal(saved.top, loaded.top)
    assert all(torch.equal(one, other) for one, other in zip(saved.levels, loaded.levels, strict=True))

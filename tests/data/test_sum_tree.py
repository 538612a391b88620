"""The tree draws each leaf as often as its share of the sum says, and never one of 0; its sums do not drift."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numba.core import caching
from torch import Tensor

from rookery.data.compiled import CompiledSumTree, compiled
from rookery.data.sum_tree import SumTree, sum_tree

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

each_kind = pytest.mark.parametrize("kind", [SumTree, CompiledSumTree])


def tree_of(
    values: Tensor, fanout: int = 3, top: int = 2, device: str = "cpu", kind: type[SumTree] = SumTree
) -> SumTree:
    made = kind(len(values), lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device=device), fanout, top)
    made.set(torch.arange(len(values), device=device), values.double().to(device))
    return made


numbers = st.one_of(st.just(0.0), st.floats(1e-300, 1e-200), st.floats(1e-6, 1e6), st.floats(1e15, 1e17))


@each_kind
@given(values=st.lists(numbers, min_size=1, max_size=40).filter(any), seed=st.integers(0, 99), top=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_no_leaf_of_zero_is_ever_found(kind: type[SumTree], values: list[float], seed: int, top: int) -> None:
    """Even where sums round, and at the very end, or beyond it."""
    tree = tree_of(torch.tensor(values, dtype=torch.float64), top=top, kind=kind)
    shares = torch.cat([torch.rand(50, generator=torch.Generator().manual_seed(seed)), torch.tensor([0.0, 1.0, 1.1])])
    found = tree.find(shares.double() * tree.total())
    assert (tree.leaves[found] > 0).all()


@each_kind
@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any), fanout=st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_each_point_belongs_to_its_leaf(kind: type[SumTree], values: list[int], fanout: int) -> None:
    """Whole numbers leave no rounding: the leaves lie end to end, and the order of points does not matter."""
    tree = tree_of(torch.tensor(values), fanout, kind=kind)
    points = torch.arange(sum(values)) + 0.5
    owners = [leaf for leaf, value in enumerate(values) for _ in range(value)]
    assert tree.find(points.double()).tolist() == owners
    assert tree.find(points.flip(0).double()).tolist() == owners[::-1]


@given(values=st.lists(st.integers(0, 9), min_size=4, max_size=60).filter(any), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_compiled_tree_draws_and_changes_the_same(values: list[int], seed: int) -> None:
    trees = [tree_of(torch.tensor(values), kind=kind) for kind in (SumTree, CompiledSumTree)]
    generator = torch.Generator().manual_seed(seed)
    lots = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    some = torch.randperm(len(values), generator=generator)[:3]
    for tree in trees:
        tree.change(some, torch.tensor([3.0, 0.0, 7.0], dtype=torch.float64))
    plain, compiled = trees
    assert torch.equal(plain.leaves, compiled.leaves), "leaves of 0 stay so"
    if plain.total():
        (found, weight), (same, equal) = (tree.draw(lots, 0.4) for tree in trees)
        assert torch.equal(found, same)
        assert weight.dtype == equal.dtype == torch.float32
        assert torch.allclose(weight, equal, rtol=1e-6)


@each_kind
def test_sums_do_not_drift(kind: type[SumTree]) -> None:
    """After a million changes, large ones and small ones, the sums are still those of the leaves."""
    generator, size = torch.Generator().manual_seed(0), 300
    tree = tree_of(torch.zeros(size), fanout=4, top=4, kind=kind)
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


@each_kind
def test_a_loaded_tree_is_the_saved_one(kind: type[SumTree]) -> None:
    values = torch.zeros(50)
    values[:20] = torch.rand(20)
    saved, loaded = tree_of(values, kind=kind), tree_of(torch.rand(50), kind=kind)
    state = saved.state(20)
    assert state["0"].numel() < 50
    loaded.load_state(state)
    assert torch.equal(saved.leaves, loaded.leaves)
    assert torch.equal(saved.top, loaded.top)
    assert all(torch.equal(one, other) for one, other in zip(saved.levels, loaded.levels, strict=True))


@pytest.mark.parametrize(("fanout", "top"), [(3, 2), (2, 5), (50, 1)])
def test_a_tree_is_loaded_by_one_of_other_nodes(fanout: int, top: int) -> None:
    """A checkpoint may be of a machine that has Numba, or has it not."""
    values = torch.zeros(50)
    values[:20] = torch.rand(20)
    for saving, loading in ((SumTree, CompiledSumTree), (CompiledSumTree, SumTree)):
        saved, loaded = tree_of(values, 4, 3, kind=saving), tree_of(torch.rand(50), fanout, top, kind=loading)
        loaded.load_state(saved.state(20))
        assert torch.equal(saved.leaves, loaded.leaves)
        assert float(loaded.total()) == pytest.approx(float(saved.total()))
        points = torch.rand(40, dtype=torch.float64) * saved.total()
        assert torch.equal(loaded.find(points), saved.find(points))


def test_another_process_writes_to_the_same_memory() -> None:
    """Its arrays are of the tensors it was handed, not copies that travelled with it."""
    tree = tree_of(torch.ones(30), kind=CompiledSumTree)
    for tensor in (*tree.levels, tree.top):
        tensor.share_memory_()
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=CompiledSumTree.set, args=(tree, torch.tensor([4]), torch.tensor([9.0]).double()))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    assert tree.leaves[4] == 9
    assert tree.total() == 38


def test_where_nothing_can_be_written_it_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def twice(number: int) -> int:
        return 2 * number

    with pytest.raises(RuntimeError, match="cannot cache"):
        njit(cache=True)(twice)
    assert compiled(twice)(4) == 8


def test_which_tree_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled one on a CPU, where Numba is installed."""

    def chosen(device: str) -> type[SumTree]:
        where = torch.device(device)
        return type(sum_tree(10, lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device=where), where))

    assert chosen("cpu") is CompiledSumTree
    assert chosen("meta") is SumTree
    monkeypatch.setattr("rookery.data.sum_tree.find_spec", lambda name: None)
    assert chosen("cpu") is SumTree

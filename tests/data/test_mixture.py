"""A mixture gives exact shares over time, and hands priorities back to where samples came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replay_model import Stream

from rookery.data.mixture import Mixture, counts_of
from rookery.data.plan import ReplayPlan
from rookery.data.replay import ReplayBuffer


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 300))
def test_counts_are_the_nearest_whole_numbers(weights: list[int], count: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = counts_of([share * count for share in shares], count)
    assert sum(counts) == count
    assert all(abs(each - share * count) < 1 + 1e-6 for each, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize("batch", [1, 10, 64])
@pytest.mark.parametrize("weights", [[255, 1], [1, 1], [3, 1], [1, 0], [29, 71], [1, 2, 4], [1, 1, 1, 253]])
def test_shares_are_exact_over_time(weights: list[int], batch: int) -> None:
    made = parts()
    mixture = Mixture([made[place % 2] for place in range(len(weights))], [each / sum(weights) for each in weights])
    for draws in range(1, 1_001):
        assert sum(counts := mixture._turns(batch)) == batch
        assert min(counts) >= 0
        for weight, number in zip(weights, mixture._given, strict=True):
            assert abs(weight / sum(weights) * batch * draws - number) < 1 + 1e-6


def test_each_batch_of_a_draw_has_its_share() -> None:
    owner = Mixture(parts(), [0.75, 0.25]).sample(5 * 8)["index"] % 2
    assert owner.view(5, 8).tolist() == [[0] * 6 + [1] * 2] * 5


def parts(**settings: float) -> list[ReplayBuffer]:
    made = []
    for seed in range(2):
        plan = ReplayPlan(capacity=200, batch=8, learning_starts=1, alpha=0.6, **settings)
        buffer = ReplayBuffer(plan, 2, seed=seed)
        stream = Stream(2, 1, "zeros", seed)
        for _ in range(8):
            buffer.insert(stream.unroll(5)[0])
        made.append(buffer)
    return made


def test_shares_and_priorities() -> None:
    agent, demonstrations = parts()
    mixture = Mixture([agent, demonstrations], [0.75, 0.25])
    assert len(mixture) == len(agent) + len(demonstrations)
    batch = mixture.sample(16)
    owner, own = batch["index"] % 2, batch["index"] // 2
    assert owner.tolist() == ([0] * 6 + [1] * 2) * 2
    mixture.prioritise(batch["index"], own.float() + 1)
    for place, part in enumerate((agent, demonstrations)):
        mine = own[owner == place]
        assert torch.allclose(part._tree.leaves[mine], (mine.double() + 1) ** 0.6)
    before = agent._tree.leaves.clone()
    with pytest.raises(ValueError, match=r"priority nan at \[15\]"):
        mixture.prioritise(batch["index"], torch.tensor([2.0] * 15 + [float("nan")]))
    assert torch.equal(agent._tree.leaves, before), "nothing was set"


def test_sequences_are_joined_along_the_batch() -> None:
    batch = Mixture(parts(sequence=3), [0.5, 0.5]).sample(6)
    assert {name: list(value.shape) for name, value in batch.items()} == {
        "obs": [4, 6],
        "start": [4, 6],
        "weight": [6],
        "index": [6],
        "state": [6, 1],
        **{name: [3, 6] for name in ("action", "reward", "terminated", "truncated", "valid")},
    }


def test_a_loaded_mixture_has_the_same_future() -> None:
    mixture, other = (Mixture(parts(), [0.8, 0.2]) for _ in range(2))
    mixture.sample(7)
    other.load_state(mixture.state())
    mine, its = mixture.sample(8), other.sample(8)
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    assert mixture._given == other._given == [12, 3]


def test_a_state_that_one_part_refuses_is_loaded_into_none() -> None:
    saved, mixture = Mixture(parts(), [0.5, 0.5]), Mixture([parts()[0], parts(gamma=0.5)[1]], [0.5, 0.5])
    saved.sample(8)  # moves the generators
    before = mixture.parts[0].generator.get_state()
    assert not torch.equal(saved.parts[0].generator.get_state(), before)
    with pytest.raises(ValueError, match=r"the saved replay has {'gamma': 0.99} where this one has {'gamma': 0.5}"):
        mixture.load_state(saved.state())
    assert torch.equal(mixture.parts[0].generator.get_state(), before)


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.6], [-0.5, 1.5]])
def test_wrong_shares_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match=r"of 2 buffers: give one of 0 or more each, 1 together"):
        Mixture(parts(), shares)

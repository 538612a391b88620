"""Running moments against numpy over all the samples at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from rookery.nn.norm import NormObs, RunningNorm


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**31), st.floats(-1e3, 1e3))
def test_batches_equal_all_samples_at_once(sizes: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, 3, generator=generator) * 2 + offset for size in sizes]
    norm = RunningNorm((3,))
    for batch in batches:
        norm.update(batch)
    everything = torch.cat(batches).double().numpy()
    np.testing.assert_allclose(norm.mean, everything.mean(0), rtol=1e-10)
    np.testing.assert_allclose(norm.var, everything.var(0), rtol=1e-8, atol=1e-9)
    assert norm.count == len(everything)
    x = torch.randn(4, 2, 3, generator=generator) + offset
    expected = ((x.numpy() - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8)).clip(-10, 10)
    np.testing.assert_allclose(norm(x), expected, rtol=2e-3, atol=2e-3)  # x has float32's digits at the offset


def test_weights_leave_invalid_rows_out() -> None:
    x, valid = torch.randn(6, 5, 2), torch.rand(6, 5) < 0.5
    poisoned = torch.where(valid[..., None], x, torch.nan)
    weighed, chosen = RunningNorm((2,)), RunningNorm((2,))
    for rows in (slice(0, 3), slice(3, 6)):
        weighed.update(poisoned[rows], valid[rows])
    chosen.update(x[valid])
    torch.testing.assert_close(weighed.mean, chosen.mean)
    torch.testing.assert_close(weighed.var, chosen.var)
    before = {name: value.clone() for name, value in weighed.state_dict().items()}
    weighed.update(poisoned[0], torch.zeros(5, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in weighed.state_dict().items())


def test_merge_equals_one_norm_that_saw_all() -> None:
    first, second, both = RunningNorm((2,)), RunningNorm((2,)), RunningNorm((2,))
    a, b = torch.randn(7, 2), torch.randn(90, 2) * 5 + 3
    first.update(a)
    second.update(b)
    both.update(torch.cat((a, b)))
    empty = RunningNorm((2,))
    first.merge(empty)
    empty.merge(second)
    first.merge(second)
    torch.testing.assert_close(first.state_dict(), both.state_dict())
    torch.testing.assert_close(empty.state_dict(), second.state_dict())
    second.reset()
    torch.testing.assert_close(second.state_dict(), RunningNorm((2,)).state_dict(), rtol=0, atol=0)


def test_identity_before_the_first_update() -> None:
    norm, x = RunningNorm((3,)), torch.randn(5, 3)
    assert torch.equal(norm(x), x)
    assert norm(torch.full((1, 3), 99.0)).max() == norm.clip


def test_a_hundred_million_samples_still_move_it() -> None:
    norm = RunningNorm((1,))
    norm.count.fill_(1e8)
    for _ in range(1000):
        norm.update(torch.ones(1, 1))
    assert norm.count == 100_001_000
    assert float(norm.mean) == pytest.approx(1000 / 100_001_000, rel=1e-9)


SPACE = spaces.Dict(
    vector=spaces.Box(-1, 1, (2,)),
    inner=spaces.Dict(depth=spaces.Box(-1, 1, (2, 2)), camera=spaces.Box(0, 255, (2, 2, 3), np.uint8)),
    count=spaces.Discrete(3),
    action_mask=spaces.Box(0, 1, (4,), np.int8),
)


def test_only_float_leaves_are_normalised() -> None:
    norm = NormObs(SPACE)
    assert norm.keys == [("vector",), ("inner", "depth")]
    obs = TensorDict(
        {
            "vector": torch.randn(50, 2) * 3 + 7,
            "inner": {"depth": torch.randn(50, 2, 2), "camera": torch.randint(256, (50, 2, 2, 3), dtype=torch.uint8)},
            "count": torch.randint(3, (50,)),
            "action_mask": torch.ones(50, 4),
        },
        batch_size=[50],
    )
    original = obs.clone()
    norm.update(obs, torch.ones(50, dtype=torch.bool))
    result = norm(obs)
    assert (obs == original).all()
    torch.testing.assert_close(result["vector"].mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(result["inner", "depth"].std(0, correction=0), torch.ones(2, 2))
    for key in (("inner", "camera"), ("count",), ("action_mask",)):
        assert torch.equal(result[key], obs[key])
    other = NormObs(SPACE)
    other.merge(norm)
    torch.testing.assert_close(other.state_dict(), norm.state_dict())


def test_observations_without_floats_pass() -> None:
    norm, obs = NormObs(spaces.Discrete(3)), torch.tensor([1, 2])
    norm.update(obs)
    assert norm(obs) is obs

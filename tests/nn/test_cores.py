"""Recurrent cores against PyTorch's own, step against sequence, and resets against separate sequences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rookery.nn.cores import GRU, LSTM, NoMemory, make_core

T, B, F, H = 7, 3, 4, 5


@pytest.fixture(params=["lstm", "gru"])
def core(request: pytest.FixtureRequest) -> LSTM | GRU:
    torch.manual_seed(0)
    return make_core(request.param, F, H)


def test_equals_pytorch(core: LSTM | GRU) -> None:
    x, state = torch.randn(T, B, F), torch.randn(B, core.state_size)
    # where our order of gates (LSTM: forget, write, read, candidate; GRU: reset, keep, candidate) is theirs
    order, twin = ([1, 0, 3, 2], nn.LSTM(F, H)) if isinstance(core, LSTM) else ([0, 1, 2], nn.GRU(F, H))
    index = torch.cat([torch.arange(H) + H * gate for gate in order])
    for ours, theirs in ((core.input, "ih"), (core.recurrent, "hh")):
        nn.init.normal_(ours.bias)
        getattr(twin, f"weight_{theirs}_l0").data[index] = ours.weight.data
        getattr(twin, f"bias_{theirs}_l0").data[index] = ours.bias.data
    if isinstance(core, LSTM):
        h, c = state.chunk(2, -1)
        expected, (h, c) = twin(x, (h.contiguous()[None], c.contiguous()[None]))
        last = torch.cat((h[0], c[0]), -1)
    else:
        expected, h = twin(x, state[None])
        last = h[0]
    y, new_state = core(x, state, torch.zeros(T, B, dtype=torch.bool))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(new_state, last)


def test_steps_equal_the_sequence(core: LSTM | GRU) -> None:
    x, start = torch.randn(T, B, F), torch.rand(T, B) < 0.3
    state = first = torch.randn(B, core.state_size)
    rows = []
    for t in range(T):
        y, by_hand = core(x[t], state.masked_fill(start[t, :, None], 0))
        again, state = core(x[t], state, start[t])
        assert torch.equal(y, again)
        assert torch.equal(state, by_hand)
        rows.append(y)
    ys, last = core(x, first, start)
    torch.testing.assert_close(ys, torch.stack(rows))
    torch.testing.assert_close(last, state)


def test_a_reset_separates_episodes(core: LSTM | GRU) -> None:
    x, state, start = torch.randn(T, 1, F), torch.randn(1, core.state_size), torch.zeros(T, 1, dtype=torch.bool)
    start[3] = True
    together, last = core(x, state, start)
    none = torch.zeros_like(start)
    before, _ = core(x[:3], state, none[:3])
    after, last_alone = core(x[3:], torch.zeros_like(state), none[3:])
    torch.testing.assert_close(together, torch.cat((before, after)))
    torch.testing.assert_close(last, last_alone)
    assert not torch.allclose(core(x, state, none)[0][3:], after)


def test_nothing_passes_a_reset(core: LSTM | GRU) -> None:
    state = torch.full((B, core.state_size), torch.nan)  # memory never written
    y, last = core(torch.randn(T, B, F), state, torch.arange(T)[:, None].expand(T, B) == 0)
    assert torch.isfinite(y).all()
    assert torch.isfinite(last).all()


def test_no_memory_passes_features() -> None:
    x = torch.randn(T, B, F)
    core = make_core("none", F, H)
    assert isinstance(core, NoMemory)
    assert (core.features, core.state_size) == (F, 0)
    assert core(x, torch.zeros(B, 0), torch.zeros(T, B, dtype=torch.bool))[0] is x


def test_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="none, lstm, gru"):
        make_core("rnn", F, H)

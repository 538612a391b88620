"""Replay equals a naive model of lists, whatever is inserted; saved and loaded, it has the same future."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from replay_model import Model, Stream, sample_of

from rookery.data.plan import PER_SAMPLE, ReplayPlan
from rookery.data.replay import ReplayBuffer

PLANS = st.one_of(
    st.fixed_dictionaries({"n_step": st.integers(1, 4), "alpha": st.sampled_from([0.0, 0.6])}),
    st.integers(2, 6).flatmap(
        lambda sequence: st.fixed_dictionaries(
            {
                "sequence": st.just(sequence),
                "overlap": st.integers(0, sequence - 1),
                "burn_in": st.sampled_from([0, 1, 2, 5]),
                "alpha": st.sampled_from([0.0, 0.9]),
            }
        )
    ),
)


class ReplayMachine(RuleBasedStateMachine):
    """Anything in any order: inserts by any writer, broken streams, samples, priorities, saving and loading."""

    @initialize(
        plan=PLANS,
        lanes=st.integers(1, 3),
        writers=st.integers(1, 2),
        stack=st.sampled_from([1, 1, 2, 4]),
        pad=st.sampled_from(["zeros", "repeats", "carries"]),
        spare=st.integers(4, 18),
        seed=st.integers(0, 10**6),
        compiled=st.booleans(),
    )
    def begin(
        self, plan: dict, lanes: int, writers: int, stack: int, pad: str, spare: int, seed: int, compiled: bool
    ) -> None:
        longest = max(plan.get("n_step", 1), plan.get("sequence", 0) + plan.get("burn_in", 0))
        capacity = (longest + spare) * lanes * writers
        self.plan = ReplayPlan(capacity=capacity, batch=8, learning_starts=1, gamma=0.9, **plan)
        self.made, self.compiled = {"lanes": lanes, "writers": writers, "stack": stack}, compiled
        self.buffer = self.buffer_of(seed)
        self.model = Model(self.plan, lanes, writers, stack)
        self.streams = [Stream(lanes, stack, pad, seed + writer) for writer in range(writers)]
        self.random = random.Random(seed)

    def buffer_of(self, seed: int) -> ReplayBuffer:
        """With the tree of sums that there is without Numba, or that with it."""
        with pytest.MonkeyPatch.context() as patch:
            if not self.compiled:
                patch.setattr("rookery.data.sum_tree.find_spec", lambda name: None)
            return ReplayBuffer(self.plan, seed=seed, **self.made)

    @rule(count=st.integers(1, 4), writer=st.integers(0, 1), given=st.booleans())
    def insert(self, count: int, writer: int, given: bool) -> None:
        writer %= len(self.streams)
        columns, rows, newest = self.streams[writer].unroll(count)
        valid = self.model.insert(writer, rows, newest)
        priorities = torch.rand(count, self.buffer.lanes) if given else None
        more = {} if priorities is None else {"priority": priorities}
        assert self.buffer.insert({**columns, **more}, writer) == valid

    @rule(writer=st.integers(0, 1), foreign=st.booleans(), lost=st.integers(0, 3))
    def break_off(self, writer: int, foreign: bool, lost: int) -> None:
        """The actor begins anew, or an unroll never arrives."""
        stream = self.streams[writer % len(self.streams)]
        if lost and stream.stack == 1:
            stream.unroll(lost)
        else:
            stream.begin_anew(foreign)

    @precondition(lambda self: len(self.buffer))
    @rule(count=st.integers(1, 12))
    def sample(self, count: int) -> None:
        batch, ready = self.buffer.sample(count, beta=0.5), self.model.ready()
        for n, serial in enumerate(batch["index"].tolist()):
            for name, wanted in sample_of(self.model, *ready[serial]).items():
                dim = 1 if self.plan.sequence and name not in PER_SAMPLE else 0
                found, expected = batch[name].select(dim, n), torch.tensor(wanted)
                assert torch.allclose(found, expected.to(found.dtype), atol=1e-6), (name, serial)

    @precondition(lambda self: len(self.buffer) and self.plan.alpha)
    @rule(count=st.integers(1, 12), old=st.booleans())
    def prioritise(self, count: int, old: bool) -> None:
        index = self.buffer.sample(count)["index"]
        before = self.buffer._tree.leaves.clone()
        width = self.buffer.lanes * self.buffer.writers
        if old:  # rows that were overwritten long ago
            self.buffer.prioritise(index - self.model.capacity * width, torch.rand(count))
            assert torch.equal(self.buffer._tree.leaves, before)
            return
        priorities = (index % 7).float()
        self.buffer.prioritise(index, priorities)
        leaf = self.buffer._tree.leaves[index % len(before)]
        assert torch.allclose(leaf, priorities.double().clamp(min=1e-6) ** self.plan.alpha)

    @rule()
    def save_and_load(self) -> None:
        """The future of what was loaded is that of what was saved: every later check is of another buffer."""
        state = self.buffer.state()
        loaded = self.buffer_of(self.random.randrange(100))
        loaded.load_state(state)
        if len(self.buffer):
            mine, its = self.buffer.sample(5), loaded.sample(5)
            assert all(torch.equal(mine[name], its[name]) for name in mine)
        self.buffer = loaded

    @invariant()
    def what_can_be_drawn(self) -> None:
        """Exactly the samples that the model has, and the sums are those of their priorities."""
        if not hasattr(self, "buffer"):
            return
        ready = self.model.ready()
        assert len(self.buffer) == len(ready)
        if not self.buffer._ring.columns:
            return
        cells = self.buffer._ring.columns["replay", "span"].view(-1).nonzero().squeeze(-1)
        assert sorted(self.buffer._serial(cells).tolist()) == sorted(ready)
        tree = self.buffer._tree
        if tree is not None:
            assert torch.equal(tree.leaves.nonzero().squeeze(-1), cells)
            for level, above in zip(tree.levels, tree.levels[1:], strict=False):
                assert torch.allclose(level.sum(-1), above.view(-1)[: len(level)], rtol=1e-14)


TestReplayMachine = pytest.mark.filterwarnings("ignore")(ReplayMachine.TestCase)
ReplayMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

"""An unroll is allocated once, poisoned, written with one copy a leaf; stacks equal those of a naive stacker."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from rookery.data.unroll import UnrollBuffer, frames_to_stacks

LANES = 3


def row(number: float = 0.0) -> dict[str, Tensor | TensorDict]:
    """One row of every kind of leaf, filled with `number`."""
    obs = {
        "image": torch.full((LANES, 2, 2), int(number), dtype=torch.uint8),
        "inner": TensorDict({"speed": torch.full((LANES, 4), float(number))}, batch_size=[LANES]),
    }
    return {
        "obs": TensorDict(obs, batch_size=[LANES]),
        "action": torch.full((LANES,), int(number), dtype=torch.int64),
        "reward": torch.full((LANES,), float(number)),
        "terminated": torch.full((LANES,), number > 0),
    }


def places_of(buffer: UnrollBuffer) -> list[int]:
    """Where in memory every leaf is."""
    whole = TensorDict(buffer.storage)
    return [leaf.data_ptr() for leaf in whole.values(include_nested=True, leaves_only=True)]


def test_storage_is_like_the_example_and_poisoned() -> None:
    storage = UnrollBuffer(row(), steps=5).storage
    assert storage["obs"].batch_size == torch.Size([6, LANES])
    assert storage["obs"]["inner"].batch_size == torch.Size([6, LANES])
    assert storage["obs"]["image"].shape == (6, LANES, 2, 2)
    assert storage["reward"].isnan().all()
    assert storage["obs"]["inner", "speed"].isnan().all()
    assert (storage["obs"]["image"] == 255).all()
    assert (storage["action"] == torch.iinfo(torch.int64).min).all()
    assert not storage["terminated"].any()


def test_a_dict_of_dicts_is_an_example_too() -> None:
    storage = UnrollBuffer({"obs": {"image": torch.zeros(LANES, 2)}}, steps=2).storage
    assert isinstance(storage["obs"], TensorDict)
    assert storage["obs"]["image"].shape == (3, LANES, 2)


def test_write_copies_each_leaf_once_and_in_place() -> None:
    buffer = UnrollBuffer(row(), steps=4)
    places = places_of(buffer)
    rows = [row(number) for number in range(5)]
    buffer.write({"obs": [r["obs"] for r in rows]} | {key: [r[key] for r in rows[:4]] for key in ("action", "reward")})
    storage = buffer.storage
    assert buffer.copies == 4  # image, speed, action, reward
    assert places == places_of(buffer)
    assert storage["obs"]["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert storage["obs"]["inner", "speed"][:, 1, 3].tolist() == [0, 1, 2, 3, 4]
    assert storage["action"][:4, 2].tolist() == [0, 1, 2, 3]
    assert storage["reward"][:4, 0].tolist() == [0, 1, 2, 3]
    assert storage["reward"][4].isnan().all(), "row T was not given, so it stays poisoned"
    rows[0]["reward"].fill_(99)
    assert storage["reward"][0, 0] == 0, "the storage shares no memory with the rows"
    buffer.poison()
    assert storage["reward"].isnan().all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"rewards": [torch.zeros(LANES)] * 2}, "no key 'rewards' in this unroll; it holds action, obs, reward, term"),
        (
            {"reward": [torch.zeros(LANES)] * 4},
            "'reward' brings 4 rows from row 0 on; an unroll of 2 steps has rows 0 to 2",
        ),
        (
            {"reward": [torch.zeros(LANES), torch.zeros(LANES).double()]},
            r"'reward' brings a row float64\[3\] on cpu; .* allocated for float32\[3\] on cpu",
        ),
        ({"reward": [torch.zeros(LANES, 1)] * 2}, r"'reward' brings a row float32\[3, 1\] on cpu"),
        ({"obs": [torch.zeros(LANES)] * 2}, "'obs.image' is missing from a row"),
        ({"obs": [row()["obs"].select("image")] * 2}, "'obs.inner.speed' is missing from a row"),
        ({"obs": [row()["obs"].double()] * 2}, r"'obs.image' brings a row float64\[3, 2, 2\]"),
    ],
)
def test_rows_unlike_the_example_are_refused(rows: dict, message: str) -> None:
    buffer = UnrollBuffer(row(), steps=2)
    with pytest.raises(ValueError, match=message):
        buffer.write(rows)
    assert buffer.storage["reward"].isnan().all(), "nothing was written"


@pytest.mark.parametrize(
    ("example", "steps", "message"),
    [
        (row(), 0, "steps=0 holds nothing; use 1 or more"),
        ({}, 2, r"shape \[B, ...\] with one B; got first sizes {}"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, 2, r"got first sizes {'a': \[2\], 'b': \[3\]}"),
        ({"a": torch.zeros(())}, 2, r"got first sizes {'a': \[\]}"),
        ({"a": torch.zeros(2), "b": torch.zeros(())}, 2, r"got first sizes {'a': \[2\], 'b': \[\]}"),
    ],
)
def test_bad_examples_are_refused(example: dict, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnrollBuffer(example, steps)


# Frame stacks.


def naive_stacks(frames: Tensor, start: Tensor, stack: int) -> Tensor:
    """A frame stacker as an environment has it: zeros at an episode's start, then push one frame a step."""
    rows = []
    current = torch.zeros(frames.shape[1], stack, *frames.shape[2:], dtype=frames.dtype)
    for frame, begins in zip(frames, start, strict=True):
        current = current.clone()
        current[begins] = 0
        current = torch.cat([current[:, 1:], frame[:, None]], dim=1)
        rows.append(current)
    return torch.stack(rows[stack - 1 :])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 12),
    lanes=st.integers(1, 3),
    stack=st.integers(1, 5),
    frame=st.sampled_from([(3, 2), (2, 3, 2)]),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    ends=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 2**31),
)
def test_stacks_equal_the_naive_stacker(
    rows: int, lanes: int, stack: int, frame: tuple, dtype: torch.dtype, ends: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = rows + stack - 1
    frames = torch.randint(1, 256, (count, lanes, *frame), generator=generator).to(dtype)
    start = torch.rand(count, lanes, generator=generator) < ends
    expected = naive_stacks(frames, start, stack)
    stacks = frames_to_stacks(frames, start, stack)
    assert stacks.view.untyped_storage().data_ptr() == frames.untyped_storage().data_ptr(), "the view is a copy"
    shown = stacks.mask.view(*stacks.mask.shape, *[1] * len(frame))
    assert torch.equal(stacks.view * shown, expected)
    t = torch.randint(0, rows, (4, 2), generator=generator)
    b = torch.randint(0, lanes, (4, 2), generator=generator)
    kept = frames.clone()
    gathered = stacks.gather(t, b)
    assert torch.equal(gathered, expected[t, b])
    gathered.zero_()
    assert torch.equal(frames, kept), "what is gathered is the caller's own"


def test_hidden_history_may_be_poisoned() -> None:
    frames = torch.full((5, 1, 2, 2), torch.nan)
    frames[3:] = 1.0
    start = torch.tensor([[False], [False], [False], [True], [False]])
    stacks = frames_to_stacks(frames, start, stack=4)
    everything = stacks.gather(torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert everything[:, :, 0, 0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]


def test_stacks_of_a_slice_of_storage_are_of_that_slice() -> None:
    storage = torch.arange(8 * 2 * 4, dtype=torch.float32).view(8, 2, 2, 2)
    start = torch.zeros(5, 2, dtype=torch.bool)
    stacks = frames_to_stacks(storage[3:], start, stack=2)
    t, b = torch.tensor([0, 3]), torch.tensor([1, 0])
    assert torch.equal(stacks.gather(t, b), torch.stack([storage[3:5, 1], storage[6:8, 0]]))


def test_frames_that_cannot_be_viewed_are_refused() -> None:
    frames, start = torch.zeros(4, 2, 3, 3), torch.zeros(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="stack=5 with 4 rows of frames; use 1 to 4"):
        frames_to_stacks(frames, start, 5)
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) on them first"):
        frames_to_stacks(frames.transpose(2, 3)[:, :, :2], start, 2)

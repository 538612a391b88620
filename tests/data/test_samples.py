"""Samples by kind: goals that were reached later, stored recurrent states, structures; weights and frequencies."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from replay_model import Model, Stream
from tensordict import TensorDict
from torch import Tensor

from rookery.data.plan import ReplayPlan
from rookery.data.replay import ReplayBuffer
from rookery.envs.spec import EnvSpec
from rookery.nn.cores import GRU

LANES = 3


def plan(**settings: Any) -> ReplayPlan:
    return ReplayPlan(**({"capacity": 300, "batch": 8, "learning_starts": 1, "gamma": 0.9} | settings))


def rows(count: int, lanes: int = LANES, **others: Tensor) -> dict[str, Any]:
    """An unroll without ends."""
    flags = {name: torch.zeros(count + 1, lanes, dtype=torch.bool) for name in ("terminated", "truncated")}
    zeros = torch.zeros(count + 1, lanes)
    return {"obs": zeros, "action": zeros, "reward": zeros, **flags, "valid": ~flags["truncated"], **others}


def filled(seed: int = 0, inserts: int = 20, **settings: Any) -> tuple[ReplayBuffer, Stream]:
    made = {name: settings.pop(name) for name in ("memory", "device") if name in settings}
    buffer, stream = ReplayBuffer(plan(**settings), LANES, seed=seed, **made), Stream(LANES, 1, "zeros", seed)
    for _ in range(inserts):
        buffer.insert({name: value.to(buffer.device) for name, value in stream.unroll(4)[0].items()})
    return buffer, stream


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_no_samples_are_refused(count: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"count={count} is no number of samples; draw 1 or more"):
        filled(alpha=alpha)[0].sample(count)


# How often, and with what weight.


def test_uniform_samples_are_equally_likely() -> None:
    buffer, _ = filled()
    seen = torch.cat([buffer.sample(500)["index"] for _ in range(60)]).unique(return_counts=True)[1]
    expected = 30_000 / len(buffer)
    assert len(seen) == len(buffer), "each is drawn"
    freedom = len(buffer) - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 3.3 * (2 * freedom) ** 0.5  # χ², p ≈ 0.001


def test_where_little_can_be_drawn_it_is_equally_likely_too() -> None:
    """Sequences of 9 that begin every 9 steps are less than a quarter of all cells, so they are listed."""
    buffer, _ = filled(sequence=9)
    assert len(buffer) < 0.25 * 80 * LANES
    seen = torch.cat([buffer.sample(500)["index"] for _ in range(10)]).unique(return_counts=True)[1]
    expected, freedom = 5_000 / len(buffer), len(buffer) - 1
    assert len(seen) == len(buffer)
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 3.3 * (2 * freedom) ** 0.5


def test_priorities_of_the_paper() -> None:
    """Golden vector: p = (1, 2, 4), α = 0.6, β = 0.4."""
    buffer = ReplayBuffer(plan(alpha=0.6, batch=9_000), 3)
    buffer.insert({**rows(1), "priority": torch.tensor([[1.0, 2.0, 4.0]])})
    batch = buffer.sample(9_000, beta=0.4)
    for lane, (share, weight) in enumerate([(0.207766, 1.0), (0.314914, 0.846745), (0.47732, 0.716978)]):
        mine = batch["index"] == lane
        assert float(mine.float().mean()) == pytest.approx(share, abs=2e-4), "stratified: off by 2 of 9,000 at most"
        assert batch["weight"][mine].unique().item() == pytest.approx(weight, abs=1e-6)


def test_each_batch_of_several_is_stratified_and_weighed_by_itself() -> None:
    """As though each had been drawn when its update was due: none is of one stretch of the ring alone."""
    buffer = ReplayBuffer(plan(alpha=0.6, batch=8), 1)
    buffer.insert({**rows(64, lanes=1), "priority": 1.0 + torch.rand(64, 1)})
    batch = buffer.sample(8 * 5, beta=0.4)
    leaf = buffer._tree.leaves
    ends = leaf.cumsum(0)
    for index, weight in zip(batch["index"].view(5, 8), batch["weight"].view(5, 8), strict=True):
        first, last = (ends - leaf)[index] / ends[-1], ends[index] / ends[-1]
        for part in range(8):
            assert first[part] - 1 / 8 <= part / 8 <= last[part], "one from each eighth"
        torch.testing.assert_close(weight, ((leaf[index] / leaf[index].min()) ** -0.4).float())
        assert weight.max() == 1


def test_new_rows_get_the_largest_priority_so_far() -> None:
    buffer = ReplayBuffer(plan(alpha=1.0), LANES)
    buffer.insert(rows(2))
    assert buffer._tree.leaves[: 2 * LANES].tolist() == [1.0] * 2 * LANES
    buffer.prioritise(torch.arange(2), torch.tensor([7.0, 0.5]))
    buffer.insert(rows(1))
    assert buffer._tree.leaves[2 * LANES : 3 * LANES].tolist() == [7.0] * LANES
    buffer.prioritise(torch.tensor([0]), torch.tensor([0.0]))
    assert buffer._tree.leaves[0] == 1e-6, "not 0: it would never be seen again"


def test_bf16_is_stored_read_and_drawn_by() -> None:
    """NumPy, which reads for the CPU, has no such numbers."""
    buffer = ReplayBuffer(plan(alpha=1.0), LANES)
    obs = torch.arange(5.0).view(5, 1, 1).expand(5, LANES, 2).bfloat16()
    buffer.insert(rows(4, obs=obs))
    batch = buffer.sample(50)
    assert torch.equal(batch["obs"][:, 0], (batch["index"] // LANES).bfloat16())
    assert torch.equal(batch["next_obs"], batch["obs"] + 1)
    buffer.prioritise(torch.arange(2), torch.tensor([7.0, 0.5], dtype=torch.bfloat16))
    assert buffer._tree.leaves[:3].tolist() == [7.0, 0.5, 1.0]


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("inserted", range(6))
def test_priorities_come_after_some_rows_are_overwritten(inserted: int, writers: int) -> None:
    """What can still be drawn is changed, and what has taken the place of the others is not."""
    buffer = ReplayBuffer(plan(capacity=8 * writers, alpha=1.0), 1, writers=writers)
    for unroll in range(4 * writers):
        buffer.insert(rows(4, lanes=1), unroll % writers)
    index = buffer.sample(100)["index"]
    for _ in range(inserted):
        buffer.insert(rows(1, lanes=1))
    expected = buffer._tree.leaves.clone()
    drawable = buffer._serial(expected.nonzero().squeeze(-1))
    there = torch.isin(index, drawable)
    assert there.all() == (inserted == 0)
    expected[index[there] % len(expected)] = 5.0
    buffer.prioritise(index, torch.full(index.shape, 5.0))
    assert torch.equal(buffer._tree.leaves, expected)


@pytest.mark.parametrize("wrong", [float("nan"), -1.0, float("inf")])
def test_wrong_priorities_are_refused_whole(wrong: float) -> None:
    buffer, stream = filled(alpha=0.6)
    before, size = buffer._tree.leaves.clone(), len(buffer)
    priorities = torch.tensor([2.0, wrong])
    with pytest.raises(ValueError, match=rf"the priority {wrong} at \[1\] .* give finite numbers of 0 or more"):
        buffer.prioritise(torch.tensor([200, 201]), priorities)
    columns, each, _ = stream.unroll(2)
    given = torch.ones(2, LANES).masked_fill(columns["valid"][:2], wrong)
    assert any(row.valid for row in each[0] + each[1])
    with pytest.raises(ValueError, match=f"the priority {wrong} at"):
        buffer.insert({**columns, "priority": given})
    with pytest.raises(ValueError, match=r"priorities \[3\] came for \[2\] samples"):
        buffer.prioritise(torch.tensor([200, 201]), torch.ones(3))
    assert torch.equal(buffer._tree.leaves, before)
    assert len(buffer) == size


# Hindsight, on the bit-flip layout.


def goal_reward(achieved: Tensor, desired: Tensor) -> Tensor:
    return (achieved == desired).all(-1).float() - 1


GOALS = EnvSpec("Goals-v0", "own", spaces.Discrete(2), spaces.Discrete(2), goal_reward=goal_reward)


def bit_flips(stream: Stream, count: int) -> tuple[dict[str, Any], Any, Any]:
    """A stream whose observations are numbers in bits, its goal another; the reward is 0 where they are equal."""
    columns, own, newest = stream.unroll(count)
    bits = columns["obs"].long().unsqueeze(-1).bitwise_and(2 ** torch.arange(12)).ne(0).float()
    goal = torch.ones_like(bits)
    parts = {"observation": bits, "achieved_goal": bits, "desired_goal": goal}
    return {**columns, "obs": TensorDict(parts, batch_size=bits.shape[:2])}, own, newest


def number(bits: Tensor) -> list[int]:
    return (bits.long() * 2 ** torch.arange(12)).sum(-1).tolist()


@pytest.mark.parametrize("share", [0.8, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_goals_that_were_reached_later(share: float, alpha: float) -> None:
    """Goals come from the same episode's later observations, all equally likely; all else stays as it was."""
    settings = plan(hindsight=share, alpha=alpha, capacity=40 * LANES)
    buffer, stream = ReplayBuffer(settings, LANES, spec=GOALS), Stream(LANES, 1, "zeros", 5)
    model, relabelled, drawn = Model(settings, LANES, 1, 1), 0, 0
    for turn in range(40):
        if turn % 9 == 8:
            stream.begin_anew(foreign=False)
        columns, own, newest = bit_flips(stream, 1 + turn % 4)
        assert buffer.insert(columns) == model.insert(0, own, newest)
        ready = model.ready()
        assert len(buffer) == len(ready), "rows of episodes that have ended, and no others"
        if not ready:
            continue
        batch = buffer.sample(64)
        for n, serial in enumerate(batch["index"].tolist()):
            lane, place = ready[serial]
            row, left = model.rows[lane][place], model.ended(lane, place, 10**9)
            later = {int(model.obs(lane, place + ahead)) for ahead in range(1, left + 1)}
            goals = {name: number(batch[name]["desired_goal"])[n] for name in ("obs", "next_obs")}
            assert goals["obs"] == goals["next_obs"]
            assert number(batch["obs"]["observation"])[n] == model.obs(lane, place)
            reached = number(batch["next_obs"]["achieved_goal"])[n]
            assert reached == model.obs(lane, place + 1)
            assert batch["discount"][n] == pytest.approx(0.9 * (not row.terminated))
            if goals["obs"] == 2**12 - 1:
                assert batch["reward"][n] == pytest.approx(row.reward)
                continue
            assert goals["obs"] in later
            assert batch["reward"][n] == (reached == goals["obs"]) - 1.0
            relabelled += 1
        drawn += 64
    assert relabelled / drawn == pytest.approx(share, abs=0.04)


def test_later_goals_are_equally_likely() -> None:
    buffer = ReplayBuffer(plan(hindsight=1.0), 1, spec=GOALS)
    bits = torch.arange(6).view(6, 1, 1).bitwise_and(2 ** torch.arange(12)).ne(0).float()
    obs = TensorDict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), bits), batch_size=[6, 1])
    ended = torch.zeros(6, 1, dtype=torch.bool)
    ended[4] = True
    buffer.insert(rows(5, 1, obs=obs, truncated=ended))
    batch = buffer.sample(20_000)
    goal, row = torch.tensor(number(batch["obs"]["desired_goal"])), batch["index"]
    for each in range(5):
        share = goal[row == each].bincount(minlength=6)[each + 1 :] / (row == each).sum()
        assert share.sum() == pytest.approx(1.0)
        assert torch.allclose(share, torch.full_like(share, 1 / (5 - each)), atol=0.04)


# What is stored beside.


def test_the_recurrent_state_of_a_sequence_is_that_before_its_first_row() -> None:
    buffer = ReplayBuffer(plan(sequence=4, overlap=2), LANES)
    state = torch.arange(13.0 * LANES * 2).view(13, LANES, 2)
    buffer.insert(rows(12, state=state, log_prob=torch.rand(13, LANES), start=torch.ones(13, LANES, dtype=torch.bool)))
    batch = buffer.sample(50)
    row, lane = batch["index"] // LANES, batch["index"] % LANES
    assert set(row.tolist()) == {0, 2, 4, 6, 8}
    assert torch.equal(batch["state"], state[row, lane])
    assert batch["log_prob"].shape == (4, 50)
    assert torch.equal(batch["start"][0], row == 0)


# Rows before a sequence.


def test_burn_in_shows_the_rows_before_a_sequence() -> None:
    """An episode of rows 0 to 5, its final observation in row 6, and the next one; sequences of 3 at every 2nd row."""
    number = torch.arange(11.0).unsqueeze(-1)
    flags = {"truncated": number == 5, "valid": number != 6}
    buffer = ReplayBuffer(plan(sequence=3, overlap=1, burn_in=3), 1)
    buffer.insert(rows(10, 1, obs=number, action=number, reward=number + 1, state=number.unsqueeze(-1), **flags))
    batch, no, yes = buffer.sample(100), False, True
    # By first row: observations, rewards, and of which row the state is.
    wanted = {
        0: ([0, 0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3], 0),
        2: ([0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 0),
        4: ([1, 2, 3, 4, 5, 6, 6], [2, 3, 4, 5, 6, 0], 1),
        7: ([7, 7, 7, 7, 8, 9, 10], [0, 0, 0, 8, 9, 10], 7),
    }
    starts, last = {0: 3, 2: 1, 4: None, 7: 3}, [yes, yes, yes]
    assert set(batch["index"].tolist()) == set(wanted)
    for n, first in enumerate(batch["index"].tolist()):
        obs, reward, state = wanted[first]
        assert batch["obs"][:, n].tolist() == obs
        assert batch["reward"][:, n].tolist() == reward
        assert batch["state"][n].tolist() == [state]
        assert batch["action"][:, n].tolist() == ([*obs[:5], 5] if first == 4 else obs[:-1])
        assert batch["valid"][:, n].tolist() == [no, no, no] + ([yes, yes, no] if first == 4 else last)
        assert batch["truncated"][:, n].nonzero().flatten().tolist() == ([4] if first == 4 else [])
        assert batch["start"][:, n].nonzero().flatten().tolist() == ([] if first == 4 else [starts[first]])


def test_without_its_burn_in_a_sequence_cannot_be_drawn() -> None:
    """Of 13 rows that are left, the first 4 are shown before others only."""
    buffer = ReplayBuffer(plan(sequence=2, burn_in=4, capacity=12), 1)
    for head in range(1, 30):
        buffer.insert(rows(1, 1))
        oldest = max(0, head - 12)
        wanted = {first for first in range(0, head - 1, 2) if first - min(4, first) >= oldest}
        assert len(buffer) == len(wanted)
        assert not wanted or set(buffer.sample(200)["index"].tolist()) == wanted


@pytest.mark.parametrize("burn_in", [0, 3, 7])
def test_a_memory_is_in_a_sequence_what_it_was_in_the_stream(burn_in: int) -> None:
    """Stored states, padding and `start` bring the core to each row as it came there when it acted."""
    core, (columns, _, _) = GRU(1, 4), Stream(LANES, 1, "zeros", 3).unroll(80)
    obs = columns["obs"].unsqueeze(-1) / 100
    start = torch.ones(81, LANES, dtype=torch.bool)
    start[1:] = ~columns["valid"][:-1]
    state, states, outputs = torch.zeros(LANES, 4), [], []
    with torch.no_grad():
        for row, begins in zip(obs, start, strict=True):
            states.append(state)
            output, state = core(row, state, begins)
            outputs.append(output)
    buffer = ReplayBuffer(plan(sequence=5, overlap=2, burn_in=burn_in), LANES)
    buffer.insert(columns | {"obs": obs, "state": torch.stack(states)})
    batch = buffer.sample(300)
    with torch.no_grad():
        found = core(batch["obs"], batch["state"], batch["start"])[0][burn_in:-1]
    row, lane = batch["index"] // LANES, batch["index"] % LANES
    learnt = batch["valid"][burn_in:]
    acted = torch.stack(outputs)[(torch.arange(5).unsqueeze(-1) + row).clamp(max=80), lane]
    torch.testing.assert_close(found[learnt], acted[learnt])
    assert batch["start"][:burn_in].any() or not burn_in
    assert not batch["start"][0].all()


def test_what_replay_has_no_use_for_is_left_out() -> None:
    buffer = ReplayBuffer(plan(), LANES)
    numbers = torch.rand(5, LANES)
    others = {"discounted_return": numbers, "raw_reward": numbers, "state": torch.zeros(LANES, 7), "log_prob": numbers}
    assert buffer.insert(rows(4, **others)) == 4 * LANES
    batch = buffer.sample(5)
    assert set(batch) == {"obs", "action", "reward", "discount", "next_obs", "weight", "index", "log_prob"}
    assert torch.equal(batch["log_prob"], numbers.view(-1)[batch["index"]])


def test_structures_are_handed_back_as_they_were() -> None:
    inner = {"speed": torch.rand(5, LANES, 2), "deep": {"image": torch.zeros(5, LANES, 3, 3, dtype=torch.uint8)}}
    buffer, obs = ReplayBuffer(plan(), LANES), TensorDict(inner, batch_size=[5, LANES])
    buffer.insert(rows(4, obs=obs, action=TensorDict({"push": torch.rand(5, LANES)}, batch_size=[5, LANES])))
    batch = buffer.sample(6)
    assert batch["next_obs"].batch_size == torch.Size([6])
    assert batch["next_obs"]["deep", "image"].dtype == torch.uint8
    assert torch.equal(batch["next_obs"]["speed"], inner["speed"].view(-1, 2)[batch["index"] + LANES])
    assert list(batch["action"].keys()) == ["push"]
    loaded = ReplayBuffer(plan(), LANES)
    loaded.load_state(buffer.state())
    assert torch.equal(loaded.sample(6)["obs"]["speed"], buffer.sample(6)["obs"]["speed"])


# Memory.


def read_elsewhere(buffer: ReplayBuffer, pipe: Any) -> None:
    """In another process: read a sample, then see what is inserted later."""
    pipe.send(buffer.sample(4)["obs"].tolist())
    pipe.recv()
    pipe.send(len(buffer))
    pipe.recv()


def test_shared_memory_is_seen_by_another_process_and_leaves_nothing() -> None:
    before = set(Path("/dev/shm").iterdir())
    context = torch.multiprocessing.get_context("spawn")
    buffer, stream = filled(memory="shared", inserts=3)
    own = ReplayBuffer(buffer.plan, LANES)
    own.load_state(buffer.state())
    ours, theirs = context.Pipe()
    process = context.Process(target=read_elsewhere, args=(buffer, theirs))
    process.start()
    theirs.close()  # so that a child that fails ends the wait
    assert ours.recv() == own.sample(4)["obs"].tolist()
    buffer.insert(stream.unroll(4)[0])
    ours.send("look again")
    assert ours.recv() == len(buffer)
    ours.send("enough")
    process.join(20)
    assert process.exitcode == 0
    del buffer
    assert {path for path in Path("/dev/shm").iterdir() if path.name.startswith("torch_")} <= before
    assert not mp.active_children()


def test_memory_in_files(tmp_path: Path) -> None:
    buffer, _ = filled(memory=tmp_path / "replay", alpha=0.6)
    own, _ = filled(alpha=0.6)
    assert (tmp_path / "replay").is_dir()
    assert not list((tmp_path / "replay").iterdir()), "files have no name that a killed process would leave behind"
    mine, its = own.sample(20), buffer.sample(20)
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_files_that_find_no_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, first: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"replay takes .* GB more in .*, which has .* GB left \(No space"):
        filled(memory=tmp_path / "replay")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.6, "n_step": 3}, {"sequence": 4, "overlap": 1}])
def test_memory_on_a_gpu(settings: dict) -> None:
    buffer, _ = filled(device="cuda", **settings)
    own, _ = filled(**settings)
    assert len(buffer) == len(own)
    batch = buffer.sample(30)
    assert {value.device.type for value in batch.values()} == {"cuda"}
    buffer.prioritise(batch["index"], batch["index"].float())
    own.load_state(buffer.state() | {"generator": own.generator.get_state()})
    assert len(own) == len(buffer)


# Refusals.


@pytest.mark.parametrize(
    ("settings", "made", "message"),
    [
        ({"capacity": 20, "sequence": 8}, {}, r"capacity=20 gives each of 3 lanes 6 rows, .* use capacity=30 or more"),
        ({"burn_in": -1, "sequence": 8}, {}, r"burn_in=-1 is too small; use 0 or more"),
        ({"burn_in": 4}, {}, r"burn_in=4 comes before sequences, and sequence=0 samples transitions; use 0"),
        (
            {"burn_in": 296, "sequence": 4},
            {},
            r"capacity=300 rows hold no sample of 300 steps \(burn_in=296 and sequence=4\); use more",
        ),
        (
            {"burn_in": 96, "sequence": 4},
            {},
            r"3 lanes 100 rows, .* 100 steps \(burn_in=96 and sequence=4\) needs 102; use capacity=306 or more",
        ),
        ({"hindsight": 0.8}, {}, r"hindsight=0.8 needs to know .*; give goal_reward\(achieved, desired\)"),
        ({"hindsight": 0.8, "n_step": 3}, {"spec": GOALS}, r"n_step=3 makes samples of several; use n_step=1\."),
        ({"n_step": 40_000, "capacity": 10**6}, {}, r"n_step=40000 is too long; use at most 32767 steps"),
        ({}, {"stack": 0}, r"stack=0 is no number of frames; use 1 to 64"),
        ({}, {"memory": "tape"}, r"memory='tape' is no kind of memory; use 'ram', 'shared' or the Path of a folder"),
        ({}, {"memory": "shared", "device": "meta"}, r"memory='shared' is not on meta; use memory='ram' there"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, made: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(plan(**settings), LANES, **made)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"obs": torch.zeros(5, LANES, 2)},
            r"insert has float32\[2\] a lane as 'obs' where .* stores float32\[\];",
        ),
        ({"reward": torch.zeros(5, LANES).double()}, r"has float64\[\] a lane as 'reward' where .* stores float32\[\]"),
        ({"log_prob": torch.zeros(5, LANES)}, r"has float32\[\] a lane as 'log_prob' where .* stores nothing"),
        ({"action": torch.zeros(5, 2)}, r"'action' has shape \[4, 2\]; 4 rows of 3 lanes bring \[4, 3\] of it"),
    ],
)
def test_rows_unlike_the_first_are_refused_whole(wrong: dict, message: str) -> None:
    buffer = ReplayBuffer(plan(), LANES)
    buffer.insert(rows(4))
    before = buffer.state()["columns"]["obs"]
    with pytest.raises(ValueError, match=message):
        buffer.insert(rows(4) | {"obs": torch.ones(5, LANES)} | wrong)
    assert len(buffer) == 4 * LANES
    assert torch.equal(buffer.state()["columns"]["obs"], before)


@pytest.mark.parametrize(
    ("made", "wrong", "message"),
    [
        ({}, {"priority": torch.full((4, LANES), float("nan"))}, "the priority nan at"),
        ({"stack": 2}, {"obs": torch.arange(10.0 * LANES).view(5, LANES, 2)}, "holds no stack of 2 frames"),
    ],
)
def test_a_refused_first_insert_leaves_no_layout_behind(made: dict, wrong: dict, message: str) -> None:
    buffer, good = ReplayBuffer(plan(alpha=0.6), LANES, **made), rows(4, obs=torch.zeros(5, LANES, 2))
    with pytest.raises(ValueError, match=message):
        buffer.insert(good | {"extra": torch.zeros(5, LANES)} | wrong)
    assert not buffer._ring.columns
    buffer.insert(good)
    assert len(buffer) == 4 * LANES


def test_too_early_too_long_and_by_nobody() -> None:
    buffer = ReplayBuffer(plan(n_step=3), LANES)
    with pytest.raises(ValueError, match="none of the 0 rows inserted so far begins a whole sample; insert more"):
        buffer.sample(4)
    buffer.insert(rows(2))
    with pytest.raises(ValueError, match="none of the 6 rows"):
        buffer.sample(4)
    with pytest.raises(ValueError, match=r"an insert of 200 rows .*capacity=300 over 3 lanes; insert 1 to 97 rows"):
        buffer.insert(rows(200))
    with pytest.raises(ValueError, match="no writer 1; this buffer has writers 0 to 0"):
        buffer.insert(rows(2), writer=1)
    with pytest.raises(ValueError, match="this one lacks valid"):
        buffer.insert({name: value for name, value in rows(2).items() if name != "valid"})
    buffer.insert(rows(97))
    assert len(buffer) == 97 * LANES


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_step": 2}, r"the saved replay has {'n_step': 1} where this one has {'n_step': 2}; give both the same"),
        ({"capacity": 330}, r"{'capacity': 300} where this one has {'capacity': 330}"),
        (
            {"sequence": 4, "burn_in": 2},
            r"{'burn_in': 0, 'sequence': 0} where this one has {'burn_in': 2, 'sequence': 4}",
        ),
    ],
)
def test_states_of_other_buffers_are_refused(other: dict, message: str) -> None:
    buffer, _ = filled()
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(plan(**other), LANES).load_state(buffer.state())


def test_a_state_from_before_there_was_burn_in_has_none() -> None:
    buffer, _ = filled(sequence=4)
    state = buffer.state()
    del state["layout"]["burn_in"]
    ReplayBuffer(buffer.plan, LANES).load_state(state)
    with pytest.raises(ValueError, match=r"{'burn_in': 0} where this one has {'burn_in': 2}"):
        ReplayBuffer(plan(sequence=4, burn_in=2), LANES).load_state(state)


@pytest.mark.parametrize(("stack", "frame"), [(1, [8]), (4, [2])])
def test_a_state_of_another_environment_is_refused(stack: int, frame: list[int]) -> None:
    box, choice = spaces.Box(-1, 1, (8,)), spaces.Discrete(3)
    buffer = ReplayBuffer(plan(), LANES, stack=stack, spec=EnvSpec("Own-v0", "own", box, choice))
    buffer.insert(rows(4, obs=torch.zeros(5, LANES, 8)))
    half, pair = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,))
    for spec, words in (
        (EnvSpec("Other-v0", "own", half, choice), f"{{'obs': {frame}}} a lane where Other-v0 has {{'obs': "),
        (
            EnvSpec("Other-v0", "own", box, pair),
            "{'action': []} a lane where Other-v0 has {'action': [2]}; resume with",
        ),
    ):
        other = ReplayBuffer(plan(), LANES, stack=stack, spec=spec)
        with pytest.raises(ValueError, match=re.escape(words)):
            other.load_state(buffer.state())
        assert not len(other)
    again = ReplayBuffer(plan(), LANES, stack=stack, spec=buffer.spec)
    again.load_state(buffer.state())
    assert len(again) == len(buffer)


def test_a_refused_state_leaves_everything_as_it_was() -> None:
    buffer, _ = filled()
    other = ReplayBuffer(plan(), LANES)
    other.insert(rows(4, obs=torch.rand(5, LANES, 2)))
    twin = ReplayBuffer(plan(), LANES)
    twin.load_state(other.state())
    with pytest.raises(ValueError, match=r"the saved replay has float32\[\] a lane as 'obs' where .* float32\[2\]"):
        other.load_state(buffer.state())
    mine, its = other.sample(9), twin.sample(9)
    assert all(torch.equal(mine[name], its[name]) for name in mine)

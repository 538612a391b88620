"""Replay in shards: nothing is lost, doubled or drawn with the wrong weight, and who dies is replaced."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rookery
from rookery.data.plan import Refused, ReplayPlan
from rookery.data.replay import ReplayBuffer
from rookery.runs.metrics import read
from rookery.runtimes.local import Local
from rookery.topologies.replay_shards import Delivery, Draw, Shard, Shares
from rookery.topologies.setting import ReplaySetting
from rookery.train import Keeper, saved_whole

RUN: dict[str, Any] = {"envs": 2, "unroll": 4, "steps": 600, "eval_every": 300, "eval_episodes": 2, "batch": 24}
RUN |= {"updates_per_step": 0.25, "learning_starts": 50, "hidden": (16,), "sinks": (), "device": "cpu", "threads": 1}
RUN |= {"quiet": True, "env_options": {"max_steps": 60}, "actors": 2, "shards": 2}
RUN |= {"compile": False}  # some recipes compile, for seconds
SYSTEMS: dict[str, dict[str, Any]] = {
    "dqn": {"alpha": 0.6, "n_step": 3, "actors": 4},
    "c51": {"learners": 2, "actors": 3, "shards": 3},
    "sac": {"inference": "shared", "env": "tensor:Pendulum-v1"},
    "ddpg": {"replay_memory": "disk", "env": "tensor:Pendulum-v1"},
}
PLAN = ReplayPlan(capacity=400, batch=8, learning_starts=1, alpha=1.0)


def train(path: Path, system: str, env: str = "tensor:CartPole-v1", **more: Any) -> rookery.Run:
    return rookery.train(system, env, run_dir=path, **{**RUN, **more})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., rookery.Run]:
    @cache
    def run(system: str, runtime: str = "inline") -> rookery.Run:
        return train(tmp_path_factory.mktemp("run") / "run", system, runtime=runtime, **SYSTEMS[system])

    return run


def saved(run: rookery.Run) -> dict[str, Any]:
    state: dict[str, Any] = saved_whole(run, run._make_env.options)["run"]
    return state


# What is stored and drawn, without a runtime.


class Direct:
    """`Calls` that a shard answers at once."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.slots, self.asked = shard, dict[int, Any](), Counter[type]()

    async def slot(self, make: Callable[[], Any], index: int) -> Any:
        if index not in self.slots:
            self.slots[index] = make()
        return self.slots[index]

    def ask(self, slot: Any) -> Awaitable[Any]:
        self.asked[type(slot)] += 1

        async def answer() -> Any:
            return slot.serve(self.shard)

        return answer()


def shards_of(*rows: int, plan: ReplayPlan = PLAN) -> list[Direct]:
    """Shards with so many rows each, whose observation says which shard and row it is, with priorities 1, 2, 3 ..."""
    found = []
    for place, count in enumerate(rows):
        setting: Any = SimpleNamespace(replay=ReplaySetting(), replay_plan=plan, lanes=1)
        shard = Shard(setting, place, 1, len(rows), seed=place)
        if count:
            shard.buffer.insert(unroll(place, count))
        found.append(Direct(shard))
    return found


def unroll(place: int, count: int, first: int = 0) -> dict[str, Any]:
    number = torch.arange(first, first + count + 1.0)
    no = torch.zeros(count + 1, 1, dtype=torch.bool)
    obs = torch.stack([torch.full_like(number, place), number], -1).unsqueeze(1)
    rows = {"obs": obs, "action": torch.zeros(count + 1, 1, dtype=torch.int64), "reward": number.unsqueeze(-1)}
    return {**rows, "terminated": no, "truncated": no, "valid": ~no, "priority": 1 + number[:-1].unsqueeze(-1)}


def drawn(shards: list[Direct], count: int = 8, beta: float = 1.0, plan: ReplayPlan = PLAN) -> dict[str, Any] | None:
    shares: Any = Shares(plan, shards)  # type: ignore[arg-type]
    found: dict[str, Any] | None = asyncio.run(shares.sample(count, beta))
    return found


def test_every_shard_gives_an_equal_share_of_each_batch() -> None:
    samples = drawn(shards_of(20, 50), count=32)
    assert samples is not None
    assert samples["obs"][:, 0].view(4, 8).sum(-1).tolist() == [4, 4, 4, 4]
    assert torch.equal(samples["index"] % 2, samples["obs"][:, 0].long())
    assert torch.equal(samples["next_obs"][:, 1], samples["obs"][:, 1] + 1)


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_weights_are_of_the_chance_that_a_row_had(beta: float) -> None:
    """In a shard of M rows with priorities 1 to M, row i has the chance (i + 1) / (M(M + 1) / 2) in each draw."""
    rows = (20, 50)
    samples = drawn(shards_of(*rows), beta=beta)
    assert samples is not None
    size = torch.tensor(rows)[samples["obs"][:, 0].long()]
    chance = (samples["obs"][:, 1] + 1) / (size * (size + 1) / 2)
    torch.testing.assert_close(samples["weight"], (chance / chance.min()) ** -beta)
    assert samples["weight"].dtype == torch.float32


def test_weighted_means_over_shards_of_unlike_priorities_are_those_of_uniform_rows() -> None:
    """However unlike the shards' sizes are too: one that began anew has few rows, each drawn more often."""
    large = dataclasses.replace(PLAN, batch=20_000)
    samples = drawn(shards_of(20, 50, plan=large), count=20_000, plan=large)
    assert samples is not None
    mean = (samples["weight"] * samples["obs"][:, 1]).sum() / samples["weight"].sum()
    assert mean == pytest.approx((20 * 9.5 + 50 * 24.5) / 70, rel=0.02)  # of equal shards it would be 17


def test_priorities_reach_the_shard_that_gave_the_sample() -> None:
    shards = shards_of(20, 50)
    shares: Any = Shares(PLAN, shards)  # type: ignore[arg-type]

    async def change() -> dict[str, Any]:
        samples: dict[str, Any] = await shares.sample(16, 1.0)
        await shares.prioritise(samples["index"], 1000.0 + samples["obs"][:, 0] * 100 + samples["obs"][:, 1])
        return samples

    samples = asyncio.run(change())
    for place, direct in enumerate(shards):
        buffer: ReplayBuffer = direct.shard.buffer
        assert buffer._tree is not None
        changed = {int(row) for which, row in samples["obs"].tolist() if which == place}
        for row in range((20, 50)[place]):
            priority = 1000.0 + place * 100 + row if row in changed else 1.0 + row
            assert float(buffer._tree.leaves[row]) == pytest.approx(priority)


def test_bad_priorities_are_refused_before_any_is_sent() -> None:
    shards = shards_of(20, 20)
    shares: Any = Shares(PLAN, shards)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"priority nan at \[1\]"):
        asyncio.run(shares.prioritise(torch.tensor([0, 1]), torch.tensor([1.0, float("nan")])))
    assert not shards[0].asked


def test_the_others_give_the_share_of_one_that_has_nothing() -> None:
    samples = drawn(shards_of(20, 0, 30, 0))
    assert samples is not None
    assert Counter(samples["obs"][:, 0].tolist()) == {0.0: 4, 2.0: 4}
    assert drawn(shards_of(0, 0)) is None


def test_shares_go_by_memory_after_the_first() -> None:
    (shard,) = shards_of(20)
    shares: Any = Shares(PLAN, [shard])  # type: ignore[arg-type]
    asyncio.run(shares.sample(8, 1.0))
    room = shard.slots[1].content["obs"]
    address = room.data_ptr()
    asyncio.run(shares.sample(80, 1.0))
    assert shard.slots[1].content["obs"].data_ptr() == address
    assert shard.asked == {Draw: 11}


def test_sequences_are_joined_along_their_lanes() -> None:
    plan = ReplayPlan(capacity=400, batch=8, learning_starts=1, sequence=4, overlap=2)
    samples = drawn(shards_of(30, 40, plan=plan), count=16, plan=plan)
    assert samples is not None
    assert samples["obs"].shape == (5, 16, 2)
    assert samples["reward"].shape == (4, 16)
    assert samples["weight"].shape == samples["index"].shape == (16,)


def test_what_is_delivered_is_told() -> None:
    (shard,) = shards_of(20)
    delivery = Delivery(SimpleNamespace(batch=lambda: unroll(0, 30, first=20)), 0)  # type: ignore[arg-type]
    ready, fill = delivery.serve(shard.shard)
    assert ready == len(shard.shard.buffer) == 50
    assert fill == pytest.approx(50 / 401)


# Whole runs.


@pytest.mark.parametrize("system", SYSTEMS)
def test_processes_change_nothing(trained: Callable[..., rookery.Run], system: str) -> None:
    inline, local = (trained(system, runtime) for runtime in ("inline", "local"))
    ours, theirs = (saved(run)["roles"]["learner_0"] for run in (inline, local))
    assert ours["counts"]["updates"] >= 100
    assert ours["counts"] == theirs["counts"]
    assert all(torch.equal(ours["net"][name], theirs["net"][name]) for name in ours["net"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_row_lies_in_the_shard_of_its_actor(trained: Callable[..., rookery.Run], system: str) -> None:
    run = trained(system)
    state, asked = saved(run), {**RUN, **SYSTEMS[system]}
    shards = [state["roles"][f"shard_{place}"]["replay"] for place in range(asked["shards"])]
    stored = [sum(int(valid[:rows].sum()) for valid, rows in written(shard, asked["envs"])) for shard in shards]
    assert sum(stored) == state["words"]["replay"]["counts"]["inserts"]
    assert max(stored) - min(stored) <= 2 * asked["envs"] * asked["unroll"]
    assert all(len(shard["counts"]) == asked["actors"] // asked["shards"] for shard in shards)
    assert sum(state["words"]["replay"]["store"]["ready"]) > 0


def written(shard: dict[str, Any], lanes: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Of each writer, which of its cells are valid, and how many rows it wrote."""
    valid: torch.Tensor = shard["columns"]["valid"]
    yield from zip(valid.split(lanes, 1), shard["counts"][:, 0].tolist(), strict=True)


def test_without_its_replay_a_resumed_run_fills_the_shards_anew(tmp_path: Path) -> None:
    train(tmp_path / "run", "dqn", save_replay=False)
    run = rookery.resume(tmp_path / "run", steps=900, quiet=True)
    assert run.summary["steps"] >= 900


@pytest.mark.parametrize("victim", ["shard", "actor", "learner"])
def test_who_dies_is_replaced_and_the_run_goes_on(tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, killed = Local._turn, []

    def deadly(runtime: Local) -> None:
        turn(runtime)
        if runtime.steps >= 150 * (len(killed) + 1) and len(killed) < 3:
            found = [member for member in runtime.members if member.spec.name == victim]
            killed.append(found[len(killed) % len(found)])
            os.kill(killed[-1].process.pid, signal.SIGKILL)

    monkeypatch.setattr(Local, "_turn", deadly)
    run = train(tmp_path / "run", "dqn", runtime="local", steps=900, alpha=0.6)
    assert len(killed) == 3
    assert sum("restarted" in row for row in read(run.path / "metrics.jsonl")) == 3
    assert run.summary["steps"] >= 900
    counts, state = saved(run)["roles"]["learner_0"]["counts"], saved(run)
    assert counts["updates"] * RUN["batch"] <= state["words"]["replay"]["counts"]["samples"]


def test_an_inline_run_can_be_stopped_while_both_sides_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    between, stopped = Keeper.between, []

    def stopping(keeper: Keeper, steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        stopped.append(steps)
        return between(keeper, steps, snapshot) or steps >= 300

    monkeypatch.setattr(Keeper, "between", stopping)
    train(tmp_path / "run", "apex", actors=4, learners=2)
    assert len(stopped) > 20
    assert stopped[-1] < 350


def test_unrolls_that_overwrite_what_a_sample_is_made_of_are_refused(tmp_path: Path) -> None:
    """However many shards there are; the advice is tried, and works."""
    small: dict[str, Any] = {"actors": 4, "learning_starts": 10, "n_step": 3, "steps": 100}
    said = r"capacity=40 gives each of 8 lanes 5 rows, of which an unroll of 4 may overwrite 2; use capacity=56 or more"
    for shards in (1, 2):
        with pytest.raises(Refused, match=said):
            train(tmp_path / "run", "dqn", **{**small, "shards": shards, "capacity": 40})
        assert not (tmp_path / "run").exists()
        train(tmp_path / f"run_{shards}", "dqn", **{**small, "shards": shards, "capacity": 56})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"shards": 5, "actors": 5}, r"shards=5 cannot share batch=24 evenly; use batch=25\."),
        ({"shards": 2, "actors": 3}, r"shards=2 cannot share actors=3 evenly; use actors=4\."),
    ],
    ids=["batch", "actors"],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        train(tmp_path / "run", "dqn", **more)
    assert not (tmp_path / "run").exists()

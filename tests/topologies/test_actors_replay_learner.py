"""Actors, replay and a learner: how often is learnt, from what, and what a run without its replay does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rookery
from rookery.algorithms.base import Batch, Loss, Now, Refused
from rookery.algorithms.dqn import DQN
from rookery.data.replay import ReplayBuffer
from rookery.runs.metrics import read

CART = "tensor:CartPole-v1"
SMALL: dict[str, Any] = {"hidden": (8,), "batch": 8, "capacity": 2_000, "learning_starts": 100}
RUN: dict[str, Any] = {"quiet": True, "sinks": (), "eval_every": 10**9, "eval_episodes": 1, "device": "cpu"}


def train(path: Path, steps: int = 400, envs: int = 4, algorithm: type[DQN] = DQN, **settings: Any) -> rookery.Run:
    run = {name: settings.pop(name) for name in list(settings) if name in rookery.Options.__dataclass_fields__}
    return rookery.train(algorithm(**SMALL, **settings), CART, run_dir=path, steps=steps, envs=envs, **{**RUN, **run})


def learner_of(run: rookery.Run) -> dict[str, Any]:
    return run.checkpoints.latest()[1]["run"]["roles"]["learner_0"]


@pytest.mark.parametrize("updates_per_step", [0.1, 0.25, 1.0, 3.0])
@pytest.mark.parametrize(("envs", "actors"), [(1, 1), (4, 1), (3, 2)])
def test_updates_per_step_is_honoured_exactly(updates_per_step: float, envs: int, actors: int, tmp_path: Path) -> None:
    run = train(tmp_path / "run", updates_per_step=updates_per_step, envs=envs, actors=actors)
    counts = learner_of(run)["counts"]
    assert counts["steps"] == run.summary["steps"]
    assert counts["updates"] == int(round((counts["steps"] - 100) * updates_per_step, 6))


def test_an_unroll_is_rows_between_rounds(tmp_path: Path) -> None:
    """A longer unroll means fewer rounds of more updates, not more or fewer updates."""
    run = train(tmp_path / "run", unroll=32, updates_per_step=0.5, envs=2)
    counts = learner_of(run)["counts"]
    assert counts["updates"] == (counts["steps"] - 100) // 2
    assert counts["version"] - 1 <= 300 / 32  # rounds, of up to 64 valid rows


class Recorded(DQN):
    """DQN that keeps what its losses were handed."""

    def loss(self, net: Any, target: Any, batch: Batch, now: Now) -> Loss:
        seen.append(batch)
        return super().loss(net, target, batch, now)


seen: list[Batch] = []


def test_what_a_loss_is_handed(tmp_path: Path) -> None:
    seen.clear()
    train(tmp_path / "run", algorithm=Recorded, n_step=3, alpha=0.5)
    for batch in seen:
        assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 8)
        gammas = torch.tensor([0.0, *(0.99**k for k in (1, 2, 3))])
        assert torch.isclose(batch["discount"][:, None], gammas).any(1).all()
        one = batch["discount"] == 0  # the pole fell within three steps: a reward of 1 for each of them
        returns = torch.tensor([1.0, 1.99, 1 + 0.99 + 0.99**2])
        assert torch.isclose(batch["reward"][one][:, None], returns).any(1).all()
        assert (batch["weight"] <= 1).all()
        assert batch["weight"].max() == 1
    assert any(len(batch["weight"].unique()) > 1 for batch in seen)  # priorities came back


def test_before_learning_starts_actions_are_random_and_weights_stay(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"learning_starts=100 leaves nothing of the 100 steps .* learning_starts=10\."):
        train(tmp_path / "refused", steps=100)
    assert not (tmp_path / "refused").exists()
    run = train(tmp_path / "run", steps=101, envs=1, updates_per_step=1.0)
    assert learner_of(run)["counts"]["updates"] == run.summary["steps"] - 100


def test_a_run_without_its_replay_fills_it_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(tmp_path / "run", save_replay=False, updates_per_step=1.0)
    steps = first.summary["steps"]
    assert first.checkpoints.replay(first.checkpoints.steps()[-1]) is None
    own = type(first.algorithm)(**SMALL, updates_per_step=1.0)
    again = rookery.resume(first.path, steps=steps + 150, algorithm=own)
    assert "The checkpoint holds no replay" in capsys.readouterr().out
    counts = learner_of(again)["counts"]
    assert counts["updates"] == counts["steps"] - 200  # 100 rows once more before learning went on


def test_only_the_newest_checkpoint_has_a_replay(tmp_path: Path) -> None:
    run = train(tmp_path / "run", eval_every=100, eval_episodes=2)
    steps = run.checkpoints.steps()
    assert len(steps) > 1
    assert [step for step in steps if run.checkpoints.replay(step) is not None] == steps[-1:]


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is asked of Linux")
@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_where_replay_lies(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: set[str] = set()
    insert = ReplayBuffer.insert

    def watched(*args: Any, **kwargs: Any) -> int:
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped.update(line for line in maps if str(tmp_path / "run" / "replay") in line)
        assert not list((tmp_path / "run" / "replay").glob("*"))
        return insert(*args, **kwargs)

    monkeypatch.setattr(ReplayBuffer, "insert", watched)
    run = train(tmp_path / "run", replay_memory=memory)
    assert bool(mapped) == (memory == "disk")
    assert not (run.path / "replay").exists()  # its content is in the checkpoint
    reference = train(tmp_path / "reference")
    for name, weight in learner_of(reference)["net"].items():
        assert torch.equal(weight, learner_of(run)["net"][name])


def test_priorities_reach_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(ReplayBuffer, "prioritise", lambda self, index, priorities: handed.append((index, priorities)))
    train(tmp_path / "run", alpha=0.6, updates_per_step=0.5)
    assert handed
    assert all(index.shape == priorities.shape and (priorities >= 0).all() for index, priorities in handed)


def test_beta_rises_to_1_over_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schaul et al. 2016, section 3.4: in a line; a round is weighed by where the run stood before it."""
    betas: list[float] = []
    sample = ReplayBuffer.sample

    def watched(self: ReplayBuffer, count: int, beta: float = 1.0) -> Any:
        betas.append(beta)
        return sample(self, count, beta)

    monkeypatch.setattr(ReplayBuffer, "sample", watched)
    train(tmp_path / "run", alpha=0.6, beta=0.4, updates_per_step=0.5, envs=4)
    assert betas == sorted(betas)
    assert betas[0] == 0.4
    assert betas[-1] == pytest.approx(1, abs=0.6 * 2 * 4 / 400), "but for the last round's steps"
    middle = betas[len(betas) // 2]
    assert middle == pytest.approx(0.4 + 0.6 * (100 + 300 / 2) / 400, abs=0.02)


def test_metrics_say_how_learning_goes(tmp_path: Path) -> None:
    run = train(tmp_path / "run", log_every=100)
    rows = [row for row in read(run.path / "metrics.jsonl") if row["role"] == "learner"]
    assert len(rows) >= 3
    assert {"loss", "grad_norm", "lr", "updates", "seconds"} <= rows[-1].keys()

"""A run that was interrupted and resumed equals, bit for bit, the one that never was; and a run can be repeated.

Every system joins by standing in `rookery.systems`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies
from tiny import differences, home, metrics, tiny, weights

import rookery
from rookery.systems import SYSTEMS, find
from rookery.train import Keeper

HOME = {"env_options": {"max_steps": 30}}  # on the environment that the system is at home on
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": HOME,
    "memory": {**HOME, "memory": "lstm"},
    "normalised": {**HOME, "normalize_obs": True, "normalize_reward": True},
    "continuous": {"env": "tensor:Pendulum-v1", "env_options": {"max_steps": 20}},
    "noisy": {**HOME, "double": True, "dueling": True, "noisy": True},
    "prioritised": {**HOME, "alpha": 0.6, "n_step": 3, "unroll": 0},
    "replicas": {**HOME, "actors": 2, "learners": 2},
    "shared batches": {**HOME, "learners": 2},
    "sharded replay": {**HOME, "actors": 4, "shards": 2, "envs": 2},
    "sharded": {**HOME, "actors": 3, "shards": 2, "max_delay": 1, "outliers": 1.0},
    "asking": {**HOME, "actors": 2, "inference": "shared", "double_buffer": True},
    "asking seldom": {**HOME, "actors": 2, "inference": "shared", "unrolls": 4},
    "transformed": {**HOME, "actors": 2, "frame_stack": 3, "clip_reward": True},
}
COMPILED = {**HOME, "compile": True}  # takes up to a minute a system
LONG = 1_920  # steps of the runs that are interrupted from outside

# Of systems that differ in numbers alone, one stands for all: A3C, DQN and C51 for these.
ALIKE = ("async_a2c", "dqn_512", "c51_2048")

each_system = pytest.mark.parametrize("system", [system for system in SYSTEMS if system not in ALIKE])
each_variant = pytest.mark.parametrize("variant", [*VARIANTS, pytest.param("compiled", marks=pytest.mark.slow)])
# The first of each topology, and one whose actors are ahead of its learner; the others are slow.
FIRST = {SYSTEMS[name].topology: name for name in reversed(SYSTEMS)}.values()
each_system_in_time = pytest.mark.parametrize(
    "system",
    [
        pytest.param(name, marks=[] if name in (*FIRST, "apex") else [pytest.mark.slow])
        for name in SYSTEMS
        if name not in ALIKE
    ],
)


def run(system: str, path: Path, variant: str = "plain", **more: Any) -> rookery.Run:
    """Train the smallest run of a variant; skips what the system does not have."""
    options = {**(COMPILED if variant == "compiled" else VARIANTS[variant]), **more}
    fields = {field.name for field in dataclasses.fields(find(system).algorithm_class())}
    fields |= {field.name for field in dataclasses.fields(rookery.Options)}
    if options.keys() - fields - {"env"}:
        pytest.skip(f"{system} has no such setting")
    env = options.pop("env", home(system))
    try:
        return rookery.train(system, env, run_dir=path, quiet=True, **tiny(system, **options))
    except ValueError as error:
        if path.exists():  # refused only after the run had begun
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., rookery.Run]:
    """The run that nothing interrupted, trained once for each set of arguments."""

    @cache
    def trained(system: str, variant: str = "plain", **more: Any) -> rookery.Run:
        return run(system, tmp_path_factory.mktemp("whole") / "run", variant, **more)

    return trained


@pytest.fixture
def expected(whole: Any, system: str, variant: str) -> rookery.Run:
    """That of a system and a variant; skips before hypothesis could take a skip for a failing example."""
    found: rookery.Run = whole(system, variant)
    return found


class Stops:
    """Lets a signal arrive after the given round of the next run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        between = Keeper.between

        def counting(keeper: Keeper, steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return between(keeper, steps, snapshot)

        monkeypatch.setattr(Keeper, "between", counting)

    def after(self, rounds: int) -> None:
        self.left = rounds


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    return Stops(monkeypatch)


# In this process: after any round, once or twice.


@each_variant
@each_system
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=strategies.lists(strategies.integers(1, 9), min_size=1, max_size=2))
@example(rounds=[2])  # between two actors' turns
def test_stopped_after_a_round(
    system: str, variant: str, expected: rookery.Run, stops: Stops, tmp_path_factory: Any, rounds: list[int]
) -> None:
    path = tmp_path_factory.mktemp("stopped") / "run"
    for number, count in enumerate(rounds):
        stops.after(count)
        found = rookery.resume(path, quiet=True) if number else run(system, path, variant)
    stops.after(-1)
    found = rookery.resume(path, quiet=True)
    assert not found.interrupted
    assert differences(expected, found) == []


# From outside: a signal at a random moment of a process of its own.


def child(system: str, path: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run(system, Path(path), steps=LONG)


def interrupt(system: str, path: Path, number: signal.Signals, ready: Callable[[], bool]) -> tuple[int | None, int]:
    """Train in another process and send it the signal a random while after it is `ready`; exit code and steps."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rookery.train", "rookery.topologies.actors_learner", "rookery.envs.tensor"])
    process = context.Process(target=child, args=(system, str(path)))
    process.start()
    deadline = time.monotonic() + 60
    while not ready() and process.is_alive():
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))
    with contextlib.suppress(ProcessLookupError):  # it may be done already, which the caller allows, but not each time
        os.kill(process.pid or 0, number)
    process.join(60)
    steps = rookery.load(path).checkpoints.steps()
    return process.exitcode, steps[-1] if steps else -1


@each_system_in_time
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signalled_at_a_random_moment(system: str, number: signal.Signals, whole: Any, tmp_path: Path) -> None:
    expected = whole(system, steps=LONG)
    midway: list[bool] = []
    for attempt in range(9):
        if attempt >= 3 and any(midway):
            break
        path = tmp_path / str(attempt)
        code, reached = interrupt(system, path, number, lambda path=path: any(path.glob("checkpoints/0*/state.json")))
        assert code in (0, -number)
        midway.append(0 <= reached < LONG)
        found = rookery.resume(path, quiet=True)
        assert differences(expected, found) == [], f"interrupted at about step {reached} with code {code}"
    assert any(midway), "no signal arrived before the end; make the run longer"


@each_system
def test_goes_on_to_a_larger_budget(system: str, tmp_path: Path) -> None:
    short = run(system, tmp_path / "run", steps=80)
    assert 80 <= short.summary["steps"] < 160
    before = metrics(short.path)
    again = rookery.resume(short.path, steps=160, quiet=True)
    assert again.summary["steps"] >= 160
    assert again.config["options"]["steps"] == 160
    after = metrics(again.path)
    assert after[: len(before)] == before
    assert [row["step"] for row in after] == sorted(row["step"] for row in after)
    assert after[-1]["step"] == again.summary["steps"]
    assert rookery.load(short.path).evaluate(2).returns


@each_system
def test_resuming_a_finished_run_changes_nothing(system: str, tmp_path: Path) -> None:
    done = run(system, tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted(done.path.rglob("*")) if path.is_file()}
    again = rookery.resume(done.path, quiet=True)
    assert not again.interrupted
    with pytest.raises(ValueError, match=r"steps=10: .* has done 1\d\d of 160 already"):
        rookery.resume(done.path, steps=10, quiet=True)
    assert {path: path.read_bytes() for path in sorted(done.path.rglob("*")) if path.is_file()} == before


@each_system
def test_stopped_in_the_last_round(system: str, whole: Any, stops: Stops, tmp_path: Path) -> None:
    """The budget is used up, but the last evaluation is still owed."""
    stops.after(1000)
    run(system, tmp_path / "counted")
    stops.after(1000 - stops.left)
    path = run(system, tmp_path / "stopped").path
    assert json.loads((path / "summary.json").read_text())["interrupted"]
    stops.after(-1)
    assert differences(whole(system), rookery.resume(path, quiet=True)) == []


@pytest.mark.parametrize("backend", ["gym", "envpool"])
def test_an_environment_without_state_begins_episodes_anew(
    backend: str, stops: Stops, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend == "envpool":
        pytest.importorskip("envpool")
    stops.after(4)
    settings = tiny("ppo", steps=400)
    first = rookery.train("ppo", f"{backend}:CartPole-v1", run_dir=tmp_path / "run", quiet=True, **settings)
    assert first.interrupted
    reached = first.summary["steps"]
    capsys.readouterr()
    again = rookery.resume(first.path)
    assert "cannot save its state: episodes begin anew" in capsys.readouterr().out
    assert reached < 400 <= again.summary["steps"]
    rows = [row for row in metrics(again.path) if row["role"] == "learner"]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


# Repeatable, and alone.


@each_system
def test_repeatable(system: str, whole: Any, tmp_path: Path) -> None:
    expected = whole(system)
    torch.manual_seed(12345)  # what others do to the global generator has no influence
    assert differences(expected, run(system, tmp_path / "same")) == []


@each_system
def test_another_seed_differs(system: str, whole: Any, tmp_path: Path) -> None:
    one, other = weights(whole(system)), weights(run(system, tmp_path / "other", seed=1))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert metrics(whole(system).path) != metrics(tmp_path / "other")


@each_system
def test_the_process_stays_as_it_was(system: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    rng, count, handlers = torch.get_rng_state(), torch.get_num_threads(), _handlers()
    run(system, tmp_path / "run", threads=count + 1).evaluate(2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == count
    assert _handlers() == handlers


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

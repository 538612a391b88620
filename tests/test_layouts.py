"""`layout="auto"`: what is tried, what is kept, and that nothing else is left of it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest

import rookery
from rookery import layouts, trial
from rookery.envs.tensor.classic_control import CartPole
from rookery.layouts import CHOICES, fastest, rows
from rookery.rerun import differences
from rookery.settings import Options, resolve
from rookery.systems import find
from rookery.trial import Stopwatch, Trial

CART = "tensor:CartPole-v1"
RUN: dict[str, Any] = {"steps": 64, "envs": 4, "actors": 2, "eval_episodes": 2, "eval_every": 32, "sinks": ()}
RUN |= {"unroll": 4, "epochs": 1, "minibatches": 2, "hidden": (8,)}
DQN: dict[str, Any] = {"learning_starts": 16, "batch": 8, "capacity": 96, "hidden": (8,)}

Pace = Callable[[Options], float]


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pace], list[Options]]:
    """Let layouts be as fast as a function says; gives those that are tried. What it raises is what a layout raises."""

    def begin(pace: Pace) -> list[Options]:
        tried: list[Options] = []

        def measure(system: Any, options: Options, setting: Any) -> Trial:
            tried.append(options)
            return Trial(options, pace(options), {"bottleneck": {"limit": "learner", "because": "It is."}})

        monkeypatch.setattr(trial, "measure", measure)
        monkeypatch.setattr(trial, "gc", SimpleNamespace(collect=int))  # there is nothing to free, and much to look at
        return tried

    return begin


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment only."""
    monkeypatch.setattr(trial, "LAYOUT_SECONDS", 0.1)
    monkeypatch.setattr(trial, "SETTLING", 0.05)


def cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(count)))


def search(system: str, settings: dict[str, Any], splits: bool = True) -> tuple[Options, list[Trial]]:
    _, algorithm, options = resolve(system, "CartPole-v1", settings, tuned=False)
    options = dataclasses.replace(options, threads=options.threads or 1)
    return fastest(find(system), algorithm, options, lambda _: None, splits, lambda trials, best: None)  # type: ignore[arg-type,return-value]


def train(path: Path, system: str = "ppo", env: Any = CART, **settings: Any) -> rookery.Run:
    return rookery.train(system, env, run_dir=path, quiet=True, **{**RUN, **settings})


def tried_in(run: rookery.Run) -> list[dict[str, Any]]:
    return json.loads((run.path / "layouts.json").read_text())


# What is tried


@pytest.mark.parametrize("count", [1, 2, 6, 96])
@pytest.mark.parametrize(
    ("system", "settings", "shared_out"),
    [
        ("ppo", {"envs": 32}, True),
        ("ppo", {"envs": 1}, False),
        ("ppo", {"envs": 5, "actors": 3, "learners": 3, "minibatches": 1}, True),
        ("a2c", {"envs": 12, "actors": 2, "runtime": "local"}, True),
        ("appo", {"envs": 8, "actors": 3}, False),
        ("impala", {"envs": 8, "actors": 4}, False),
        ("a3c", {"learners": 4}, False),
        ("dqn", {"envs": 8}, True),
        ("apex", {"envs": 16, "actors": 4}, True),
        ("gorila", {"envs": 8, "actors": 2}, False),
    ],
)
def test_what_an_update_learns_from_stays(
    system: str, settings: dict[str, Any], shared_out: bool, count: int, paced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lanes altogether, and every option that is no choice of layout; where actors learn, or an update takes so
    many unrolls, the lanes of each as well."""
    cores(monkeypatch, count)
    tried = paced(lambda options: 1.0)
    search(system, settings)
    first = tried[0]
    for name, value in settings.items():
        assert getattr(first, name, value) == value
    assert {options.runtime for options in tried} == {"inline", "local"}
    assert len(set(tried)) == len(tried) <= 10
    for options in tried:
        assert options.actors * options.envs == first.actors * first.envs
        assert dataclasses.replace(options, **{name: getattr(first, name) for name in CHOICES}) == first
    splits = {(options.actors, options.envs) for options in tried}
    if shared_out and count > 2 and "learners" not in settings:
        assert len(splits) > 1
    if not shared_out:
        assert splits == {(first.actors, first.envs)}


def test_an_environment_with_lanes_of_its_own_keeps_them(paced: Any) -> None:
    tried = paced(lambda options: 1.0)
    search("ppo", {"envs": 8, "actors": 2}, splits=False)
    assert {(options.actors, options.envs) for options in tried} == {(2, 8)}


def test_threads_are_tried_on_the_best(paced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 64)
    tried = paced(lambda options: options.actors + (options.threads == 1))
    best, _ = search("ppo", {"envs": 8, "threads": 4})
    assert [options.threads for options in tried] == [4] * (len(tried) - 1) + [1]
    assert best == tried[-1]
    assert best.actors == max(options.actors for options in tried)


def test_processes_have_no_more_threads_than_their_share_of_the_cores(
    paced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, 8)
    tried = paced(lambda options: 1.0)
    search("ppo", {"envs": 8, "threads": 4})
    found = {options.actors: options.threads for options in tried if options.runtime == "local"}
    assert found == {1: 4, 4: 1, 8: 1}
    assert {options.threads for options in tried if options.runtime == "inline"} == {4, 1}


# What is kept


def test_the_fastest_is_kept(paced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 2)
    tried = paced(lambda options: 100.0 + 50 * (options.actors == 2))
    best, trials = search("ppo", {"envs": 8})
    assert (best.runtime, best.actors, best.envs, best.inference) == ("local", 2, 4, "own")
    assert [each.options for each in trials] == tried
    assert [row["kept"] for row in rows(trials, best)] == [options == best for options in tried]


def test_what_is_hardly_faster_is_not_worth_it(paced: Any) -> None:
    """Times vary: the first of those that are about as fast as the fastest is kept."""
    paced(lambda options: 103.0 if options.runtime == "local" else 100.0)
    assert search("ppo", {"envs": 8})[0].runtime == "inline"


def test_a_layout_that_fails_is_listed(paced: Any) -> None:
    def pace(options: Options) -> float:
        if options.runtime == "inline":
            raise MemoryError("no room for so many lanes")
        return 1.0

    paced(pace)
    best, trials = search("ppo", {"envs": 8})
    assert best.runtime == "local"
    assert rows(trials, best)[0]["failed"] == "no room for so many lanes"
    assert "failed" not in rows(trials, best)[1]


def test_if_all_fail_the_first_says_why(paced: Any, tmp_path: Path) -> None:
    def pace(options: Options) -> float:
        raise OSError(f"{options.runtime} fails")

    paced(pace)
    with pytest.raises(OSError, match="inline fails"):
        train(tmp_path / "run", layout="auto")
    assert not (tmp_path / "run").exists()


# The run


def test_the_run_is_one_with_that_layout(paced: Any, tmp_path: Path) -> None:
    """Bit for bit, resumed or not; nothing but a file says that others were tried."""
    paced(lambda options: 2.0 if options.runtime == "inline" and options.actors == 1 else 1.0)
    given, auto = train(tmp_path / "given", actors=1, envs=8), train(tmp_path / "auto", layout="auto")
    assert auto.config["options"] == given.config["options"]
    assert auto.config["options"]["layout"] == "given"
    assert {path.name for path in auto.path.iterdir()} - {path.name for path in given.path.iterdir()} == {
        "layouts.json"
    }
    assert [row["actors"] for row in tried_in(auto) if row["kept"]] == [1]
    assert differences(given, auto) == []
    longer = [rookery.resume(run.path, steps=128, quiet=True) for run in (given, auto)]
    assert longer[1].summary["steps"] >= 128
    assert differences(*longer) == []


def test_it_is_shown(paced: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paced(lambda options: 12_345.0)
    rookery.train("ppo", CART, run_dir=tmp_path / "run", layout="auto", **RUN)
    title, names, first, *_ = capsys.readouterr().out.splitlines()
    assert title.strip() == "Layouts, 4 s each"
    assert first.split() == ["inline", "2", "×", "4", "own", "1", "12,345", "learner", "kept"]
    assert names.split()[0] == "runtime"


def test_an_object_with_lanes_is_trained_on(paced: Any, tmp_path: Path) -> None:
    tried = paced(lambda options: 1.0)
    train(tmp_path / "run", env=CartPole(lanes=4), layout="auto")
    assert {(options.actors, options.envs) for options in tried} == {(2, 4)}


def test_ctrl_c_leaves_nothing(paced: Any, tmp_path: Path) -> None:
    def pace(options: Options) -> float:
        raise KeyboardInterrupt

    paced(pace)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", layout="auto")
    assert not (tmp_path / "run").exists()


# Measuring


@pytest.mark.parametrize(
    ("system", "settings"),
    [
        ("ppo", {}),
        ("dqn", {**DQN, "learning_starts": 50_000, "capacity": 100_000, "steps": 100_000, "replay_memory": "disk"}),
        ("a3c", {}),
        ("gorila", {**DQN, "n_step": 3}),
    ],
)
def test_measuring_leaves_nothing(
    system: str, settings: dict[str, Any], quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial learns soon, however long replay is to be filled, and knows what limited it."""
    found: list[Trial] = []
    one = {"runtime": "inline"}
    monkeypatch.setattr(layouts, "_places", lambda options, counts: iter([dataclasses.replace(options, **one)]))
    monkeypatch.setattr(layouts, "_inferences", lambda options, counts: iter(()))
    module = sys.modules["rookery.train"]
    monkeypatch.setattr(module, "execute", lambda run, *rest, **more: run)
    monkeypatch.setattr(module, "rows", lambda trials, best: found.extend(trials) or rows(trials, best))
    known = {field.name for kind in (Options, find(system).algorithm_class()) for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in {**RUN, **settings}.items() if name in known}
    settings = {name: value for name, value in settings.items() if name != "actors" or system != "a3c"}
    run = rookery.train(system, CART, run_dir=tmp_path / "run", quiet=True, layout="auto", **settings)
    assert [each.error for each in found] == [None]
    assert found[0].steps_per_second > 0
    assert found[0].bottleneck["limit"] in ("environment", "inference", "transfer", "learner", "waiting")
    assert {path.name for path in run.path.iterdir()} == {"config.json", "layouts.json"}


class Broken(gymnasium.Wrapper):
    """An environment that only works in the process it was first made in."""

    def __init__(self, **_: Any) -> None:
        if multiprocessing.parent_process() is not None:
            raise OSError("no licence for another process")
        super().__init__(gymnasium.make("CartPole-v1"))


def test_with_processes(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that work are measured, and those that do not say why; none is left."""
    cores(monkeypatch, 1)
    monkeypatch.setattr(layouts, "_inferences", lambda options, counts: iter(()))
    monkeypatch.setattr(sys.modules["rookery.train"], "execute", lambda run, *rest, **more: run)
    works = tried_in(train(tmp_path / "works", layout="auto"))
    assert all(row["steps_per_second"] > 0 for row in works)
    assert {row["runtime"] for row in works} == {"inline", "local"}
    fails = train(tmp_path / "fails", env=Broken, layout="auto")
    assert fails.config["options"]["runtime"] == "inline"
    reasons = [row["failed"] for row in tried_in(fails) if row["runtime"] == "local"]
    assert reasons
    assert all("no licence for another process" in each for each in reasons)
    assert multiprocessing.active_children() == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(trial.time, "monotonic", lambda: now.time)
    return now


def measured(now: SimpleNamespace, learns_at: float) -> dict[str, Any]:
    learning = max(0.0, now.time - learns_at)
    role = {"work": now.time, "waiting": {}, "cpu": 0.0, "activities": {"learning": learning}, "steps": 0}
    role |= {"restarts": 0, "dropped": {}}
    return {"seconds": now.time, "processes": 1, "cores": 1, "cpu": 0.0, "keeper": 0.0, "words": {}} | {
        "roles": {"learner 0": role}
    }


def test_the_clock_leaves_out_the_start(clock: SimpleNamespace) -> None:
    """Slow until it has learnt for a second, then 100 steps come every half second; times between do not count."""
    watch = Stopwatch(lambda: measured(clock, 30.0))

    def pass_time(steps: int = 0) -> None:
        while True:
            clock.time += 0.25
            steps += 1 if clock.time < 30 else 100 * (clock.time % 0.5 == 0)
            watch.between(steps, None)

    with pytest.raises(trial.Over):
        pass_time()
    assert watch.pace == pytest.approx(200.0)
    assert 30 + trial.SETTLING + trial.LAYOUT_SECONDS < clock.time < 30 + trial.SETTLING + trial.LAYOUT_SECONDS + 2
    assert watch.account["bottleneck"]["limit"] == "learner"


def test_the_clock_has_no_patience_without_end(clock: SimpleNamespace) -> None:
    watch = Stopwatch(lambda: measured(clock, 1e9))
    watch.between(1, None)
    clock.time = trial.PATIENCE + 1
    with pytest.raises(TimeoutError, match="120 s"):
        watch.between(2, None)


def test_ctrl_c_while_processes_run(tmp_path: Path) -> None:
    """The command ends with 130, and leaves neither folder nor process behind."""
    command = [sys.executable, "-m", "rookery.cli", "train", "ppo", CART, "--layout", "auto", "--quiet", "--runtime"]
    command += ["local", "--run-dir", str(tmp_path / "run"), "--envs", "4", "--unroll", "4", "--minibatches", "1"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    latest = time.monotonic() + 60
    while not descendants(run.pid) and time.monotonic() < latest:
        time.sleep(0.1)
    began = descendants(run.pid)
    time.sleep(1)
    began |= descendants(run.pid)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (130, "")
    while any(Path(f"/proc/{process}").exists() for process in began) and time.monotonic() < latest:
        time.sleep(0.1)
    assert not [process for process in began if Path(f"/proc/{process}").exists()]
    assert list(tmp_path.iterdir()) == []


def descendants(process: int) -> set[int]:
    """Processes that it has started, and theirs."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return set()
    return {int(child) for child in children}.union(*(descendants(int(child)) for child in children))

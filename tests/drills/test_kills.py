"""Processes die, at any moment: training goes on, every number stays true, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mortals
import pytest
import torch

import rookery
from rookery.runtimes import forks
from rookery.runtimes.inline import RoleError
from rookery.runtimes.local import Local, _brief
from rookery.runtimes.words import Graph
from rookery.train import Keeper

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")

PATIENCE = 60.0  # seconds, on a busy machine

Rows = list[tuple[str, int, int, dict[str, Any]]]


def eventually(holds: Callable[[], bool], patience: float = PATIENCE) -> bool:
    until = time.monotonic() + patience
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def children() -> list[int]:
    """Of the server of forks: the roles' processes."""
    server = forks.SERVER._forkserver_pid
    if server is None:
        return []
    with contextlib.suppress(FileNotFoundError):
        return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
    return []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each drill there is no process, no shared memory and no open file that was not there before."""
    before, files = set(Path("/dev/shm").iterdir()), open_files()
    logging.disable(logging.WARNING)  # what is logged of a death holds all that was alive then
    yield
    logging.disable(logging.NOTSET)
    assert multiprocessing.active_children() == []
    assert eventually(lambda: not children()), children()
    assert eventually(lambda: set(Path("/dev/shm").iterdir()) <= before)
    assert open_files() <= files + 10  # the first drill begins the server of forks


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Killer:
    """Kills processes one after the other, each at a random moment; the next once the last was replaced."""

    def __init__(self, seed: int, names: list[str], gap: int) -> None:
        self.random, self.gap = random.Random(seed), gap
        self.plan = list(names)
        self.random.shuffle(self.plan)
        self.killed: list[str] = []
        self.replaced: list[str] = []
        self.next = gap
        self.idle = False  # whether a new watcher has done nothing yet, which nobody waits for
        self.timers: list[threading.Timer] = []

    def hear(self, role: str, index: int, step: int, values: dict[str, Any]) -> None:
        """A row of metrics."""
        if "restarted" in values:
            self.replaced.append(values["restarted"])
            self.next = step + self.gap
        if role in ("runtime", "watcher"):
            self.idle = values.get("restarted") == "watcher 0"

    def look(self, steps: int) -> None:
        """The run has come so far."""
        if not self.plan or steps < self.next or len(self.replaced) < len(self.killed) or self.idle:
            return
        pid = {process.name: process.pid for process in multiprocessing.active_children()}[self.plan[-1]]
        self.killed.append(self.plan.pop())
        timer = threading.Timer(self.random.uniform(0, 0.03), kill, [pid])
        timer.start()
        self.timers.append(timer)

    def done(self, steps: int) -> bool:
        """Whether all were killed and replaced, and the run has gone on for a while since."""
        return not self.plan and self.replaced == self.killed and not self.idle and steps >= self.next + self.gap

    def check(self) -> None:
        for timer in self.timers:
            timer.join()
        assert not self.plan, "the run was over too soon"
        assert self.replaced == self.killed


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run(graph: Graph, killer: Killer | None = None, **options: Any) -> tuple[Rows, dict[str, Any], Local]:
    rows: Rows = []

    def report(*row: Any) -> None:
        rows.append(row)
        if killer is not None:
            killer.hear(*row)

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        if killer is None:
            return False
        killer.look(steps)
        return killer.done(steps)

    local = Local(report, **{"deadline": PATIENCE, **options})
    return rows, local.run(graph, between), local


# In a small graph, whose numbers can all be checked.

FOREVER = 10**9  # steps: the run is stopped once all are dead and replaced, however fast it is
EACH = ["player 0", "player 1", "learner 0", "watcher 0"]


@pytest.mark.parametrize("seed", range(4))
def test_every_role_may_die(seed: int) -> None:
    killer = Killer(seed, EACH * 3, gap=30)
    rows, state, local = run(mortals.in_step(2, until=FOREVER), killer)
    killer.check()
    assert local.restarts == 12
    deaths = [row[3] for row in rows if "restarted" in row[3]]
    assert sum(death["dropped"] for death in deaths) == local.dropped
    assert {death["reason"] for death in deaths} == {"its process ended (signal 9)"}
    weights, lives = local.measured()["words"]["weights"], 1 + killer.killed.count("learner 0")
    published = weights["given"]["learner 0"] - lives  # each life begins by what it goes on from
    assert state["steps"] + weights["undone_steps"] == 6 * published, "a lesson that was published is learnt or undone"
    assert 6 * weights["undone"] == weights["undone_steps"]
    assert sum(row[3].get("undone", 0) for row in rows) == weights["undone"]
    units = local.measured()["words"]["queue"]["units"]
    assert units["begun"] == units["taken"] + units["lost"] + units["unfinished"] + units["untaken"]
    assert 0 <= units["lost"] <= local.dropped
    assert units["unfinished"] == sum(len(member.filling) for member in local.members)
    check_lessons([row for row in rows if row[0] == "learner"], state)


def check_lessons(rows: Rows, state: dict[str, Any]) -> None:
    """Every lesson begins where another ended, is of one unroll of each player, and they come to be in step again."""
    ends = {0: 1}  # steps -> version
    last = -1
    for number, (_, _, steps, values) in enumerate(rows):
        assert ends[values["before"]] == values["version"]
        assert steps == values["before"] + 6
        assert [index for index, _ in values["seen"]] == [0, 1]
        if values["version"] != last + 1:
            fell_back = number
        last = values["version"]
        ends[steps] = values["version"] + 1
        if number > fell_back + 1:
            assert [version for _, version in values["seen"]] == [values["version"]] * 2
    lesson = state["roles"]["learner_0"]
    assert lesson["steps"] == 6 * (lesson["version"] - 1) == state["steps"] == rows[-1][2]


@pytest.mark.parametrize("seed", range(3))
def test_states_are_true_whoever_dies_meanwhile(seed: int) -> None:
    killer = Killer(seed, EACH * 2, gap=30)
    states: list[dict[str, Any]] = []

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        killer.look(steps)
        states.append(snapshot())
        return killer.done(steps)

    local = Local(killer.hear, deadline=PATIENCE)
    local.run(mortals.in_step(2, until=FOREVER), between)
    killer.check()
    assert len(states) >= 20
    for state in states:
        lesson = state["roles"]["learner_0"]
        assert lesson["steps"] == state["steps"] == 6 * (lesson["version"] - 1)


@pytest.mark.parametrize("seed", range(2))
def test_requests_outlive_their_server(seed: int) -> None:
    graph = Graph(0)
    calls = graph.word("calls", "calls")
    graph.role(mortals.asking, calls=calls, count=FOREVER, ends_run=True)
    graph.role(mortals.server, calls=calls)
    killer = Killer(seed, ["server 0"] * 4, gap=20)
    rows, state, _ = run(graph, killer)
    killer.check()
    assert [row[2] for row in rows if row[0] == "asking"] == list(range(1, state["steps"] + 1))


def test_no_unit_is_learnt_from_twice(tmp_path: Path) -> None:
    """Who dies between what it publishes and what it tells of it does not remember what it will be given again."""
    graph = Graph(0)
    weights, queue = graph.word("weights", "weights"), graph.word("queue", "queue", each=1)
    graph.role(mortals.counter, queue=queue)
    marker = tmp_path / "died"
    graph.role(mortals.diarist, weights=weights, queue=queue, marker=marker, ends_run=True)
    _, state, local = run(graph)
    units = state["roles"]["diarist_0"]["units"]
    assert (local.restarts, len(units)) == (1, 100)
    assert len(set(units)) == 100


def test_no_sample_is_owed_twice(tmp_path: Path) -> None:
    """Of who dies after it has handed over what it learnt from them."""
    graph = Graph(0)
    options = {"samples_per_insert": 2.0, "min_size": 8, "tolerance": 16.0, "writers": 1}
    replay = graph.word("replay", "replay", make_store=mortals.Store, **options)
    weights, marker = graph.word("weights", "weights"), tmp_path / "died"
    graph.role(mortals.writer, replay=replay)
    graph.role(mortals.sampler, weights=weights, replay=replay, marker=marker, ends_run=True)
    _, state, local = run(graph)
    assert local.restarts == 1
    assert state["words"]["replay"]["counts"]["samples"] == state["roles"]["sampler_0"]["steps"] == 800


def test_the_server_of_forks_may_die() -> None:
    killed: list[int] = []

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        if steps >= 60 and not killed:
            killed.append(forks.SERVER._forkserver_pid)
            os.kill(killed[0], signal.SIGKILL)
        return False

    rows: Rows = []
    local = Local(lambda *row: rows.append(row), deadline=PATIENCE)
    state = local.run(mortals.in_step(2, until=300), between)
    assert local.restarts >= 4
    assert state["steps"] == 300


def test_other_processes_of_the_program_hear_signals() -> None:
    """Roles are spared them while they begin; what else the program starts by multiprocessing is not."""
    Local(lambda *_: None, deadline=PATIENCE).run(mortals.in_step(1, until=10), lambda *_: False)
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(PATIENCE,))
    other.start()
    other.terminate()
    other.join(PATIENCE / 2)
    assert other.exitcode == -signal.SIGTERM


# Who cannot be helped.


def test_who_dies_each_time_ends_the_run() -> None:
    graph = Graph(0)
    graph.role(mortals.brittle, 2, weights=graph.word("weights", "weights"))
    rows: Rows = []
    with pytest.raises(RoleError, match=r"^brittle 2 failed 3 times in a row: its process ended \(exit status 3\)$"):
        Local(lambda *row: rows.append(row)).run(graph, lambda steps, snapshot: False)
    assert [row[3] for row in rows] == [
        {"restarted": "brittle 2", "dropped": 1, "reason": "its process ended (exit status 3)"}
    ] * 2, "what it had begun lies in no slot, and is lost nevertheless"


def test_who_gets_no_further_ends_the_run() -> None:
    """It does a few units of work in each life, and then fails where it did before."""
    graph = Graph(0)
    graph.role(mortals.stuck, weights=graph.word("weights", "weights"))
    with pytest.raises(RoleError, match=r"^stuck 0 failed 3 times in a row: a loss of NaN$"):
        run(graph)


def test_who_hangs_is_replaced(tmp_path: Path) -> None:
    graph = Graph(0)
    marker = tmp_path / "marker"
    graph.role(mortals.sleeper, weights=graph.word("weights", "weights"), marker=marker, ends_run=True)
    rows, _, _ = run(graph, deadline=2.0)
    assert marker.exists()
    assert {(row[3]["restarted"], row[3]["reason"]) for row in rows} == {("sleeper 0", "it was not heard of for 2 s")}


def test_who_hangs_at_the_beginning_of_a_message_is_replaced(tmp_path: Path) -> None:
    graph = Graph(0)
    queue = graph.word("queue", "queue", each=1)
    graph.role(mortals.freezer, queue=queue, marker=tmp_path / "marker")
    graph.role(mortals.taker, queue=queue, ends_run=True)
    rows, _, _ = run(graph, deadline=2.0)
    assert [row[3]["restarted"] for row in rows] == ["freezer 0"]


def test_who_does_not_listen_is_replaced(tmp_path: Path) -> None:
    """To tell it something would take for ever, and this process hears nobody else meanwhile, nor Ctrl-C."""
    graph = Graph(0)
    calls = graph.word("calls", "calls")
    graph.role(mortals.deaf, calls=calls, marker=tmp_path / "marker", ends_run=True)
    graph.role(mortals.talker, calls=calls)
    _, state, local = run(graph, deadline=1.0)
    assert (local.restarts, state["steps"]) == (1, 1)


def test_who_never_begins_ends_the_run() -> None:
    graph = beside_a_clock(mortals.unreachable, endless=mortals.Endless(), more=bytes(1_000_000))
    with pytest.raises(RoleError, match=r"^unreachable 0 failed 3 times in a row: it was not heard of for 1 s$"):
        run(graph, deadline=1.0, failures=3)


def beside_a_clock(role: Callable[..., Any], **how: Any) -> Graph:
    """The role, and another that goes on whatever happens to it."""
    graph = Graph(0)
    weights = graph.word("weights", "weights")
    graph.role(mortals.ticking, weights=weights)
    graph.role(role, weights=weights, **how)
    return graph


def process_of(name: str) -> Any:
    return next(each for each in multiprocessing.active_children() if each.name == name)


def test_who_hangs_when_asked_for_its_state_is_replaced() -> None:
    stopped: list[int] = []

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        if steps < 20:
            return False
        stopped.append(process_of("idler 0").pid)
        os.kill(stopped[0], signal.SIGSTOP)
        assert snapshot()["roles"]["idler_0"] == {"version": 1, "steps": 0}
        return True

    rows: Rows = []
    Local(lambda *row: rows.append(row), deadline=1.0).run(beside_a_clock(mortals.idler), between)
    assert "idler 0" in [row[3].get("restarted") for row in rows]


def test_who_is_killed_while_idle_has_not_failed() -> None:
    lives: list[str] = []
    kills: list[int] = []

    def report(role: str, index: int, step: int, values: dict[str, Any]) -> None:
        if "alive" in values:
            lives.append(role)

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        idler = local.members[1]
        idle = idler.granted and idler.waiting is not None  # it has read weights, and waits for newer ones
        if len(kills) < 5 and len(lives) > len(kills) and idle:
            kills.append(process_of("idler 0").pid)
            kill(kills[-1])
        return len(lives) == 6

    local = Local(report, deadline=PATIENCE)
    local.run(beside_a_clock(mortals.idler), between)
    assert local.restarts == len(kills) == 5
    assert local.dropped == 0


def test_who_fails_every_time_after_a_while_ends_the_run() -> None:
    """Its first units are well done, and others get on: neither makes it fail less."""
    with pytest.raises(RoleError, match=r"^corrupt 0 failed 6 times within 10 minutes: a corrupt level$") as caught:
        run(beside_a_clock(mortals.corrupt), often=6)
    assert caught.value.state["roles"]["ticking_0"]["steps"] > 0


TRACE = """Traceback (most recent call last):
  File "/home/me/rookery/runtimes/process.py", line 300, in main
    _play(begun(link, spec, seed, saved), spec.name)
  File "C:\\games\\chess.py", line 12, in step
    raise Foul(move)
"""
ERRORS = {
    ("e2e5", "chess.Foul: e2e5"): "it raised chess.Foul: e2e5 (chess.py, line 12)",
    ("AssertionError()", "AssertionError"): "it raised AssertionError (chess.py, line 12)",
    ("no kernel\nset A=1\nor B", "E: no kernel\nset A=1\nor B"): "it raised E: no kernel (chess.py, line 12)",
    ("x" * 900, "E: " + "x" * 900): f"it raised E: {'x' * 197} (chess.py, line 12)",
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error[1][:20])
def test_what_was_raised_is_told_in_a_line(error: tuple[str, str]) -> None:
    assert _brief(error[0], TRACE + error[1] + "\n") == ERRORS[error]


@pytest.mark.parametrize("anew", [False, True])
def test_who_begins_anew_has_another_seed_and_no_past(anew: bool) -> None:
    killer = Killer(0, ["newborn 0"], gap=10)
    states: list[Any] = []

    def between(steps: int, snapshot: Callable[[], Any]) -> bool:
        if steps >= 10 and not states:
            states.append(snapshot())
        killer.look(steps)
        return killer.done(steps)

    rows: Rows = []
    local = Local(lambda *row: (rows.append(row), killer.hear(*row)), deadline=PATIENCE)
    local.run(beside_a_clock(mortals.newborn, anew=anew), between)
    first, second = (row[3] for row in rows if row[0] == "newborn")
    assert first["version"] == 1
    assert (second["version"], second["seed"] == first["seed"]) == ((1, False) if anew else (7, True))


def test_what_cannot_be_handed_over_is_refused(tmp_path: Path) -> None:
    import gymnasium

    with pytest.raises(ValueError, match=r"learner 0 cannot be handed to another process .* use runtime='inline'\.$"):
        rookery.train(
            "ppo", lambda: gymnasium.make("CartPole-v1"), run_dir=tmp_path / "run", quiet=True, runtime="local"
        )


# In training.


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Callable[[Killer], None]:
    """Lets a killer look on at the next run."""

    def begin(killer: Killer) -> None:
        between, report = Keeper.between, Keeper.report

        def looking(keeper: Keeper, steps: int, snapshot: Callable[[], Any]) -> bool:
            killer.look(steps)
            return between(keeper, steps, snapshot)

        def hearing(keeper: Keeper, *row: Any) -> None:
            killer.hear(*row)
            report(keeper, *row)

        monkeypatch.setattr(Keeper, "between", looking)
        monkeypatch.setattr(Keeper, "report", hearing)

    return begin


SETTINGS = {"quiet": True, "runtime": "local", "actors": 2, "envs": 4, "hidden": (8,), "device": "cpu", "threads": 1}
SETTINGS |= {"log_every": 64, "sinks": (), "eval_episodes": 2}
RUN = {name: value for name, value in SETTINGS.items() if name != "hidden"}  # of an own algorithm
ROLES = ["actor 0", "actor 1", "learner 0", "evaluator 0"]


def test_ppo_outlives_its_processes(deaths: Any, tmp_path: Path) -> None:
    killer = Killer(0, ROLES * 2, gap=200)
    deaths(killer)
    settings = {**SETTINGS, "unroll": 8, "minibatches": 2, "epochs": 1, "steps": 6_000, "eval_every": 500}
    found = rookery.train("ppo", "CartPole-v1", run_dir=tmp_path / "run", **settings)
    killer.check()
    step, saved = found.checkpoints.latest()
    assert found.summary["steps"] == step == saved["run"]["roles"]["learner_0"]["counts"]["steps"] >= 6_000
    assert all(torch.isfinite(each).all() for each in saved["run"]["roles"]["learner_0"]["net"].values())
    text = (found.path / "metrics.jsonl").read_text()
    assert text.count('"restarted"') == 8


def test_who_fails_again_and_again_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Of the last update that went well, and not of the last evaluation; the record of it all is repeated."""
    algorithm = mortals.Poisoned(unroll=8, hidden=(8,), lr=1e-3)
    with pytest.raises(RoleError, match=r"learner 0 failed 3 times in a row: .* not finite"):
        rookery.train(algorithm, "tensor:CartPole-v1", run_dir=tmp_path / "run", steps=2_000, eval_every=900, **RUN)
    steps = rookery.load(tmp_path / "run", algorithm=algorithm).checkpoints.steps()
    assert 960 <= steps[-1] <= 1_064, steps
    assert rookery.resume(tmp_path / "run", algorithm=mortals.PPO(unroll=8, hidden=(8,)), quiet=True).summary["steps"]


def test_actors_and_who_acts_for_them_may_die(deaths: Any, tmp_path: Path) -> None:
    killer = Killer(3, ["inference 0", "actor 0", "inference 0", "actor 1", "learner 0", "inference 0"], gap=200)
    deaths(killer)
    settings = {**SETTINGS, "inference": "shared", "double_buffer": True, "unroll": 8, "steps": 4_000}
    found = rookery.train("impala", "CartPole-v1", run_dir=tmp_path / "run", eval_every=500, **settings)
    killer.check()
    assert found.summary["steps"] >= 4_000
    died = {"actor 0": 1, "actor 1": 1, "inference 0": 3, "learner 0": 1}
    reason = "its process ended (signal 9)"
    assert found.summary["restarts"] == {name: {"times": times, "reason": reason} for name, times in died.items()}
    assert found.summary["dropped"].keys() <= {"died"}


def test_dqn_keeps_its_ratio(deaths: Any, tmp_path: Path) -> None:
    killer = Killer(1, ROLES * 2, gap=150)
    deaths(killer)
    settings = {**SETTINGS, "batch": 8, "capacity": 2_000, "learning_starts": 100, "updates_per_step": 0.25}
    settings |= {"steps": 4_000, "eval_every": 500}
    found = rookery.train("dqn", "CartPole-v1", run_dir=tmp_path / "run", **settings)
    killer.check()
    _, saved = found.checkpoints.latest()
    counts, plan = saved["run"]["words"]["replay"]["counts"], found.algorithm.plan
    owed = (counts["inserts"] - counts["start"]) * plan.samples_per_insert - counts["samples"]
    assert 0 <= owed < plan.batch + plan.rows(4) * 4 * plan.samples_per_insert
    assert counts["inserts"] == found.summary["steps"]
    assert saved["run"]["roles"]["learner_0"]["counts"]["steps"] >= 4_000


def test_gorila_outlives_its_bundles_and_shards(deaths: Any, tmp_path: Path) -> None:
    """A bundle begins with the shards' parameters, a shard with those that it last handed over; the others go on."""
    killer = Killer(2, ["learner 0", "learner 1", "shard 0", "shard 1", "evaluator 0"] * 2, gap=150)
    deaths(killer)
    settings = {**SETTINGS, "batch": 8, "capacity": 2_000, "learning_starts": 100, "updates_per_step": 0.25}
    settings |= {"shards": 2, "steps": 4_000, "eval_every": 500}
    found = rookery.train("gorila", "CartPole-v1", run_dir=tmp_path / "run", **settings)
    killer.check()
    _, saved = found.checkpoints.latest()
    roles = saved["run"]["roles"]
    assert found.summary["steps"] == roles["shard_0"]["counts"]["steps"] >= 4_000
    assert min(roles[f"shard_{index}"]["counts"]["version"] for index in range(2)) > 100
    assert all(torch.isfinite(each).all() for each in roles["learner_0"]["net"].values())
    rows = [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    assert sum("restarted" in row for row in rows) == 10
    for index in range(2):
        counted = [row["undone"] for row in rows if row.get("word") == f"parameters_{index}"]
        assert len(counted) <= 2, "of two deaths"
        assert sum(counted) == found.summary["words"][f"parameters_{index}"].get("undone", 0)


def test_what_workers_share_outlives_them(deaths: Any, tmp_path: Path) -> None:
    """The first worker made it; all go on with it, and what was counted and learnt by then is there."""
    killer = Killer(2, ["learner 0", "learner 1"] * 3, gap=300)
    deaths(killer)
    settings = {**SETTINGS, "actors": 1, "learners": 2, "unroll": 5, "steps": 5_000}
    settings |= {"eval_every": 10**9}
    found = rookery.train("a3c", "CartPole-v1", run_dir=tmp_path / "run", **settings)
    killer.check()
    memory = found.saved()["run"]["words"]["memory"]["values"]
    assert memory["steps"].sum() == found.summary["steps"] >= 5_000
    updates = memory["updates"].sum()
    assert updates * 4 * 5 >= found.summary["steps"]
    assert 1 <= found.summary["dropped"]["died"] <= 6, "who acts and learns holds no slot; what it was at is lost"
    assert 0.9 * updates <= memory["statistics"]["all"]["step"] <= updates + 6


# The runtime's own process.


def family(marker: str) -> list[int]:
    """Every process that was begun with the marker in its environment, and lives."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if marker.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


class Command:
    """`rookery train` in a process of its own, with temporary files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, f"DRILL_{uuid.uuid4().hex}"
        self.temporary = tempfile.mkdtemp(prefix="d", dir="/tmp")  # short: sockets' names are
        self.run = folder / "run"
        words = ["train", "ppo", "tensor:CartPole-v1", "--runtime", "local", "--actors", "2", "--steps", "100_000_000"]
        words += ["--envs", "4", "--unroll", "8", "--device", "cpu", "--threads", "1", "--run-dir", str(self.run)]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from rookery.cli import main; main()",
                *words,
                "--quiet",
                "--eval-every",
                "2_000",
                "--log-every",
                "500",
            ],
            env={**os.environ, self.marker: "1", "TMPDIR": self.temporary},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_learning(self) -> None:
        log = self.run / "metrics.jsonl"
        assert eventually(lambda: log.exists() and '"learner"' in log.read_text()), self.process.poll()
        assert len(family(self.marker)) >= 6  # itself, the server of forks, two actors, learner, evaluator

    def folders_left(self) -> list[Path]:
        return sorted(Path(self.temporary).iterdir())


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    try:
        yield made
    finally:
        for pid in family(made.marker):
            kill(pid)
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_nobody(command: Command, number: signal.Signals, to_all: bool) -> None:
    """Sent to the command, or to all processes of its group, as schedulers and terminals do."""
    command.wait_until_learning()
    main = command.process.pid
    roles = [pid for pid in family(command.marker) if pid != main and parent(pid) != main]  # children of the server
    kill(roles[0])  # which must not leave its folder behind
    assert eventually(lambda: '"restarted"' in (command.run / "metrics.jsonl").read_text())
    (os.killpg if to_all else os.kill)(main, number)
    said, _ = command.process.communicate(timeout=PATIENCE)
    assert command.process.returncode == 128 + number, said
    assert "rookery resume" in said
    assert eventually(lambda: not family(command.marker)), said
    assert command.folders_left() == []
    assert (command.run / "metrics.jsonl").read_text().count('"restarted"') == 1  # the one that was killed
    reached = rookery.load(command.run).checkpoints.steps()[-1]
    assert reached > 0
    assert rookery.resume(command.run, steps=reached + 500, quiet=True).summary["steps"] >= reached + 500


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_who_is_only_being_started(command: Command, number: signal.Signals) -> None:
    """It reaches a process between its fork and its first line as well: a group's signal does not wait."""
    log = command.run / "metrics.jsonl"

    def learning() -> bool:
        for pid in family(command.marker):
            if pid != command.process.pid:
                kill(pid, number)
        return log.exists() and '"learner"' in log.read_text()

    assert eventually(learning), command.process.poll()
    assert '"restarted"' not in log.read_text()


def test_nobody_outlives_a_killed_runtime(command: Command) -> None:
    command.wait_until_learning()
    called = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in family(command.marker)}
    assert called >= {"actor 0", "actor 1", "learner 0", "evaluator 0"}  # what `top` and `ps` show
    command.process.kill()
    command.process.wait()
    assert eventually(lambda: not family(command.marker), patience=5.0), "a process is left"


HANGING = """
import pathlib, signal, mortals
from rookery.runtimes.local import Local
from rookery.runtimes.words import Graph

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin without
    graph = Graph(0)
    graph.role(mortals.sleeper, weights=graph.word("weights", "weights"), marker=pathlib.Path("asleep"))
    Local(print).run(graph, lambda steps, snapshot: False)
"""


@pytest.mark.parametrize("presses", [0, 1, 2])
def test_who_hangs_ends_too(presses: int, tmp_path: Path) -> None:
    """With Ctrl-C, once or twice; and with a runtime that is killed."""
    marker = f"DRILL_{uuid.uuid4().hex}"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING],
        cwd=tmp_path,
        env={**os.environ, marker: "1", "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert eventually((tmp_path / "asleep").exists)
        if not presses:
            process.kill()
        for press in range(presses):
            time.sleep(press)
            os.kill(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) != 0
        assert eventually(lambda: not family(marker))
    finally:
        for pid in family(marker):
            kill(pid)
        process.wait()

"""Drills of a cluster: three hosts, a run on all of them, and what happens to hosts and links meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest

PATIENCE = 240.0  # seconds for anything to happen

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(bool(hosts.unavailable()), reason=f"no hosts can be made: {hosts.unavailable()}")


@pytest.fixture
def three(tmp_path: Path) -> Iterator[hosts.Hosts]:
    with hosts.Hosts(tmp_path) as made:
        yield made


class Training:
    """A run that was begun on one of the hosts."""

    def __init__(self, cluster: hosts.Hosts, system: str, *options: str, driver: int = 0) -> None:
        self.cluster, self.driver = cluster, driver
        self.path, self.log = cluster.folder / "run", cluster.folder / "train.log"
        on = ["--runtime", "ray", "--address", cluster.head, "--run-dir", str(self.path), "--role-needs"]
        self.process = self._begin("train", system, "CartPole-v1", *on, "evaluator.CPU=0.5", *options)

    def _begin(self, *verb: str) -> subprocess.Popen[bytes]:
        command = self.cluster.within(self.driver, sys.executable, "-m", "rookery.cli", *verb, "--quiet")
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=self.cluster.env, stdout=log, stderr=log)

    def resume(self, steps: int) -> None:
        """Kill the process that keeps it, and go on with another."""
        self.process.kill()  # that of nsenter, whose child is the host's
        subprocess.run(["pkill", "-KILL", "-f", str(self.path)], check=False)
        self.process.wait()
        self.process = self._begin("resume", str(self.path), "--steps", str(steps))

    def rows(self, *names: str) -> list[dict[str, Any]]:
        """Rows of metrics that have all of these."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [row for row in found if all(name in row for name in names)]

    def steps(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def until(self, ready: Callable[[], bool], what: str) -> float:
        """Wait; gives for how long, in seconds."""
        began = time.monotonic()
        while not ready():
            assert self.process.poll() is None, f"the run ended before {what}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() - began < PATIENCE, f"no {what}: {self.log.read_text()[-3000:]}"
            time.sleep(0.1)
        return time.monotonic() - began

    def comes_to(self, steps: int) -> float:
        return self.until(lambda: self.steps() >= steps, f"step {steps}")

    def comes_on(self, steps: int = 5_000) -> float:
        return self.comes_to(self.steps() + steps)

    def summary(self) -> dict[str, Any]:
        """Once it is over."""
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()[-3000:]
        return dict(json.loads((self.path / "summary.json").read_text()))


def restarted(run: Training) -> list[str]:
    return [row["restarted"] for row in run.rows("restarted")]


def joined(run: Training) -> list[str]:
    return [row["joined"] for row in run.rows("joined")]


def check_units(run: Training) -> dict[str, int]:
    """Whatever dies: each unit that was begun is learnt from, lost with its actor, or still there; gives the last."""
    accounts = [row["measured"]["words"]["unrolls"]["units"] for row in run.rows("measured")]
    for units in accounts:
        assert units["begun"] == sum(many for name, many in units.items() if name != "begun"), units
        assert min(units.values()) >= 0, units
    return accounts[-1]


def test_hosts_come_and_go(three: hosts.Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    """One joins, one is killed, a link is slow and then cut, one leaves, the driver dies: each time the run goes on."""
    took = {f"start of host {host}": three.start(host) for host in (0, 1)}
    run = Training(
        three, "impala", "--steps", "10_000_000", "--actors", "4", "--min-actors", "2", "--eval-every", "20_000"
    )
    took["first 5,000 steps"] = run.comes_to(5_000)
    took["start of host 2"] = three.start(2)
    took["actors on it"] = run.until(lambda: len(joined(run)) >= 2, "actors on the host that joined")
    run.comes_on()
    three.kill(1)
    took["to notice a killed host"] = run.until(lambda: bool(restarted(run)), "notice of the killed host")
    took["5,000 steps without it"] = run.comes_on()
    three.slow(2, "100mbit")
    took["5,000 steps over 100 Mbit/s"] = run.comes_on()
    before = len(restarted(run))
    three.cut(2)
    took["to notice a cut link"] = run.until(lambda: len(restarted(run)) > before, "notice of the cut link")
    before = len(joined(run))
    three.heal(2)
    three.kill(2)  # Ray itself ends where it was cut off for too long, and is begun again
    three.start(2)
    took["to be back on a healed host"] = run.until(lambda: len(joined(run)) > before, "actors on the healed host")
    restarts = len(restarted(run))
    three.drain(2)
    took["to leave a host that is drained"] = run.until(lambda: len(run.rows("moved")) >= 2, "moves")
    three.kill(2)
    run.comes_on()
    assert len(restarted(run)) == restarts
    three.start(2)
    assert "learner 0" not in restarted(run)
    reached, units = run.steps(), check_units(run)
    assert units["lost"] >= 1, "two hosts died at work"
    run.resume(reached + 10_000)
    summary = run.summary()
    check_units(run)
    with capsys.disabled():
        print("", *(f"{what}: {seconds:.1f} s" for what, seconds in took.items()), f"units: {units}", sep="\n")
    assert summary["steps"] >= reached + 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("ppo", ("--actors", "2", "--steps", "60_000")),
        ("apex", ("--actors", "3", "--steps", "30_000")),
        ("apex", ("--actors", "2", "--shards", "2", "--steps", "10_000")),
        ("gorila", ("--actors", "2", "--shards", "2", "--steps", "6_000")),
    ],
)
def test_a_host_is_killed_and_comes_back(three: hosts.Hosts, system: str, options: tuple[str, ...]) -> None:
    for host in range(3):
        three.start(host)
    run = Training(three, system, *options)
    budget = int(options[-1].replace("_", ""))
    run.comes_to(budget // 4)
    three.kill(1)
    run.until(lambda: bool(restarted(run)), "notice of the killed host")
    three.start(1)
    assert run.summary()["steps"] >= budget


@pytest.mark.slow
def test_the_head_is_lost_and_comes_back(three: hosts.Hosts, tmp_path: Path) -> None:
    """With what it knows on a disk that outlives it, and the run on another host."""
    (tmp_path / "gcs").mkdir()
    three.env |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    three.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "120"
    for host in range(3):
        three.start(host)
    run = Training(three, "impala", "--steps", "10_000_000", "--actors", "4", "--eval-every", "20_000", driver=1)
    run.comes_to(5_000)
    three.kill(0)
    run.until(lambda: bool(restarted(run)), "notice of the head's actors")
    run.comes_on()
    three.start(0)
    before = len(joined(run))
    run.until(lambda: len(joined(run)) > before, "actors on the head that came back")
    run.comes_on()
    run.resume(run.steps() + 5_000)
    run.summary()


def test_too_much_is_refused_and_so_is_a_wrong_token(three: hosts.Hosts, tmp_path: Path) -> None:
    three.start(0)
    many = Training(three, "impala", "--actors", "64")
    assert many.process.wait(60) != 0
    assert "66 roles ask for 65.5 CPU; the host" in many.log.read_text()
    (tmp_path / "token").write_text("0" * 64)
    began = time.monotonic()
    stranger = Training(three, "impala")
    assert stranger.process.wait(60) != 0
    assert "whose token is missing or another" in stranger.log.read_text()
    assert time.monotonic() - began < 15

"""Where roles find room on a cluster, and what is refused; without Ray."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies
from roles import quiet

from rookery.runtimes import cluster as clusters
from rookery.runtimes.boxes import Parcel, content, fill
from rookery.runtimes.cluster import Cluster, ClusterError, Host
from rookery.runtimes.ray import Ray
from rookery.runtimes.seat import Mail
from rookery.runtimes.words import Graph
from rookery.settings import Options

CORE = {"CPU": 1.0}


def cluster(*cores: float, placement: str = "spread", here: int = 0) -> Cluster:
    """Hosts named 0, 1, ... with so many cores."""
    made = Cluster(None, placement)  # type: ignore[arg-type]
    made.hosts = {str(host): Host(str(host), str(host), {"CPU": number}) for host, number in enumerate(cores)}
    made._here, made._looked_at = str(here), time.monotonic()
    return made


def placed(where: Cluster, count: int) -> str:
    """The hosts of so many roles of a core each, in order; - where there is no room."""
    found = ""
    for _ in range(count):
        host = where.place(CORE)
        found += "-" if host is None else host.name
        if host is not None:
            host.taken.update(CORE)
    return found


def test_roles_are_spread_by_the_share_of_cores_that_is_taken() -> None:
    assert sorted(placed(cluster(2, 4, 2), 8)) == sorted("00111122")
    assert placed(cluster(2, 4, 2), 3) == "012"  # this host first, then by name
    assert placed(cluster(2, 4, 2), 9)[-1] == "-"


def test_roles_are_packed_here_first() -> None:
    assert placed(cluster(2, 4, 2, placement="pack", here=1), 8) == "11110022"


@given(cores=strategies.lists(strategies.integers(0, 5), min_size=1, max_size=5), asked=strategies.integers(0, 30))
def test_every_core_is_used_and_none_twice(cores: list[int], asked: int) -> None:
    for placement in ("spread", "pack"):
        found = placed(cluster(*cores, placement=placement), asked)
        assert found.count("-") == max(0, asked - sum(cores))
        assert all(found.count(str(host)) <= number for host, number in enumerate(cores))


def test_room_is_left_here_for_those_that_stay() -> None:
    where = cluster(2, 1)
    assert where.place(CORE, staying=[CORE, CORE]).name == "1"  # type: ignore[union-attr]
    where.hosts["1"].taken.update(CORE)
    assert where.place(CORE, staying=[CORE, CORE]) is None
    assert where.place(CORE, stays=True) is where.here


def test_a_host_where_a_role_was_lost_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(clusters.time, "monotonic", lambda: now[0])
    where = cluster(1, 4)
    where.hosts["1"].lost_at = now[0]
    assert placed(where, 2) == "0-"
    where._looked_at = now[0] = now[0] + clusters.SHUN
    assert placed(where, 1) == "1"


def test_nothing_begins_on_a_host_that_is_about_to_leave() -> None:
    where = cluster(1, 4)
    where._nodes = [
        {"NodeID": node, "Alive": True, "NodeManagerHostname": node, "Resources": CORE} for node in where.hosts
    ]
    where.leaving = {"1"}
    where.look()
    assert placed(where, 2) == "0-"


def test_who_has_to_be_here_begins_here_again_while_this_host_is_about_to_leave() -> None:
    where = cluster(1, 0)
    where.leaving = {"0"}
    assert where.place(CORE) is None
    assert where.place(CORE, stays=True) is where.here


def test_while_the_head_is_lost_there_is_only_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    where = cluster(1, 4)
    where._looked_at -= clusters.PATIENCE
    assert placed(where, 2) == "0-"


def test_resources_are_counted_by_name() -> None:
    where = cluster(8, 8)
    where.hosts["1"].total = {"CPU": 8.0, "GPU": 1.0}
    assert where.place({"CPU": 1.0, "GPU": 0.5}) is where.hosts["1"]
    where.hosts["1"].taken.update({"GPU": 0.6})
    assert where.place({"CPU": 1.0, "GPU": 0.5}) is None


@pytest.mark.parametrize(
    ("asked", "stay", "free", "message"),
    [
        (7, False, 6, r"7 roles ask for 7 CPU; the 2 hosts of the cluster have 6: use fewer actors"),
        (5, False, 4, r"5 roles ask for 5 CPU; the 2 hosts of the cluster have 6, of which others use 2: use fewer"),
        (3, True, 6, r"3 roles ask for 3 CPU, and they share memory, so that they have to be on one; the host 0 has 2"),
    ],
)
def test_too_much_is_refused(
    asked: int, stay: bool, free: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free})
    with pytest.raises(ClusterError, match=message):
        cluster(2, 4).check([CORE] * asked, stay)
    cluster(2, 4).check([CORE] * (asked - 1), stay)


def test_no_cluster_is_told_at_once() -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster answers at address='127.0.0.1:1'.*ray start --head"),
        Cluster("127.0.0.1:1", "spread").joined(1),
    ):
        pass


def test_signals_stay_with_the_run() -> None:
    """Ray takes SIGTERM when it begins, and would end the process without a checkpoint."""
    mine = signal.getsignal(signal.SIGTERM)
    with clusters._signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_token_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would abort."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"none, where there is no token"), Cluster("head:1", "spread").joined(1):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"address": "192.0.2.2", "runtime": "ray"},
            r"address=.192.0.2.2. is neither .auto. nor of the form",
        ),
        ({"address": "auto"}, r"address='auto' is for a Ray cluster; use it with runtime='ray'"),
        ({"min_actors": 1}, r"min_actors=1 is for a Ray cluster"),
        ({"placement": "pack"}, r"placement='pack' is for a Ray cluster"),
        ({"role_needs": ("actor=1",), "runtime": "ray"}, r"role_needs has 'actor=1', and takes role.resource=amount"),
        ({"min_actors": 2, "runtime": "ray"}, r"min_actors=2 of actors=1"),
    ],
)
def test_options_of_a_cluster_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**settings)


def test_needs_are_by_role() -> None:
    options = Options(runtime="ray", role_needs=("actor.CPU=0.5", "actor.big=1", "learner.GPU=1"))
    assert options.needs == {"actor": {"CPU": 0.5, "big": 1.0}, "learner": {"CPU": 1.0, "GPU": 1.0}}


def test_needs_of_a_role_there_is_none_of() -> None:
    graph = Graph(0)
    graph.role(quiet)
    with pytest.raises(ClusterError, match=r"role_needs names 'actr'; the roles of this run are quiet"):
        Ray(print, needs={"actr": CORE}).run(graph, lambda steps, snapshot: False)


# What travels


def test_the_content_of_a_box_fills_another() -> None:
    def made(scale: float) -> Parcel:
        parts = {"half": torch.arange(6, dtype=torch.bfloat16).view(2, 3) * scale, "flag": torch.tensor(scale > 1)}
        return Parcel({"a": torch.full((), scale), "rest": parts, "none": torch.zeros(0)})

    one, other = made(1.0), made(3.0)
    assert [part.dtype for part in content(one)] == ["uint8"] * 4
    fill(other, content(one))
    assert torch.equal(other.content["a"], one.content["a"])
    assert all(torch.equal(other.content["rest"][name], one.content["rest"][name]) for name in ("half", "flag"))
    one.content["a"].add_(1)
    assert not torch.equal(other.content["a"], one.content["a"])


def test_what_was_said_does_not_change_any_more() -> None:
    mail, memory = Mail(), torch.zeros(3).numpy()
    mail.send(("content", 1, [memory]))
    memory += 1
    assert mail.said.get()[2][0].tolist() == [0, 0, 0]

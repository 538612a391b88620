"""The planner: closed forms where there are any, published clusters within a factor of two."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("simpy")

from rookery import cli, planner
from rookery.data.plan import OnPolicy, Refused, ReplayPlan
from rookery.planner import Cluster, Costs, Forecast, Work, draw, show, simulate
from rookery.planner.rehearsal import corrected
from rookery.settings import Options
from rookery.trial import Trial

FREE = Costs(environment=1e-3, update=((1, 1e-9),))  # a step takes a millisecond, all else nothing
STALE = OnPolicy(20, stale=True, unrolls=1)
SYNC = OnPolicy(20)
ONE_HOST = Cluster(cores_per_host=64, actors_per_host=1_000)
REPLAY = ReplayPlan(10_000, 32, 100, updates_per_step=0.25, unroll=8)


def costs(**changes: Any) -> Costs:
    return dataclasses.replace(FREE, **changes)


def pace(work: Work, each: Costs, actors: int = 1, cluster: Cluster = ONE_HOST) -> float:
    return simulate(work, each, actors, cluster).steps_per_second


def learning(plan: Any, lanes: int = 1, topology: str = "actors_learner", shards: int = 1) -> Work:
    return Work(topology, plan, lanes, shards)


# Closed forms


@pytest.mark.parametrize("lanes", [1, 16])
def test_one_actor_takes_what_its_steps_take(lanes: int) -> None:
    each = costs(inference=2e-3, asleep=1e-3, valid=0.9)
    assert pace(learning(STALE, lanes), each) == pytest.approx(0.9 * lanes / 4e-3, rel=1e-3)


def test_what_an_unroll_costs_besides() -> None:
    """Two questions, a put, new weights and accounts for 20 steps; the keeper is alone with it."""
    each = costs(message=1e-3, answer=2e-3, hop=3e-3, load=4e-3, unroll=5e-3)
    seconds = 20e-3 + 2 * (1e-3 + 2e-3 + 3e-3) + 1e-3 + 4e-3 + 5e-3
    assert pace(learning(STALE), each) == pytest.approx(20 / seconds, rel=0.1)  # the learner has questions, too


def test_in_turn_times_add_up() -> None:
    """Actors that wait for the newest weights, and the learner, work in turn, whatever the number of actors."""
    each = costs(update=((1, 0.1), (4, 0.4)))
    for actors in (1, 4):
        found = simulate(learning(SYNC), each, actors, ONE_HOST)
        assert found.steps_per_second == pytest.approx(20 * actors / (20e-3 + 0.1 * actors), rel=1e-3)
        assert found.lag_max == 0


@pytest.mark.parametrize("actors", [4, 32])
def test_a_slow_learner_is_the_limit(actors: int) -> None:
    found = simulate(learning(STALE, lanes=8), costs(update=((1, 0.01),)), actors, ONE_HOST)
    assert found.steps_per_second == pytest.approx(20 * 8 / 0.01, rel=1e-3)
    assert found.updates_per_second == pytest.approx(100, rel=1e-3)
    assert (found.limit, round(found.busy["learner"], 2)) == ("learner", 1.0)


def test_an_update_is_a_step_of_the_optimiser() -> None:
    found = simulate(learning(OnPolicy(20, epochs=3, minibatches=4)), costs(update=((1, 0.02),)), 1, ONE_HOST)
    assert found.updates_per_second == pytest.approx(12 / 0.04, rel=1e-3)


def test_sleeping_actors_scale_until_the_learner_is_full() -> None:
    """4 ms a step, 20 steps an unroll: the learner's 5 ms are enough for 16 actors."""
    each = costs(asleep=3e-3, update=((1, 5e-3),))
    for actors in (1, 2, 8, 14):
        assert pace(learning(STALE), each, actors) == pytest.approx(actors / 4e-3, rel=0.02)
    for actors in (20, 40):
        assert pace(learning(STALE), each, actors) == pytest.approx(20 / 5e-3, rel=0.02)


@pytest.mark.parametrize(("actors", "asleep"), [(2, 0.0), (6, 0.0), (8, 1e-3), (16, 3e-3)])
def test_actors_share_cores(actors: int, asleep: float) -> None:
    """All of which are in use, where there are actors enough."""
    two = Cluster(cores_per_host=2, actors_per_host=100)
    assert pace(learning(STALE), costs(asleep=asleep), actors, two) == pytest.approx(2 / 1e-3, rel=0.03)


def test_full_cores_are_slower() -> None:
    each, cluster = costs(crowding=1.5), Cluster(cores_per_host=4, actors_per_host=100)
    assert pace(learning(STALE), each, 1, cluster) == pytest.approx(1 / 1e-3, rel=1e-2)
    assert pace(learning(STALE), each, 4, cluster) == pytest.approx(4 / 1.5e-3, rel=1e-2)


def test_roles_can_be_slower_in_a_run() -> None:
    """By so many times, in all that they do; the processor time of a step says so."""
    each = costs(update=((1, 8e-3),), slower={"actor": 1.5, "learner": 2.0})
    found = simulate(learning(STALE), each, 2, ONE_HOST)
    assert found.steps_per_second == pytest.approx(20 / 16e-3, rel=1e-2)
    each = costs(update=((1, 1e-9),), slower={"actor": 1.5, "learner": 2.0})
    found = simulate(learning(STALE), each, 2, ONE_HOST)
    assert found.steps_per_second == pytest.approx(2 / 1.5e-3, rel=0.03)
    assert found.processor["actor"] / found.steps_per_second == pytest.approx(1.5e-3, rel=0.05)


# Short runs


def as_trial(found: Forecast, device: str = "cpu") -> Trial:
    """What a run that goes as in a simulation measures of itself."""
    roles = {f"{kind} 0": {"processor": cores} for kind, cores in found.processor.items() if kind != "keeper"}
    account = {"roles": roles, "cores_busy": sum(found.processor.values())}
    return Trial(Options(device=device), found.steps_per_second, account)


def test_costs_are_corrected_by_short_runs() -> None:
    """Of a machine whose roles take longer than alone, and answers too, from runs with one and with two actors."""
    alone = costs(inference=1e-3, update=((1, 30e-3),), message=1e-4, answer=2e-4)
    truth = dataclasses.replace(alone, hop=2e-3, slower={"actor": 1.3, "learner": 1.6, "keeper": 1.2})
    work = learning(STALE, lanes=4)
    runs = {actors: as_trial(simulate(work, truth, actors)) for actors in (1, 2)}
    found = corrected(work, alone, runs)
    assert found.slower == pytest.approx(truth.slower, rel=0.05)
    assert found.hop == pytest.approx(truth.hop, rel=0.25)
    for actors in (1, 2, 8):
        assert pace(work, found, actors) == pytest.approx(pace(work, truth, actors), rel=0.02)


def test_answers_that_nobody_waits_for_are_not_corrected() -> None:
    slow = costs(update=((1, 1.0),))
    work = learning(STALE)
    runs = {1: dataclasses.replace(as_trial(simulate(work, slow, 1)), steps_per_second=10.0)}
    assert corrected(work, slow, runs).hop == 0.0


def test_learners_on_a_gpu_are_not_corrected() -> None:
    """What they were measured to take is no processor time."""
    work, each = learning(STALE), costs(update=((1, 5e-3),))
    truth = dataclasses.replace(each, slower={"actor": 1.2})
    found = corrected(work, each, {1: as_trial(simulate(work, truth, 1), "cuda")})
    assert found.slower == pytest.approx({"actor": 1.2}, rel=0.05)


# Lag


@pytest.mark.parametrize(("actors", "unrolls"), [(1, 1), (4, 1), (16, 1), (4, 4), (4, 8)])
def test_lag_is_bounded_by_the_slots(actors: int, unrolls: int) -> None:
    """An unroll is as many versions late as updates were made of those before it, in slots that are there."""
    found = simulate(learning(OnPolicy(20, stale=True, unrolls=unrolls)), costs(update=((1, 0.1),)), actors, ONE_HOST)
    slots = (1 + math.ceil(unrolls / actors)) * actors
    assert 0 < found.lag <= found.lag_max <= math.ceil(slots / unrolls)


# The network, and hosts that die


def test_bandwidth_is_a_limit() -> None:
    """A gigabit a second is 1000 unrolls of a megabit."""
    apart = Cluster(cores_per_host=1, bandwidth=1.0, latency=0.0)
    found = simulate(learning(STALE), costs(environment=1e-4, unroll_bytes=125_000), 16, apart)
    assert found.hosts == 17
    assert found.steps_per_second == pytest.approx(1_000 * 20, rel=0.01)
    assert pace(learning(STALE), costs(environment=1e-4, unroll_bytes=125_000), 16) > 100_000


def test_weights_cross_once_for_each_host() -> None:
    """10 ms for each version: an actor alone waits for every one, in step with an actor of the same host for half."""
    each = costs(weights_bytes=1.25e6)
    alone = pace(learning(SYNC), each, 1, Cluster(cores_per_host=1, bandwidth=1.0, latency=0.0))
    together = pace(learning(SYNC), each, 4, Cluster(cores_per_host=5, actors_per_host=1, bandwidth=1.0, latency=0.0))
    shared = pace(learning(SYNC), each, 5, Cluster(cores_per_host=5, bandwidth=1.0, latency=0.0))
    assert alone == pytest.approx(20 / 30e-3, rel=1e-3)
    assert together == pytest.approx(4 * 20 / 50e-3, rel=1e-3)  # three hosts, one after the other
    assert shared == pytest.approx(5 * 20 / 30e-3, rel=1e-3)


def test_latency() -> None:
    """Two questions with their answers, and the weights."""
    cluster = Cluster(cores_per_host=1, latency=4.0)
    assert pace(learning(STALE), FREE, 1, cluster) == pytest.approx(20 / (20e-3 + 5 * 4e-3), rel=1e-3)


@pytest.mark.parametrize(("hours", "restart"), [(0.1, 60.0), (1.0, 600.0), (24.0, 30.0)])
def test_dead_hosts_are_missing(hours: float, restart: float) -> None:
    cluster = dataclasses.replace(ONE_HOST, mtbf=hours, restart=restart)
    missing = restart / (hours * 3600 + restart)
    assert pace(learning(STALE), FREE, 1, cluster) / 1_000 == pytest.approx(1 - missing, abs=0.002 + missing / 4)


def test_price() -> None:
    """Two hosts of four cores at a tenth an hour, 2000 steps/s."""
    cluster = Cluster(cores_per_host=4, actors_per_host=1, price=0.1)
    found = simulate(learning(STALE), FREE, 2, cluster)
    assert found.price == pytest.approx(8 * 0.1 / 3600 * 1e6 / 2_000, rel=0.01)


# Other topologies


def test_replay_keeps_its_ratio_and_takes_turns() -> None:
    work = learning(REPLAY, 4, "actors_replay_learner")  # 32 steps, 8 updates
    found = simulate(work, costs(update=((1, 1e-3),)), 1, ONE_HOST)
    assert found.steps_per_second == pytest.approx(32 / (8e-3 + 8e-3), rel=0.01)
    assert found.updates_per_second == pytest.approx(found.steps_per_second / 4, rel=0.02)


def test_replay_ahead_overlaps_until_the_learner_is_full() -> None:
    work = learning(dataclasses.replace(REPLAY, ahead=2), 4, "actors_replay_learner")
    each = costs(update=((1, 1e-3),), asleep=9e-3)
    assert pace(work, each, 2) == pytest.approx(2 * 4 / 10e-3, rel=0.02)
    assert pace(work, each, 16) == pytest.approx(4 / 1e-3, rel=0.02)


def test_shards_store_and_draw_side_by_side() -> None:
    """In turn: an unroll's 8 steps of 4 lanes, storing it, and 8 updates, for each of which all shards draw at once."""
    each = costs(update=((1, 1e-3),), insert=4e-3, sample=2e-3)
    seconds = 8e-3 + 4e-3 + 8 * (2e-3 + 1e-3)
    for shards in (2, 4):
        found = simulate(learning(REPLAY, 4, "actors_replay_learner", shards), each, 4, ONE_HOST)
        assert found.steps_per_second == pytest.approx(32 / seconds, rel=0.01)
        assert found.updates_per_second == pytest.approx(found.steps_per_second / 4, rel=0.02)
        assert found.busy["shard"] == pytest.approx((4e-3 / shards + 16e-3) / seconds, rel=0.05)
    slow = costs(update=((1, 1e-3),), message=1e-3)
    one, prioritised = (
        pace(learning(dataclasses.replace(REPLAY, alpha=alpha), 4, "actors_replay_learner", 2), slow, 2)
        for alpha in (0.0, 0.6)
    )
    assert prioritised < 0.9 * one  # they ask once more for each batch


def test_draws_from_shards_elsewhere_wait_for_the_network() -> None:
    """16 rows of 1 MB, each with the observation after it, come from the second host's shard at 10 Gbit/s."""
    two = Cluster(cores_per_host=64, actors_per_host=1, bandwidth=10.0, latency=0.0)
    each = costs(update=((1, 1e-3),), unroll_bytes=32e6)
    work = learning(dataclasses.replace(REPLAY, ahead=2), 4, "actors_replay_learner", 2)
    assert pace(work, each, 2, two) < 4 / (2 * 16e6 * 8e-10)


def test_parameter_server_scales_until_a_shard_is_full() -> None:
    each = costs(update=((1, 8e-3),), optimise=1e-3)
    work = learning(REPLAY, 1, "parameter_server", shards=2)  # two updates for 8 steps, of 7 ms, and 0.5 in a shard
    for actors in (1, 4):
        found = simulate(work, each, actors, ONE_HOST)
        assert found.updates_per_second == pytest.approx(actors * 2 / (8e-3 + 2 * 7.5e-3), rel=0.05)
        assert found.lag == pytest.approx(actors - 1, abs=1)
    assert simulate(work, each, 40, ONE_HOST).updates_per_second == pytest.approx(1 / 0.5e-3, rel=0.02)


def test_hogwild_waits_for_nobody() -> None:
    work, each = learning(OnPolicy(5), 1, "hogwild"), costs(update=((1, 5e-3),))
    for workers in (1, 4, 16):
        found = simulate(work, each, workers, ONE_HOST)
        assert found.steps_per_second == pytest.approx(workers * 5 / 10e-3, rel=0.02)
        assert found.lag == pytest.approx(workers - 1, abs=0.1)
    with pytest.raises(Refused, match="share memory, and 5 are too many for a host of 4 cores"):
        simulate(work, each, 5, Cluster(cores_per_host=4))


# What it says


@pytest.mark.parametrize(
    ("limit", "plan", "changes"),
    [
        ("environment", STALE, {}),
        ("inference", STALE, {"inference": 2e-3}),
        ("learner", STALE, {"update": ((1, 1.0),)}),
        ("waiting", SYNC, {"update": ((1, 20e-3),)}),
        ("transfer", STALE, {"load": 0.1}),
    ],
)
def test_the_limit_is_called_as_in_an_account(limit: str, plan: OnPolicy, changes: dict[str, Any]) -> None:
    assert simulate(learning(plan), costs(**changes), 1, ONE_HOST).limit == limit


def test_it_repeats() -> None:
    one, again, other = (simulate(learning(STALE), FREE, 3, Cluster(cores_per_host=2), seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_rounds_between_and_beyond_what_was_measured() -> None:
    each = costs(update=((4, 0.5), (1, 0.2)))
    assert [each.round(size) for size in (0.5, 1, 2, 4, 8)] == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.9])
    assert costs(update=((8, 0.4),)).round(16) == pytest.approx(0.8)


def test_places() -> None:
    assert Cluster(cores_per_host=4).places(8) == [0, 0, 0, 1, 1, 1, 1, 2]
    assert Cluster(cores_per_host=4, actors_per_host=2).places(5) == [0, 0, 1, 1, 2]
    assert Cluster().places(100) == [0] * 100
    assert Cluster().cores == len(os.sched_getaffinity(0))


def test_refusals() -> None:
    with pytest.raises(Refused, match="mtbf=-1 has to be"):
        Cluster(mtbf=-1)
    with pytest.raises(Refused, match="bandwidth=0"):
        Cluster(bandwidth=0)
    with pytest.raises(Refused, match="evolution is not modelled"):
        simulate(learning(STALE, topology="evolution"), FREE, 1)


def test_without_simpy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    monkeypatch.delitem(sys.modules, "rookery.planner.simulation")
    with pytest.raises(RuntimeError, match=r'pip install "rookery\[plan\]"'):
        importlib.import_module("rookery.planner.simulation")


# Published clusters. No paper says what network it had: 40 Gbit/s, and hosts of 32 cores, are assumed.

CLUSTER = Cluster(cores_per_host=32, bandwidth=40.0)
FRAMES = 4  # of a step


def within_two(found: float, published: float) -> bool:
    return published / 2 <= found <= published * 2


@pytest.mark.parametrize(("actors", "batch", "frames"), [(150, 32, 80e3), (375, 32, 200e3), (500, 128, 250e3)])
def test_impala_as_published(actors: int, batch: int, frames: float) -> None:
    """Espeholt et al. 2018, table 1, distributed rows, from the rows of a single machine."""
    each = Costs(
        # 48 actors on 48 cores make 17,000 and 20,500 frames/s on the two tasks (table 1)
        environment=FRAMES / ((17_000 + 20_500) / 2 / 48),
        # no slower than 250,000 frames/s of unrolls of 100 steps (tables 1, D.3)
        update=((1, 100 * FRAMES / 250e3),),
        unroll_bytes=100 * 96 * 72 * 3,  # section D.2
        weights_bytes=1.2e6 * 4,  # the shallow model (figure 3)
    )
    found = simulate(learning(OnPolicy(100, stale=True, unrolls=batch)), each, actors, CLUSTER)
    assert within_two(found.steps_per_second * FRAMES, frames)


@pytest.mark.parametrize(("actors", "frames", "batches"), [(8, 8 * 139, None), (64, 64 * 139, None), (360, 50e3, 19)])
def test_apex_as_published(actors: int, frames: float, batches: float | None) -> None:
    """Horgan et al. 2018, section 4.1: 360 actors of 139 frames/s each, 19 batches of 512 a second, linear."""
    each = Costs(
        environment=FRAMES / 139,
        update=((1, 1 / 19),),
        unroll_bytes=100 * 84 * 84,  # a frame a step, not compressed
        weights_bytes=3.3e6 * 4,  # a dueling network of two streams of 512 units
    )
    # Their ratio is whatever it is: 19 batches for 50,000 frames. Parameters are copied every 400 frames.
    plan = ReplayPlan(2_000_000, 512, 50_000, updates_per_step=19 / (50e3 / FRAMES), unroll=100, ahead=2)
    found = simulate(learning(plan, topology="actors_replay_learner"), each, actors, CLUSTER)
    assert within_two(found.steps_per_second * FRAMES, frames)
    assert batches is None or within_two(found.updates_per_second, batches)


def test_es_as_published() -> None:
    """Salimans et al. 2017, section 4.3: 3D Humanoid takes 657 minutes on 18 cores, 10 on 1440.

    A generation is a synchronous batch. How many there were is not said: it follows from the time on 18 cores and an
    episode of half a second (500 steps of a millisecond, assumed), of which a generation has 10,000.
    """
    generation, step = 10_000 * 500, 1e-3
    update = 10_000 * 166_000 * 4 / 8e9  # each of 10,000 perturbations of 166,000 weights is read, at 8 GB/s
    generations = 657 * 60 / (generation * step / 18 + update)

    def minutes(cores: int) -> float:
        each = Costs(environment=step, update=((cores, update),), unroll_bytes=1e3, weights_bytes=20_000 * 8)
        rows = generation // cores
        made = pace(learning(OnPolicy(rows)), each, cores, CLUSTER)
        return generations * rows * cores / made / 60

    assert minutes(18) == pytest.approx(657, rel=0.01)
    assert within_two(minutes(1440), 10)


# The command


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Costs in place of measurements; gives what was asked to be measured."""
    asked: list[Any] = []

    def measure(name: str, algorithm: Any, env: Any, options: Any, actors: list[int]) -> tuple[Work, Costs]:
        asked.append((name, algorithm, env, options, actors))
        return Work("actors_learner", algorithm.plan, options.envs), costs(update=((1, 0.01),))

    monkeypatch.setattr(planner, "measure", measure)
    return asked


def test_command(given: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = "--actors 1,4,32 --unroll 50 --envs 3 --cores-per-host 8 --price 0.05 --json --plot"
    cli.main(["plan", "impala", "CartPole-v1", *flags.split(), str(tmp_path / "plan.png")])
    found = json.loads(capsys.readouterr().out)
    ((name, algorithm, env, options, actors),) = given
    assert (name, algorithm.unroll, env, options.envs, actors) == ("impala", 50, "CartPole-v1", 3, [1, 4, 32])
    assert [each["hosts"] for each in found["forecasts"]] == [1, 1, 5]
    assert found["forecasts"][0]["steps_per_second"] == pytest.approx(3 / 1e-3, rel=1e-3)
    assert found["cluster"]["price"] == 0.05
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_command_prints_a_table(given: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "impala", "CartPole-v1", "--actors", "1,2", "--envs", "1", "--cores-per-host", "8"])
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if "steps/s" in line)
    assert lines[head + 1].split()[:2] == ["1", "1"]
    assert lines[-1].startswith("2: Learner is busy 100%")
    assert max(map(len, lines[: head + 3])) <= 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "plan takes a system and an environment, such as `rookery plan ppo CartPole-v1`"),
        ("impala CartPole-v1 --actors 0,2", "actors='0,2' is no list of numbers from 1 on"),
        ("impala CartPole-v1 --latency -1", "latency=-1.0 has to be a finite number"),
        ("impala CartPole-v1 --learners 2", "learners: no setting of"),
    ],
)
def test_command_refuses(words: str, message: str, given: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["plan", *words.split()])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_picture(tmp_path: Path) -> None:
    found = [simulate(learning(STALE), costs(update=((1, 5e-3),)), actors, ONE_HOST) for actors in (1, 4, 16)]
    assert draw(found, "A title", tmp_path / "plan.png").stat().st_size > 10_000
    assert len(list(show(FREE, found))) == 2 + 1 + 3 + 3
    lines = list(show(costs(slower={"actor": 1.25, "learner": 1.5}, hop=2e-4), found))
    assert lines[2] == "times as long in a run: actor 1.25, learner 1.50; an answer 200 µs later"


@pytest.mark.slow
@pytest.mark.parametrize("system", ["ppo", "dqn", "gorila", "a3c"])
def test_costs_are_measured(system: str) -> None:
    """One of each topology: what is measured is there, and adds up to a forecast."""
    settings = {"envs": 4, "unroll": 8} | ({} if system in ("ppo", "a3c") else {"batch": 8})
    work, each, found = planner.forecasts(system, "tensor:CartPole-v1", "1,2", None, **settings)
    assert (work.lanes, work.rows) == (4, 8)
    for name in ("environment", "message", "answer", "load", "publish", "optimise", "unroll_bytes", "weights_bytes"):
        assert getattr(each, name) > 0, name
    assert 0.8 < each.valid <= 1
    assert all(size >= 1 and seconds > 0 for size, seconds in each.update)
    assert (each.insert > 0) == (each.sample > 0) == isinstance(work.plan, ReplayPlan)
    assert all(one.steps_per_second > 0 for one in found)


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    """It predicts, trains, and writes both down."""
    script = Path(cli.__file__).resolve().parents[1] / "benchmarks" / "planner.py"
    core = str(min(os.sched_getaffinity(0)))
    words = [sys.executable, str(script), "--smoke", "--cores", core, "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("planner-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["actors"] for row in rows] == [1, 2]
    for row in rows:
        (predicted, *_), (measured, *_) = row["predicted"], row["measured"]
        assert row["error"] == pytest.approx(predicted / measured - 1)
        assert f"| {predicted:,.0f} (" in path.with_suffix(".md").read_text()

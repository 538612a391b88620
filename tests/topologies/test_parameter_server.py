"""A parameter server: shards together are one optimiser, and what is dropped is counted exactly."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rookery
from rookery.algorithms.base import Algorithm, Refused
from rookery.algorithms.c51 import C51
from rookery.algorithms.ddpg import DDPG
from rookery.algorithms.dqn import DQN
from rookery.algorithms.ppo import PPO
from rookery.algorithms.sac import SAC
from rookery.algorithms.td3 import TD3
from rookery.envs.make import make_env
from rookery.learner import Learner
from rookery.nn.adagrad import AdaGrad
from rookery.runs.metrics import read
from rookery.runtimes.inline import Inline, RoleSpec, role_seed
from rookery.runtimes.words import Graph
from rookery.shard import RHO, Outliers, Shard, slices
from rookery.topologies import actors_replay_learner, parameter_server
from rookery.topologies.setting import Setting

CART, PENDULUM = "tensor:CartPole-v1", "tensor:Pendulum-v1"
SMALL: dict[str, Any] = {"hidden": (8,), "batch": 8, "capacity": 2_000, "learning_starts": 100}
RUN: dict[str, Any] = {"quiet": True, "sinks": (), "eval_every": 10**9, "eval_episodes": 1, "device": "cpu", "envs": 4}


def train(path: Path, **settings: Any) -> rookery.Run:
    settings = {**SMALL, **RUN, "steps": 800, "updates_per_step": 0.25, "actors": 1, "shards": 1, **settings}
    return rookery.train("gorila", CART, run_dir=path, **settings)


def roles_of(run: rookery.Run) -> dict[str, Any]:
    return run.checkpoints.latest()[1]["run"]["roles"]


def rows_of(run: rookery.Run, role: str) -> list[dict[str, Any]]:
    return [row for row in read(run.path / "metrics.jsonl") if row["role"] == role]


# Shards.


ALGORITHMS: list[tuple[Algorithm, str]] = [
    (DQN(hidden=(20,), max_grad_norm=1.0), CART),
    (DQN(hidden=(20,), adagrad=True, anneal=True, normalize_obs=True), CART),
    (C51(hidden=(20,), noisy=True), CART),
    (DDPG(hidden=(20,), actor_lr=1e-3), PENDULUM),
    (TD3(hidden=(20,)), PENDULUM),
    (SAC(hidden=(20,)), PENDULUM),
]
each_algorithm = pytest.mark.parametrize(("algorithm", "env"), ALGORITHMS, ids=lambda each: type(each).__name__)


def net_of(algorithm: Algorithm, env: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return algorithm.networks(make_env(env, 1).spec)


def share(learner: Learner, own: dict[str, slice], moves: Any, version: int, steps: int = 4) -> dict[str, Any]:
    """What a shard is told by a bundle."""
    return {
        "gradient": {name: gradient[own[name]].clone() for name, gradient in learner.flat.gradients.items()},
        "moves": {name: torch.tensor(name in moves) for name in learner.flat.gradients},
        "version": torch.tensor(version),
        "steps": torch.tensor(steps),
        "seen": {},
    }


@each_algorithm
def test_shards_together_are_one_optimiser(algorithm: Algorithm, env: str) -> None:
    """Bit for bit, for a fixed sequence of gradients, whatever their number; and that of a plain learner."""
    learner = Learner(algorithm, net_of(algorithm, env), 1_000, 0)
    generator = torch.Generator().manual_seed(0)
    servers = {
        count: [Shard(algorithm, net_of(algorithm, env), 1_000, index, count) for index in range(count)]
        for count in (1, 4, 7)
    }
    for server in servers.values():  # of what was observed there is nothing here
        server[0].norms = {}
    for _ in range(12):
        moves = learner.moves()
        for gradient in learner.flat.gradients.values():
            gradient.copy_(torch.randn(gradient.shape, generator=generator) * (gradient.abs() >= 0))
        for count, server in servers.items():
            for own, shard in zip(slices(learner.flat, count), server, strict=True):
                shard.accept(share(learner, own, moves, shard.version))
        learner.anneal()
        for name in moves:
            learner.optimizers[name].step()
        learner.updates, learner.steps = learner.updates + 1, learner.steps + 4
    for server in servers.values():
        for name, group in learner.flat.groups.items():
            assert torch.equal(torch.cat([shard.parameters[name].detach() for shard in server]), group)


@pytest.mark.parametrize("shards", [1, 2, 3, 16, 1_000])
def test_slices_are_all_of_it_once(shards: int) -> None:
    algorithm, env = ALGORITHMS[3]
    flat = Learner(algorithm, net_of(algorithm, env), 1, 0).flat
    found = slices(flat, shards)
    for name, group in flat.groups.items():
        assert found[0][name].start == 0
        assert found[-1][name].stop == group.numel()
        assert all(one[name].stop == two[name].start for one, two in pairwise(found))
        sizes = [own[name].stop - own[name].start for own in found]
        assert max(sizes) - min(sizes) <= 16  # one block of 64 bytes


def test_adagrad_is_what_it_says() -> None:
    """In float64, against its equation; the same as `torch.optim.Adagrad` but for where ε stands."""
    mine, theirs = (torch.nn.Parameter(torch.arange(5, dtype=torch.float64)) for _ in range(2))
    lr, sums, expected = torch.tensor(0.1, dtype=torch.float64), torch.zeros(5), mine.detach().clone()
    ours, torchs = AdaGrad([mine], lr, eps=0.0), torch.optim.Adagrad([theirs], lr=0.1, eps=0.0)
    for number in range(5):
        gradient = torch.sin(torch.arange(5, dtype=torch.float64) + number) + 2
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        torchs.step()
        sums = sums + gradient**2
        expected = expected - 0.1 * gradient / sums.sqrt()
    assert torch.allclose(mine, expected, rtol=1e-14, atol=0)
    assert torch.allclose(mine, theirs, rtol=1e-14, atol=0)
    mine.grad = None
    ours.step()
    assert torch.allclose(mine, expected, rtol=1e-14, atol=0)


# What is dropped.


@pytest.mark.parametrize(("max_delay", "dropped"), [(0, []), (1, [3, 4]), (2, [4]), (3, [])])
def test_stale_gradients_are_dropped_and_counted(max_delay: int, dropped: list[int]) -> None:
    """Gradient i was computed from the parameters of `reads[i]`: the shard's versions, where nothing is dropped."""
    algorithm, env = ALGORITHMS[0]
    learner = Learner(algorithm, net_of(algorithm, env), 1_000, 0)
    shard = Shard(algorithm, net_of(algorithm, env), 1_000, 0, 1, max_delay)
    (own,) = slices(learner.flat, 1)
    delays, found = [0, 1, 0, 2, 3, 0], []
    for number, delay in enumerate(delays):
        before = shard.parameters["all"].detach().clone()
        for gradient in learner.flat.gradients.values():
            gradient.fill_(1.0)
        version = shard.version
        shard.accept(share(learner, own, ("all",), version - delay))
        kept = not torch.equal(before, shard.parameters["all"])
        assert shard.version == version + kept
        found += [] if kept else [number]
    assert found == dropped
    assert shard.dropped == {"stale": len(dropped)}
    assert shard.steps == 4 * len(delays)  # what was done counts, whatever was learnt from it
    said = shard.metrics()
    assert (said["delay"], said["delay_max"], said["stale_dropped"]) == (statistics.mean(delays), 3, len(dropped))
    assert said["updates"] == len(delays) - len(dropped)
    assert shard.metrics().keys() == {"stale_dropped", "updates"}  # nothing came since


def test_steps_without_a_gradient_move_nothing() -> None:
    algorithm, env = ALGORITHMS[0]
    learner = Learner(algorithm, net_of(algorithm, env), 1_000, 0)
    shard = Shard(algorithm, net_of(algorithm, env), 1_000, 0, 1)
    learner.flat.gradients["all"].fill_(1.0)
    before = shard.parameters["all"].detach().clone()
    shard.accept(share(learner, slices(learner.flat, 1)[0], (), 1, steps=7))
    assert torch.equal(before, shard.parameters["all"])
    assert (shard.steps, shard.version) == (7, 1)


def test_outliers_are_dropped_and_counted() -> None:
    """A scripted schedule, against a straight-line twin."""
    losses = [0.5, 0.6, 0.4, -0.5, 50.0, 0.5, 0.7, -80.0, 0.5, math.inf, 0.6]
    outliers = Outliers(5.0)
    found = [number for number, loss in enumerate(losses) if outliers.drop(loss)]
    assert found == [4, 7, 9]
    assert outliers.dropped == 3
    mean, variance = 0.5, 0.25
    for number, loss in enumerate(losses):
        rate = max(RHO, 1 / (number + 2))
        size = min(abs(loss), mean + 5 * variance**0.5)
        mean, variance = mean + rate * (size - mean), variance + rate * ((size - mean) ** 2 - variance)
    assert (outliers.mean, outliers.variance) == pytest.approx((mean, variance))
    again = Outliers(5.0)
    again.load_state(outliers.state())
    assert again.state() == outliers.state()
    assert not any(Outliers(0.0).drop(loss) for loss in losses)


@pytest.mark.parametrize("deviations", [5.0, 30.0])
def test_rare_outliers_do_not_become_usual(deviations: float) -> None:
    """One loss in a hundred is of another kind for ever, and each of those is found."""
    generator = torch.Generator().manual_seed(0)
    usual = (torch.rand(10_000, generator=generator) + 0.5).tolist()
    outliers = Outliers(deviations)
    found = [number for number, loss in enumerate(usual) if outliers.drop(1000 * loss if number % 100 == 99 else loss)]
    assert found == list(range(99, 10_000, 100))


def test_a_lasting_change_of_the_loss_is_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    usual = (torch.rand(3_000, generator=generator) + 0.5).tolist()
    outliers = Outliers(5.0)
    assert sum(outliers.drop(loss) for loss in usual) == 0
    later = [outliers.drop(100 * loss) for loss in usual]
    assert later[0]
    assert not any(later[500:])


# Runs.


def test_one_bundle_and_one_shard_are_the_plain_system(tmp_path: Path) -> None:
    """Bit for bit, with equal seeds: DQN on actors–replay–learner is gorila with one of each.

    With one update a round, since the plain learner draws the samples of a round's updates at once.
    """
    algorithm = DQN(**{**SMALL, "updates_per_step": 0.25, "target_period": 7, "epsilon_steps": 300, "anneal": False})
    weights = []
    bundle = role_seed(5, RoleSpec(parameter_server.learner, "learner", 0, {}))
    for wire, seed, layout in (
        (actors_replay_learner.wire, bundle, {}),
        (parameter_server.wire, 5, {"outliers": 0.0}),
        (parameter_server.wire, 5, {"shards": 3, "max_delay": 1, "outliers": 1e9}),
    ):
        state = inline(setting(algorithm, CART, lanes=1), wire(setting(algorithm, CART, lanes=1), seed, **layout))
        weights.append(state["roles"]["learner_0"])
    plain, one, three = weights
    assert plain["counts"]["updates"] == one["counts"]["updates"] == 125
    for part in ("net", "target"):
        for name, value in plain[part].items():
            assert torch.equal(value, one[part][name]), (part, name)
            assert torch.equal(value, three[part][name]), (part, name)


def setting(algorithm: Algorithm, env: str, lanes: int = 2, steps: int = 600) -> Setting:
    return Setting(
        algorithm,
        lambda lanes, seed: make_env(env, lanes, seed=seed),
        lambda: net_of(algorithm, env),
        lanes,
        steps,
        100,
        0,
        1,
    )


def inline(setting: Setting, graph: Graph) -> dict[str, Any]:
    return Inline(lambda *row: None).run(graph, lambda steps, snapshot: False)


@each_algorithm
def test_every_algorithm_on_replay_runs(algorithm: Algorithm, env: str) -> None:
    small = {name: value for name, value in SMALL.items() if name != "hidden"}
    algorithm = dataclasses.replace(algorithm, **{**small, "updates_per_step": 0.25, "target_period": 2, "tau": 0.5})
    parameter_server.check(algorithm, 2, 3, 2, 0, 0.0)
    made = setting(algorithm, env)
    state = inline(made, parameter_server.wire(made, 0, actors=3, shards=2))
    learner, first, second = (state["roles"][name] for name in ("learner_0", "shard_0", "shard_1"))
    assert first["counts"]["version"] == second["counts"]["version"] > 50
    assert learner["reads"] == {"versions": [first["counts"]["version"]] * 2, "clock": state["steps"]}
    net = net_of(algorithm, env)
    untrained = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(learner["net"])
    trained = Learner(algorithm, net, 1, 0)
    for name, group in trained.flat.groups.items():  # the run's network is the server's
        served = torch.cat([shard["parameters"][name] for shard in (first, second)])
        assert torch.equal(group.detach(), served)
    for part, parameters in trained.parts.items():
        assert parameters.parameters, part
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, untrained[name])}
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} <= moved
    for name, buffer in net.named_buffers():
        if name.endswith("count"):
            assert buffer == 8 * (first["counts"]["version"] - 1), "each batch was observed once"


@pytest.mark.parametrize("actors", [1, 3])
@pytest.mark.parametrize("updates_per_step", [0.1, 1.0, 3.0])
def test_updates_per_step_is_honoured(updates_per_step: float, actors: int, tmp_path: Path) -> None:
    """By each bundle, up to the updates that are still owed when the budget is used up."""
    run = train(tmp_path / "run", updates_per_step=updates_per_step, actors=actors, outliers=0.0, max_delay=0, unroll=2)
    roles = roles_of(run)
    for index in range(actors):
        counts = roles[f"learner_{index}"]["limiter"]
        owed = (counts["inserts"] - math.ceil(100 / actors)) * updates_per_step * 8 - counts["samples"]
        assert -1e-6 < owed < 8 + 8 * updates_per_step * 8
        assert counts["samples"] == 8 * roles[f"learner_{index}"]["counts"]["derived"]
    inserts = sum(roles[f"learner_{index}"]["limiter"]["inserts"] for index in range(actors))
    assert inserts == run.summary["steps"] == roles["shard_0"]["counts"]["steps"]
    derived = sum(roles[f"learner_{index}"]["counts"]["derived"] for index in range(actors))
    assert roles["shard_0"]["counts"]["version"] - 1 == derived


@cache
def poisoned(every: int) -> type[DQN]:
    """DQN whose every so many-th loss, in all bundles together, is a thousand times what it should be."""
    count = 0

    class Poisoned(DQN):
        def loss(self, net: Any, target: Any, batch: Any, now: Any) -> Any:
            nonlocal count
            count += 1
            loss = super().loss(net, target, batch, now)
            return loss._replace(loss=1_000 * loss.loss) if count % every == 0 else loss

    return Poisoned


def test_what_is_dropped_is_reported_by_reason(tmp_path: Path) -> None:
    algorithm = poisoned(20)(**SMALL, updates_per_step=0.25)
    made = setting(algorithm, CART, lanes=4, steps=2_000)
    rows: list[Any] = []
    graph = parameter_server.wire(made, 0, actors=4, shards=2, max_delay=2, outliers=8.0)
    state = Inline(lambda *row: rows.append(row)).run(graph, lambda steps, snapshot: False)["roles"]
    counts = state["shard_0"]["counts"]
    bundles = [state[f"learner_{index}"] for index in range(4)]
    outliers = sum(bundle["outliers"]["dropped"] for bundle in bundles)
    losses = sum(bundle["outliers"]["losses"] for bundle in bundles)
    assert 0.9 * losses / 20 <= outliers <= 1.5 * losses / 20
    assert counts["version"] - 1 + counts["dropped"]["stale"] + outliers == losses
    # Of a round's four gradients the last is three updates late, unless one before it was dropped or not owed.
    assert losses / 8 < counts["dropped"]["stale"] < losses / 4
    said = [values for role, index, _, values in rows if (role, index) == ("shard", 0)][-1]
    assert said["delay_max"] == 3
    assert counts["dropped"]["stale"] - said["stale_dropped"] in range(20)
    dropped = [values["outlier_dropped"] for role, index, _, values in rows if (role, index) == ("learner", 1)]
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0


def test_the_target_network_follows_the_server(tmp_path: Path) -> None:
    """After every so many updates of the server: in a bundle that makes a third of the gradients, too."""
    run = train(tmp_path / "run", actors=3, target_period=10**6, steps=400)
    roles = roles_of(run)
    start = run._make_net().state_dict()
    assert roles["shard_0"]["counts"]["version"] > 20
    assert all(torch.equal(start[name], value) for name, value in roles["learner_2"]["target"].items())
    often = roles_of(train(tmp_path / "often", actors=3, target_period=1, steps=400))["learner_2"]
    assert all(torch.equal(often["net"][name], value) for name, value in often["target"].items())


def test_rows_tell_of_bundles_and_shards(tmp_path: Path) -> None:
    run = train(tmp_path / "run", actors=2, shards=2, log_every=100)
    learners = rows_of(run, "learner")
    assert {row["index"] for row in learners} == {0, 1}
    assert {"version_skew", "outlier_dropped", "episode_return"} <= learners[-1].keys()
    assert {row["index"] for row in learners if {"loss", "grad_norm", "updates"} <= row.keys()} == {0}
    shards = rows_of(run, "shard")
    assert {row["index"] for row in shards} == {0}
    assert len(shards) >= 6
    assert {"updates", "stale_dropped", "delay", "delay_max"} <= shards[-1].keys()
    assert sum(row.get("episodes", 0) for row in learners) == run.summary["episodes"]


def test_a_run_without_its_replay_fills_it_anew(tmp_path: Path) -> None:
    run = train(tmp_path / "run", save_replay=False, actors=2)
    before = roles_of(run)
    again = rookery.resume(run.path, steps=1_200, quiet=True)
    for index in range(2):
        assert "replay" not in before[f"learner_{index}"]
        starts = [roles[f"learner_{index}"]["limiter"]["start"] for roles in (before, roles_of(again))]
        assert starts == [50, 100]


def test_processes_learn(tmp_path: Path) -> None:
    run = train(tmp_path / "run", runtime="local", actors=2, shards=2, steps=1_500, eval_every=500)
    roles = roles_of(run)
    assert run.summary["steps"] == roles["shard_0"]["counts"]["steps"] >= 1_500
    inserts = sum(roles[f"learner_{index}"]["limiter"]["inserts"] for index in range(2))
    assert inserts == run.summary["steps"]
    assert len(rows_of(run, "evaluator")) >= 3
    again = rookery.resume(run.path, steps=1_800, quiet=True)
    assert again.summary["steps"] >= 1_800


@pytest.mark.parametrize("shards", [1, 3])
def test_one_bundle_in_processes_is_the_one_inline(shards: int, tmp_path: Path) -> None:
    """Bit for bit: it waits until its last gradient was taken, and then reads what that led to."""
    settings = {"shards": shards, "steps": 600, "outliers": 5.0}
    inline, local = (roles_of(train(tmp_path / each, runtime=each, **settings)) for each in ("inline", "local"))
    assert inline["learner_0"]["counts"] == local["learner_0"]["counts"]
    for part in ("net", "target"):
        for name, value in inline["learner_0"][part].items():
            assert torch.equal(value, local["learner_0"][part][name]), (part, name)


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: parameter_server.check(PPO(), 8, 1, 1, 0, 0.0), "PPO learns from each unroll at once"),
        (lambda: parameter_server.check(DQN(ahead=2), 8, 1, 1, 0, 0.0), "ahead=2: .* leave it out"),
        (lambda: parameter_server.check(DQN(capacity=2_000), 8, 100, 1, 0, 0.0), "use capacity=24 or more"),
        (lambda: rookery.train("dqn", CART, max_delay=2), "max_delay=2: dqn .* or use one of gorila"),
        (lambda: rookery.train("gorila", CART, ahead=1), "ahead=1"),
        (lambda: rookery.train("gorila", CART, learners=2), "learners=2: gorila runs as parameter_server"),
    ],
)
def test_refusals(refused: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        refused()


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in tensors(value)]
    return [state] if isinstance(state, Tensor) else []


def test_a_shard_keeps_all_that_decides_its_future() -> None:
    """The state of one, loaded by another, goes on alike; and it is no larger than its share."""
    algorithm, env = ALGORITHMS[1]
    learner = Learner(algorithm, net_of(algorithm, env), 1_000, 0)
    generator = torch.Generator().manual_seed(0)
    (_, own) = slices(learner.flat, 2)
    one, two = (Shard(algorithm, net_of(algorithm, env), 1_000, 1, 2, 5) for _ in range(2))
    for number in range(6):
        for gradient in learner.flat.gradients.values():
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        if number == 3:
            two.load_state(copy.deepcopy(one.state()))
        told = share(learner, own, ("all",), one.version)
        for shard in (one, two) if number >= 3 else (one,):
            shard.accept(told)
    assert torch.equal(one.parameters["all"], two.parameters["all"])
    assert one.metrics() == two.metrics()
    assert sum(leaf.numel() for leaf in tensors(one.state())) <= learner.flat.groups["all"].numel() + 32

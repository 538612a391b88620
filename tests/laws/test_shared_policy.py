"""Actions chosen by one role for all: the same as if each actor chose for itself, also by halves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import home, tiny

import rookery
from rookery.actor import Collector, Unroll
from rookery.algorithms.dqn import DQN
from rookery.algorithms.impala import IMPALA
from rookery.algorithms.ppo import PPO
from rookery.data.plan import Refused
from rookery.envs.make import make_env
from rookery.rerun import differences
from rookery.runtimes.inline import Answer
from rookery.topologies.setting import Setting
from rookery.topologies.shared_policy import Asking, Desk, Group, Policy

SHARED = {"inference": "shared"}
BUFFERED = {**SHARED, "double_buffer": True}
SYSTEMS: dict[str, dict[str, Any]] = {
    "ppo": {"memory": "lstm"},
    "impala": {},
    "appo": {},
    "dqn": {"alpha": 0.6, "n_step": 3},
    "apex": {},
    "sac": {},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., rookery.Run]:
    @cache
    def run(system: str, **more: Any) -> rookery.Run:
        path = tmp_path_factory.mktemp("shared") / "run"
        settings = {"env_options": {"max_steps": 30}, **SYSTEMS[system], **more}
        return rookery.train(system, home(system), run_dir=path, quiet=True, **tiny(system, **settings))

    return lambda system, **more: run(system, **more)


@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - {"impala", "appo", "apex"}))
def test_one_actor_learns_what_it_learns_alone(trained: Callable[..., rookery.Run], system: str) -> None:
    own, shared = trained(system), trained(system, **SHARED)
    assert own.summary["steps"] == shared.summary["steps"]
    assert differences(own, shared) == []
    assert shared.summary["roles"]["inference 0"]["inference"] > 0


@pytest.mark.parametrize("system", ["ppo", "dqn"])
def test_processes_change_nothing(trained: Callable[..., rookery.Run], system: str) -> None:
    inline, local = (trained(system, runtime=runtime, **SHARED) for runtime in ("inline", "local"))
    assert differences(inline, local) == []


@pytest.mark.parametrize("runtime", ["inline", "local"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_halves_of_several_actors(trained: Callable[..., rookery.Run], system: str, runtime: str) -> None:
    run = trained(system, actors=2, runtime=runtime, **BUFFERED)
    assert run.summary["steps"] >= 150
    words = run.summary["words"]
    assert words["questions"]["kind"] == "calls"
    flows = {(flow["from"], flow["to"]) for flow in run.summary["flows"]}
    assert {("actor 0", "questions"), ("actor 1", "questions"), ("questions", "inference 0")} <= flows


def test_learners_that_share_actors_go_on(trained: Callable[..., rookery.Run]) -> None:
    run = trained("appo", actors=4, learners=2, **BUFFERED)
    assert run.summary["steps"] >= 150


def test_an_object_keeps_its_lanes(tmp_path: Path) -> None:
    env = make_env("tensor:CartPole-v1", 4)
    with pytest.raises(Refused, match="halves an actor's lanes; those of an environment object stay"):
        rookery.train("ppo", env, run_dir=tmp_path / "run", quiet=True, **tiny("ppo", **BUFFERED))
    run = rookery.train("ppo", env, run_dir=tmp_path / "run", quiet=True, **tiny("ppo", **SHARED))
    assert run.summary["steps"] >= 150


# A group of lanes.


class Told:
    """Calls that a policy answers at once; notes what is asked and answered."""

    def __init__(self, setting: Setting) -> None:
        self.policy, self.version = Policy(setting), 1
        self.log: list[str] = []

    async def slot(self, make: Callable[[], Desk], index: int) -> Desk:
        desk = make()
        desk.place = index  # type: ignore[attr-defined]
        return desk

    def ask(self, desk: Any) -> Answer:
        self.log.append(f"ask {desk.place}")
        answer = Answer(desk, "questions")
        self.policy.act([desk])
        answer.give(self.version)
        self.version += 1
        return answer


class Alone:
    """A role whose units nobody else minds."""

    seed = 0

    async def boundary(self) -> None: ...

    def unit(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it gives without ever waiting."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


def setting_of(algorithm: Any, env: str, lanes: int) -> Setting:
    spec = make_env(env, 1).spec

    def make_net() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return algorithm.networks(spec)

    return Setting(algorithm, lambda lanes, seed: make_env(env, lanes, seed=seed), make_net, lanes, 1, 0, 0, 0)


def asking(setting: Setting, groups: int, rows: int = 6) -> tuple[Asking, Told]:
    calls, made = Told(setting), []
    for place in range(groups):
        env = setting.make_env(setting.lanes // groups, place)
        group = Group(setting.algorithm, setting.make_net(), env, rows, place)
        result(group.sit(calls, place))
        made.append(group)
    return Asking(Alone(), made), calls  # type: ignore[arg-type]


def columns(unroll: Unroll) -> dict[str, Any]:
    return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in unroll.batch().items()}


def assert_same(ours: Any, theirs: Any, name: str = "") -> None:
    if isinstance(ours, dict):
        for key in ours.keys() | theirs.keys():
            assert_same(ours[key], theirs[key], f"{name}.{key}")
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("env", ["tensor:CartPole-v1", "tensor:ProbeDict-v0", "tensor:ProbeTuple-v0"])
@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_each_group_collects_what_it_would_alone(env: str, memory: Any, groups: int) -> None:
    setting = setting_of(PPO(hidden=(8,), memory=memory, memory_size=4), env, 6)
    together, _ = asking(setting, groups)
    size, unroll = 6 // groups, together.slot()
    alone = [
        Collector(setting.algorithm, setting.make_net(), setting.make_env(size, place), 6, place)
        for place in range(groups)
    ]
    for _ in range(4):
        valid = result(together.filled(unroll))
        whole = columns(unroll)
        expected = [(each, each.slot()) for each in alone]
        assert valid == sum(each.fill(slot) for each, slot in expected)
        for place, (_, slot) in enumerate(expected):
            assert_same(columns(unroll.part(slice(place * size, (place + 1) * size))), columns(slot))
        assert len(whole["reward"]) == 7
    episodes = together.episodes()
    assert sorted(episodes["returns"]) == sorted(one for each in alone for one in each.returns)
    assert together.episodes() == {}
    assert together.steps == sum(each.steps for each in alone)


def test_a_group_steps_while_the_other_waits_for_its_actions() -> None:
    together, calls = asking(setting_of(IMPALA(hidden=(8,)), "tensor:CartPole-v1", 4), 2, rows=3)
    for group in together.groups:
        step = group.env.step

        def noted(action: Any, step: Any = step, place: int = together.groups.index(group)) -> Any:
            calls.log.append(f"step {place}")
            return step(action)

        group._step = noted  # type: ignore[assignment]
    result(together.filled(together.slot()))
    first = calls.log[: calls.log.index("step 1") + 2]
    assert first == ["ask 0", "ask 1", "step 0", "ask 0", "step 1", "ask 1"]
    for place, what in enumerate(calls.log):
        if what.startswith("step"):
            other = 1 - int(what[-1])
            said = [each for each in calls.log[:place] if each.endswith(str(other))]
            assert said[-1] == f"ask {other}" or said.count(f"step {other}") == 3


def test_an_unroll_is_as_old_as_the_oldest_weights_in_it() -> None:
    together, calls = asking(setting_of(IMPALA(hidden=(8,)), "tensor:CartPole-v1", 4), 2)
    for _ in range(2):
        before, unroll = calls.version, together.slot()
        result(together.filled(unroll))
        assert int(unroll.version) == before < calls.version - 6


def test_weights_are_fetched_when_an_asker_knows_of_others() -> None:
    together, calls = asking(setting_of(IMPALA(hidden=(8,)), "tensor:CartPole-v1", 4), 2)
    desks = [group.desk for group in together.groups]
    found = []
    for version in (3, None, 5, 2, 2):  # a learner that begins anew falls back, and may come to the same number
        if version is not None:
            together.load(version, {})
        result(together.filled(together.slot()))
        found += [calls.policy.outdated(desks), calls.policy.outdated(desks)]
    assert found == [True, False, False, False, True, False, True, False, True, False]


def test_exploration_is_each_lanes_own() -> None:
    together, _ = asking(setting_of(DQN(hidden=(8,)), "tensor:CartPole-v1", 4), 2, rows=40)
    unroll = together.slot()
    result(together.filled(unroll, torch.tensor([0.0, 1.0, 0.0, 1.0])))
    net = together.groups[0].net
    obs = unroll.batch()["obs"][:-1].flatten(0, 1)
    greedy = together.groups[0].algorithm.act(net, obs, net.initial_state(160), None)
    unlike = (greedy.action.view(40, 4) != unroll.batch()["action"][:-1]).float().mean(0)
    assert unlike[0] == unlike[2] == 0
    assert unlike[1] > 0.2 < unlike[3]


# Refusals.


@pytest.mark.parametrize(
    ("system", "more", "sentence"),
    [
        ("ppo", {"double_buffer": True}, "chooses its own actions has nothing to wait for"),
        ("dqn", {"double_buffer": True}, "chooses its own actions has nothing to wait for"),
        ("ppo", {**BUFFERED, "envs": 3}, "an actor's 3 lanes at a time; use an even number"),
        ("a3c", SHARED, "inference=shared: a3c runs as hogwild, which takes learners instead"),
        ("gorila", SHARED, "inference=shared: gorila runs as parameter_server, which takes actors, shards"),
    ],
)
def test_refusals(system: str, more: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=sentence):
        rookery.train(system, "tensor:CartPole-v1", run_dir=tmp_path / "run", quiet=True, **tiny(system, **more))
    assert not (tmp_path / "run").exists()

"""`rookery.train` and what it gives back: own parts, and what happens when something is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

import rookery
from rookery import PPO
from rookery.algorithms.base import Batch, Loss, Now, OnPolicy, Refused
from rookery.algorithms.dqn import DQN
from rookery.envs.spec import EnvSpec
from rookery.envs.tensor.classic_control import CartPole
from rookery.envs.vector import EnvError, Obs, Step
from rookery.learner import NonFinite
from rookery.runs import checkpoint
from rookery.runs.checkpoint import CheckpointError
from rookery.runs.folder import RunFolderError
from rookery.runtimes.inline import RoleError
from rookery.systems import name_of
from rookery.train import Keeper

CART = "tensor:CartPole-v1"
LEARN: dict[str, Any] = {"unroll": 4, "epochs": 2, "minibatches": 2, "hidden": (8,)}
RUN: dict[str, Any] = {"steps": 96, "envs": 4, "eval_episodes": 2, "eval_every": 32, "log_every": 16, "sinks": ()}


def train(path: Path, env: Any = CART, system: Any = "ppo", **settings: Any) -> rookery.Run:
    learn = LEARN if isinstance(system, str) else {}
    return rookery.train(system, env, run_dir=path, quiet=True, **{**RUN, **learn, **settings})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> rookery.Run:
    return train(tmp_path_factory.mktemp("trained") / "run")


def rows_of(run: rookery.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def copy_of(run: rookery.Run, path: Path) -> Path:
    return run.save(path)


# What a run measures


@pytest.mark.parametrize(
    ("system", "more"),
    [
        ("ppo", {}),
        ("impala", {"runtime": "local", "actors": 2, "epochs": 1, "minibatches": 1}),
        ("dqn", {"runtime": "local", "batch": 8, "learning_starts": 16, "updates_per_step": 0.25, "capacity": 96}),
    ],
)
def test_a_run_is_measured(system: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Who was busy with what, what flowed, and what limited it: in the summary, and in the metrics."""
    learn = {**LEARN, **more} if system == "ppo" else {"hidden": (8,), **more}
    known = {field.name for field in dataclasses.fields(rookery.SYSTEMS[system].algorithm_class())}
    known |= {field.name for field in dataclasses.fields(rookery.Options)}
    settings = {**RUN, "steps": 480, **{name: value for name, value in learn.items() if name in known}}
    run = rookery.train(system, CART, run_dir=tmp_path / "run", quiet=True, **settings)
    summary, words = run.summary, {"ppo": "unrolls", "impala": "unrolls", "dqn": "replay"}
    roles = [*(f"actor {index}" for index in range(more.get("actors", 1))), "learner 0", "evaluator 0", "keeper"]
    assert list(summary["roles"]) == roles
    wholes = []
    for name, role in summary["roles"].items():
        assert 0 <= role["busy"] <= 1
        if name != "keeper":
            parts = [role.get(part, 0.0) for part in ("environment", "inference", "learning", "evaluation", "transfer")]
            assert sum(parts) == pytest.approx(role["busy"], abs=1e-6)
            wholes.append(role["busy"] + sum(role["waiting"].values()))
    first = max(wholes)  # in one process the time before a role's first turn is neither, but for who has the first
    assert first == pytest.approx(1.0)
    assert summary["processes"] == 1 or wholes == pytest.approx([first] * len(wholes))
    actor, learner = summary["roles"]["actor 0"], summary["roles"]["learner 0"]
    assert min(actor["environment"], actor["inference"], actor["steps_per_second"]) > 0
    assert min(learner["learning"], learner["steps_per_second"]) > 0
    assert set(summary["words"]) == {"weights", words[system]}
    flows = {(flow["from"], flow["to"]): flow for flow in summary["flows"]}
    assert min(flow["per_second"] for flow in flows.values()) > 0
    assert {("actor 0", words[system]), (words[system], "learner 0"), ("weights", "actor 0")} <= set(flows)
    assert flows["actor 0", words[system]]["bytes_per_second"] > 0
    if system == "dqn":
        assert summary["words"]["replay"]["samples_per_insert"] == pytest.approx(2.0, rel=0.3)
        assert 0 < summary["words"]["replay"]["fill"] <= 1
    else:
        assert 0 <= summary["words"]["unrolls"]["fill"] <= 1
        assert summary["policy_lag"]["mean"] <= summary["policy_lag"]["max"]
    assert (summary["restarts"], summary["dropped"]) == ({}, {})
    assert summary["bottleneck"]["limit"] in ("environment", "inference", "transfer", "learner", "waiting")
    *_, row = (row for row in rows_of(run) if row["role"] == "runtime")
    assert {"actor_busy", "learner_busy", "actor_steps_per_second", "restarts", "dropped"} <= set(row)
    assert list(row["measured"]["roles"]) == roles


def test_the_summary_measures_from_the_first_update_on(tmp_path: Path) -> None:
    """Building environments is no work of a run, or short ones would be told of nothing else."""
    run = train(tmp_path / "run", LateCoin, steps=2_000, unroll=16)
    assert run.summary["roles"]["actor 0"]["transfer"] < 0.5
    assert run.summary["bottleneck"]["limit"] != "transfer"


def test_rows_of_the_runtime_come_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has what was measured since the last."""
    monkeypatch.setattr(sys.modules["rookery.train"], "SOON", 0.0)
    rows = [row for row in rows_of(train(tmp_path / "run")) if row["role"] == "runtime"]
    assert len(rows) >= 4
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    flows = [{(flow["from"], flow["to"]): flow["per_second"] for flow in row["measured"]["flows"]} for row in rows]
    assert all(each["actor 0", "unrolls"] > 0 for each in flows[:4])


def test_rows_compiled_as_one_are_one_activity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rookery.actor"], "compiled", lambda function, graphs: function)
    actor = train(tmp_path / "run", compile=True).summary["roles"]["actor 0"]
    assert actor["environment and inference"] > 0
    assert "environment" not in actor


# What a run gives


def test_a_run_can_be_used(trained: rookery.Run) -> None:
    found = trained.evaluate(5, seed=3)
    assert len(found.returns) == len(found.lengths) == 5
    assert found == trained.evaluate(5, seed=3)
    assert trained.summary["steps"] >= 96
    assert trained.summary["system"] == "ppo"
    assert not trained.interrupted
    assert (trained.path / "metrics.jsonl").exists()


def test_a_policy_acts(trained: rookery.Run) -> None:
    policy, obs = trained.policy, torch.zeros(3, 4)
    action, state = policy(obs)
    assert action.shape == (3,)
    assert state.shape == (3, 0)
    assert not any(parameter.requires_grad for parameter in policy.net.parameters())
    sampled = [policy(obs, None, torch.Generator().manual_seed(seed))[0] for seed in range(20)]
    assert len({tuple(each.tolist()) for each in sampled}) > 1


def test_the_public_function_stays_a_function(trained: rookery.Run) -> None:
    """Importing the module of the same name must not put the module in its place."""
    import rookery.train

    assert callable(rookery.train)
    rookery.load(trained.path)
    assert callable(rookery.train)


def test_save_and_load(trained: rookery.Run, tmp_path: Path) -> None:
    saved = trained.save(tmp_path / "kept")
    loaded = rookery.load(saved)
    assert loaded.algorithm == trained.algorithm
    assert loaded.evaluate(3) == trained.evaluate(3) == rookery.evaluate(saved, 3)
    assert loaded.summary == trained.summary
    for name, value in trained.net().state_dict().items():
        assert torch.equal(loaded.net().state_dict()[name], value)
    with pytest.raises(RunFolderError, match="already holds a run"):
        trained.save(saved)


def test_memory_is_carried_by_the_caller(tmp_path: Path) -> None:
    policy = train(tmp_path / "run", memory="gru", memory_size=8).policy
    state = policy.initial_state(2)
    assert state.shape == (2, 8)
    _, after = policy(torch.ones(2, 4), state)
    assert not torch.equal(after, state)


# Own parts


class OwnNet(nn.Module):
    def __init__(self, inputs: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, 6)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.inner(obs))


def own_net(spec: EnvSpec) -> nn.Module:
    return OwnNet(spec.obs_space.shape[0])


@pytest.mark.parametrize("make", [OwnNet, lambda: own_net], ids=["module", "factory"])
def test_own_network(make: Callable[[], Any], tmp_path: Path) -> None:
    network = make()
    before = [value.clone() for value in network.parameters()] if isinstance(network, nn.Module) else []
    run = train(tmp_path / "run", network=network)
    assert "trunk.network.inner.weight" in run.net().state_dict()
    for mine, was in zip(before, getattr(network, "parameters", list)(), strict=True):
        assert torch.equal(mine, was)  # the user's module is a beginning, not the one that learns
    with pytest.raises(ValueError, match=r"was trained with its own network; load\(path, network=\.\.\.\)"):
        rookery.load(run.path)
    assert rookery.load(run.path, network=network).evaluate(3) == run.evaluate(3)


def test_a_network_of_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must map 2 observations to features of shape"):
        train(tmp_path / "run", network=nn.Flatten(0))
    assert not (tmp_path / "run").exists()


class Coin(gymnasium.Env):
    """Heads or tails, ten times; `fault` at step `at` of lane 1, which is told by its seed."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def __init__(self, fault: str = "", at: int = 30) -> None:
        self.fault, self.at, self.steps, self.seeds = fault, at, 0, 0

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count, self.steps = self.count + 1, self.steps + 1
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        reward = float(action)
        if self.steps >= self.at:
            if self.fault == "raise":
                raise ZeroDivisionError("the wheel came off")
            if self.fault == "nan":
                obs[0] = np.nan
            if self.fault == "reward":
                reward = float("nan")
            if self.fault == "shape":
                obs = obs[:1]
        return obs, reward, self.count == 10, False, {}


class LateCoin(Coin):
    """It takes its time to be made."""

    def __init__(self) -> None:
        time.sleep(0.5)
        super().__init__()


@pytest.mark.parametrize("env", [Coin, lambda: Coin(), Coin()], ids=["class", "function", "object"])
def test_own_environment(env: Any, tmp_path: Path) -> None:
    run = train(tmp_path / "run", env)
    assert run.summary["backend"] == "own"
    assert run.config["own"]["env"]
    assert set(run.evaluate(3).lengths) == {10}
    with pytest.raises(ValueError, match=r"was trained with its own env; load\(path, env=\.\.\.\)"):
        rookery.load(run.path)
    assert rookery.load(run.path, env=env).evaluate(3) == run.evaluate(3)
    again = rookery.resume(run.path, steps=128, env=env, quiet=True)
    assert again.summary["steps"] >= 128


def test_episodes_that_begin_anew_are_counted(trained: rookery.Run, tmp_path: Path) -> None:
    """Where the environment cannot save its state, quiet or not."""
    run = train(tmp_path / "run", Coin)
    for times, steps in enumerate((96, 128, 160)):
        again = rookery.resume(run.path, steps=steps, env=Coin, quiet=True)
        assert again.summary["episodes_restarted"] == times
    again = rookery.resume(copy_of(trained, tmp_path / "saved"), steps=128, quiet=True)
    assert again.summary["episodes_restarted"] == 0


def test_an_object_gives_each_lane_its_own_copy(tmp_path: Path) -> None:
    env = Coin()
    env.reset(seed=0)
    run = train(tmp_path / "run", env, envs=4)
    assert env.steps == 0
    assert run.evaluate(8).lengths == [10] * 8


def test_an_object_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    env = Coin()
    env.lock = threading.Lock()
    with pytest.raises(
        ValueError, match=r"this Coin cannot be copied .* hand in its class or a function that makes it"
    ):
        train(tmp_path / "run", env)


def test_own_vector_environment(tmp_path: Path) -> None:
    """An object decides how many lanes there are; what is asked for otherwise is refused."""
    env = CartPole(6, max_steps=20)
    before = env.state()
    settings = {name: value for name, value in RUN.items() if name != "envs"}
    run = rookery.train("ppo", env, run_dir=tmp_path / "run", quiet=True, **settings, **LEARN)
    assert run.config["options"]["envs"] == 6
    assert all(torch.equal(value, before[name]) for name, value in env.state().items())  # each role plays on a copy
    assert len(run.evaluate(3).returns) >= 3
    assert run.evaluate(6, seed=1) != run.evaluate(6, seed=2)
    with pytest.raises(ValueError, match="envs=5, but the environment handed in has 6 lanes"):
        train(tmp_path / "other", env, envs=5)


@dataclass(frozen=True)
class MyPPO(PPO):
    """The tour's: a changed loss, with a setting of its own."""

    weight: float = 0.5  # of the extra term

    def loss(self, net: Any, target: None, batch: Batch, now: Now) -> Loss:
        loss = super().loss(net, target, batch, now)
        (_, value), _ = net(batch["obs"], batch["state"], batch["start"])
        extra = self.weight * value.square().mean()
        return loss._replace(loss=loss.loss + extra, metrics={**loss.metrics, "extra": extra.detach()})


def test_own_algorithm(tmp_path: Path) -> None:
    algorithm = MyPPO(**LEARN, weight=0.25)
    run = train(tmp_path / "run", system=algorithm)
    assert run.config["system"] == "myppo"
    assert run.config["algorithm"]["weight"] == 0.25
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all("extra" in row for row in rows if row["role"] == "learner")
    with pytest.raises(ValueError, match=r"was trained with its own algorithm; load\(path, algorithm=\.\.\.\)"):
        rookery.load(run.path)
    assert rookery.load(run.path, algorithm=algorithm).evaluate(3) == run.evaluate(3)
    again = rookery.resume(run.path, steps=128, algorithm=algorithm, quiet=True)
    assert again.summary["steps"] >= 128


def test_a_subclass_with_our_name_is_not_taken_for_ours(tmp_path: Path) -> None:
    own = dataclass(frozen=True)(type("PPO", (MyPPO,), {}))
    run = train(tmp_path / "run", system=own(**LEARN))
    with pytest.raises(ValueError, match="was trained with its own algorithm"):
        rookery.load(run.path)


def test_an_algorithm_object_needs_no_name(tmp_path: Path) -> None:
    """Settings and class of our own algorithms are in the folder, so that it loads without the object."""
    run = train(tmp_path / "run", system=PPO(**LEARN, lr=1e-3))
    assert rookery.load(run.path).algorithm == PPO(**LEARN, lr=1e-3)
    with pytest.raises(ValueError, match=r"lr: no setting of a run \(the algorithm's settings go into PPO\(\.\.\.\)\)"):
        train(tmp_path / "other", system=PPO(), lr=1e-3)


@pytest.mark.parametrize("system", [name for name, row in rookery.SYSTEMS.items() if not row.preset])
def test_every_algorithm_is_of_the_system_without_a_preset(system: str) -> None:
    assert name_of(rookery.SYSTEMS[system].algorithm_class()()) == system


def test_an_algorithm_object_has_the_types_of_its_fields() -> None:
    assert type(DQN(capacity=1e5).capacity) is int  # type: ignore[arg-type]
    for name, value in (("batch", 32.5), ("double", "no"), ("hidden", 64), ("lr", True), ("target_period", 2.5)):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not of type"):
            DQN(**{name: value})


class Thawing(nn.Module):
    """Of two layers the first is frozen."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(spec.obs_space.shape[0], 8), nn.Linear(8, 8)
        self.first.requires_grad_(False)

    def forward(self, obs: Tensor) -> Tensor:
        return self.second(self.first(obs).tanh()).relu()


@pytest.mark.parametrize("system", ["ppo", "dqn", "sac", "gorila"])
def test_frozen_layers_stay(system: str, tmp_path: Path) -> None:
    """Target networks move without them, and an actor's critics may be fed by them."""
    env = "tensor:Pendulum-v1" if system == "sac" else CART
    more = LEARN if system == "ppo" else {"hidden": (8,), "learning_starts": 16, "batch": 8, "tau": 0.5}
    more = more | ({"target_period": 2, "n_step": 3} if system in ("dqn", "gorila") else {})
    run = rookery.train(system, env, run_dir=tmp_path / "run", quiet=True, network=Thawing, **{**RUN, **more})
    checkpoints = [checkpoint.load(run.checkpoints.path(step)) for step in run.checkpoints.steps()]
    first, *_, last = (saved["run"]["roles"]["learner_0"]["net"] for saved in checkpoints)
    names = [name for name in first if ".first." in name]
    assert names
    assert all(torch.equal(first[name], last[name]) for name in names)
    assert not all(torch.equal(first[name], last[name]) for name in first)


def evaluations(run: rookery.Run) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_return_mean"]) for row in rows_of(run) if row["role"] == "evaluator"]


@pytest.mark.parametrize("runtime", ["inline", "local"])
def test_a_checkpoint_has_the_score_of_its_own_evaluation(runtime: str, tmp_path: Path) -> None:
    """In processes it is played once the checkpoint is written. No step is evaluated twice, not even the last one."""
    run = train(tmp_path / "run", runtime=runtime, steps=256)
    found = evaluations(run)
    assert [step // 32 for step, _ in found] == list(range(1, 9))
    kept = {step: dict(found)[step] for step in run.checkpoints.steps()}
    index = json.loads((run.path / "checkpoints" / "index.json").read_text())["scores"]
    assert index == {str(step): score for step, score in kept.items()}
    assert run.checkpoints.best()[0] == max(found, key=lambda each: (each[1], each[0]))[0]
    assert run.summary["eval_return_mean"] == found[-1][1]


@pytest.mark.parametrize("runtime", ["inline", "local"])
def test_a_resumed_run_evaluates_no_step_twice(runtime: str, tmp_path: Path) -> None:
    run = train(tmp_path / "run", runtime=runtime, steps=192)
    before = evaluations(run)
    *_, resumed_at, ended = run.checkpoints.steps()
    shutil.rmtree(run.checkpoints.path(ended))
    again = evaluations(rookery.resume(run.path, quiet=True))
    # In processes an evaluator plays the newest weights there are when it is free, which is a matter of time.
    settled = math.inf if runtime == "inline" else resumed_at
    assert [each for each in again if each[0] < settled] == [each for each in before if each[0] < settled]
    assert [step // 32 for step, _ in again] == list(range(1, 7))
    longer = rookery.resume(run.path, steps=256, quiet=True)
    assert [step // 32 for step, _ in evaluations(longer)] == list(range(1, 9))


def test_the_last_evaluation_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run ended before its evaluator had seen the last weights: it is not played anew, or left out."""
    run = train(tmp_path / "run", steps=192)
    before, saved_of = evaluations(run), rookery.Run.saved

    def seen_late(run: rookery.Run, *which: Any) -> dict[str, Any]:
        saved = saved_of(run, *which)
        saved["run"]["roles"]["evaluator_0"]["due"] = 192
        return saved

    monkeypatch.setattr(rookery.Run, "saved", seen_late)
    longer = evaluations(rookery.resume(run.path, steps=256, quiet=True))
    assert longer[:-2] == before
    assert [step // 32 for step, _ in longer] == list(range(1, 9))


# Refused before anything is built


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": PPO}, r"PPO is a class; hand in PPO\(...\), or the name of a system"),
        ({"system": "pppo"}, r"no system 'pppo'; nearest: ppo"),
        ({"env": "CartPoel-v1"}, r"no backend has an environment 'CartPoel-v1'; nearest: .*CartPole-v1"),
        ({"env": "tensor:CartPoel-v1"}, r"no environment 'CartPoel-v1'; the nearest are CartPole-v1"),
        ({"learning_rate": 1e-3}, r"learning_rate: no setting of ppo; nearest: lr\."),
        ({"n_steps": 64}, r"n_steps: no setting of ppo; nearest: unroll\."),
        ({"system": "dqn", "buffer_size": 64}, r"buffer_size: no setting of dqn; nearest: capacity\."),
        ({"network": "mlp"}, r"network='mlp' is neither a module nor what makes one from an EnvSpec; .* `hidden` sets"),
        ({"unrol": 8}, r"unrol: no setting of ppo; nearest: unroll"),
        ({"lr": "fast"}, r"lr='fast' is not of type float"),
        ({"steps": 10.5}, r"steps=10\.5 is not of type int"),
        ({"envs": True}, r"envs=True is not of type int"),
        ({"hidden": 64}, r"hidden=64 is not of type tuple\[int, \.\.\.\]"),
        ({"hidden": (64, "a")}, r"hidden=\(64, 'a'\) is not of type tuple"),
        ({"memory": "lstmm"}, r"memory='lstmm' is not 'none' or 'lstm' or 'gru'"),
        ({"runtime": "cloud"}, r"runtime='cloud' is not 'inline'"),
        ({"steps": 0}, r"steps=0 is too small; use 1 or more"),
        ({"seed": -1}, r"seed=-1 is too small; use 0 or more"),
        ({"frame_stack": -2}, r"frame_stack=-2 is too small; use 0 or more"),
        ({"epochs": 0}, r"epochs=0 leaves nothing to learn from; use 1 or more"),
        ({"minibatches": 0}, r"minibatches=0 leaves nothing to learn from"),
        ({"unroll": 0}, r"unroll=0 leaves nothing to learn from"),
        ({"env_options": ("max_steps",)}, r"env_options has 'max_steps', and takes name=value"),
        ({"env_options": {"gravity_": 3}}, r"CartPole-v1 has no option 'gravity_'; it takes"),
        ({"env_options": {"device": "cpu"}}, r"which the run itself sets; use the option device"),
        ({"env_options": ("seed=3",)}, r"env_options has 'seed=3', which the run itself sets; use the option seed"),
        ({"env_options": ("lanes=3",)}, r"use the option envs"),
        ({"env_options": ("render=true",)}, r"leave it out, for a video draws anyhow"),
        ({"env_options": ("workers=x",)}, r"workers='x'; use a whole number, such as workers=2"),
        ({"device": "tpu"}, r"device='tpu' is none that torch can use here; use 'auto', 'cpu' or 'cuda'"),
        ({"device": "mps"}, r"device='mps' is none that torch can use here; use 'auto', 'cpu' or 'cuda'"),
        ({"sinks": ("tensorbord",)}, r"sinks=\('tensorbord',\) is not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path / "run", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_whole_numbers_may_be_floats(tmp_path: Path) -> None:
    run = train(tmp_path / "run", steps=9.6e1, hidden=[8])
    assert run.config["options"]["steps"] == 96


@pytest.mark.parametrize("settings", [{"unroll": 5, "minibatches": 3}, {"unroll": 4, "minibatches": 64}])
def test_minibatches_that_do_not_divide(settings: dict[str, Any], tmp_path: Path) -> None:
    """The advice is tried, and works."""
    with pytest.raises(Refused, match=r"does not divide the \d+ samples of an update \(unroll=\d × envs=4\)") as caught:
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    advice = int(re.search(r"use (\d+) instead", str(caught.value))[1])
    assert train(tmp_path / "run", **{**settings, "minibatches": advice}).summary["steps"] >= 96


@dataclass(frozen=True)
class Shuffled(PPO):
    """Forgets that rows with memory have to be learnt from in order."""

    @property
    def plan(self) -> OnPolicy:
        return dataclasses.replace(super().plan, sequences=False)


def test_memory_that_is_learnt_from_single_rows(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"network of Shuffled has a memory, .* give the plan sequences=True, or"
    ) as caught:
        train(tmp_path / "run", system=Shuffled(**LEARN, memory="lstm", memory_size=4))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", system=Shuffled(**LEARN), steps=16)


def test_lanes_that_do_not_divide_with_memory(tmp_path: Path) -> None:
    settings = {"memory": "lstm", "memory_size": 4, "envs": 3, "actors": 3}
    with pytest.raises(Refused, match="minibatches=4 does not divide the 9 lanes of an update") as caught:
        train(tmp_path / "run", **settings, minibatches=4)
    advice = int(re.search(r"use (\d+) instead", str(caught.value))[1])
    assert train(tmp_path / "run", **settings, minibatches=advice).summary["steps"] >= 96


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("env", [CART, "gym:CartPole-v1"])
def test_a_device_that_is_not_there(env: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cuda.*use 'cpu'"):
        train(tmp_path / "run", env, device="cuda")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_by_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="cannot be written"):
        train(tmp_path / "run")


@pytest.mark.parametrize("where", ["/proc/rookery/run", "file/run"])
def test_a_folder_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot be written.*name a folder that can"):
        train(Path(where))


# What goes wrong on the way


def survivor(path: Path, env: Any = None) -> rookery.Run:
    """The run left behind by one that failed: it loads, its weights are finite and it can be evaluated."""
    run = rookery.load(path, env=env)
    assert all(bool(value.isfinite().all()) for value in run.net().state_dict().values())
    assert (path / "config.json").exists()
    assert not (path / "summary.json").exists()
    return run


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"ZeroDivisionError: the wheel came off"),
        ("nan", r"observation.*nan"),
        ("reward", r"reward.*nan"),
        ("shape", r"shape"),
    ],
)
def test_an_environment_that_fails_midway(fault: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(RoleError, match=rf"actor 0 failed: .*lane \d, step \d+: .*{message}") as caught:
        train(path, lambda: Coin(fault), steps=1000, eval_every=64)
    assert isinstance(caught.value.__cause__, EnvError)
    run = survivor(path, Coin)
    assert run.checkpoints.steps()[-1] >= 64
    assert len(run.evaluate(2).returns) == 2
    rows = (path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) >= 2
    assert rookery.resume(path, env=Coin, steps=200, quiet=True).summary["steps"] >= 200


class BadVector(CartPole):
    """A user's tensor environment, whose lane 2 goes wrong at step 6."""

    id = "BadVector-v0"
    calls = 0
    fault = ""

    def step(self, action: Obs) -> Step:
        step, self.calls = super().step(action), self.calls + 1
        if self.calls == 6 and self.fault == "nan":
            step.obs[2, 1] = float("nan")
        if self.calls == 6 and self.fault == "reward":
            step.reward[2] = float("inf")
        if self.calls >= 6 and self.fault == "shape":
            return step._replace(obs=step.obs[:, :3])
        return step


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "nan",
            r"BadVector-v0 gave obs that is not finite in lane 2 at step 6 of its episode \(row 1 of the unroll\): \[",
        ),
        ("reward", r"BadVector-v0 gave reward that is not finite in lane 2 at step 6 of .*: \[inf\]"),
        ("shape", "actor 0 failed"),
    ],
)
def test_a_tensor_environment_is_looked_at_once_an_unroll(fault: str, message: str, tmp_path: Path) -> None:
    env = BadVector(4)
    env.fault = fault
    path = tmp_path / "run"
    with pytest.raises(RoleError, match=message):
        train(path, env)
    survivor(path, CartPole(4))


def test_weights_that_explode(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(
        RoleError, match=r"learner 0 failed: .* is not finite at update \d+ .*; the run stops"
    ) as caught:
        train(path, lr=1e30)
    assert isinstance(caught.value.__cause__, NonFinite)
    survivor(path).evaluate(2)


def test_weights_that_overflow_in_a_step_are_never_saved(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(NonFinite, match=r"^the weights .* is not finite at update 1 \(step 16\); the run"):
        train(path, system=rookery.A2C(unroll=4, hidden=(8,), lr=1e38), eval_every=16)
    survivor(path)


@dataclass(frozen=True)
class NanPPO(PPO):
    """Its loss is NaN from half of the run on."""

    def loss(self, net: Any, target: None, batch: Batch, now: Now) -> Loss:
        loss = super().loss(net, target, batch, now)
        return loss._replace(loss=loss.loss * torch.where(now.remaining < 0.5, float("nan"), 1.0))


def test_a_loss_that_becomes_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run"
    with pytest.raises(RoleError, match=r"learner 0 failed: the gradient of .* is not finite") as caught:
        train(path, system=NanPPO(**LEARN))
    assert isinstance(caught.value.__cause__, NonFinite)
    run = rookery.load(path, algorithm=NanPPO(**LEARN))
    assert run.checkpoints.steps()[-1] >= 32
    assert all(bool(value.isfinite().all()) for value in run.net().state_dict().values())
    mended = rookery.resume(path, algorithm=PPO(**LEARN), quiet=True)
    assert "was trained with NanPPO, and goes on with PPO" in caplog.text
    assert mended.summary["steps"] >= 96


def test_a_disk_that_fills_up_during_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rookery.runs import checkpoint

    path, written, save_file = tmp_path / "run", [], checkpoint.save_file

    def full(tensors: Any, file: Path) -> None:
        if len(written) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(file)
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; .* What was saved before is intact: resume"):
        train(path)
    monkeypatch.undo()
    run = survivor(path)
    assert run.checkpoints.steps()[-1] >= 32  # the older one was given up in vain
    whole = train(tmp_path / "whole")
    again = rookery.resume(path, quiet=True)
    for name, value in whole.net().state_dict().items():
        assert torch.equal(value, again.net().state_dict()[name])


def test_a_disk_that_fills_up_during_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rookery.runs.metrics import MetricsError, MetricsLog

    append, rows = MetricsLog.append, []

    def full(log: MetricsLog, row: Any) -> None:
        rows.append(row)
        if len(rows) == 6:
            raise log._unwritable(OSError(28, "No space left on device"))
        append(log, row)

    monkeypatch.setattr(MetricsLog, "append", full)
    with pytest.raises(MetricsError, match=r"metrics.jsonl could not be written: No space left on device"):
        train(tmp_path / "run", eval_every=1000)
    monkeypatch.undo()
    assert survivor(tmp_path / "run").checkpoints.steps()[-1] > 0  # where it stood, and not where it began
    whole, again = train(tmp_path / "whole", eval_every=1000), rookery.resume(tmp_path / "run", quiet=True)
    assert again.summary["episodes"] == whole.summary["episodes"]
    for name, value in whole.net().state_dict().items():
        assert torch.equal(value, again.net().state_dict()[name])


def test_a_failed_run_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.get_num_threads()
    with pytest.raises(RoleError):
        train(tmp_path / "run", lambda: Coin("raise", at=10), threads=before[2] + 1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.get_num_threads()) == before


# Signals


def signalling(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int = 1) -> None:
    between, rounds = Keeper.between, []

    def signalled(keeper: Keeper, *arguments: Any) -> bool:
        rounds.append(keeper)
        if len(rounds) == 3:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return between(keeper, *arguments)

    monkeypatch.setattr(Keeper, "between", signalled)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_round(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalling(monkeypatch, number, times=2)  # some supervisors send it to the process and to its group
    run = train(tmp_path / "run")
    assert run.interrupted
    assert run.signal == number
    assert run.summary["interrupted"]
    assert 0 < run.summary["steps"] < 96
    assert run.checkpoints.steps()[-1] == run.summary["steps"]


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an environment that hangs could not be left."""
    clock, ticks = time.monotonic, itertools.count()
    signalling(monkeypatch, signal.SIGINT, times=2)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 2 * next(ticks))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert rookery.resume(tmp_path / "run", quiet=True).summary["steps"] >= 96


def test_training_in_another_thread(tmp_path: Path) -> None:
    """Where signals cannot be handled, nothing is lost but that."""
    found: list[rookery.Run] = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "run")))
    thread.start()
    thread.join(60)
    assert found[0].summary["steps"] >= 96


# What was tampered with

STATE: dict[str, Any] = {
    "run": {"roles": {"learner_0": {"net": {"a": torch.ones(3)}}}, "words": {}, "steps": 96},
    "recorder": {"episodes": 1, "returns": [9.0], "evaluation": {}, "steps": {}, "lags": {}, "rows": 3},
    "steps": 96,
    "seconds": 1.0,
}


def test_damaged_checkpoints(trained: rookery.Run, tmp_path: Path) -> None:
    path = copy_of(trained, tmp_path / "run")
    [step] = rookery.load(path).checkpoints.steps()
    tensors = rookery.load(path).checkpoints.path(step) / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-10] ^= 1
    tensors.write_bytes(data)
    run = rookery.load(path)
    with (
        pytest.warns(RuntimeWarning, match="is damaged"),
        pytest.raises(CheckpointError, match="no readable checkpoint"),
    ):
        run.evaluate(2)
    with (
        pytest.warns(RuntimeWarning, match="is damaged"),
        pytest.raises(CheckpointError, match="no readable checkpoint"),
    ):
        rookery.resume(path, quiet=True)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"run": 3, "recorder": {}, "steps": 96, "seconds": 1.0},
        {"run": {"roles": {}}, "recorder": {}, "steps": 96, "seconds": 1.0},
        {"run": {"roles": {"learner_0": {"net": {"a": torch.ones(3)}}}}, "recorder": {}, "steps": 96, "seconds": 1.0},
        {**STATE, "steps": "96"},
        {**STATE, "recorder": {**STATE["recorder"], "rows": "all"}},
    ],
    ids=["nothing", "number", "no learner", "another network", "steps", "rows"],
)
def test_a_checkpoint_of_something_else(state: dict[str, Any], trained: rookery.Run, tmp_path: Path) -> None:
    """Written by our own code, with right checksums, and still no state of this run."""
    path = copy_of(trained, tmp_path / "run")
    rookery.load(path).checkpoints.save(10**6, state)
    for use in (lambda: rookery.load(path).evaluate(2), lambda: rookery.resume(path, steps=2 * 10**6, quiet=True)):
        with pytest.raises(CheckpointError, match=r"is no run's: it has no usable /\w+"):
            use()


def test_a_checkpoint_of_another_network(trained: rookery.Run, tmp_path: Path) -> None:
    """In form a run's, and what its roles have saved is another's."""
    path = copy_of(trained, tmp_path / "run")
    rookery.load(path).checkpoints.save(10**6, STATE)
    with pytest.raises(CheckpointError, match=r"do not fit its network"):
        rookery.load(path).evaluate(2)
    with pytest.raises(RoleError, match=r"learner 0 .* is not one that it can go on from \(RuntimeError"):
        rookery.resume(path, steps=2 * 10**6, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"stepps": 3}}, r"stepps: no setting of Options; nearest: steps"),
        ({"options": {"steps": "many"}}, r"steps='many' is not of type int"),
        ({"options": {"steps": -5}}, r"steps=-5 is too small"),
        ({"options": []}, r"has no usable 'options'"),
        ({"options": None}, r"has no usable 'options'"),
        ({"algorithm": {"lr": [1]}}, r"lr=\(1,\) is not of type float"),
        ({"algorithm": {"lrr": 1.0}}, r"lrr: no setting of PPO; nearest: lr"),
        ({"algorithm": "PPO"}, r"has no usable 'algorithm'"),
        ({"system": "pppo"}, r"no system 'pppo'; nearest: ppo"),
        ({"system": 3}, r"has no usable 'system'"),
        ({"env": "CartPoel-v1"}, r"no backend has an environment 'CartPoel-v1'"),
        ({"env": ["a"]}, r"has no usable 'env'"),
        ({"own": 1}, r"has no usable 'own'"),
        ({"algorithm": {"hidden": [16]}}, r"do not fit its network"),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else "",
)
def test_a_config_that_was_tampered_with(
    change: dict[str, Any], message: str, trained: rookery.Run, tmp_path: Path
) -> None:
    path = copy_of(trained, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    for name, value in change.items():
        merged = isinstance(value, dict) and isinstance(config[name], dict)
        config[name] = {**config[name], **value} if merged else value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RunFolderError, CheckpointError), match=message) as caught:
        rookery.load(path).evaluate(2)
    assert not isinstance(caught.value, json.JSONDecodeError)


def test_a_config_that_is_no_json(trained: rookery.Run, tmp_path: Path) -> None:
    path = copy_of(trained, tmp_path / "run")
    (path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config\.json cannot be read"):
        rookery.load(path)
    with pytest.raises(RunFolderError, match="is no folder"):
        rookery.load(tmp_path / "nowhere")


def test_options_are_frozen_and_round_trip(trained: rookery.Run) -> None:
    options = rookery.Options(**{**RUN, "env_options": ("a=1", "b=x", 'c={"d": [1]}')})
    assert options.env_settings == {"a": 1, "b": "x", "c": {"d": [1]}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.steps = 3


class Broken(CartPole):
    """A vector environment whose step goes wrong as it was told."""

    wrong = ""

    def step(self, action: torch.Tensor) -> Step:
        step = super().step(action)
        if self.wrong == "raises":
            raise KeyError("physics")
        if self.wrong == "shape":
            return step._replace(obs=step.obs[:, :3])
        obs = step.obs.clone()
        obs[1] = float("nan")
        return step._replace(obs=obs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("raises", r"failed at step 1: KeyError: 'physics'"),
        ("shape", r"at step 1 gave obs of \[2, 3\] torch.float32; its spec says \[2, 4\]"),
        ("nan", r"at step 1 gave obs that is not finite in lane 1"),
    ],
)
def test_an_own_vector_environment_that_goes_wrong_is_named(tmp_path: Path, wrong: str, message: str) -> None:
    env = Broken(2)
    env.wrong, env.spec = wrong, dataclasses.replace(env.spec, backend="own")
    with pytest.raises(RoleError, match=message):
        rookery.train(PPO(unroll=4), env, steps=64, run_dir=tmp_path / "run", quiet=True, sinks=())


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"gamma": 2.0}, {"clip": 0.0}, {"hidden": (0,)}, {"entropy_coef": -1.0}]
)
def test_a_setting_that_cannot_work_is_refused_when_it_is_made(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(Refused, match=name):
        PPO(**settings)


def test_a_run_folder_names_no_module_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_import.py").write_text(
        "import gymnasium\ndef make(**kw):\n    return gymnasium.make('CartPole-v1', **kw)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = rookery.train(
        "ppo", "mine_to_import:make", steps=64, unroll=8, run_dir=tmp_path / "run", quiet=True, sinks=()
    )
    with pytest.raises(ValueError, match=r"its own env; load\(path, env=...\) needs it again"):
        rookery.load(run.path)
    assert len(rookery.load(run.path, env="mine_to_import:make").evaluate(2).returns) == 2


def test_a_script_that_would_train_again_in_each_process_is_told_so_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import rookery\n"
        f"rookery.train('ppo', {CART!r}, steps=64, envs=2, runtime='local', quiet=True, sinks=(), run_dir='run')\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "put what trains under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "script.py"]


def test_a_run_that_goes_on_is_not_resumed(trained: rookery.Run, tmp_path: Path) -> None:
    path = copy_of(trained, tmp_path / "run")
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    with rookery.load(path).folder.claimed():
        with pytest.raises(RunFolderError, match=r"run is being trained by another process; wait until"):
            rookery.resume(path, steps=500, quiet=True)
        assert {each: each.read_bytes() for each in path.rglob("*") if each.is_file()} == before
    assert rookery.resume(path, steps=128, quiet=True).summary["steps"] >= 128


def test_a_damaged_summary_is_written_anew(trained: rookery.Run, tmp_path: Path) -> None:
    path = copy_of(trained, tmp_path / "run")
    (path / "summary.json").write_text("{")
    assert rookery.resume(path, steps=128, quiet=True).summary["steps"] >= 128


def test_a_folder_whose_run_has_no_checkpoint(trained: rookery.Run, tmp_path: Path) -> None:
    path = copy_of(trained, tmp_path / "run")
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(RunFolderError, match=r"has no checkpoint: .* delete the folder, or name another one"):
        train(path)

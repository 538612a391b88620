"""What an update does: the losses of PPO and A2C against known numbers and each other, and the learner around them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rookery.actor import Collector
from rookery.algorithms.a2c import A2C
from rookery.algorithms.base import Algorithm, Batch, Loss, Now, OnPolicy
from rookery.algorithms.impala import IMPALA
from rookery.algorithms.ppo import PPO
from rookery.envs.make import make_env
from rookery.estimators import valid_mean
from rookery.learner import Learner, NonFinite, minibatches

NOW = Now(torch.tensor(1.0))
SMALL: dict[str, Any] = {"unroll": 12, "hidden": (16,), "anneal": False}
ENVS = {
    "discrete": ("tensor:CartPole-v1", {"max_steps": 5}),
    "continuous": ("tensor:Pendulum-v1", {"max_steps": 5}),
    "masked": ("tensor:ProbeMask-v0", {}),
    "tuple": ("tensor:ProbeTuple-v0", {}),
}


def collected(algorithm: Algorithm, env: str = "discrete", lanes: int = 6, seed: int = 0) -> tuple[Any, Batch]:
    """A network and an unroll that it filled; episodes are short, so that rows of every kind are in it."""
    id, options = ENVS[env]
    made = make_env(id, lanes, seed=seed, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = algorithm.networks(made.spec)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    collector = Collector(algorithm, net, made, algorithm.plan.unroll, seed)
    unroll = collector.slot()
    for _ in range(2):  # the second begins in the middle of episodes
        collector.fill(unroll)
    net.requires_grad_(True)
    batch = unroll.batch()
    assert not batch["valid"][:-1].all()
    assert batch["valid"][:-1].any()
    return net, batch


def learn(learner: Learner, unroll: Batch) -> dict[str, float]:
    """One round of updates; the metrics it reports."""
    learner.update(dict(unroll), learner.steps + int(unroll["valid"][:-1].sum()))
    return learner.metrics()


@pytest.mark.parametrize("vtrace", [False, True])
def test_bf16_holds_for_all_that_a_learner_asks_its_network(vtrace: bool) -> None:
    """Also for what is worked out before the losses, which for APPO is a pass over the whole unroll."""
    algorithm = PPO(vtrace=vtrace, **SMALL)
    net, batch = collected(algorithm)
    lowered: list[bool] = []
    next(net.children()).register_forward_pre_hook(lambda *_: lowered.append(torch.is_autocast_enabled("cpu")))
    for bf16 in (False, True):
        lowered.clear()
        learn(Learner(algorithm, net, 10_000, 0, bf16=bf16), batch)
        assert len(lowered) >= algorithm.epochs * algorithm.minibatches
        assert set(lowered) == {bf16}


def prepared(algorithm: Algorithm, net: Any, unroll: Batch) -> Batch:
    """What the loss reads, in the shape of a single minibatch."""
    with torch.no_grad():
        data = algorithm.prepare(net, dict(unroll))
    if algorithm.plan.sequences:
        return data
    return {name: value if name == "state" else value.flatten(0, 1) for name, value in data.items()}


def gradient(algorithm: Algorithm, net: Any, batch: Batch) -> Tensor:
    net.zero_grad()
    algorithm.loss(net, None, batch, NOW).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


# PPO


def ppo_loss(log_prob: Tensor, said: Tensor | None = None, **batch: Any) -> Loss:
    """The loss of rows for a network that says exactly this log_prob and value; `batch` may hold settings too."""
    rows = len(log_prob)
    policy = SimpleNamespace(log_prob=lambda action: log_prob, entropy=lambda: torch.zeros(rows))
    said = torch.zeros(rows) if said is None else said
    zeros = dict.fromkeys(("log_prob", "value", "target", "advantage"), torch.zeros(rows))
    names = dict.fromkeys(("obs", "action", "state", "start"))
    settings = {name: batch.pop(name) for name in ("clip", "clip_value", "anneal") if name in batch}
    given = {**names, **zeros, "valid": torch.ones(rows, dtype=torch.bool), **batch}
    now = Now(given.pop("remaining", NOW.remaining))
    return PPO(**{"anneal": False, **settings}).loss(lambda *_: ((policy, said), None), None, given, now)


def test_ppo_surrogate_golden() -> None:
    """(r, A) gives min(r·A, clip(r)·A), ε = 0.2: (1.3, 1) 1.2, (0.7, 1) 0.7, (1.3, −1) −1.3, (0.7, −1) −0.8."""
    log_prob = torch.tensor([1.3, 0.7, 1.3, 0.7]).log().requires_grad_()
    loss = ppo_loss(log_prob, advantage=torch.tensor([1.0, 1.0, -1.0, -1.0]))  # normalised already
    assert math.isclose(loss.metrics["policy_loss"], -(1.2 + 0.7 - 1.3 - 0.8) / 4, abs_tol=1e-6)
    loss.loss.backward()
    expected = torch.tensor([0.0, -0.7, 1.3, 0.0]) / 4  # clipped rows have no gradient
    torch.testing.assert_close(log_prob.grad, expected)
    assert loss.metrics["clip_fraction"] == 1.0
    kl = sum(ratio - 1 - math.log(ratio) for ratio in (1.3, 0.7)) / 2
    assert math.isclose(loss.metrics["approx_kl"], kl, rel_tol=1e-5)


def test_ppo_normalises_advantages_over_the_minibatch() -> None:
    advantage = torch.tensor([3.0, 7.0, 5.0, 1.0])
    log_prob = torch.zeros(4, requires_grad=True)
    ppo_loss(log_prob, advantage=advantage).loss.backward()
    normal = (advantage - advantage.mean()) / advantage.std(correction=0)
    torch.testing.assert_close(log_prob.grad, -normal / 4)


@pytest.mark.parametrize(("clip_value", "expected"), [(False, (0.5**2 + 1.0**2) / 4), (True, (0.8**2 + 1.0**2) / 4)])
def test_ppo_value_clipping(clip_value: bool, expected: float) -> None:
    """The larger of the errors of the value and of the value kept within 0.2 of the old one."""
    said, old, target = torch.tensor([0.5, 0.0]), torch.zeros(2), torch.ones(2)
    loss = ppo_loss(torch.zeros(2), said, value=old, target=target, clip_value=clip_value)
    assert math.isclose(loss.metrics["value_loss"], expected, rel_tol=1e-6)


def test_ppo_clip_range_is_annealed() -> None:
    log_prob = torch.tensor([1.15, 1 / 1.15]).log()
    for remaining, share in ((1.0, 0.0), (0.5, 1.0)):
        loss = ppo_loss(log_prob, anneal=True, remaining=torch.tensor(remaining))
        assert loss.metrics["clip_fraction"] == share


@pytest.mark.parametrize("memory", ["none", "lstm", "gru"])
@pytest.mark.parametrize("env", ENVS)
def test_ratio_is_one_before_the_first_update(env: str, memory: Any) -> None:
    """The learner computes the very probabilities that the actor acted with, episode ends and memory included."""
    algorithm = PPO(**SMALL, memory=memory, memory_size=8, normalize_obs=env == "discrete")
    net, unroll = collected(algorithm, env)
    batch = prepared(algorithm, net, unroll)
    (policy, value), _ = net(batch["obs"], batch["state"], batch["start"])
    ratio = (policy.log_prob(batch["action"]) - batch["log_prob"]).exp()[batch["valid"]]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)
    torch.testing.assert_close(value, batch["value"], atol=1e-5, rtol=1e-5)


# A2C


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("env", ENVS)
def test_a2c_is_ppo_with_one_pass(env: str, memory: Any) -> None:
    """One epoch, one minibatch, λ = 1; PPO's advantages are normalised, A2C's are not, so A2C is given PPO's."""
    shared = {**SMALL, "memory": memory, "memory_size": 8, "lam": 1.0, "entropy_coef": 0.02, "value_coef": 0.7}
    ppo, a2c = PPO(**shared, epochs=1, minibatches=1), A2C(**shared)
    net, unroll = collected(ppo, env)
    theirs, ours = prepared(ppo, net, unroll), prepared(a2c, net, unroll)
    torch.testing.assert_close(ours["advantage"], theirs["advantage"], rtol=0, atol=0)
    torch.testing.assert_close(ours["target"], theirs["target"], rtol=0, atol=0)

    advantage, valid = ours["advantage"], ours["valid"]
    centred = advantage - valid_mean(advantage, valid)
    ours = {**ours, "advantage": centred / (valid_mean(centred.square(), valid).sqrt() + 1e-8)}
    found, expected = gradient(a2c, net, ours), gradient(ppo, net, theirs)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# IMPALA and APPO


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("env", ENVS)
def test_impala_is_a2c_on_its_own_data(env: str, memory: Any) -> None:
    """Without lag every ratio is 1, and V-trace's targets are n-step returns (Espeholt et al. 2018, remark 1)."""
    shared = {**SMALL, "memory": memory, "memory_size": 8, "entropy_coef": 0.02, "value_coef": 0.7}
    impala, a2c = IMPALA(**shared), A2C(**shared, lam=1.0)
    net, unroll = collected(impala, env)
    with torch.no_grad():
        unroll["value"] = net(unroll["obs"], unroll["state"], unroll["start"])[0].value
    found, expected = (
        gradient(impala, net, prepared(impala, net, unroll)),
        gradient(a2c, net, prepared(a2c, net, unroll)),
    )
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("correction", ["vtrace", "none"])
def test_impala_weighs_what_older_weights_did(correction: Any) -> None:
    """The policy's gradient is ρ (r + γv' − V) ∇log π, with ρ = min(1, π/μ), by hand on one step of three lanes."""
    impala = IMPALA(correction=correction, value_coef=0.0, entropy_coef=0.0, gamma=0.5)
    log_prob, value = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 1.0, 1.0], [4.0, 4.0, 4.0]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    batch = {"obs": value, "action": value, "state": value, "start": value, "reward": torch.full((1, 3), 2.0)}
    batch |= {"valid": ~none, "truncated": none, "terminated": torch.tensor([[False, False, True]])}
    batch["log_prob"] = torch.tensor([[0.5, 2.0, 1.0]]).log()  # μ, while π = 1
    policy = SimpleNamespace(log_prob=lambda action: log_prob, entropy=lambda: torch.zeros(2, 3))
    impala.loss(lambda *_: ((policy, value), None), None, batch, NOW).loss.backward()
    rho = torch.tensor([1.0, 0.5, 1.0]) if correction == "vtrace" else torch.ones(3)
    advantage = rho * torch.tensor([2 + 0.5 * 4 - 1, 2 + 0.5 * 4 - 1, 2.0 - 1])
    torch.testing.assert_close(log_prob.grad, torch.stack([-advantage / 3, torch.zeros(3)]))


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("env", ENVS)
def test_appo_is_ppo_on_its_own_data(env: str, memory: Any) -> None:
    shared = {**SMALL, "memory": memory, "memory_size": 8, "lam": 1.0}
    appo, ppo = PPO(**shared, vtrace=True), PPO(**shared)
    net, unroll = collected(appo, env)
    ours, theirs = prepared(appo, net, unroll), prepared(ppo, net, unroll)
    valid = ours["valid"]
    for name in ("advantage", "target", "value"):
        torch.testing.assert_close(ours[name][valid], theirs[name][valid], rtol=1e-4, atol=1e-4)


class TwoPasses(PPO):
    """Works out V-trace before the loss, as where a batch is for several updates."""

    once = False


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("env", ENVS)
def test_one_pass_for_vtrace_and_loss_is_two(env: str, memory: Any) -> None:
    how = {**SMALL, "epochs": 1, "minibatches": 1, "memory": memory, "memory_size": 8, "vtrace": True}
    one, two = PPO(**how), TwoPasses(**how)
    net, unroll = collected(one, env)
    with torch.no_grad():  # newer than what acted
        for parameter in net.parameters():
            parameter.mul_(1.3)
    assert "advantage" not in prepared(one, net, unroll)
    (ours, own), (theirs, own_too) = (
        (each.loss(net, None, batch, NOW).metrics, gradient(each, net, batch))
        for each in (one, two)
        for batch in [prepared(each, net, unroll)]
    )
    torch.testing.assert_close(own, own_too, rtol=1e-4, atol=1e-6)
    assert ours["approx_kl"] > 0
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


# Rows that no action was applied in


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("env", ENVS)
def test_invalid_rows_teach_nothing(env: str, memory: Any, algorithm: Any) -> None:
    algorithm = algorithm(**SMALL, memory=memory, memory_size=8)
    net, unroll = collected(algorithm, env)
    batch = prepared(algorithm, net, unroll)
    before = algorithm.loss(net, None, batch, NOW)
    expected = gradient(algorithm, net, batch)

    changed = dict(batch)
    generator = torch.Generator().manual_seed(1)
    for name in ("advantage", "target", "log_prob", "value"):
        if name in batch:
            noise = torch.randn(batch[name].shape, generator=generator) * 5
            changed[name] = torch.where(batch["valid"], batch[name], noise)
    if isinstance(batch["obs"], Tensor):
        shape = (*batch["valid"].shape, *(1,) * (batch["obs"].dim() - batch["valid"].dim()))
        noise = torch.randn(batch["obs"].shape, generator=generator)
        changed["obs"] = torch.where(batch["valid"].view(shape), batch["obs"], noise)

    after = algorithm.loss(net, None, changed, NOW)
    for name in before.metrics:
        torch.testing.assert_close(after.metrics[name], before.metrics[name], msg=name)
    torch.testing.assert_close(gradient(algorithm, net, changed), expected)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_valid_rows_do_teach(algorithm: Any) -> None:
    """The counterpart: the test above could not pass by ignoring everything."""
    algorithm = algorithm(**SMALL)
    net, unroll = collected(algorithm)
    batch = prepared(algorithm, net, unroll)
    expected = gradient(algorithm, net, batch)
    row = int(batch["valid"].nonzero()[0])
    batch["target"][row] += 1.0
    assert not torch.allclose(gradient(algorithm, net, batch), expected)


def test_normalisers_leave_out_invalid_rows() -> None:
    algorithm = PPO(**SMALL, normalize_obs=True, normalize_reward=True)
    net, unroll = collected(algorithm)
    algorithm.finish(net, unroll)
    expected = {name: value.clone() for name, value in net.named_buffers()}
    again, _ = collected(algorithm)
    valid = unroll["valid"]
    valid[-1] = False  # the last row is the next unroll's first
    unroll["obs"] = torch.where(valid.unsqueeze(-1), unroll["obs"], torch.full_like(unroll["obs"], 1e6))
    unroll["discounted_return"] = torch.where(valid, unroll["discounted_return"], torch.tensor(-1e6))
    algorithm.finish(again, unroll)
    assert expected
    for name, value in again.named_buffers():
        torch.testing.assert_close(value, expected[name], msg=name)


# The learner


def learner_of(algorithm: Algorithm, **collecting: Any) -> tuple[Learner, Batch]:
    net, unroll = collected(algorithm, **collecting)
    return Learner(algorithm, net, total_steps=10_000, seed=0), unroll


def test_kl_stop_leaves_out_the_rest_of_a_batch() -> None:
    settings = {**SMALL, "epochs": 4, "minibatches": 2, "lr": 1e-2}
    free, unroll = learner_of(PPO(**settings))
    learn(free, unroll)
    assert free.updates == 8
    stopped, unroll = learner_of(PPO(**settings, target_kl=1e-5))
    metrics = learn(stopped, unroll)
    assert 1 <= stopped.updates < 8
    assert metrics["updates"] == stopped.updates
    assert metrics["approx_kl"] <= 1e-5  # of the minibatches that were learnt from
    patient, unroll = learner_of(PPO(**settings, target_kl=1e5))
    learn(patient, unroll)
    assert patient.updates == 8
    for mine, theirs in zip(free.net.parameters(), patient.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@dataclass(frozen=True)
class Sgd(A2C):
    """A2C whose step is its gradient."""

    def optimizer(self, parameters: Any, lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("most", [None, 0.05, 1e6])
def test_gradient_clipping(most: float | None) -> None:
    algorithm = Sgd(**SMALL, lr=0.1, max_grad_norm=most)
    learner, unroll = learner_of(algorithm)
    before = learner.flat.values()
    exact = gradient(algorithm, learner.net, prepared(algorithm, learner.net, unroll)).norm()
    metrics = learn(learner, unroll)
    moved = before - learner.flat.values()
    torch.testing.assert_close(torch.tensor(metrics["grad_norm"]), exact)  # before clipping
    assert exact > 0.05
    expected = exact if most is None else min(exact, torch.tensor(most))
    torch.testing.assert_close(moved.norm(), 0.1 * expected, rtol=1e-3, atol=1e-6)


def test_annealing_follows_the_steps() -> None:
    learner, unroll = learner_of(PPO(**{**SMALL, "anneal": True}, lr=1e-3))
    first = learn(learner, unroll)
    assert math.isclose(first["lr"], 1e-3, rel_tol=1e-6)
    assert learner.steps == int(unroll["valid"][:-1].sum())
    learner.steps = 7_500
    assert math.isclose(learn(learner, unroll)["lr"], 0.25e-3, rel_tol=1e-6)
    assert float(learner.remaining) == 0.25
    learner.steps = 20_000
    assert learn(learner, unroll)["lr"] == 0.0


@pytest.mark.parametrize("sequences", [False, True])
def test_every_epoch_sees_every_row_once(sequences: bool) -> None:
    learner, _ = learner_of(PPO(**SMALL))
    steps, lanes = 6, 8
    rows = torch.arange(steps * lanes).view(steps, lanes)
    data = {"row": rows, "valid": torch.ones(steps, lanes, dtype=torch.bool), "state": torch.arange(lanes).unsqueeze(1)}
    parts = list(minibatches(OnPolicy(steps, epochs=3, minibatches=4, sequences=sequences), data, learner.generator))
    assert len(parts) == 12
    orders = []
    for epoch in range(3):
        seen = [part["row"] for part in parts[4 * epoch : 4 * epoch + 4]]
        assert sorted(torch.cat([part.flatten() for part in seen]).tolist()) == list(range(steps * lanes))
        orders.append(torch.cat([part.flatten() for part in seen]).tolist())
    assert len({tuple(order) for order in orders}) == 3
    if sequences:
        for part in parts:  # whole lanes in order of time, each with its own state
            assert torch.equal(part["row"][0], part["state"].squeeze(1))
            assert torch.equal(part["row"], part["row"][0] + lanes * torch.arange(steps).unsqueeze(1))


def test_state_goes_on_bit_for_bit() -> None:
    algorithm = PPO(**SMALL, normalize_obs=True, epochs=2, minibatches=2)
    one, unroll = learner_of(algorithm)
    learn(one, unroll)
    saved = {name: _copy(value) for name, value in one.state().items()}
    learn(one, unroll)
    two, _ = learner_of(algorithm, seed=5)
    two.load_state(saved)
    learn(two, unroll)
    for (name, mine), theirs in zip(one.net.state_dict().items(), two.net.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert (one.steps, one.updates, one.version) == (two.steps, two.updates, two.version)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(child) for name, child in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    ("name", "message"),
    [("obs", "the batch's obs"), ("reward", "the batch's advantage"), ("log_prob", "the batch's log_prob")],
)
def test_a_nan_in_the_data_stops_before_the_weights(name: str, message: str) -> None:
    learner, unroll = learner_of(PPO(**SMALL))
    unroll = {**unroll, name: unroll[name].clone()}
    unroll[name][2, 1] = float("nan")
    before = learner.flat.values()
    with pytest.raises(NonFinite, match=rf"^{message} is not finite at update \d+ \(step 0\)"):
        learn(learner, unroll)
    if learner.updates == 0:
        assert torch.equal(learner.flat.values(), before)
    assert learner.flat.values().isfinite().all()


def test_a_nan_in_the_loss_is_named() -> None:
    @dataclass(frozen=True)
    class Broken(A2C):
        def loss(self, net: Any, target: None, batch: Batch, now: Now) -> Loss:
            loss = super().loss(net, target, batch, now)
            return loss._replace(loss=loss.loss * math.nan, metrics={**loss.metrics, "own": loss.loss.detach() / 0})

    learner, unroll = learner_of(Broken(**SMALL))
    with pytest.raises(NonFinite, match="the loss's own is not finite at update 1"):
        learn(learner, unroll)


def test_algorithms_are_their_settings() -> None:
    for kind in (PPO, A2C):
        assert dataclasses.replace(kind(), lr=1.0) == kind(lr=1.0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().lr = 1.0

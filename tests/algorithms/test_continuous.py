"""DDPG, TD3, SAC, D4PG and MPO: each part gets the gradient of a straight-line twin of its own loss, in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence
from torch.nn import functional as F

from rookery.algorithms.base import Algorithm, Batch, Explore, Now, Refused
from rookery.algorithms.continuous import with_noise
from rookery.algorithms.d4pg import D4PG
from rookery.algorithms.ddpg import DDPG
from rookery.algorithms.mpo import MPO, reweighted
from rookery.algorithms.sac import SAC, soft_value
from rookery.algorithms.td3 import TD3
from rookery.envs.spec import EnvSpec
from rookery.learner import Learner
from rookery.nn.heads import Categorical, SquashedGaussian

N, A = 6, 2
OBS = spaces.Box(-1, 1, (4,))
BOX, CHOICE = spaces.Box(-1, 1, (A,)), spaces.Discrete(3)
SMALL: dict[str, Any] = {"hidden": (8, 8), "batch": N}
EVERYTHING = ("critic", "actor", "temperature", "duals")
Losses = dict[str, Tensor]  # by part


def spec(action: spaces.Space = BOX, obs: spaces.Space = OBS) -> EnvSpec:
    return EnvSpec("Test-v0", "own", obs, action)


def set_up(algorithm: Algorithm, action: spaces.Space = BOX, seed: int = 0) -> tuple[Any, Any, Batch]:
    """A network in float64, a slow copy that differs from it, and a batch with its noise; two samples terminated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = algorithm.networks(spec(action)).double()
        target = copy.deepcopy(net)
        for parameter in weights(net, target):
            parameter.data += 0.2 * torch.randn_like(parameter)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    taken = torch.randint(3, (N,), generator=generator) if action is CHOICE else normal(N, A).clamp(-1, 1)
    batch = {"obs": normal(N, 4), "next_obs": normal(N, 4), "action": taken, "reward": normal(N)}
    batch |= {"discount": torch.tensor([0.9, 0.0] + [0.9] * (N - 3) + [0.0]).double(), "weight": normal(N).exp()}
    for name, drawn in algorithm.noise(net, batch, generator).items():
        batch[name] = drawn.double() if drawn.is_floating_point() else drawn
    return net, target, batch


def weights(*nets: Any) -> list[Tensor]:
    return [parameter for net in nets for name, parameter in net.named_parameters() if not name.startswith("duals")]


def mlp(x: Tensor, layers: Any) -> Tensor:
    for layer in layers:
        x = F.linear(x, layer.weight, layer.bias).relu()
    return x


def q(net: Any, obs: Tensor, action: Tensor | None = None) -> Tensor:
    """`[K, N, outputs]`, one critic after another."""
    said = []
    for k in range(len(net.critics.layers[0].weight)):
        x = obs if action is None else torch.cat([obs, action], -1)
        for layer in net.critics.layers:
            last = layer is net.critics.layers[-1]
            x = x @ layer.weight[k] + layer.bias[k]
            x = x if last else x.relu()
        said.append(x)
    return torch.stack(said)


def mu(net: Any, obs: Tensor) -> Tensor:
    return torch.tanh(F.linear(mlp(obs, net.actor.mlp.layers), net.actor.head[0].weight, net.actor.head[0].bias))


def normal_policy(net: Any, obs: Tensor) -> Normal:
    mean, log_std = net.actor.head.linear(mlp(obs, net.actor.mlp.layers)).chunk(2, -1)
    return Normal(mean, log_std.exp())


def twin_ddpg(algorithm: DDPG, net: Any, target: Any, batch: Batch) -> Losses:
    obs, following = batch["obs"], batch["next_obs"]
    y = batch["reward"] + batch["discount"] * q(target, following, mu(target, following))[0, :, 0]
    critic = (batch["weight"] * (q(net, obs, batch["action"])[0, :, 0] - y.detach()) ** 2).mean()
    return {"critic": critic, "actor": -q(net, obs, mu(net, obs))[0, :, 0].mean()}


def twin_td3(algorithm: TD3, net: Any, target: Any, batch: Batch) -> Losses:
    obs, following = batch["obs"], batch["next_obs"]
    noise = (algorithm.smoothing * batch["next_noise"]).clip(-algorithm.smoothing_clip, algorithm.smoothing_clip)
    action = (mu(target, following) + noise).clip(-1, 1)
    first, second = q(target, following, action)[..., 0]
    y = (batch["reward"] + batch["discount"] * torch.minimum(first, second)).detach()
    critic = sum((batch["weight"] * (value - y) ** 2).mean() for value in q(net, obs, batch["action"])[..., 0])
    return {"critic": critic, "actor": -q(net, obs, mu(net, obs))[0, :, 0].mean()}


def twin_d4pg(algorithm: D4PG, net: Any, target: Any, batch: Batch) -> Losses:
    obs, following = batch["obs"], batch["next_obs"]
    support = torch.linspace(algorithm.v_min, algorithm.v_max, algorithm.atoms, dtype=torch.float64)
    gap = float(support[1] - support[0])
    probability = q(target, following, mu(target, following))[0].softmax(-1).detach()
    aim = torch.zeros_like(probability)
    for n in range(N):
        for j in range(algorithm.atoms):
            place = float(batch["reward"][n] + batch["discount"][n] * support[j])
            place = (min(max(place, algorithm.v_min), algorithm.v_max) - algorithm.v_min) / gap
            low = min(int(place), algorithm.atoms - 2)
            aim[n, low] += probability[n, j] * (low + 1 - place)
            aim[n, low + 1] += probability[n, j] * (place - low)
    critic = -(batch["weight"] * (aim * q(net, obs, batch["action"])[0].log_softmax(-1)).sum(-1)).mean()
    return {"critic": critic, "actor": -(q(net, obs, mu(net, obs))[0].softmax(-1) @ support).mean()}


def twin_sac(algorithm: SAC, net: Any, target: Any, batch: Batch) -> Losses:
    obs, following, log_alpha = batch["obs"], batch["next_obs"], net.duals["log_temperature"]
    alpha = log_alpha.exp().detach()

    def sample(states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        normal = normal_policy(net, states)
        squashed = TransformedDistribution(Independent(normal, 1), TanhTransform(cache_size=1))
        action = torch.tanh(normal.mean + normal.stddev * noise)
        return action, squashed.log_prob(action)

    action, log_prob = sample(following, batch["next_noise"])
    judges = batch.get("judges", torch.arange(algorithm.critics))
    lowest = q(target, following, action)[judges, :, 0].min(0).values
    y = (batch["reward"] + batch["discount"] * (lowest - alpha * log_prob)).detach()
    critic = sum((0.5 * batch["weight"] * (value - y) ** 2).mean() for value in q(net, obs, batch["action"])[..., 0])
    action, log_prob = sample(obs, batch["noise"])
    values = q(net, obs, action)[..., 0]
    value = values.mean(0) if algorithm.target_critics < algorithm.critics else values.min(0).values
    aim = -A if algorithm.target_entropy is None else algorithm.target_entropy
    temperature = (-log_alpha * (log_prob + aim).detach()).mean()
    return {"critic": critic, "actor": (alpha * log_prob - value).mean(), "temperature": temperature}


def twin_discrete_sac(algorithm: SAC, net: Any, target: Any, batch: Batch) -> Losses:
    obs, following, log_alpha = batch["obs"], batch["next_obs"], net.duals["log_temperature"]
    alpha = log_alpha.exp().detach()

    def policy(states: Tensor) -> Tensor:
        return net.actor.head.linear(mlp(states, net.actor.mlp.layers)).softmax(-1)

    critic, actor, entropy = torch.zeros(()).double(), torch.zeros(()).double(), torch.zeros(()).double()
    for n in range(N):
        pi, lowest = policy(following)[n], q(target, following)[:, n].min(0).values
        v = sum(pi[a] * (lowest[a] - alpha * pi[a].log()) for a in range(3))
        y = (batch["reward"][n] + batch["discount"][n] * v).detach()
        for k in range(algorithm.critics):
            critic = critic + 0.5 * batch["weight"][n] * (q(net, obs)[k, n, batch["action"][n]] - y) ** 2 / N
        pi, lowest = policy(obs)[n], q(net, obs)[:, n].min(0).values.detach()
        actor = actor + sum(pi[a] * (alpha * pi[a].log() - lowest[a]) for a in range(3)) / N
        entropy = entropy - sum(pi[a] * pi[a].log() for a in range(3)) / N
    temperature = log_alpha * (entropy.detach() - 0.5 * math.log(3))
    return {"critic": critic, "actor": actor, "temperature": temperature}


def twin_mpo(algorithm: MPO, net: Any, target: Any, batch: Batch) -> Losses:
    obs, following, samples = batch["obs"], batch["next_obs"], algorithm.samples
    old, new, then = normal_policy(target, obs), normal_policy(net, obs), normal_policy(target, following)
    old = Normal(old.mean.detach(), old.stddev.detach())
    dual = {name: torch.log1p(raw.exp()) + 1e-8 for name, raw in net.duals.items()}
    value, fit = torch.zeros(N, samples).double(), torch.zeros(()).double()
    beyond, y = torch.zeros(N, samples).double(), batch["reward"].clone()
    actions = [old.mean + old.stddev * batch["noise"][:, m] for m in range(samples)]
    for m, action in enumerate(actions):
        inside = action.clip(-1, 1)
        value[:, m] = q(target, obs, inside)[0, :, 0].detach()
        beyond[:, m] = -(action - inside).square().sum(-1).sqrt()
        next_action = (then.mean + then.stddev * batch["next_noise"][:, m]).clip(-1, 1)
        y = y + batch["discount"] * q(target, following, next_action)[0, :, 0].detach() / samples
    critic = (batch["weight"] * (q(net, obs, batch["action"])[0, :, 0] - y) ** 2).mean()

    weight = (value / dual["temperature"].detach()).softmax(1) + (beyond / dual["penalty"].detach()).softmax(1)
    moved, spread = Normal(new.mean, old.stddev), Normal(old.mean, new.stddev)
    for m, action in enumerate(actions):
        log_prob = moved.log_prob(action).sum(-1) + spread.log_prob(action).sum(-1)
        fit = fit - (weight[:, m] * log_prob).mean()
    kl_mean, kl_std = kl_divergence(old, moved).mean(0), kl_divergence(old, spread).mean(0)
    actor = fit + (dual["mean"].detach() * kl_mean).sum() + (dual["std"].detach() * kl_std).sum()
    duals = (dual["mean"] * (algorithm.epsilon_mean - kl_mean.detach())).sum()
    duals = duals + (dual["std"] * (algorithm.epsilon_std - kl_std.detach())).sum()
    for eta, score, epsilon in (
        (dual["temperature"], value, algorithm.epsilon),
        (dual["penalty"], beyond, algorithm.epsilon_penalty),
    ):
        duals = duals + eta * (epsilon + (score / eta).exp().mean(1).log().mean())
    return {"critic": critic, "actor": actor, "duals": duals}


ALL: dict[str, tuple[Algorithm, Any, spaces.Space]] = {
    "ddpg": (DDPG(**SMALL), twin_ddpg, BOX),
    "td3": (TD3(**SMALL), twin_td3, BOX),
    "td3 clipped": (TD3(**SMALL, smoothing=2.0), twin_td3, BOX),
    "d4pg": (D4PG(**SMALL, atoms=11, v_min=-2.0, v_max=1.5), twin_d4pg, BOX),
    "sac": (SAC(**SMALL), twin_sac, BOX),
    "redq": (SAC(**SMALL, critics=5, target_critics=2, target_entropy=0.3), twin_sac, BOX),
    "discrete sac": (SAC(**SMALL), twin_discrete_sac, CHOICE),
    "mpo": (MPO(**SMALL, samples=4), twin_mpo, BOX),
}
KINDS = {name: ALL[name] for name in ("ddpg", "td3", "d4pg", "sac", "discrete sac", "mpo")}


@pytest.mark.parametrize("name", ALL)
def test_each_part_has_the_gradient_of_its_own_loss(name: str) -> None:
    algorithm, twin, action = ALL[name]
    net, target, batch = set_up(algorithm, action)
    if name == "mpo":
        for raw, value in zip(net.duals.values(), (0.7, 0.2, 1.5, 3.0), strict=True):
            raw.data.fill_(value)
    ours = algorithm.loss(net, target, batch, Now(torch.tensor(1.0), EVERYTHING)).loss
    ours.backward()
    losses = twin(algorithm, net, target, batch)
    parts = algorithm.parts(net)
    assert parts.keys() == losses.keys()
    for part, (parameters, *_) in parts.items():
        expected = torch.autograd.grad(losses[part], parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert gradient.any() or part == "critic"
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_no_next_state_counts_where_the_episode_terminated(name: str) -> None:
    """Truncated samples come with their discount, and so bootstrap."""
    algorithm, _, action = KINDS[name]
    net, target, batch = set_up(algorithm, action)
    now = Now(torch.tensor(1.0), ("critic",))
    before = algorithm.loss(net, target, batch, now)
    for rows, same in ((batch["discount"] == 0, True), (batch["discount"] > 0, False)):
        other = {**batch, "next_obs": torch.where(rows[:, None], batch["next_obs"] + 1, batch["next_obs"])}
        after = algorithm.loss(net, target, other, now)
        assert torch.allclose(before.priorities, after.priorities, rtol=1e-12) == same
        assert torch.allclose(before.loss, after.loss, rtol=1e-12) == same


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_one_graph(name: str) -> None:
    torch.compiler.reset()
    algorithm, _, action = KINDS[name]
    net, target, batch = set_up(algorithm, action)
    now = Now(torch.tensor(1.0).double(), EVERYTHING)

    def loss(batch: Batch) -> Tensor:
        return algorithm.loss(net, target, batch, now).loss

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(batch), loss(batch))


BANDIT: dict[str, Any] = {"hidden": (32, 32), "activation": "silu", "lr": 3e-3}
BANDIT["actor_lr"] = 1e-3  # or it is at the edge before the critic knows better
SOLVERS: dict[str, tuple[Algorithm, spaces.Space]] = {
    "ddpg": (DDPG(**BANDIT), BOX),
    "td3": (TD3(**BANDIT), BOX),
    "d4pg": (D4PG(**BANDIT, target_period=10, v_min=-2.0, v_max=0.2), BOX),
    "sac": (SAC(**BANDIT, target_entropy=-4.0), BOX),
    "discrete sac": (SAC(**BANDIT, target_entropy=0.1), CHOICE),
    "mpo": (MPO(**BANDIT, target_period=10, dual_lr=0.1, std=0.3, epsilon_mean=0.05), BOX),
}


def learnt(algorithm: Algorithm, action: spaces.Space, updates: int) -> Learner:
    """From random actions in one state: -2(a - 0.4)^2, or 1 for the second choice, and then the episode is over.

    It ends in another state, which says nothing of the first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = algorithm.networks(spec(action))
    learner, generator = Learner(algorithm, net, updates, 0), torch.Generator().manual_seed(0)
    obs = torch.zeros(64, 4)
    for update in range(updates):
        if update == updates - 20:
            learner.metrics()
        taken = torch.rand(64, A, generator=generator) * 2 - 1
        reward = -2 * (taken - 0.4).square().sum(-1)
        if action is CHOICE:
            taken = torch.randint(3, (64,), generator=generator)
            reward = (taken == 1).float()
        batch = {"obs": obs, "next_obs": obs + 3, "action": taken, "reward": reward}
        learner.update({**batch, "discount": torch.zeros(64), "weight": torch.ones(64)}, 0)
    return learner


@pytest.mark.parametrize("name", SOLVERS)
def test_finds_the_best_action_of_one_state(name: str) -> None:
    algorithm, action = SOLVERS[name]
    learner = learnt(algorithm, action, 500 * getattr(algorithm, "policy_delay", 1))
    greedy = algorithm.act(learner.net, torch.zeros(1, 4), torch.zeros(1, 0), None).action
    best = torch.tensor([1]) if action is CHOICE else torch.full((1, A), 0.4)
    torch.testing.assert_close(greedy, best, atol=0.2, rtol=0)


@pytest.mark.parametrize(("action", "aim"), [(BOX, -1.0), (BOX, 0.5), (CHOICE, 0.7)])
def test_the_temperature_settles_where_entropy_is_as_asked(action: spaces.Space, aim: float) -> None:
    algorithm = SAC(hidden=(32, 32), activation="tanh", lr=1e-2, target_entropy=aim)
    assert learnt(algorithm, action, 800).metrics()["entropy"] == pytest.approx(aim, abs=0.15)


def test_golden_vectors() -> None:
    weight, dual = reweighted(torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor(1.0).double(), 0.1)
    torch.testing.assert_close(weight[0], torch.tensor([0.090031, 0.244728, 0.665241]).double(), atol=1e-6, rtol=0)
    assert dual.item() == pytest.approx(2.408994, abs=1e-6)
    policy = SquashedGaussian(torch.zeros(1, 1).double(), torch.zeros(1, 1).double())
    value, log_prob = soft_value(policy, lambda action: action[:, 0], torch.tensor(2.0), torch.full((1, 1), 0.5))
    assert log_prob.item() == pytest.approx(-0.803710, abs=1e-6)
    assert value.item() == pytest.approx(math.tanh(0.5) + 2 * 0.803710, abs=1e-6)


def test_large_rewards_do_not_slow_the_multipliers_of_mpo() -> None:
    """The gradient of a multiplier is ε − KL: clipped with the critics, it would be no more than the ε of Adam."""
    algorithm = MPO(**SMALL)
    learner = Learner(algorithm, algorithm.networks(spec(BOX)), 1, 0)
    batch = {"obs": torch.randn(N, 4), "next_obs": torch.randn(N, 4), "action": torch.rand(N, A) * 2 - 1}
    batch |= {"reward": torch.full((N,), -1e4), "discount": torch.zeros(N), "weight": torch.ones(N)}
    before = learner.net.duals["std"].detach().clone()
    learner.update(batch, 0)
    moved = before - learner.net.duals["std"].detach()
    torch.testing.assert_close(moved, torch.full((A,), algorithm.dual_lr), atol=0.0, rtol=0.05)


def test_the_dual_of_the_temperature_bounds_the_weights() -> None:
    """At the minimum of g(η) the KL of the weights to equal ones is ε (2018a, E-step)."""
    value, eta = torch.randn(7, 20).double(), torch.tensor(1.0).double().requires_grad_()
    optimizer = torch.optim.LBFGS([eta], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reweighted(value, eta, 0.1)[1]
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = reweighted(value, eta, 0.1)[0].detach()
    assert (weight * (weight * 20).log()).sum(1).mean().item() == pytest.approx(0.1, abs=1e-4)


def test_discrete_soft_value_is_the_mean_over_samples_and_ignores_masked_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    mask, alpha = torch.tensor([[True, False, True, True]]), torch.tensor(0.5)
    policy, values = Categorical.of(torch.randn(1, 4, generator=generator), mask), torch.tensor([[1.0, 1e6, -2.0, 0.5]])
    value, log_prob = soft_value(policy, lambda _: values, alpha, None)
    samples = torch.multinomial(policy.logits.exp().expand(200_000, 4), 1, generator=generator)
    logs = policy.logits[0, samples]
    torch.testing.assert_close(log_prob[0], logs.mean(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(value[0], (values[0, samples] - alpha * logs).mean(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("name", "every"), [("td3", 3), ("sac", 2)])
def test_a_delayed_policy_moves_with_every_so_many_updates(name: str, every: int) -> None:
    algorithm = type(ALL[name][0])(**SMALL, policy_delay=every)
    net, _, batch = set_up(algorithm)
    net = net.float()
    batch = {key: value.float() for key, value in batch.items() if "noise" not in key}
    learner = Learner(algorithm, net, 1_000, 0)
    for update in range(1, 2 * every + 1):
        before = [[parameter.clone() for parameter in part.parameters] for part in learner.parts.values()]
        learner.update(dict(batch), 0)
        for (part, (parameters, *_)), old in zip(learner.parts.items(), before, strict=True):
            moved = any(not torch.equal(a, b) for a, b in zip(parameters, old, strict=True))
            assert moved == (part == "critic" or update % every == 0), (part, update)


def test_without_learnt_temperature_there_is_none() -> None:
    algorithm = SAC(**SMALL, temperature=0.3)
    net, target, batch = set_up(algorithm)
    assert "temperature" not in algorithm.parts(net)
    loss = algorithm.loss(net, target, batch, Now(torch.tensor(1.0), EVERYTHING))
    assert loss.metrics["temperature"].item() == pytest.approx(0.3)


LANES = 4_000


def exploring(scale: float, size: int = A) -> Explore:
    generator = torch.Generator().manual_seed(0)
    return Explore(torch.randn(LANES, size, generator=generator), torch.full((LANES,), scale))


@pytest.mark.parametrize("name", ["ddpg", "td3", "d4pg", "sac", "mpo"])
def test_actions_are_uniform_before_learning_and_in_range_after(name: str) -> None:
    algorithm = KINDS[name][0]
    net = set_up(algorithm)[0].float()
    obs, none = torch.randn(LANES, 4), torch.zeros(LANES, 0)
    place = torch.zeros(1)
    assert algorithm.exploration(algorithm.learning_starts - 1, place) == math.inf
    assert algorithm.exploration(algorithm.learning_starts, place) < math.inf
    action = algorithm.act(net, obs, none, exploring(math.inf)).action
    quartiles = action.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quartiles, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), atol=0.03, rtol=0)
    noisy, greedy = algorithm.act(net, obs, none, exploring(0.5)).action, algorithm.act(net, obs, none, None).action
    assert noisy.abs().max() <= 1
    assert greedy.abs().max() <= 1
    assert not torch.equal(noisy, greedy)


def test_noise_is_scaled_lane_by_lane_on_a_ladder() -> None:
    algorithm = DDPG(sigma=1 / 32, sigma_last=1.0)
    scale = algorithm.exploration(algorithm.learning_starts, torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(scale, torch.tensor([1 / 32, 1 / 8, 1.0]))
    noise = torch.tensor([[1.0], [1.0], [-3.0]])
    action = with_noise(torch.full((3, 1), 0.5), Explore(noise, scale))
    torch.testing.assert_close(action, torch.tensor([[0.5 + 1 / 32], [0.5 + 1 / 8], [-1.0]]))


def test_random_choices_obey_the_mask() -> None:
    obs_space = spaces.Dict(vector=OBS, action_mask=spaces.Box(0, 1, (3,), np.int8))
    algorithm = SAC(**SMALL)
    net = algorithm.networks(spec(CHOICE, obs_space))
    mask = torch.tensor([[1, 0, 1]] * LANES)
    obs = TensorDict({"vector": torch.randn(LANES, 4), "action_mask": mask}, batch_size=[LANES])
    noise = net.draw((LANES,), torch.Generator().manual_seed(0))
    for scale in (math.inf, 1.0):
        explore = Explore(noise, torch.full((LANES,), scale))
        share = torch.bincount(algorithm.act(net, obs, torch.zeros(LANES, 0), explore).action, minlength=3) / LANES
        torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.5]), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [DDPG, TD3, D4PG, MPO])
def test_choices_are_refused_where_only_boxes_work(kind: type[Algorithm]) -> None:
    with pytest.raises(ValueError, match="use sac or dqn for Discrete actions, and ppo for any"):
        kind().networks(spec(CHOICE))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(Refused, match="target_critics=3 of critics=2 cannot be drawn; use 1 to 2"):
        SAC(target_critics=3)
    with pytest.raises(Refused, match="atoms=1"):
        D4PG(atoms=1)
    with pytest.raises(Refused, match="v_min below v_max"):
        D4PG(v_min=1.0, v_max=1.0)


def test_observations_are_normalised_from_samples() -> None:
    for algorithm, _, action in KINDS.values():
        net = type(algorithm)(**SMALL, normalize_obs=True).networks(spec(action))
        obs = 3 + 2 * torch.randn(500, 4)
        with torch.no_grad():
            algorithm.finish(net, {"obs": obs})
        torch.testing.assert_close(net.norm.norms[0].mean.float(), obs.mean(0))

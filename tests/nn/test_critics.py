"""An actor and critics: stacked critics equal separate ones, frozen ones give no gradient, every observation works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from rookery.envs.spec import EnvSpec, example
from rookery.nn.critics import ActorCritics, Critics
from rookery.nn.encoders import Layers

N, A = 5, 2
VECTOR, ACTION = spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (A,))
OBSERVATIONS = {
    "vector": VECTOR,
    "discrete": spaces.Discrete(5, start=2),
    "image": spaces.Box(0, 255, (10, 10, 3), np.uint8),
    "dict": spaces.Dict(vector=VECTOR, n=spaces.Tuple((spaces.Discrete(3), spaces.Box(0, 1, (6, 6, 2))))),
}
SMALL = Layers((8, 8), "relu")


def spec(obs: spaces.Space = VECTOR, action: spaces.Space = ACTION) -> EnvSpec:
    return EnvSpec("Test-v0", "own", obs, action)


def straight(critics: Critics, k: int, x: Tensor) -> Tensor:
    """The k-th critic as plain matrix products."""
    *first, last = critics.layers
    for layer in first:
        x = x @ layer.weight[k] + layer.bias[k]
        x = (F.layer_norm(x, x.shape[-1:]) if critics.layer_norm else x).relu()
    return x @ last.weight[k] + last.bias[k]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("outputs", [(1,), (7,), (3, 1), (3, 7)])
def test_stacked_critics_equal_separate_ones(outputs: tuple[int, ...], layer_norm: bool) -> None:
    torch.manual_seed(0)
    critics = Critics(4 + A, Layers((8, 8), "relu", layer_norm=layer_norm), 3, outputs).double()
    for parameter in critics.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    features, action = torch.randn(N, 4).double(), torch.randn(N, A).double()
    alone = torch.stack([straight(critics, k, torch.cat([features, action], -1)) for k in range(3)])
    shape = outputs[:-1] if outputs[-1] == 1 else outputs
    torch.testing.assert_close(critics(features, action), alone.reshape(3, N, *shape))
    some = critics(features, action, which=torch.tensor([2, 0]))
    torch.testing.assert_close(some, alone[[2, 0]].reshape(2, N, *shape))
    many = critics(features.expand(6, N, 4), action.expand(6, N, A))
    torch.testing.assert_close(many, alone.reshape(3, 1, N, *shape).expand(3, 6, N, *shape))


def test_frozen_critics_pass_gradients_on_and_get_none() -> None:
    critics = Critics(4 + A, SMALL, 2, (1,))
    features, action = torch.randn(N, 4), torch.randn(N, A, requires_grad=True)
    (through,) = torch.autograd.grad(critics(features, action).sum(), action)
    critics(features, action, frozen=True).sum().backward()
    torch.testing.assert_close(action.grad, through)
    assert all(parameter.grad is None for parameter in critics.parameters())


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "squashed"])
@pytest.mark.parametrize("obs", OBSERVATIONS)
def test_every_observation(obs: str, kind: Any) -> None:
    chosen = spec(OBSERVATIONS[obs])
    net = ActorCritics(chosen, kind, SMALL, normalize_obs=True)
    rows = example(chosen.obs_space, N)
    features = net.encode(rows)
    said = net.actor(features)
    action = said if kind == "deterministic" else said.sample(net.draw((N,), torch.Generator()))
    assert action.shape == (N, A)
    assert kind == "gaussian" or (action.abs() <= 1).all()
    value = net.critics(features, action)
    assert value.shape == (2, N)
    value.sum().backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert missing == [] or kind == "squashed"  # what squashing leaves out is reached by the log probability


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_actions_of_any_shape(shape: tuple[int, ...]) -> None:
    net = ActorCritics(spec(action=spaces.Box(-1, 1, shape)), "deterministic", SMALL)
    action = net.actor(net.encode(torch.zeros(N, 4)))
    assert net.shaped(action).shape == (N, *shape)
    assert torch.equal(net.flat(net.shaped(action)), action)


def test_over_choices_critics_judge_all_of_them() -> None:
    net = ActorCritics(spec(action=spaces.Discrete(3)), "squashed", SMALL)
    features = net.encode(torch.randn(N, 4))
    assert net.critics(features).shape == (2, N, 3)
    assert net.actor(features).sample(net.draw((N,), torch.Generator())).shape == (N,)


def test_a_users_network_is_the_encoder() -> None:
    for network in (nn.Linear(4, 6), lambda spec: nn.Linear(4, 6)):
        net = ActorCritics(spec(), "deterministic", SMALL, network=network)
        assert net.encode(torch.zeros(N, 4)).shape == (N, 6)
        assert net.critics.layers[0].weight.shape == (2, 6 + A, 8)


def test_heads_are_float32_under_autocast() -> None:
    net = ActorCritics(spec(), "squashed", SMALL)
    features, noise = net.encode(torch.randn(N, 4)), torch.randn(N, A)
    exact = net.critics(features, noise)
    with torch.autocast("cpu", torch.bfloat16):
        policy, rough = net.actor(features), net.critics(features, noise)
    assert policy.mean.dtype == policy.log_std.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(rough, exact)


def test_observations_are_normalised_by_its_norm() -> None:
    net = ActorCritics(spec(), "deterministic", SMALL, normalize_obs=True)
    obs = torch.randn(100, 4) * 5 + 3
    net.norm.update(obs)
    torch.testing.assert_close(net.encode(obs), (obs - obs.mean(0)) / obs.std(0, correction=0))


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "squashed"])
def test_what_it_cannot_act_on_is_refused(kind: Any) -> None:
    for action in (spaces.MultiDiscrete([2, 2]), spaces.Dict(a=ACTION), spaces.Box(-np.inf, np.inf, (2,))):
        with pytest.raises(ValueError, match="use sac or dqn for Discrete actions, and ppo for any"):
            ActorCritics(spec(action=action), kind, SMALL)
    masked = spaces.Dict(vector=VECTOR, action_mask=spaces.Box(0, 1, (2,), np.int8))
    with pytest.raises(ValueError, match=r"cannot be masked.*drop that key"):
        ActorCritics(spec(masked), kind, SMALL)
    if kind != "squashed":
        with pytest.raises(ValueError, match="use sac or dqn"):
            ActorCritics(spec(action=spaces.Discrete(3)), kind, SMALL)


def test_masks_reach_a_categorical_actor() -> None:
    masked = spaces.Dict(vector=VECTOR, action_mask=spaces.Box(0, 1, (3,), np.int8))
    net = ActorCritics(spec(masked, spaces.Discrete(3)), "squashed", SMALL)
    obs = TensorDict({"vector": torch.randn(N, 4), "action_mask": torch.tensor([[0, 1, 0]] * N)}, batch_size=[N])
    assert (net.actor(net.encode(obs), obs["action_mask"]).mode() == 1).all()
    with pytest.raises(ValueError, match=r"shape \(3,\), and its actions need \(4,\)"):
        ActorCritics(spec(masked, spaces.Discrete(4)), "squashed", SMALL)

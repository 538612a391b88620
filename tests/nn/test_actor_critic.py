"""The actor-critic network: every combination gives the right shapes, memory is exact, users' networks drop in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn

from rookery.envs.spec import EnvSpec, example
from rookery.nn.actor_critic import ActorCritic
from rookery.nn.encoders import Layers

T, B = 5, 3


def spec(obs: spaces.Space, action: spaces.Space) -> EnvSpec:
    return EnvSpec("Test-v0", "own", obs, action)


VECTOR = spaces.Box(-1, 1, (4,))
OBSERVATIONS = {
    "vector": VECTOR,
    "discrete": spaces.Discrete(5, start=2),
    "image": spaces.Box(0, 255, (10, 10, 3), np.uint8),
    "dict": spaces.Dict(vector=VECTOR, n=spaces.Tuple((spaces.Discrete(3), spaces.Box(0, 1, (6, 6, 2))))),
    "masked": spaces.Dict(vector=VECTOR, action_mask=spaces.Box(0, 1, (5,), np.int8)),
}
ACTIONS = {
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(-1, 1, (2,)),
    "dict": spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple((spaces.Box(-1, 1, (2,)),))),
}
COMBINATIONS = [(o, a) for o in OBSERVATIONS for a in ACTIONS if o != "masked" or a in ("discrete", "multi_discrete")]


@pytest.mark.parametrize("memory", ["none", "lstm", "gru"])
@pytest.mark.parametrize(("obs", "action"), COMBINATIONS)
def test_every_combination_trains(obs: str, action: str, memory: str) -> None:
    chosen = spec(OBSERVATIONS[obs], ACTIONS[action])
    net = ActorCritic(chosen, Layers((8,)), memory=memory, memory_size=6, normalize_obs=True)
    rows = example(chosen.obs_space, lanes=B)
    out, state = net(rows, net.initial_state(B))
    taken, log_prob = out.policy.sample_with_log_prob(net.policy_head.draw((B,), None))
    assert out.value.shape == log_prob.shape == (B,)
    assert state.shape == (B, net.state_size)
    sequence, actions = torch.stack([rows] * T), torch.stack([taken] * T)
    out, state = net(sequence, state, torch.zeros(T, B, dtype=torch.bool))
    assert state.shape == (B, net.state_size)
    (out.policy.log_prob(actions) + out.policy.entropy() + out.value).sum().backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not missing


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_steps_equal_the_sequence(memory: str) -> None:
    torch.manual_seed(0)
    net = ActorCritic(spec(VECTOR, ACTIONS["discrete"]), memory=memory)
    obs, start = torch.randn(T, B, 4), torch.rand(T, B) < 0.3
    first = state = torch.randn(B, net.state_size)
    values, logits = [], []
    for t in range(T):
        out, state = net(obs[t], state.masked_fill(start[t, :, None], 0))
        values.append(out.value)
        logits.append(out.policy.logits)
    out, last = net(obs, first, start)
    torch.testing.assert_close(out.value, torch.stack(values))
    torch.testing.assert_close(out.policy.logits, torch.stack(logits))
    torch.testing.assert_close(last, state)


def test_actor_and_critic_share_nothing_without_memory() -> None:
    net = ActorCritic(spec(VECTOR, ACTIONS["discrete"]))
    out, _ = net(torch.randn(7, 4))
    out.value.sum().backward()
    gradient = net.trunk.mlp.layers[0].weight.grad
    assert not gradient[0].any()
    assert gradient[1].any()


def test_first_values_and_policies_are_of_the_right_size() -> None:
    torch.manual_seed(0)
    out, _ = ActorCritic(spec(VECTOR, ACTIONS["discrete"]))(torch.randn(200, 4))
    assert out.policy.logits.std(-1).mean() < 0.05
    assert 0.1 < out.value.std() < 3


def test_the_mask_reaches_the_policy() -> None:
    net = ActorCritic(spec(OBSERVATIONS["masked"], ACTIONS["discrete"]))
    obs = TensorDict({"vector": torch.randn(50, 4), "action_mask": torch.zeros(50, 5)}, batch_size=[50])
    obs["action_mask"][:, 3] = 1
    out, _ = net(obs)
    assert (out.policy.sample(net.policy_head.draw((50,), None)) == 3).all()
    with pytest.raises(ValueError, match=r"shape \(5,\), and its actions need \(4,\)"):
        ActorCritic(spec(OBSERVATIONS["masked"], spaces.Discrete(4)))


def test_observations_are_normalised_by_its_norm() -> None:
    net = ActorCritic(spec(VECTOR, ACTIONS["box"]), normalize_obs=True)
    plain = ActorCritic(spec(VECTOR, ACTIONS["box"]))
    plain.load_state_dict({name: value for name, value in net.state_dict().items() if not name.startswith("norm.")})
    obs = torch.randn(100, 4) * 5 + 3
    net.norm.update(obs)
    torch.testing.assert_close(net(obs)[0].value, plain((obs - obs.mean(0)) / obs.std(0, correction=0))[0].value)
    assert plain.norm is None


class OwnTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)

    def forward(self, obs: Tensor) -> Tensor:
        assert obs.ndim == 4
        return self.convolution(obs.permute(0, 3, 1, 2) / 255).flatten(1)


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("network", [OwnTrunk(), lambda spec: OwnTrunk()])
def test_a_users_network_drops_in(network: object, memory: str) -> None:
    chosen = spec(OBSERVATIONS["image"], ACTIONS["discrete"])
    net = ActorCritic(chosen, network=network, memory=memory)
    assert net.trunk.features == 2 * 8 * 8
    obs = torch.stack([example(chosen.obs_space, lanes=B)] * T)
    out, _ = net(obs, net.initial_state(B), torch.zeros(T, B, dtype=torch.bool))
    assert out.value.shape == (T, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bf16", [False, True])
def test_heads_are_float32_whatever_a_users_network_gives(dtype: torch.dtype, bf16: bool) -> None:
    class Cast(nn.Module):
        def forward(self, obs: Tensor) -> Tensor:
            return obs.to(dtype)

    net = ActorCritic(spec(spaces.Box(-1, 1, (3,)), spaces.Discrete(2)), network=Cast())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output, _ = net(torch.rand(5, 3))
    assert output.value.dtype == output.policy.logits.dtype == torch.float32


def test_a_users_network_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, F\).*flatten"):
        ActorCritic(spec(VECTOR, ACTIONS["box"]), network=nn.Unflatten(-1, (2, 2)))
    ActorCritic(spec(VECTOR, ACTIONS["box"]), network=nn.Sequential(nn.Unflatten(-1, (2, 2)), nn.Flatten()))
    with pytest.raises(TypeError, match="returned int"):
        ActorCritic(spec(VECTOR, ACTIONS["box"]), network=lambda spec: 3)


def test_memory_without_state_is_refused() -> None:
    net = ActorCritic(spec(VECTOR, ACTIONS["box"]), memory="gru")
    with pytest.raises(ValueError, match="initial_state"):
        net(torch.zeros(B, 4))
    assert net(torch.zeros(B, 4), net.initial_state(B))[0].value.shape == (B,)


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize(("obs", "action"), [("vector", "box"), ("masked", "discrete"), ("dict", "dict")])
def test_traces_as_one_graph(obs: str, action: str, memory: str) -> None:
    torch.compiler.reset()
    chosen = spec(OBSERVATIONS[obs], ACTIONS[action])
    net = ActorCritic(chosen, Layers((8,)), memory=memory, memory_size=4, normalize_obs=True)
    rows, state, noise = example(chosen.obs_space, B), net.initial_state(B), net.policy_head.draw((B,), None)

    def act(obs: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        out, state = net(obs, state)
        action, log_prob = out.policy.sample_with_log_prob(noise)
        return action, log_prob, out.policy.log_prob(action), out.policy.entropy(), out.policy.kl(out.policy), state

    traced = torch.compile(act, fullgraph=True, backend="eager")(rows, state, noise)
    for ours, expected in zip(traced, act(rows, state, noise), strict=True):
        as_tensors = [x if isinstance(x, Tensor) else x.to_dict() for x in (ours, expected)]
        torch.testing.assert_close(*as_tensors)

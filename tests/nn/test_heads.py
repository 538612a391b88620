"""Policies against torch.distributions, against frequencies of their own samples, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor
from torch import distributions as td

from rookery.envs.spec import example
from rookery.nn.heads import (
    Bernoulli,
    Categorical,
    Composite,
    Gaussian,
    MultiCategorical,
    Policy,
    SquashedGaussian,
    log_one_minus_tanh_squared,
    make_head,
)

FEATURES = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def pairs() -> dict[str, tuple[Policy, td.Distribution, Policy, td.Distribution]]:
    """Two policies of each kind over [3, 2] observations, each beside its torch.distributions twin."""

    def each(seed: int) -> dict[str, tuple[Policy, td.Distribution]]:
        logits, mean, log_std = (
            normal(3, 2, 4, seed=seed),
            normal(3, 2, 4, seed=seed + 1),
            normal(3, 2, 4, seed=seed + 2),
        )
        gaussian = td.Independent(td.Normal(mean, log_std.exp()), 1)
        return {
            "categorical": (Categorical.of(logits), td.Categorical(logits=logits)),
            "bernoulli": (Bernoulli(logits), td.Independent(td.Bernoulli(logits=logits), 1)),
            "gaussian": (Gaussian(mean, log_std), gaussian),
            "squashed": (SquashedGaussian(mean, log_std), td.TransformedDistribution(gaussian, td.TanhTransform())),
        }

    mine, theirs = each(1), each(11)
    return {name: (*mine[name], *theirs[name]) for name in mine}


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian", "squashed"])
def test_policy_equals_torch_distribution(name: str) -> None:
    policy, twin, other, other_twin = pairs()[name]
    action = twin.sample() if name != "squashed" else twin.sample().clamp(-0.99, 0.99)
    torch.testing.assert_close(policy.log_prob(action), twin.log_prob(action))
    if name != "squashed":
        torch.testing.assert_close(policy.entropy(), twin.entropy())
        torch.testing.assert_close(policy.kl(other), td.kl_divergence(twin, other_twin))


def test_multi_categorical_is_the_sum_of_its_choices() -> None:
    logits, others, sizes = normal(3, 2, 9), normal(3, 2, 9, seed=1), (2, 3, 4)
    policy, other = MultiCategorical.of(logits, sizes), MultiCategorical.of(others, sizes)
    twins = [td.Categorical(logits=part) for part in logits.split(sizes, -1)]
    other_twins = [td.Categorical(logits=part) for part in others.split(sizes, -1)]
    action = torch.stack([twin.sample() for twin in twins], -1)
    expected = sum(twin.log_prob(choice) for twin, choice in zip(twins, action.unbind(-1), strict=True))
    torch.testing.assert_close(policy.log_prob(action), expected)
    torch.testing.assert_close(policy.entropy(), sum(twin.entropy() for twin in twins))
    divergences = [td.kl_divergence(mine, theirs) for mine, theirs in zip(twins, other_twins, strict=True)]
    torch.testing.assert_close(policy.kl(other), sum(divergences))
    assert policy.mode().tolist() == torch.stack([part.argmax(-1) for part in logits.split(sizes, -1)], -1).tolist()


SPACES = {
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_discrete_2d": spaces.MultiDiscrete([[2, 3], [3, 2]]),
    "multi_binary": spaces.MultiBinary(2),
    "multi_binary_2d": spaces.MultiBinary((2, 2)),
    "box": spaces.Box(-1, 1, (3,)),
    "box_2d": spaces.Box(-1, 1, (2, 3)),
    "box_scalar": spaces.Box(-1, 1, ()),
    "dict": spaces.Dict(
        move=spaces.Box(-1, 1, (2,)),
        tools=spaces.Tuple(
            (spaces.Discrete(3), spaces.Dict(on=spaces.MultiBinary(2), at=spaces.MultiDiscrete([2, 2])))
        ),
    ),
}


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("name", SPACES)
def test_head_gives_actions_of_the_space(name: str, squash: bool) -> None:
    space = SPACES[name]
    head = make_head(space, FEATURES, squash=squash)
    policy = head(normal(4, 3, FEATURES, dtype=torch.float32))
    noise = head.draw((4, 3), generator())
    assert noise.shape == (4, 3, head.noise_size)
    assert policy.noise_size == head.noise_size
    action, log_prob = policy.sample_with_log_prob(noise)
    expected = torch.stack([example(space, lanes=3)] * 4)
    for given_action in (action, policy.sample(noise), policy.mode()):
        assert same_form(given_action, expected)
    torch.testing.assert_close(log_prob, policy.log_prob(action), rtol=1e-3, atol=1e-3)
    assert policy.entropy().shape == policy.kl(policy).shape == log_prob.shape == (4, 3)
    torch.testing.assert_close(policy.kl(policy), torch.zeros(4, 3), rtol=0, atol=1e-6)


def same_form(action: Tensor | TensorDict, expected: Tensor | TensorDict) -> bool:
    if isinstance(action, Tensor):
        return (action.shape, action.dtype) == (expected.shape, expected.dtype)
    keys = set(expected.keys(include_nested=True, leaves_only=True))
    same_keys = set(action.keys(include_nested=True, leaves_only=True)) == keys
    return same_keys and all(same_form(action[key], expected[key]) for key in keys)


def chi_square(samples: Tensor, probabilities: Tensor) -> float:
    """Σ (count − expected)²/expected: mean k − 1 and variance 2(k − 1) if the samples follow the probabilities."""
    counts = torch.bincount(samples, minlength=len(probabilities))
    expected = probabilities * len(samples)
    return float(((counts - expected).square() / expected).sum())


def test_samples_have_the_probabilities_of_log_prob() -> None:
    count, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 2.0])
    head = make_head(spaces.Discrete(4), FEATURES)
    policy = Categorical.of(logits.expand(count, 4))
    probabilities = policy.log_prob(torch.arange(4).repeat(count // 4)).exp()[:4].double()
    assert chi_square(policy.sample(head.draw((count,), generator())), probabilities) < 16.3  # 99.9 % at 3 degrees

    switches = Bernoulli(torch.tensor([0.7, -1.5]).expand(count, 2))
    samples = switches.sample(make_head(spaces.MultiBinary(2), FEATURES).draw((count,), generator()))
    p = torch.tensor([0.7, -1.5]).sigmoid()
    cells = torch.stack([(1 - p[0]) * (1 - p[1]), (1 - p[0]) * p[1], p[0] * (1 - p[1]), p[0] * p[1]]).double()
    assert chi_square(samples[:, 0] * 2 + samples[:, 1], cells) < 16.3


def test_gaussian_samples_have_its_moments() -> None:
    count = 40_000
    policy = Gaussian(torch.tensor([1.0, -2.0]).expand(count, 2), torch.tensor([0.0, -1.0]))
    samples = policy.sample(make_head(spaces.Box(-1, 1, (2,)), FEATURES).draw((count,), generator()))
    torch.testing.assert_close(samples.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=4 / math.sqrt(count))
    torch.testing.assert_close(samples.std(0), torch.tensor([1.0, math.exp(-1)]), rtol=0.02, atol=0)


def test_draw_follows_its_generator() -> None:
    head = make_head(SPACES["dict"], FEATURES)
    before = torch.get_rng_state()
    first, again = head.draw((7,), generator(3)), head.draw((7,), generator(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, head.draw((7,), generator(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_squashed_gaussian_golden_value() -> None:
    policy = SquashedGaussian(torch.zeros(1, 1), torch.zeros(1))
    action, log_prob = policy.sample_with_log_prob(torch.full((1, 1), 0.5))
    assert float(log_prob) == pytest.approx(-0.803710, abs=1e-6)
    assert float(policy.log_prob(action)) == pytest.approx(-0.803710, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.floats(-300, 300))
def test_log_one_minus_tanh_squared_is_stable(u: float) -> None:
    value = log_one_minus_tanh_squared(torch.tensor(u))
    exact = -2 * (abs(u) + math.log1p(math.exp(-2 * abs(u))) - math.log(2))  # −2 log cosh u
    assert float(value) == pytest.approx(exact, rel=1e-5, abs=1e-6)


def test_squashed_gaussian_far_from_zero_stays_finite() -> None:
    mean = torch.tensor([[50.0, -50.0, 0.0]], requires_grad=True)
    policy = SquashedGaussian(mean, torch.zeros(3))
    action, log_prob = policy.sample_with_log_prob(torch.zeros(1, 3))
    (log_prob + policy.log_prob(action.detach()) + policy.entropy()).sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(mean.grad).all()


@pytest.mark.parametrize(("log_std", "error"), [(-3.0, 1e-3), (0.0, 1e-3), (1.0, 0.03), (2.0, 0.3)])
@pytest.mark.parametrize("mean", [0.0, 0.7, -3.0])
def test_squashed_entropy_equals_fine_integration(mean: float, log_std: float, error: float) -> None:
    policy = SquashedGaussian(torch.tensor([mean]).double(), torch.tensor([log_std]).double())
    u = mean + math.exp(log_std) * torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = td.Normal(mean, math.exp(log_std)).log_prob(u)
    integrand = density.exp() * -(density - log_one_minus_tanh_squared(u))
    assert float(policy.entropy()) == pytest.approx(float(torch.trapezoid(integrand, u)), abs=error)


def test_masked_choices_have_no_probability_and_nothing_is_nan() -> None:
    logits = normal(4, 3, dtype=torch.float32).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, True], [False, False, False]])
    policy, other = Categorical.of(logits, mask), Categorical.of(torch.zeros(4, 3), mask)
    effective = mask | ~mask.any(-1, keepdim=True)  # a row without any allows all
    twin = td.Categorical(logits=logits.detach().masked_fill(~effective, -torch.inf))
    torch.testing.assert_close(policy.logits.exp(), twin.probs)
    torch.testing.assert_close(policy.entropy(), Categorical.of(twin.logits.clamp_min(-1e30)).entropy())
    assert policy.entropy()[1] == 0
    noise = make_head(spaces.Discrete(3), FEATURES).draw((5_000, 4), generator())
    assert effective.expand(5_000, 4, 3).gather(-1, policy.sample(noise).unsqueeze(-1)).all()
    (policy.entropy() + policy.kl(other) + policy.log_prob(policy.mode())).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(policy.logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_survive_half_precision(dtype: torch.dtype) -> None:
    policy = Categorical.of(torch.tensor([[30.0, 1.0]], dtype=dtype), torch.tensor([[True, False]]))
    assert policy.logits.dtype == torch.float32
    assert policy.entropy() == 0


def test_masks_of_several_choices() -> None:
    head = make_head(spaces.MultiDiscrete([2, 3]), FEATURES, gain=1.0)
    mask = torch.tensor([[False, True, True, False, False]])
    policy = head(normal(1, FEATURES, dtype=torch.float32), mask)
    assert policy.sample(head.draw((200, 1), generator())).reshape(-1, 2).unique(dim=0).tolist() == [[1, 0]]
    assert policy.entropy().item() == 0

    head = make_head(spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(-1, 1, (1,))), FEATURES)
    masks = TensorDict({"a": torch.tensor([[False, True]])}, batch_size=[1])
    assert head(torch.zeros(1, FEATURES), masks).mode()["a"].tolist() == [1]


def test_masks_that_mean_nothing_are_refused() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="Box actions cannot be masked"):
        make_head(spaces.Box(-1, 1, (2,)), FEATURES)(torch.zeros(1, FEATURES), mask)
    with pytest.raises(ValueError, match="make action_mask a Dict"):
        make_head(spaces.Dict(a=spaces.Discrete(2)), FEATURES)(torch.zeros(1, FEATURES), mask)


def test_composite_is_the_sum_of_its_parts() -> None:
    head = make_head(SPACES["dict"], FEATURES, gain=1.0)
    policy = head(normal(4, FEATURES, dtype=torch.float32))
    other = head(normal(4, FEATURES, dtype=torch.float32, seed=1))
    assert isinstance(policy, Composite)
    assert set(policy.parts) == {("move",), ("tools", "0"), ("tools", "1", "on"), ("tools", "1", "at")}
    action = policy.sample(head.draw((4,), generator()))
    torch.testing.assert_close(policy.log_prob(action), sum(p.log_prob(action[k]) for k, p in policy.parts.items()))
    torch.testing.assert_close(policy.kl(other), sum(p.kl(other.parts[k]) for k, p in policy.parts.items()))


def test_first_policy_is_nearly_uniform() -> None:
    policy = make_head(spaces.Discrete(6), 64)(normal(100, 64, dtype=torch.float32))
    assert (math.log(6) - policy.entropy()).max() < 0.01


def test_state_dependent_std_depends_on_the_features() -> None:
    head = make_head(spaces.Box(-1, 1, (2,)), FEATURES, gain=1.0, state_dependent_std=True)
    log_std = head(normal(2, FEATURES, dtype=torch.float32)).log_std
    assert log_std.shape == (2, 2)
    assert not torch.equal(log_std[0], log_std[1])
    assert make_head(spaces.Box(-1, 1, (2,)), FEATURES).log_std.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(0, 9, (2,), np.int64), "MultiDiscrete"),
        (spaces.Text(3), "no fixed-size tensor"),
        (spaces.Dict(), "at least one action"),
    ],
)
def test_spaces_without_a_policy_are_refused(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(space, FEATURES)

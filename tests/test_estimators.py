"""Estimators equal their straight-line twins in float64, the golden vectors, and each other where theory says so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rookery import estimators
from rookery.estimators import (
    Limits,
    categorical_divergence,
    categorical_projection,
    gae,
    linear_recurrence,
    n_step,
    quantile_huber,
    rescale,
    retrace,
    running_return,
    td_lambda,
    unrescale,
    vtrace,
)

law = settings(max_examples=40, deadline=None)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=tolerance, atol=tolerance)


# Streams: rows of random numbers with the stream convention's pattern of ends.


def stream(steps: int, lanes: int, seed: int, ends: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows [T, B] of a stream: after every ended row an invalid one, whose reward is 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, lanes, generator=generator, dtype=torch.float64).to(dtype)

    draw = torch.rand(steps, lanes, generator=generator)
    ended = draw < ends
    valid = torch.ones_like(ended)
    for t in range(1, steps):
        valid[t] = ~ended[t - 1]
        ended[t] &= valid[t]
    values = normal(steps + 1)
    return {
        "reward": normal(steps) * valid,
        "value": values[:-1],
        "next_value": values[1:],
        "terminated": ended & (draw < ends / 2),
        "ended": ended,
        "valid": valid,
        "log_rho": normal(steps),
    }


streams = st.builds(
    stream,
    steps=st.integers(1, 40),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    ends=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
)
unit = st.floats(0, 1)


def pick(rows: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: rows[name] for name in names}


BASE = ("reward", "next_value", "terminated", "ended")


# Straight-line twins: one number at a time, written from the definitions.


def each(rows: dict[str, Tensor], lane_result: object) -> Tensor:
    """`lane_result` of the columns as plain lists, lane by lane, as one tensor [T, B]."""
    steps, lanes = rows["reward"].shape
    results = []
    for b in range(lanes):
        lane = {name: x[:, b].tolist() for name, x in rows.items()}
        results.append([lane_result(lane, t, steps) for t in range(steps)])
    return torch.tensor(results, dtype=torch.float64).T


def lambda_return(lane: dict, t: int, steps: int, gamma: float, lam: float) -> float:
    """The mixture of n-step returns with weights (1−λ)λ^(n−1), the rest on the longest."""
    total, weight, rewards, discount = 0.0, 1.0, 0.0, 1.0
    for k in range(t, steps):
        rewards += discount * lane["reward"][k]
        discount *= gamma
        bootstrap = 0.0 if lane["terminated"][k] else discount * lane["next_value"][k]
        final = lane["ended"][k] or k == steps - 1
        total += (weight if final else weight * (1 - lam)) * (rewards + bootstrap)
        weight *= lam
        if final:
            break
    return total


def truncated_return(lane: dict, t: int, steps: int, gamma: float, n: int) -> float:
    rewards, discount = 0.0, 1.0
    for k in range(t, min(t + n, steps)):
        rewards += discount * lane["reward"][k]
        discount *= gamma
        if lane["ended"][k]:
            break
    return rewards + (0.0 if lane["terminated"][k] else discount * lane["next_value"][k])


def corrected(lane: dict, t: int, steps: int, gamma: float, rho: list, trace: list, base: list) -> float:
    """base_t + Σ_k (γ^(k−t) Π_{i<k} trace_i) ρ_k δ_k up to the end of the episode: V-trace's and Retrace's sum."""
    total, weight = base[t], 1.0
    for k in range(t, steps):
        future = 0.0 if lane["terminated"][k] else gamma * lane["next_value"][k]
        total += weight * rho[k] * (lane["reward"][k] + future - base[k])
        weight *= gamma * trace[k]
        if lane["ended"][k]:
            break
    return total


# The recurrence.


def recurrence_loop(coefficient: Tensor, term: Tensor, last: Tensor, reverse: bool = True) -> Tensor:
    rows, x = {}, last
    for t in reversed(range(len(term))) if reverse else range(len(term)):
        x = term[t] + coefficient[t] * x
        rows[t] = x
    return torch.stack([rows[t] for t in range(len(term))])


@law
@given(st.integers(1, 70), st.integers(0, 2**31), st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_recurrence_equals_its_loop(steps: int, seed: int, reverse: bool, lanes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    term, coefficient = torch.randn(2, steps, *lanes, generator=generator, dtype=torch.float64).unbind()
    coefficient = coefficient * (torch.rand(coefficient.shape, generator=generator) > 0.2)
    last = torch.randn(lanes, generator=generator, dtype=torch.float64)
    given_arguments = coefficient.clone(), term.clone(), last.clone()
    close(
        linear_recurrence(coefficient, term, last, reverse=reverse), recurrence_loop(coefficient, term, last, reverse)
    )
    close(
        linear_recurrence(coefficient, term, reverse=reverse),
        recurrence_loop(coefficient, term, 0 * last, reverse),
    )
    for now, before in zip((coefficient, term, last), given_arguments, strict=True):
        assert torch.equal(now, before), "an argument was written to"


@pytest.mark.parametrize("steps", [5, 128, 2048])
def test_recurrence_is_as_exact_as_the_loop_in_float32(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    term = torch.randn(steps, 64, generator=generator)
    coefficient = 0.9 + 0.1 * torch.rand(steps, 64, generator=generator)
    last = torch.zeros(64)
    exact = recurrence_loop(coefficient.double(), term.double(), last.double())

    def error(x: Tensor) -> float:
        return (x.double() - exact).abs().mean().item()

    assert error(linear_recurrence(coefficient, term)) <= 1.5 * error(recurrence_loop(coefficient, term, last))


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_recurrence_has_first_and_second_gradients(steps: int, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((steps, 2),) * 2 + ((2,),)]
    for x in arguments:
        x.requires_grad_()

    def whole(c: Tensor, x: Tensor, last: Tensor) -> Tensor:
        return linear_recurrence(c, x, last, reverse=reverse)

    def without_last(c: Tensor, x: Tensor) -> Tensor:
        return linear_recurrence(c, x, reverse=reverse)

    assert torch.autograd.gradcheck(whole, arguments)
    assert torch.autograd.gradgradcheck(whole, arguments)
    assert torch.autograd.gradcheck(without_last, arguments[:2])
    only_term = arguments[0].detach(), arguments[1], arguments[2].detach()
    assert torch.autograd.gradcheck(whole, only_term)


def test_recurrence_takes_expanded_and_strided_arguments() -> None:
    term = torch.randn(4, 9, dtype=torch.float64).T
    coefficient = torch.full((), 0.5, dtype=torch.float64).expand(9, 4)
    close(
        linear_recurrence(coefficient, term),
        recurrence_loop(coefficient, term, torch.zeros(4, dtype=torch.float64)),
    )


def test_recurrence_refuses_what_does_not_fit() -> None:
    rows = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"coefficient is float64\[3, 2\] and term is float32\[3, 2\]"):
        linear_recurrence(rows.double(), rows)


# Golden vectors.

REWARD = column(1, 0, 0, 1)
VALUE = column(0.5, 0.4, 0.3, 0.2)
NEXT = column(0.4, 0.3, 0.2, 0.6)
NEVER = torch.zeros(4, 1, dtype=torch.bool)


def test_gae_golden() -> None:
    close(gae(REWARD, VALUE, NEXT, NEVER, NEVER, 0.9, 0.95), column(1.498662, 0.746974, 1.0257, 1.34), 1e-6)


@pytest.mark.parametrize(
    ("ratio", "end", "target", "advantage"),
    [
        ((2, 0.5, 1, 0.25), None, (1.375008, 0.416675, 0.4815, 0.535), (0.875008, 0.016675, 0.1815, 0.335)),
        ((1, 1, 1, 1), None, (2.12266, 1.2474, 1.386, 1.54), (1.62266, 0.8474, 1.086, 1.34)),
        ((2, 0.5, 1, 0.25), 1, (1.18, 0.2, 0.4815, 0.535), (0.68, -0.2, 0.1815, 0.335)),
    ],
)
def test_vtrace_golden(ratio: tuple, end: int | None, target: tuple, advantage: tuple) -> None:
    terminated = torch.arange(4)[:, None] == (-1 if end is None else end)
    result = vtrace(column(*ratio).log(), REWARD, VALUE, NEXT, terminated, terminated, 0.9)
    close(result.target, column(*target), 1e-6)
    close(result.advantage, column(*advantage), 1e-6)


def test_rescale_golden() -> None:
    x = torch.tensor([0, 1, 3, 10, 100, -5, 1000], dtype=torch.float64)
    h = torch.tensor([0, 0.415214, 1.003, 2.326625, 9.149876, -1.454490, 31.638584], dtype=torch.float64)
    close(rescale(x), h, 1e-6)
    close(
        unrescale(torch.tensor([1, 2, 10], dtype=torch.float64)),
        torch.tensor([2.988057, 7.952349, 117.430323], dtype=torch.float64),
        1e-6,
    )


def test_rescaled_n_step_golden() -> None:
    """R2D2's target: n-step return of unrescaled values, rescaled."""
    reward, bootstrap = column(1, 0, 2), unrescale(column(9, 9, 2))
    never = torch.zeros(3, 1, dtype=torch.bool)
    close(rescale(n_step(reward, bootstrap, never, never, 0.997, 3))[0], column(2.456012)[0], 1e-6)


# Twins.


@law
@given(streams, unit, unit)
def test_gae_and_td_lambda_equal_the_mixture_of_n_step_returns(rows: dict, gamma: float, lam: float) -> None:
    expected = each(rows, lambda lane, t, steps: lambda_return(lane, t, steps, gamma, lam))
    close(td_lambda(**pick(rows, *BASE), gamma=gamma, lam=lam), expected, 1e-9)
    # The sum of GAE's δ telescopes because the streams keep value[t+1] = next_value[t].
    close(gae(**pick(rows, *BASE, "value"), gamma=gamma, lam=lam) + rows["value"], expected, 1e-9)


@law
@given(streams, unit, st.integers(1, 45))
def test_n_step_equals_its_twin(rows: dict, gamma: float, n: int) -> None:
    expected = each(rows, lambda lane, t, steps: truncated_return(lane, t, steps, gamma, n))
    close(n_step(**pick(rows, *BASE), gamma=gamma, n=n), expected, 1e-9)


@law
@given(streams, unit, unit, st.sampled_from([(1, 1, 1), (2, 0.5, 1.5), (0.3, 0.2, 4)]))
def test_vtrace_equals_its_sum(rows: dict, gamma: float, lam: float, limits: tuple) -> None:
    rho_max, c_max, pg_rho_max = limits
    rows["ratio"] = rows["log_rho"].exp()

    def target(lane: dict, t: int, steps: int) -> float:
        rho = [min(rho_max, x) for x in lane["ratio"]]
        trace = [lam * min(c_max, x) for x in lane["ratio"]]
        return corrected(lane, t, steps, gamma, rho, trace, lane["value"])

    def advantage(lane: dict, t: int, steps: int) -> float:
        following = lane["next_value"][t] if lane["ended"][t] or t == steps - 1 else target(lane, t + 1, steps)
        future = 0.0 if lane["terminated"][t] else gamma * following
        return min(pg_rho_max, lane["ratio"][t]) * (lane["reward"][t] + future - lane["value"][t])

    ours = vtrace(
        **pick(rows, *BASE, "value", "log_rho"),
        gamma=gamma,
        limits=Limits(lam, rho_max, c_max, pg_rho_max),
    )
    close(ours.target, each(rows, target), 1e-9)
    close(ours.advantage, each(rows, advantage), 1e-9)


@law
@given(streams, unit, unit)
def test_vtrace_on_policy_is_the_lambda_return(rows: dict, gamma: float, lam: float) -> None:
    on_policy = vtrace(torch.zeros_like(rows["reward"]), **pick(rows, *BASE, "value"), gamma=gamma, limits=Limits(lam))
    close(on_policy.target, td_lambda(**pick(rows, *BASE), gamma=gamma, lam=lam), 1e-9)
    longest = vtrace(torch.zeros_like(rows["reward"]), **pick(rows, *BASE, "value"), gamma=gamma)
    close(longest.target, n_step(**pick(rows, *BASE), gamma=gamma, n=len(rows["reward"])), 1e-9)
    close(longest.advantage, gae(**pick(rows, *BASE, "value"), gamma=gamma, lam=1.0), 1e-9)


@law
@given(streams, unit, unit)
def test_retrace_equals_its_sum(rows: dict, gamma: float, lam: float) -> None:
    rows["q"] = rows["log_rho"].cos() * 3  # any numbers: Q(s, a) is not E_π Q(s, ·)
    rows["ratio"] = rows["log_rho"].exp()

    def target(lane: dict, t: int, steps: int) -> float:
        trace = [lam * min(1.0, x) for x in lane["ratio"][1:]] + [0.0]
        return corrected(lane, t, steps, gamma, [1.0] * steps, trace, lane["q"])

    close(retrace(**pick(rows, *BASE, "q", "log_rho"), gamma=gamma, lam=lam), each(rows, target), 1e-9)


@law
@given(streams, unit, st.integers(0, 40))
def test_running_return_equals_its_twin_and_goes_on_over_calls(rows: dict, gamma: float, cut: int) -> None:
    reward = rows["reward"]
    ended_before = torch.cat([torch.zeros_like(rows["ended"][:1]), rows["ended"][:-1]])
    expected, carry = [], torch.zeros_like(reward[0])
    for t in range(len(reward)):
        carry = reward[t] + gamma * torch.where(ended_before[t], 0.0, carry)
        expected.append(carry)
    whole = running_return(reward, ended_before, gamma)
    close(whole, torch.stack(expected))
    cut = min(cut, len(reward) - 1)
    if cut:
        first = running_return(reward[:cut], ended_before[:cut], gamma)
        close(running_return(reward[cut:], ended_before[cut:], gamma, carry=first[-1]), whole[cut:])


# Laws.


def all_estimates(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    base, valued = pick(rows, *BASE), pick(rows, *BASE, "value")
    off_policy = vtrace(rows["log_rho"], **valued, gamma=0.97, limits=Limits(lam=0.9))
    return {
        "gae": gae(**valued, gamma=0.97, lam=0.9),
        "td_lambda": td_lambda(**base, gamma=0.97, lam=0.9),
        "n_step": n_step(**base, gamma=0.97, n=3),
        "vtrace target": off_policy.target,
        "vtrace advantage": off_policy.advantage,
        "retrace": retrace(rows["log_rho"], q=rows["value"], **base, gamma=0.97, lam=0.9),
    }


@law
@given(streams, st.sampled_from([-1e30, 7.0, 1e30]))
def test_garbage_in_invalid_rows_reaches_no_valid_row(rows: dict, garbage: float) -> None:
    """Reward, value, ratio and following value of an invalid row are its own; its flags are False by convention.

    The value *at* an invalid row is the row before's `next_value`, which is left alone.
    """
    valid = rows["valid"]
    spoilt = dict(rows)
    for name in ("reward", "value", "next_value", "log_rho"):
        spoilt[name] = torch.where(valid, rows[name], garbage)
    clean, dirty = all_estimates(rows), all_estimates(spoilt)
    for name, estimate in clean.items():
        assert torch.equal(estimate[valid], dirty[name][valid]), f"garbage reached {name}"


@law
@given(streams)
def test_a_terminated_row_ignores_what_follows_and_a_truncated_one_does_not(rows: dict) -> None:
    changed = {**rows, "next_value": rows["next_value"] + 10 * rows["ended"]}
    clean, other = all_estimates(rows), all_estimates(changed)
    truncated = rows["ended"] & ~rows["terminated"]
    for name, estimate in clean.items():
        assert torch.equal(estimate[rows["terminated"]], other[name][rows["terminated"]]), name
        assert not torch.isclose(estimate[truncated], other[name][truncated]).any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_and_device_are_kept(dtype: torch.dtype, device: str) -> None:
    rows = {name: x.to(device) for name, x in stream(6, 2, 0, 0.2, dtype).items()}
    estimates = all_estimates(rows)
    estimates["running_return"] = running_return(rows["reward"], rows["ended"], 0.9)
    estimates["rescale"] = unrescale(rescale(rows["reward"]))
    for name, estimate in estimates.items():
        assert (estimate.dtype, estimate.device.type, estimate.shape) == (dtype, device, rows["reward"].shape), name


def test_float32_estimates_are_near_float64() -> None:
    precise = stream(128, 16, 3, 0.02)
    rough = {name: x.float() if x.is_floating_point() else x for name, x in precise.items()}
    for (name, estimate), expected in zip(all_estimates(rough).items(), all_estimates(precise).values(), strict=True):
        torch.testing.assert_close(estimate, expected.float(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_estimates_have_gradients() -> None:
    rows = stream(5, 2, 1, 0.2)
    names = ["reward", "value", "next_value", "log_rho"]
    inputs = [rows[name].clone().requires_grad_() for name in names]

    def joined(*tensors: Tensor) -> Tensor:
        return torch.stack(list(all_estimates({**rows, **dict(zip(names, tensors, strict=True))}).values()))

    assert torch.autograd.gradcheck(joined, inputs)


@law
@given(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e-3, 1e-2]))
def test_unrescale_undoes_rescale_in_float32(x: float, eps: float) -> None:
    number = torch.tensor([x], dtype=torch.float32)
    torch.testing.assert_close(unrescale(rescale(number, eps), eps), number, rtol=1e-5, atol=1e-37)  # subnormals


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 0.1])
def test_rescaling_is_exact_near_zero(size: float) -> None:
    """√(1+x) − 1 taken literally keeps no digit of 1e-12."""
    number = torch.tensor([size, -size], dtype=torch.float32)
    exact = torch.tensor([size, -size], dtype=torch.float64)
    h = exact.sign() * torch.expm1(0.5 * torch.log1p(exact.abs())) + 1e-3 * exact
    torch.testing.assert_close(rescale(number).double(), h, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(unrescale(rescale(number)), number, rtol=1e-6, atol=0.0)


def test_rescale_has_a_gradient_at_zero() -> None:
    x = torch.zeros(1, requires_grad=True)
    rescale(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.5 + 1e-3]))


# Distributions over returns.

ATOMS = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
MASSES = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=torch.float64)


def straight_projection(support: list[float], mass: list[float], reward: float, discount: float) -> list[float]:
    """Algorithm 1 of C51 in loops, with all of the mass to an atom that is met."""
    low, high, gap = support[0], support[-1], support[1] - support[0]
    result = [0.0] * len(support)
    for z, p in zip(support, mass, strict=True):
        place = (min(max(reward + discount * z, low), high) - low) / gap
        below = min(int(place), len(support) - 1)
        above = min(below + 1, len(support) - 1)
        result[below] += p * (1 - (place - below)) if above > below else p
        result[above] += p * (place - below) if above > below else 0.0
    return result


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.3, 0.9, (0.02, 0.14, 0.3, 0.34, 0.2)),
        (0.3, 0.0, (0, 0, 0.4, 0.6, 0)),
        (0.5, 1.0, (0, 0.1, 0.2, 0.4, 0.3)),  # every return meets an atom: a floor and a ceiling are one
        (5.0, 0.9, (0, 0, 0, 0, 1)),
    ],
)
def test_categorical_projection_golden(reward: float, discount: float, expected: tuple[float, ...]) -> None:
    """papers.md, section 7."""
    r, d = (torch.tensor(x, dtype=torch.float64) for x in (reward, discount))
    close(categorical_projection(ATOMS, MASSES, r, d), torch.tensor(expected), 1e-7)


@law
@given(st.integers(2, 60), st.floats(-3, 3), st.floats(0.01, 20), st.integers(0, 10_000))
def test_categorical_projection_equals_its_loops(atoms: int, low: float, width: float, seed: int) -> None:
    """And conserves mass; and has the mean of r + γZ where nothing is clipped."""
    drawn = torch.Generator().manual_seed(seed)
    support = torch.linspace(low, low + width, atoms, dtype=torch.float64)
    mass = torch.rand(4, atoms, generator=drawn, dtype=torch.float64)
    mass = mass / mass.sum(-1, keepdim=True)
    reward = torch.randn(4, generator=drawn, dtype=torch.float64) * width
    discount = torch.rand(4, generator=drawn, dtype=torch.float64)
    ours = categorical_projection(support, mass, reward, discount)
    rows = zip(mass.tolist(), reward.tolist(), discount.tolist(), strict=True)
    close(ours, torch.tensor([straight_projection(support.tolist(), *row) for row in rows]).double(), 1e-5)
    close(ours.sum(-1), torch.ones(4), 1e-12)
    inside = low * (1 - discount) + 0.5 * width * (1 - discount)  # γz + r then stays between the first and last atom
    mean = (categorical_projection(support, mass, inside, discount) * support).sum(-1)
    close(mean, inside + discount * (mass * support).sum(-1), 1e-9)
    single = categorical_projection(support.float(), mass.float(), reward.float(), discount.float())
    torch.testing.assert_close(single.double(), ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(single.sum(-1), torch.ones(4), rtol=0, atol=1e-5)


def test_quantile_huber_golden() -> None:
    """papers.md, section 7: the matrix's rows have means 0.328125 and 0.578125."""
    quantile, fraction, target = (torch.tensor(x).double() for x in ((0.0, 1.0), (0.25, 0.75), (0.5, 3.0)))
    close(quantile_huber(quantile, fraction, target), torch.tensor(0.90625), 1e-12)


@law
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 5), st.integers(0, 10_000))
def test_quantile_huber_equals_its_loops(n: int, m: int, kappa: float, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    quantile, target = (torch.randn(2, size, generator=drawn, dtype=torch.float64) for size in (n, m))
    fraction = torch.rand(2, n, generator=drawn, dtype=torch.float64)
    ours = quantile_huber(quantile, fraction, target, kappa)
    for row in range(2):
        total = 0.0
        for theta, tau in zip(quantile[row].tolist(), fraction[row].tolist(), strict=True):
            for aim in target[row].tolist():
                u = aim - theta
                huber = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
                total += abs(tau - (u < 0)) * huber / kappa / m
        assert ours[row].item() == pytest.approx(total, rel=1e-12)


def test_quantile_huber_is_least_at_the_quantile() -> None:
    """For small κ, where targets are 0, 1, …, 9: the quantiles at 0.15, 0.55 and 0.95 are 1, 5 and 9."""
    candidates, target = torch.arange(-1, 11).double(), torch.arange(10).double()
    for tau, best in ((0.15, 1), (0.55, 5), (0.95, 9)):
        losses = [quantile_huber(each[None], torch.tensor([tau]).double(), target, 1e-3).item() for each in candidates]
        assert candidates[losses.index(min(losses))] == best


def test_bad_n_is_refused() -> None:
    with pytest.raises(ValueError, match="n=0 steps make no return; use 1 or more"):
        n_step(REWARD, NEXT, NEVER, NEVER, 0.9, 0)
    n_step(REWARD, NEXT, NEVER, NEVER, 0.9, 1)


def test_shapes_are_checked_in_tests() -> None:
    """The import hook of conftest.py is at work: a wrong shape that would broadcast is refused."""
    with pytest.raises(Exception, match=r"(?i)type-check|beartype"):
        gae(REWARD, VALUE, NEXT[:, 0], NEVER, NEVER, 0.9, 0.95)


def test_all_names_exist() -> None:
    assert all(hasattr(estimators, name) for name in estimators.__all__)


def test_categorical_divergence() -> None:
    """Rounding makes no priority negative, and elsewhere it is the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10_000, 51, generator=generator)
    same = logits.softmax(-1)
    assert (torch.xlogy(same, same) - same * logits.log_softmax(-1)).sum(-1).min() < 0  # what it guards against
    found = categorical_divergence(same, logits)
    assert 0 <= found.min() <= found.max() < 1e-6
    target = torch.randn(10_000, 51, generator=generator).softmax(-1).index_fill(1, torch.tensor([3]), 0.0)
    expected = [
        sum(m * math.log(m / p) for m, p in zip(*each, strict=True) if m)
        for each in zip(target[:20].double().tolist(), logits[:20].double().softmax(-1).tolist(), strict=True)
    ]
    close(categorical_divergence(target[:20], logits[:20]), torch.tensor(expected), 1e-5)

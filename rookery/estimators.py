"""Returns, advantages and off-policy corrections, as pure functions of time-major tensors.

Everything stands on one primitive, `linear_recurrence`. In the stream convention row t holds the `reward[t]`,
`terminated[t]` and `ended[t]` (terminated or truncated) that followed the action at `obs[t]`, and `next_value[t]` is
the value of the *true* next observation: with `values` `[T+1, B]` of the rows of an unroll, `value = values[:-1]` and
`next_value = values[1:]`. Only `terminated` zeroes a bootstrap; every recursion stops at `ended`, so what the row after
an ended one holds (finite numbers, whatever they are) never reaches another row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Limits",
    "VTrace",
    "categorical_divergence",
    "categorical_projection",
    "gae",
    "huber",
    "linear_recurrence",
    "n_step",
    "quantile_huber",
    "rescale",
    "retrace",
    "running_return",
    "td_lambda",
    "unrescale",
    "valid_mean",
    "vtrace",
]


def linear_recurrence(coefficient: Tensor, term: Tensor, last: Tensor | None = None, reverse: bool = True) -> Tensor:
    """x_t = term_t + coefficient_t · x_{t+1}, with x_T = `last` (0 if None): `[T, *B]`, `last` `[*B]`.

    With `reverse=False` time runs the other way: x_t = term_t + coefficient_t · x_{t−1}, with x_{−1} = `last`.

    A scan in about 2·log2(T) rounds and 4·T multiplications a lane (Blelloch 1990, "Prefix sums and their
    applications", section 1.4); it divides by nothing, so coefficients may be zero. Differentiable, twice too.

    Raises:
        ValueError: where shapes or dtypes do not fit each other.
    """
    if coefficient.shape != term.shape or coefficient.dtype != term.dtype:
        raise ValueError(
            f"coefficient is {_looks(coefficient)} and term is {_looks(term)}; "
            "a linear recurrence needs one coefficient for every term, in the same dtype."
        )
    if last is not None and last.shape != term.shape[1:]:
        raise ValueError(f"last is {_looks(last)}; for terms {_looks(term)} it must have shape {list(term.shape[1:])}.")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (coefficient, term, last)):
        return _Recurrence.apply(coefficient, term, last, reverse)
    return _scan(coefficient, term, last, reverse)


def valid_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x over the valid rows, both `[...]`; 0 where there are none. What the others hold, NaN too, is ignored.

    Its shapes are not annotated: the checks that tests add to annotations cannot be compiled, and losses are.
    """
    return torch.where(valid, x, 0).sum() / valid.sum().clamp(min=1)


def gae(
    reward: Float[Tensor, "T B"],
    value: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    ended: Bool[Tensor, "T B"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "T B"]:
    """Advantages A_t = δ_t + γ_t λ_t A_{t+1}, δ_t = r_t + γ_t v_{t+1} − v_t; λ_t = 0 where the episode ended.

    Generalised advantage estimation (Schulman et al. 2016, eq. 11–16). `advantage + value` is the λ-return.
    """
    advantage = torch.addcmul(reward, _unless(terminated, gamma, reward), next_value).sub_(value)
    return linear_recurrence(_unless(ended, gamma * lam, reward), advantage)


def td_lambda(
    reward: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    ended: Bool[Tensor, "T B"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "T B"]:
    """λ-returns G_t = r_t + γ_t[(1−λ_t) v_{t+1} + λ_t G_{t+1}] (Sutton and Barto 2018, eq. 12.20).

    λ_t = 0 where the episode ended; after the last row G_T = v_T.
    """
    carry = _unless(ended, gamma * lam, reward)
    term = torch.addcmul(reward, _unless(terminated, gamma, reward).sub_(carry), next_value)
    return linear_recurrence(carry, term, last=next_value[-1])


def n_step(
    reward: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    ended: Bool[Tensor, "T B"],
    gamma: float,
    n: int,
) -> Float[Tensor, "T B"]:
    """n-step returns G_t = Σ_{k<m} γ^k r_{t+k} + γ^m v_{t+m} (Sutton and Barto 2018, eq. 7.1).

    m is n, or fewer where the episode or the unroll ends first: there the return bootstraps, unless `terminated`.
    """
    if n < 1:
        raise ValueError(f"n={n} steps make no return; use 1 or more.")
    discount = _unless(terminated, gamma, reward)
    carry = _unless(ended, gamma, reward)
    stopped = torch.addcmul(reward, discount - carry, next_value)  # the return so far, wherever the episode goes on
    target = torch.addcmul(reward, discount, next_value)
    for _ in range(min(n, len(reward)) - 1):
        longer = torch.addcmul(stopped[:-1], carry[:-1], target[1:])
        target = torch.cat([longer, target[-1:]])
    return target


class Limits(NamedTuple):
    """What bounds V-trace's weights."""

    lam: float = 1.0  # λ
    rho: float = 1.0  # ρ̄: bounds the variance, and with it moves the fixed point
    c: float = 1.0  # c̄: sets the speed of contraction only
    pg_rho: float = 1.0  # ρ̄_pg: the same as ρ̄, in the policy gradient


class VTrace(NamedTuple):
    """What an actor-critic learns from with V-trace."""

    target: Float[Tensor, "T B"]  # v_s, for the critic
    advantage: Float[Tensor, "T B"]  # for the policy gradient, the clipped importance weight included


def vtrace(
    log_rho: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    limits: Limits | None = None,
) -> VTrace:
    """V-trace targets and advantages from behaviour μ for policy π (IMPALA, Espeholt et al. 2018, section 4.1).

    v_s − V_s = δ_s + γ_s c_s (v_{s+1} − V_{s+1}),  δ_t = ρ_t (r_t + γ_t V_{t+1} − V_t),
    ρ_t = min(ρ̄, π/μ),  c_t = λ min(c̄, π/μ);  advantage_s = min(ρ̄_pg, π/μ)(r_s + γ_s v_{s+1} − V_s).

    Where the episode or the unroll ends, the recursion starts anew and v_{s+1} = `next_value`.

    All are `[T, B]`. Losses that are compiled take this one, so its shapes are not in annotations, which are checked.

    Args:
        log_rho: log π(a|x) − log μ(a|x) of the actions taken.
        limits: λ, ρ̄, c̄ and ρ̄_pg; all 1 by default, as in the paper.
    """
    lam, rho_max, c_max, pg_rho_max = limits or Limits()
    ratio = log_rho.exp()
    carry = _unless(ended, gamma, reward)
    error = torch.addcmul(reward, _unless(terminated, gamma, reward), next_value).sub_(value)
    excess = linear_recurrence(carry * ratio.clamp(max=c_max) * lam, error * ratio.clamp(max=rho_max))
    # γ_s v_{s+1} = γ_s V_{s+1} + γ_s (v_{s+1} − V_{s+1}), and past an end there is nothing in excess of V.
    longer = torch.cat([torch.addcmul(error[:-1], carry[:-1], excess[1:]), error[-1:]])
    return VTrace(target=value + excess, advantage=longer.mul_(ratio.clamp(max=pg_rho_max)))


def retrace(
    log_rho: Float[Tensor, "T B"],
    reward: Float[Tensor, "T B"],
    q: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    ended: Bool[Tensor, "T B"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "T B"]:
    """Retrace(λ) targets for Q(s_t, a_t) (Munos et al. 2016, eq. 3 and 4).

    G_t = r_t + γ_t E_π Q(s_{t+1}, ·) + γ_t c_{t+1} (G_{t+1} − Q(s_{t+1}, a_{t+1})),  c_t = λ min(1, π/μ).

    Args:
        log_rho: log π(a|x) − log μ(a|x) of the actions taken.
        q: Q(s_t, a_t) of the actions taken.
        next_value: E_π Q(s_{t+1}, ·).
    """
    error = torch.addcmul(reward, _unless(terminated, gamma, reward), next_value).sub_(q)
    trace = log_rho.exp().clamp(max=1.0).roll(-1, 0)  # the last row's is of no use: nothing follows it
    return q + linear_recurrence(trace * _unless(ended, gamma * lam, reward), error)


def running_return(
    reward: Float[Tensor, "T B"],
    ended_before: Bool[Tensor, "T B"],
    gamma: float,
    carry: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "T B"]:
    """R_t = r_t + γ R_{t−1}, begun anew where the row before was an episode's last.

    With γ = 1 the value at an ended row is the return of that episode; with γ < 1 its variance is what return
    normalisation divides by (Engstrom et al. 2020, "Implementation matters", appendix A.2).

    Args:
        ended_before: `ended` of the row before; a new stream's first row may have either, if `carry` is 0.
        carry: R of the row before the first, 0 if None; the last row returned is the next call's.
    """
    return linear_recurrence(_unless(ended_before, gamma, reward), reward, last=carry, reverse=False)


def rescale(x: Float[Tensor, "*S"], eps: float = 1e-3) -> Float[Tensor, "*S"]:
    """h(x) = sign(x)(√(|x|+1) − 1) + εx: values of any scale made small (Pohlen et al. 2018; R2D2, section 2.3).

    Written as x / (√(|x|+1) + 1) + εx, which is the same and loses no digits near 0.
    """
    return x / ((x.abs() + 1).sqrt() + 1) + eps * x


def unrescale(x: Float[Tensor, "*S"], eps: float = 1e-3) -> Float[Tensor, "*S"]:
    """The inverse of `rescale`: h⁻¹(x) = sign(x)(((√(1 + 4ε(|x| + 1 + ε)) − 1) / 2ε)² − 1) (Pohlen et al. 2018).

    With the inner fraction as 1 + w, w is the positive root of εw² + (1 + 2ε)w − |x| and h⁻¹(x) = sign(x) w(w + 2): a
    form that loses no digits near 0 in float32, nor for small ε.
    """
    size = x.abs()
    slope = 2 / ((1 + 2 * eps) + ((1 + 2 * eps) ** 2 + 4 * eps * size).sqrt())  # w / |x|
    return x * slope * (size * slope + 2)


def categorical_projection(support: Tensor, probability: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """The distribution of r + γZ on the atoms of Z, `[..., K]` (C51: Bellemare et al. 2017, eq. 7).

    (ΦTZ)_i = Σ_j [1 − |clip(r + γz_j, z_0, z_{K−1}) − z_i| / Δz]₀¹ p_j: each atom's mass goes to the two atoms
    beside where it lands, the nearer the more. Mass is conserved, and where nothing is clipped the mean is r + γE[Z].

    Not annotated with shapes, as `valid_mean` is not.

    Args:
        support: `[K]`, z, evenly spaced and rising; K ≥ 2.
        probability: `[..., K]`, p.
        reward: `[...]`, r.
        discount: `[...]`, γ; 0 where the episode terminated.
    """
    low, high = support[0], support[-1]
    atoms = torch.arange(len(support), dtype=support.dtype, device=support.device)
    moved = (reward.unsqueeze(-1) + discount.unsqueeze(-1) * support).clamp(low, high)
    place = (moved - low) * ((len(support) - 1) / (high - low))  # in atoms
    share = (1 - (place.unsqueeze(-2) - atoms.unsqueeze(-1)).abs()).clamp(min=0)  # [..., i, j]
    return (share * probability.unsqueeze(-2)).sum(-1)


def categorical_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(m ‖ p) of distributions on the same atoms, `[...]`: the cross-entropy above its least.

    Its gradient is the cross-entropy's, C51's loss; and it is Rainbow's priority (Hessel et al. 2018, section 3), so it
    is never below 0, as rounding would have it where the two are nearly the same.

    Not annotated with shapes, as `valid_mean` is not.

    Args:
        target: `[..., K]`, m.
        logits: `[..., K]`, of which p is the softmax.
    """
    return (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1).clamp(min=0)


def quantile_huber(quantile: Tensor, fraction: Tensor, target: Tensor, threshold: float = 1.0) -> Tensor:
    """Σ_i mean_j |τ_i − 1{u_ij < 0}| L_κ(u_ij) / κ with u_ij = target_j − quantile_i, `[...]`.

    The quantile Huber loss (QR-DQN: Dabney et al. 2018a, eq. 9 and 10; IQN: 2018b, eq. 3). L_κ is the Huber loss: the
    minimum is the τ-quantile of the targets as κ goes to 0, and an expectile where all |u| are below κ.

    Not annotated with shapes, as `valid_mean` is not.

    Args:
        quantile: `[..., N]`.
        fraction: `[..., N]`, τ of each quantile.
        target: `[..., M]`, samples or quantiles of the target's distribution.
        threshold: κ, above 0.
    """
    error = target.unsqueeze(-2) - quantile.unsqueeze(-1)
    slope = (fraction.unsqueeze(-1) - (error < 0).to(error.dtype)).abs()
    return (slope * (huber(error, threshold) / threshold)).mean(-1).sum(-1)


def huber(error: Tensor, threshold: float = 1.0) -> Tensor:
    """½x² up to the threshold k, k(|x| − ½k) beyond it, `[...]`. Not annotated with shapes, as `valid_mean` is not."""
    return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=threshold)


def _unless(stop: Tensor, factor: float, like: Tensor) -> Tensor:
    """`factor` where not `stop`, else 0, in the dtype of `like`."""
    return torch.full_like(like, factor, requires_grad=False).masked_fill_(stop, 0.0)


def _looks(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _scan(coefficient: Tensor, term: Tensor, last: Tensor | None, reverse: bool) -> Tensor:
    """`linear_recurrence` without gradients: an up-sweep and a down-sweep, in place on one copy of each argument."""
    if len(term) == 1:  # of actors that hand on every step
        return term.clone() if last is None else torch.addcmul(term, coefficient, last.unsqueeze(0))
    copy = torch.clone if reverse else _flip
    c, x = copy(coefficient), copy(term)
    steps, stride = len(x), 1
    if last is not None and steps:
        x[-1].addcmul_(c[-1], last)
    while 2 * stride <= steps:  # rows T−2s, T−4s, … take over the s rows after theirs
        start, hop = steps % (2 * stride), 2 * stride
        factor = c[start::hop]
        x[start::hop].addcmul_(factor, x[start + stride :: hop])
        factor.mul_(c[start + stride :: hop])
        stride = hop
    while stride := stride // 2:  # rows T−3s, T−5s, … take over all that follows the s rows they hold
        start, hop = (steps + stride) % (2 * stride), 2 * stride
        rows = slice(start, steps - stride, hop)
        x[rows].addcmul_(c[rows], x[start + stride :: hop])
    return x if reverse else _flip(x)


def _flip(x: Tensor) -> Tensor:
    return x.flip(0)


class _Recurrence(torch.autograd.Function):
    """`_scan` with gradients: the gradient of a recurrence is the recurrence run the other way."""

    @staticmethod
    def forward(ctx: Any, coefficient: Tensor, term: Tensor, last: Tensor | None, reverse: bool) -> Tensor:
        x = _scan(coefficient, term, last, reverse)
        ctx.save_for_backward(coefficient, last, x)
        ctx.reverse = reverse
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        coefficient, last, x = ctx.saved_tensors
        shift, edge = (1, -1) if ctx.reverse else (-1, 0)
        grad = linear_recurrence(coefficient.roll(shift, 0), grad, reverse=not ctx.reverse)
        before = torch.zeros_like(x[:1]) if last is None else last[None]
        neighbour = torch.cat([x[1:], before] if ctx.reverse else [before, x[:-1]])
        return grad * neighbour, grad, None if last is None else grad[edge] * coefficient[edge], None

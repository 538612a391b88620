"""Running normalisation of observations."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from gymnasium import spaces
from torch import Tensor, nn

from rookery.envs.spec import MASK, dtype_of, leaves

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["NormObs", "RunningNorm"]


class RunningNorm(nn.Module):
    """clamp((x − mean) / √(var + eps), ±clip), by the mean and population variance of all samples so far.

    Before the first update the mean is 0 and the variance 1, so x passes, clipped. The moments and the count are
    float64: float32 would stop counting at 2^24 samples, and an update of weight n/count would vanish beyond about
    10^7 of them; float64 counts exactly to 2^53.
    """

    mean: Tensor  # float64 [*shape]
    var: Tensor  # float64 [*shape]
    count: Tensor  # float64 []

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.clip, self.eps = clip, eps
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., *shape]`, in x's dtype."""
        scale = (self.var + self.eps).rsqrt().to(x.dtype)
        return ((x - self.mean.to(x.dtype)) * scale).clamp(-self.clip, self.clip)

    def scale(self, x: Tensor) -> Tensor:
        """Divide `[..., *shape]` by the deviation alone, clipped: for rewards, whose sign must stay."""
        return (x * (self.var + self.eps).rsqrt().to(x.dtype)).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Merge the moments of `[..., *shape]`, each sample weighed by `weight` `[...]` (a mask of valid rows).

        Samples of weight 0 may hold anything, NaN too.
        """
        x = x.reshape(-1, *self.mean.shape).double()
        if weight is None:
            var, mean = torch.var_mean(x, 0, correction=0)
            self.add(mean, var, self.count.new_full((), len(x)))
            return
        weight = weight.reshape(-1, *[1] * self.mean.ndim).to(x.dtype)
        x = torch.where(weight > 0, x, 0)
        count = weight.sum()
        fraction = weight / count.clamp_min(torch.finfo(x.dtype).tiny)  # without a sample all of it is 0
        mean = (fraction * x).sum(0)
        self.add(mean, (fraction * (x - mean).square()).sum(0), count)

    @torch.no_grad()
    def merge(self, other: RunningNorm) -> None:
        """Add the samples another norm has seen; they must not be in this one already."""
        self.add(other.mean.to(self.mean), other.var.to(self.var), other.count.to(self.count))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all samples: an actor does so after handing its moments on, so that none is counted twice."""
        self.mean.zero_()
        self.var.fill_(1)
        self.count.zero_()

    @torch.no_grad()
    def add(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Merge the moments of other samples, by Chan, Golub and LeVeque's formula (1979); waits for no device."""
        total = self.count + count
        share = count / total.clamp_min(torch.finfo(total.dtype).tiny)
        delta = mean - self.mean
        self.var += share * (var - self.var + (1 - share) * delta.square())
        self.mean += share * delta
        self.count.copy_(total)


class NormObs(nn.Module):
    """A `RunningNorm` for every float32 leaf of an observation; images, counts, switches and `action_mask` pass."""

    def __init__(self, obs_space: spaces.Space, clip: float = 10.0) -> None:
        super().__init__()
        found = {key: leaf for key, leaf in leaves(obs_space).items() if key[:1] != (MASK,)}
        self.keys = [key for key, leaf in found.items() if dtype_of(leaf) == torch.float32]
        self.norms = nn.ModuleList(RunningNorm(tuple(found[key].shape or ()), clip) for key in self.keys)

    def by_key(self) -> dict[tuple[str, ...], RunningNorm]:
        """The norm of each float leaf; a plain observation has the one key `()`."""
        return {key: cast(RunningNorm, norm) for key, norm in zip(self.keys, self.norms, strict=True)}

    def forward(self, obs: Tensor | TensorDict) -> Tensor | TensorDict:
        """The same observation with its float leaves normalised; `obs` itself stays as it is."""
        if not self.keys:
            return obs
        if isinstance(obs, Tensor):
            return self.norms[0](obs)
        obs = obs.copy()
        for key, norm in zip(self.keys, self.norms, strict=True):
            obs[key] = norm(obs[key])
        return obs

    def update(self, obs: Tensor | TensorDict, weight: Tensor | None = None) -> None:
        """Merge the moments of these observations, weighed by `weight` `[...]` (a mask of valid rows)."""
        for key, norm in self.by_key().items():
            norm.update(obs if isinstance(obs, Tensor) else obs[key], weight)

    def merge(self, other: NormObs) -> None:
        """Add the samples another norm of the same space has seen; they must not be in this one already."""
        for mine, theirs in zip(self.by_key().values(), other.by_key().values(), strict=True):
            mine.merge(theirs)

    def reset(self) -> None:
        """Forget all samples."""
        for norm in self.by_key().values():
            norm.reset()

"""Networks that say what each of a fixed number of actions is worth, as a number or as a distribution.

All have one form: a trunk from the observation to features, then a hidden layer and an output layer. Those two are
doubled where the network is dueling, and noisy where exploration is learnt. On vectors the hidden layer is the last of
`hidden`; on an image it is the dense layer of the convolutional network, as in the papers; on structures that hold
images it comes after what they are encoded to; on a user's network there is none.

Weights and biases start uniform in ±1/√inputs, as in the papers' code (Fortunato et al. 2018, section 3.2), and not
orthogonal with gain √2: Q-learning with a network that starts as steep as that was seen to diverge.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from gymnasium import spaces
from torch import Tensor, nn

from rookery.nn.actor_critic import Network, OwnNetwork, check_mask
from rookery.nn.compiled import in_float32
from rookery.nn.encoders import ACTIVATIONS, Encoder, ImageEncoder, Layers, make_encoder
from rookery.nn.norm import NormObs
from rookery.nn.policy import PolicyNet

if TYPE_CHECKING:
    from tensordict import TensorDict

    from rookery.envs.spec import EnvSpec

__all__ = ["CategoricalQNet", "ImplicitQNet", "NoisyLinear", "QNet"]

Obs: TypeAlias = "Tensor | TensorDict"

LAYERS = Layers((256, 256), "relu")


class QNet(PolicyNet):
    """Action values of observations `[...]`: `[..., A]`, or `[..., A, outputs]` with several outputs an action.

    Args:
        layers: of the trunk, and the hidden layer before the output, which is the last of `layers.hidden`.
        dueling: a stream for the state's value and one for advantages, Q = V + A − mean A (Wang et al. 2016, eq. 9).
        noisy: the layers after the trunk are `NoisyLinear`.
        normalize_obs: normalise float observations by `self.norm`, a `NormObs` that the algorithm updates.
        network: a user's trunk, or a function that makes it from the spec: observations `[N, ...]` to `[N, F]`.

    Raises:
        ValueError: where actions are anything but one choice among A.
    """

    state_size = 0
    return_norm = None

    def __init__(
        self,
        spec: EnvSpec,
        layers: Layers = LAYERS,
        *,
        dueling: bool = False,
        noisy: bool = False,
        outputs: int = 1,
        normalize_obs: bool = False,
        network: Network | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(spec.action_space, spaces.Discrete):
            raise ValueError(
                f"Q-learning chooses among a fixed number of actions, and {spec.id} has {spec.action_space}; "
                "use sac or td3 for Box actions, and ppo for any."
            )
        self.actions, self.outputs = int(spec.action_space.n), outputs
        check_mask(spec, self.actions)
        self.norm = NormObs(spec.obs_space) if normalize_obs else None
        self.trunk, width, activation = _trunk(spec, layers, network)
        sizes = (self.trunk.features, *width)
        self.advantage = Stream((*sizes, self.actions * outputs), activation, noisy)
        self.value = Stream((*sizes, outputs), activation, noisy) if dueling else None
        streams = [self.advantage] if self.value is None else [self.advantage, self.value]
        self.noise_sizes = [stream.noise_size for stream in streams]  # M in all; 0 where nothing is noisy

    def forward(self, obs: Obs, noise: Tensor | None = None) -> Tensor:
        """`[..., A]` or `[..., A, outputs]`.

        Args:
            noise: `[..., M]` for the noisy layers; without it they are what they are on average.
        """
        return self.heads(self.features(obs), noise)

    def values(self, obs: Obs, noise: Tensor | None = None) -> Tensor:
        """The expected return of each action, `[..., A]`."""
        return self.mean(self(obs, noise))

    def mean(self, out: Tensor) -> Tensor:
        """The expected returns `[..., A]` that what `forward` gave stands for."""
        return out if self.outputs == 1 else out.mean(-1)

    def features(self, obs: Obs) -> Tensor:
        """What the trunk makes of observations, `[..., F]`."""
        return self.trunk(obs if self.norm is None else self.norm(obs))

    def heads(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """`[..., F]` to `[..., A]` or `[..., A, outputs]`, at least float32."""
        first = rest = None
        if noise is not None and self.noise_sizes[0]:
            noise = noise.sign() * noise.abs().sqrt()  # f of the factorised noise (Fortunato et al. 2018, eq. 10)
            first, rest = noise.split([self.noise_sizes[0], sum(self.noise_sizes[1:])], -1)
        out = self.advantage(features, first).unflatten(-1, (self.actions, self.outputs))
        if self.value is not None:
            out = self.value(features, rest).unsqueeze(-2) + out - out.mean(-2, keepdim=True)
        return out.squeeze(-1) if self.outputs == 1 else out

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """`[*shape, 1 + A + M]`: uniform numbers for `epsilon_greedy`, then normal ones for the noisy layers."""
        uniform = torch.rand(*shape, 1 + self.actions, generator=generator, device=generator.device)
        noise = self.noises(("noise",), shape, generator)
        return torch.cat([uniform, noise["noise"]], -1) if noise else uniform

    def layer_noise(self, noise: Tensor) -> Tensor | None:
        """The part of what was drawn that the noisy layers take, `[..., M]`; None without such layers."""
        return noise[..., 1 + self.actions :] if self.noise_sizes[0] else None

    def noises(
        self, names: tuple[str, ...], shape: int | tuple[int, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Normal noise `[*shape, M]` by name, for noisy layers; nothing without them."""
        if not self.noise_sizes[0]:
            return {}
        shape = (shape,) if isinstance(shape, int) else shape
        drawn = torch.randn(len(names), *shape, sum(self.noise_sizes), generator=generator, device=generator.device)
        return dict(zip(names, drawn.unbind(0), strict=True))


class CategoricalQNet(QNet):
    """Logits `[..., A, atoms]` of a distribution over returns on fixed atoms (Bellemare et al. 2017).

    Args:
        bounds: the returns at the first and the last atom.
        settings: those of `QNet`.
    """

    support: Tensor  # [atoms]

    def __init__(self, spec: EnvSpec, atoms: int, bounds: tuple[float, float], **settings: Any) -> None:
        super().__init__(spec, outputs=atoms, **settings)
        self.register_buffer("support", torch.linspace(*bounds, atoms))

    def mean(self, out: Tensor) -> Tensor:
        return (out.softmax(-1) * self.support).sum(-1)


class ImplicitQNet(QNet):
    """Quantiles of the return at any fractions τ: Z_τ(s, a) = f(ψ(s) ⊙ φ(τ))_a (Dabney et al. 2018b, eq. 4).

    ψ is the trunk, f the layers after it, and φ(τ) = ReLU(Σ_i cos(πiτ) w_i + b), i from 0 to 63.

    Args:
        acting: K, fractions that `values` averages: the midpoints of as many equal parts.
        settings: those of `QNet`.
    """

    frequencies: Tensor  # [COSINES], πi
    midpoints: Tensor  # [K]

    def __init__(self, spec: EnvSpec, acting: int, **settings: Any) -> None:
        super().__init__(spec, **settings)
        self.embedding = nn.Linear(COSINES, self.trunk.features)
        self.register_buffer("frequencies", math.pi * torch.arange(COSINES), persistent=False)
        self.register_buffer("midpoints", (torch.arange(acting) + 0.5) / acting, persistent=False)

    def forward(self, obs: Obs, noise: Tensor | None = None, fractions: Tensor | None = None) -> Tensor:
        """`[..., A, N]` at `fractions` `[..., N]`, or at the K that are for acting."""
        fractions = self.midpoints if fractions is None else fractions
        embedded = self.embedding((fractions.unsqueeze(-1) * self.frequencies).cos()).relu()
        mixed = self.features(obs).unsqueeze(-2) * embedded
        return self.heads(mixed, None if noise is None else noise.unsqueeze(-2)).transpose(-1, -2)

    def mean(self, out: Tensor) -> Tensor:
        return out.mean(-1)


COSINES = 64  # n of eq. 4


class Stream(nn.Module):
    """Linear layers, the activation between them: `[..., F]` to `[..., sizes[-1]]`. The last computes in float32."""

    def __init__(self, sizes: tuple[int, ...], activation: str, noisy: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        layer = NoisyLinear if noisy else nn.Linear
        self.layers = nn.ModuleList(layer(*pair) for pair in pairwise(sizes))
        self.noise_sizes = [sum(pair) if noisy else 0 for pair in pairwise(sizes)]
        self.noise_size = sum(self.noise_sizes)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        noises = [()] * len(self.layers) if noise is None else [(n,) for n in noise.split(self.noise_sizes, -1)]
        for layer, given in zip(self.layers[:-1], noises[:-1], strict=True):
            x = self.activation(layer(x, *given))
        return in_float32(self.layers[-1], x, *noises[-1])


class NoisyLinear(nn.Linear):
    """y = (μ + σ ⊙ ε)x + (μ_b + σ_b ⊙ ε_b) with ε_ij = f(e_i)f(e_j) of a row's own (Fortunato et al. 2018, eq. 9).

    As the noise has rank one, that is μx + μ_b + f(e_out) ⊙ (σ(f(e_in) ⊙ x) + σ_b): no row needs a matrix of its own.
    μ starts as any layer here does, σ at 0.5 / √inputs (section 3.2).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.sigma = nn.Linear(inputs, outputs)
        nn.init.constant_(self.sigma.weight, 0.5 / math.sqrt(inputs))
        nn.init.constant_(self.sigma.bias, 0.5 / math.sqrt(inputs))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`; `noise` `[..., in + out]` is f(e), and without it y is the mean."""
        y = super().forward(x)
        if noise is None:
            return y
        inward, outward = noise.split([self.in_features, self.out_features], -1)
        return torch.addcmul(y, outward, self.sigma(inward * x))


def _trunk(spec: EnvSpec, layers: Layers, network: Network | None) -> tuple[Encoder, tuple[int, ...], str]:
    """The trunk, the size of the hidden layer after it if there is one, and that layer's activation."""
    if network is not None:
        return OwnNetwork(spec, network), (), layers.activation
    trunk = make_encoder(spec.obs_space, layers.hidden[:-1], layers.encoder, layers.activation)
    for layer in trunk.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    if not isinstance(trunk, ImageEncoder):
        return trunk, layers.hidden[-1:], layers.activation
    width = trunk.features
    trunk.features = trunk.dense.in_features
    trunk.dense = nn.Identity()  # type: ignore[assignment]  # its ReLU then meets what has had one
    return trunk, (width,), "relu"

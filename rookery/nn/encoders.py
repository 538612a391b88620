"""Encoders: observations of any space to features `[..., F]`, with any leading dimensions.

An image is a Box (or MultiBinary) of three dimensions whose smaller outer one holds the channels (`[C, H, W]` where
they are equal); where a convolutional encoder is named, one of two dimensions is an image of one channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from rookery.envs.spec import MASK, Leaf, dtype_of, leaves
from rookery.nn.init import GAINS, init_linear

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = [
    "MLP",
    "Copies",
    "DictEncoder",
    "Encoder",
    "EncoderName",
    "Flat",
    "GridCNN",
    "ImpalaResNet",
    "Layers",
    "NatureCNN",
    "image_shape",
    "init_linear",
    "make_encoder",
]

EncoderName = Literal["auto", "mlp", "nature", "impala", "grid"]

# functions, not modules: a module call costs about as much as a small product
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Layers(NamedTuple):
    """What a network is made of before its heads."""

    hidden: tuple[int, ...] = (64, 64)  # units of the MLP over everything that is no image
    activation: str = "tanh"  # of those layers
    encoder: EncoderName = "auto"  # of images, as in `make_encoder`
    layer_norm: bool = False  # before the activations of critics


def make_encoder(
    obs_space: spaces.Space,
    hidden: Sequence[int] = (64, 64),
    encoder: EncoderName = "auto",
    activation: str = "tanh",
    copies: int = 1,
) -> Encoder:
    """The encoder for an observation space; its `features` is the size F of what it returns.

    Args:
        hidden: layer sizes of the MLP over everything that is no image.
        encoder: for images; `auto` takes "nature" from 36×36 pixels on, else "grid", and reads boxes of two dimensions
            as vectors unless they are uint8 and that large. `mlp` flattens images too.
        copies: E independent encoders; the result is then `[E, ..., F]`.

    Raises:
        ValueError: for an unknown encoder or activation, a convolutional kind without an image, a space without leaves.
    """
    if encoder not in get_args(EncoderName):
        raise ValueError(f"Unknown encoder={encoder!r}; choose one of {', '.join(get_args(EncoderName))}.")
    found = {key: leaf for key, leaf in leaves(obs_space).items() if key[:1] != (MASK,)}
    images = {key: image_kind(leaf, encoder) for key, leaf in found.items()}
    if not any(images.values()):
        if encoder in CONVOLUTIONAL:
            raise ValueError(f"encoder={encoder!r} needs an image, and {obs_space} has none; use encoder='auto'.")
        return VectorEncoder(obs_space, hidden, activation, copies)
    if copies > 1:
        return Copies([make_encoder(obs_space, hidden, encoder, activation) for _ in range(copies)])
    if () in found:
        return CONVOLUTIONAL[images[()]](obs_space)
    return DictEncoder(obs_space, hidden, encoder, activation)


class Encoder(nn.Module):
    """Observations to features `[..., F]`."""

    features: int  # F


class MLP(Encoder):
    """Linear layers with an activation after each: `[..., in]` to `[..., F]`.

    With `copies=E` there are E independent networks of one shape, evaluated as one batched product a layer:
    parameters `[E, in, out]`, result `[E, ..., F]`.

    Args:
        sizes: of the input and of every layer; one size alone makes no layer.
        gain: of the last layer, which then is linear; by default the last layer has an activation as the others have.
    """

    def __init__(
        self, sizes: Sequence[int], activation: str = "tanh", copies: int = 1, gain: float | None = None
    ) -> None:
        super().__init__()
        if not sizes or copies < 1:
            raise ValueError(f"An MLP needs sizes and copies ≥ 1; got sizes={tuple(sizes)}, copies={copies}.")
        self.copies, self.features = copies, sizes[-1]
        self.activation, usual = _activation(activation)
        self.linear_end = gain is not None
        gains = [usual] * (len(sizes) - 1)
        if gain is not None:
            gains[-1:] = [gain] * len(gains[-1:])
        pairs = list(zip(sizes[:-1], sizes[1:], gains, strict=True))
        if copies == 1:
            self.layers = nn.ModuleList(init_linear(nn.Linear(i, o), g) for i, o, g in pairs)
        else:
            self.layers = nn.ModuleList(StackedLinear(copies, i, o, g) for i, o, g in pairs)

    def forward(self, x: Tensor) -> Tensor:
        if self.copies == 1:
            return self._layers(x)
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y = self._layers(rows.expand(self.copies, *rows.shape))
        return y if x.ndim == 2 else y.reshape(self.copies, *x.shape[:-1], self.features)

    def _layers(self, x: Tensor) -> Tensor:
        activation = self.activation
        linear = len(self.layers) - 1 if self.linear_end else -1
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == linear else activation(layer(x))
        return x


class StackedLinear(nn.Module):
    """E linear layers of one shape as one batched product: `[E, N, in]` to `[E, N, out]`."""

    def __init__(self, copies: int, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        twins = [init_linear(nn.Linear(inputs, outputs), gain) for _ in range(copies)]
        self.weight = nn.Parameter(torch.stack([twin.weight.detach().T for twin in twins]))
        self.bias = nn.Parameter(torch.zeros(copies, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Copies(Encoder):
    """E independent encoders of any kind, evaluated one after another: `[E, ..., F]`."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.features = encoders[0].features

    def forward(self, obs: Tensor | TensorDict) -> Tensor:
        return torch.stack([encoder(obs) for encoder in self.encoders])


class Flat(Encoder):
    """Every leaf that is asked for as one float32 vector `[..., F]`, without parameters.

    Box and MultiBinary are flattened, uint8 scaled by the space's greatest value; Discrete and MultiDiscrete become
    one-hot, all zero where the value lies outside of the space.

    Args:
        keys: the leaves, by nested key; all but `action_mask` by default.
    """

    def __init__(self, space: spaces.Space, keys: Sequence[tuple[str, ...]] | None = None) -> None:
        super().__init__()
        found = leaves(space)
        self.keys = [key for key in found if key[:1] != (MASK,)] if keys is None else list(keys)
        if not self.keys:
            raise ValueError(f"{space} holds nothing to observe besides {MASK}; add an observation.")
        parts = [_flat_leaf(found[key]) for key in self.keys]
        self.parts = nn.ModuleList(parts)
        self.features = sum(part.features for part in parts)

    def forward(self, obs: Tensor | TensorDict) -> Tensor:
        if isinstance(obs, Tensor):
            return self.parts[0](obs)
        vectors = [part(obs[key]) for key, part in zip(self.keys, self.parts, strict=True)]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)


class VectorEncoder(Encoder):
    """`Flat`, then an MLP: for observations without images."""

    def __init__(self, space: spaces.Space, hidden: Sequence[int], activation: str = "tanh", copies: int = 1) -> None:
        super().__init__()
        self.flat = Flat(space)
        self.is_flat = isinstance(space, spaces.Box) and len(_shape(space)) == 1 and dtype_of(space) == torch.float32
        self.mlp = MLP((self.flat.features, *hidden), activation, copies)
        self.features = self.mlp.features

    def forward(self, obs: Tensor | TensorDict) -> Tensor:
        return self.mlp(obs if self.is_flat else self.flat(obs))  # two calls less are a tenth of acting in 8 lanes


class ImageEncoder(Encoder):
    """Convolutions, then one dense layer of `features` with ReLU, in channels-last memory."""

    def __init__(self, space: spaces.Space, convolutions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.image = Image(space)
        self.convolutions = nn.Sequential(*convolutions, nn.Flatten())
        with torch.no_grad():
            inputs = self.convolutions(torch.zeros(1, *self.image.shape)).shape[-1]
        self.dense = init_linear(nn.Linear(inputs, self.features))
        for convolution in self.convolutions.modules():
            if isinstance(convolution, nn.Conv2d):
                weight = convolution.weight
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, obs: Tensor) -> Tensor:
        first, *others = self.convolutions
        assert isinstance(first, nn.Conv2d)  # for the type checker
        x = F.conv2d(self.image(obs), first.weight * self.image.scale, first.bias, first.stride, first.padding)  # type: ignore[call-overload]  # padding is no string here
        for layer in others:
            x = layer(x)
        features = self.dense(x).relu()
        return features.reshape(*obs.shape[: obs.ndim - self.image.ndim], self.features)


class NatureCNN(ImageEncoder):
    """The convolutional network of DQN (Mnih et al. 2015): 32 8×8/4, 64 4×4/2, 64 3×3/1, dense 512, ReLU."""

    features = 512

    def __init__(self, obs_space: spaces.Space) -> None:
        (channels, height, width), _ = image_shape(obs_space)
        if min(height, width) < NATURE_MIN:
            raise ValueError(
                f"The Nature CNN needs images of at least {NATURE_MIN}×{NATURE_MIN} pixels, and these have "
                f"{height}×{width}; use encoder='impala' or encoder='grid', which take any size."
            )
        first = init_linear(nn.Conv2d(channels, 32, 8, stride=4))
        second = init_linear(nn.Conv2d(32, 64, 4, stride=2))
        third = init_linear(nn.Conv2d(64, 64, 3))
        super().__init__(obs_space, [first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU()])


class ImpalaResNet(ImageEncoder):
    """The deep residual network of IMPALA (Espeholt et al. 2018, figure 3): 15 convolutions, dense 256, ReLU."""

    features = 256

    def __init__(self, obs_space: spaces.Space, sections: Sequence[int] = (16, 32, 32)) -> None:
        (inputs, _, _), _ = image_shape(obs_space)
        layers: list[nn.Module] = []
        for outputs in sections:
            layers += [init_linear(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [Residual(outputs), Residual(outputs)]
            inputs = outputs
        super().__init__(obs_space, [*layers, nn.ReLU()])


class GridCNN(ImageEncoder):
    """For small grids, such as 10×5 or 10×10 planes: that of MinAtar (Young and Tian 2019), 16 3×3, dense 128, ReLU.

    Padded where a side is below 3.
    """

    features = 128

    def __init__(self, obs_space: spaces.Space) -> None:
        (channels, height, width), _ = image_shape(obs_space)
        convolution = init_linear(nn.Conv2d(channels, 16, 3, padding=int(min(height, width) < 3)))
        super().__init__(obs_space, [convolution, nn.ReLU()])


class Residual(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), 3×3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = init_linear(nn.Conv2d(channels, channels, 3, padding=1))
        self.second = init_linear(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x.relu()).relu())


class DictEncoder(Encoder):
    """A convolutional encoder for each image and one MLP for all other leaves, concatenated; skips `action_mask`."""

    def __init__(
        self,
        space: spaces.Space,
        hidden: Sequence[int] = (64, 64),
        encoder: EncoderName = "auto",
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        found = {key: leaf for key, leaf in leaves(space).items() if key[:1] != (MASK,)}
        kinds = {key: image_kind(leaf, encoder) for key, leaf in found.items()}
        self.image_keys = [key for key, name in kinds.items() if name]
        images = [CONVOLUTIONAL[kinds[key]](found[key]) for key in self.image_keys]
        self.images = nn.ModuleList(images)
        self.features = sum(image.features for image in images)
        others = [key for key, name in kinds.items() if not name]
        self.flat = Flat(space, others) if others else None
        if self.flat is not None:
            self.mlp = MLP((self.flat.features, *hidden), activation)
            self.features += self.mlp.features

    def forward(self, obs: TensorDict) -> Tensor:
        features = [image(obs[key]) for key, image in zip(self.image_keys, self.images, strict=True)]
        if self.flat is not None:
            features.append(self.mlp(self.flat(obs)))
        return torch.cat(features, -1)


NATURE_MIN = 36  # pixels; fewer leave nothing for the third convolution
CONVOLUTIONAL: dict[str, Callable[[spaces.Space], ImageEncoder]] = {
    "nature": NatureCNN,
    "impala": ImpalaResNet,
    "grid": GridCNN,
}


class Image(nn.Module):
    """Images with any leading dimensions as one batch `[N, C, H, W]`, channels-last, in the dtype convolutions run in.

    Values stay as they are, 0 to 255 too, which bfloat16 holds exactly: the first convolution's weights take `scale`,
    which is less work than scaling every pixel.
    """

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        self.ndim = len(_shape(space))
        self.shape, self.channels_inside = image_shape(space)
        self.scale = _scale(space)

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, *obs.shape[obs.ndim - self.ndim :])
        if self.ndim == 2:
            x = x.unsqueeze(1)
        elif self.channels_inside:
            x = x.permute(0, 3, 1, 2)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return x.to(dtype).contiguous(memory_format=torch.channels_last)  # in one step it takes twice as long


class Numbers(Encoder):
    """Box and MultiBinary as float32 `[..., F]`."""

    def __init__(self, space: spaces.Box | spaces.MultiBinary) -> None:
        super().__init__()
        self.ndim, self.features = len(_shape(space)), math.prod(_shape(space))
        self.scale = _scale(space)

    def forward(self, x: Tensor) -> Tensor:
        if self.ndim != 1:
            x = x.reshape(*x.shape[: x.ndim - self.ndim], self.features)
        x = x.float()
        return x if self.scale == 1 else x * self.scale


class OneHot(Encoder):
    """Discrete and MultiDiscrete as float32 `[..., sum of sizes]`; `F.one_hot` would wait for a GPU to check values."""

    category: Tensor
    column: Tensor

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        super().__init__()
        sizes = np.atleast_1d(space.nvec.flatten() if isinstance(space, spaces.MultiDiscrete) else space.n)
        starts = np.broadcast_to(np.atleast_1d(np.asarray(space.start).flatten()), sizes.shape)
        self.ndim, self.features = len(_shape(space)), int(sizes.sum())
        ranges = [torch.arange(int(size)) + int(start) for size, start in zip(sizes, starts, strict=True)]
        self.register_buffer("category", torch.cat(ranges), persistent=False)
        columns = torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(sizes))
        self.register_buffer("column", columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.ndim == 0:
            return (x.unsqueeze(-1) == self.category).float()
        x = x.flatten(-self.ndim)
        return (x[..., self.column] == self.category).float()


def image_shape(space: spaces.Space) -> tuple[tuple[int, int, int], bool]:
    """(C, H, W) of an image space, and whether its channels come last."""
    shape = _shape(space)
    if len(shape) == 2:
        return (1, *shape), False
    if len(shape) != 3:
        raise ValueError(f"An image has 2 or 3 dimensions, and this space has shape {shape}; use encoder='mlp'.")
    first, middle, last = shape
    return ((last, first, middle), True) if last < first else ((first, middle, last), False)


def image_kind(leaf: Leaf, encoder: EncoderName) -> str:
    """Which convolutional encoder this leaf takes; "" where it is no image."""
    if encoder == "mlp" or not isinstance(leaf, spaces.Box | spaces.MultiBinary) or len(leaf.shape) not in (2, 3):
        return ""
    if encoder != "auto":
        return encoder
    (_, height, width), _ = image_shape(leaf)
    large = min(height, width) >= NATURE_MIN
    if len(leaf.shape) == 2 and not (large and dtype_of(leaf) == torch.uint8):
        return ""
    return "nature" if large else "grid"


def _shape(space: spaces.Space) -> tuple[int, ...]:
    return tuple(space.shape or ())


def _flat_leaf(leaf: Leaf) -> Numbers | OneHot:
    return OneHot(leaf) if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete) else Numbers(leaf)


def _scale(space: spaces.Space) -> float:
    """1/255 for usual images; the uint8 codes of a small grid have a smaller greatest value."""
    if not isinstance(space, spaces.Box) or dtype_of(space) != torch.uint8:
        return 1.0
    return 1.0 / max(1, int(space.high.max(initial=1)))


def _activation(name: str) -> tuple[Callable[[Tensor], Tensor], float]:
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name], GAINS[name]

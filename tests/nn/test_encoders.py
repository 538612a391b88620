"""Encoders: shapes for every space, the batched product against separate networks, refusals whose advice works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rookery.algorithms.base import Algorithm
from rookery.algorithms.dqn import DQN
from rookery.algorithms.ppo import PPO
from rookery.algorithms.sac import SAC
from rookery.envs.make import make_env
from rookery.envs.spec import example
from rookery.nn.encoders import (
    MLP,
    Copies,
    DictEncoder,
    Flat,
    GridCNN,
    ImpalaResNet,
    NatureCNN,
    image_shape,
    init_linear,
    make_encoder,
)


def images(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


MIXED = spaces.Dict(
    camera=images(40, 40, 3),
    body=spaces.Tuple((spaces.Box(-1, 1, (3,)), spaces.Discrete(4))),
    action_mask=spaces.MultiBinary(5),
)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("gain", [None, 0.1])
def test_copies_equal_separate_networks(activation: str, gain: float | None) -> None:
    stacked = MLP((5, 7, 6), activation, copies=3, gain=gain)
    x = torch.randn(4, 2, 5)
    together = stacked(x)
    assert together.shape == (3, 4, 2, 6)
    for copy in range(3):
        alone = MLP((5, 7, 6), activation, gain=gain)
        for layer, source in zip(alone.layers, stacked.layers, strict=True):
            layer.weight.data = source.weight[copy].T.detach()
            layer.bias.data = source.bias[copy, 0].detach()
        torch.testing.assert_close(together[copy], alone(x))
    assert not torch.equal(together[0], together[1])


def test_every_copy_is_orthogonal() -> None:
    weight = MLP((8, 8), copies=2).layers[0].weight
    torch.testing.assert_close(weight @ weight.mT, 2 * torch.eye(8).expand(2, 8, 8))
    linear = init_linear(torch.nn.Linear(8, 8), gain=0.5)
    torch.testing.assert_close(linear.weight @ linear.weight.T, 0.25 * torch.eye(8))
    assert not linear.bias.any()


def test_linear_end_and_no_layers() -> None:
    assert MLP((4, 8, 2), "relu", gain=1.0)(torch.randn(100, 4)).min() < 0
    assert MLP((4, 8, 2), "relu")(torch.randn(100, 4)).min() == 0
    assert MLP((4,)).features == 4
    assert MLP((4,), copies=2)(torch.ones(3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("space", "kind", "expected"),
    [
        (images(4, 84, 84), "auto", NatureCNN),
        (images(84, 84, 4), "auto", NatureCNN),
        (images(84, 84), "auto", NatureCNN),
        (images(3, 84, 84), "impala", ImpalaResNet),
        (images(7, 7, 3), "auto", GridCNN),
        (spaces.Box(0, 1, (10, 10, 4), bool), "auto", GridCNN),
        (spaces.Box(0, 1, (10, 5)), "grid", GridCNN),
        (spaces.Box(0, 1, (2, 1)), "grid", GridCNN),
        (spaces.MultiBinary((6, 6, 2)), "auto", GridCNN),
        (MIXED, "auto", DictEncoder),
    ],
)
def test_image_encoders_keep_leading_dimensions(space: spaces.Space, kind: str, expected: type) -> None:
    encoder = make_encoder(space, (16,), kind)
    assert type(encoder) is expected
    obs = torch.stack([example(space, lanes=2)] * 3)
    assert encoder(obs).shape == (3, 2, encoder.features)
    assert encoder(obs[0]).shape == (2, encoder.features)
    assert encoder(obs[0, 0]).shape == (encoder.features,)


def test_channels_first_and_last_are_one_image() -> None:
    first = NatureCNN(images(3, 40, 44))
    last = NatureCNN(images(40, 44, 3))
    last.load_state_dict(first.state_dict())
    obs = torch.randint(256, (2, 3, 40, 44), dtype=torch.uint8)
    torch.testing.assert_close(first(obs), last(obs.permute(0, 2, 3, 1)))
    assert image_shape(images(40, 44, 3)) == ((3, 40, 44), True)


def test_images_are_scaled_and_channels_last() -> None:
    encoder = NatureCNN(images(4, 84, 84))
    obs = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    plain = encoder.dense(encoder.convolutions(obs.float() / 255)).relu()
    torch.testing.assert_close(encoder(obs), plain)
    assert encoder.convolutions[0].weight.is_contiguous(memory_format=torch.channels_last)
    codes = Flat(spaces.Box(0, 10, (3,), np.uint8))
    torch.testing.assert_close(codes(torch.tensor([0, 5, 10], dtype=torch.uint8)), torch.tensor([0, 0.5, 1]))


def test_small_images_are_refused_with_advice_that_works() -> None:
    with pytest.raises(ValueError, match=r"at least 36×36 pixels.*35×40.*impala.*grid"):
        NatureCNN(images(3, 35, 40))
    for kind in ("impala", "grid"):
        encoder = make_encoder(images(3, 35, 40), encoder=kind)
        assert encoder(example(images(3, 35, 40), lanes=2)).shape == (2, encoder.features)
    smallest = images(1, 36, 36)
    assert NatureCNN(smallest)(example(smallest, lanes=1)).shape == (1, 512)


def test_grids_take_the_network_of_minatar() -> None:
    """16 3×3 filters without padding, then 128 units on their 8·8·16 outputs; scale 1."""
    encoder = make_encoder(spaces.Box(0, 1, (10, 10, 4), bool))
    shapes = {name: tuple(value.shape) for name, value in encoder.named_parameters()}
    assert shapes == {
        "convolutions.0.weight": (16, 4, 3, 3),
        "convolutions.0.bias": (16,),
        "dense.weight": (128, 1024),
        "dense.bias": (128,),
    }
    obs = (torch.rand(2, 10, 10, 4) < 0.5).float()
    plain = encoder.dense(encoder.convolutions(obs.movedim(-1, 1))).relu()
    torch.testing.assert_close(encoder(obs), plain)


def test_flat_one_hot() -> None:
    assert Flat(spaces.Discrete(3, start=5))(torch.tensor([5, 7])).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert Flat(spaces.MultiDiscrete([2, 3]))(torch.tensor([[1, 2]])).tolist() == [[0, 1, 0, 0, 1]]
    assert Flat(spaces.MultiDiscrete([[2], [2]]))(torch.tensor([[[1], [0]]])).tolist() == [[0, 1, 1, 0]]
    assert Flat(spaces.Box(-1, 1, ()))(torch.tensor([0.5])).tolist() == [[0.5]]


def test_dict_encoder_sees_every_leaf_but_the_mask() -> None:
    encoder = make_encoder(MIXED, (16,))
    assert encoder.features == 512 + 16
    obs = example(MIXED, lanes=1)
    before = encoder(obs)
    for key, changes in {("camera",): True, ("body", "0"): True, ("body", "1"): True, ("action_mask",): False}.items():
        changed = obs.clone()
        changed[key] = torch.ones_like(obs[key])
        assert torch.equal(encoder(changed), before) is not changes, key


def test_vectors_and_a_mask_make_no_dict_encoder() -> None:
    space = spaces.Dict(vector=spaces.Box(-1, 1, (3,)), action_mask=spaces.MultiBinary(2))
    encoder = make_encoder(space, (16, 8), copies=2)
    assert encoder(example(space, lanes=5)).shape == (2, 5, 8)
    assert encoder.mlp.layers[0].weight.shape == (2, 3, 16)


def test_copies_of_image_encoders() -> None:
    encoder = make_encoder(images(6, 6, 2), copies=2)
    assert isinstance(encoder, Copies)
    assert encoder(example(images(6, 6, 2), lanes=3)).shape == (2, 3, 128)


def test_bad_requests_name_what_there_is() -> None:
    with pytest.raises(ValueError, match="auto, mlp, nature, impala, grid"):
        make_encoder(images(4, 84, 84), encoder="resnet")
    with pytest.raises(ValueError, match="tanh, relu"):
        MLP((1, 2), "swish")
    with pytest.raises(ValueError, match="needs an image"):
        make_encoder(spaces.Box(-1, 1, (3,)), encoder="nature")
    with pytest.raises(ValueError, match="add an observation"):
        make_encoder(spaces.Dict(action_mask=spaces.MultiBinary(2)))


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_the_setting_reaches_the_network(algorithm: type[Algorithm]) -> None:
    spec = make_env("tensor:KeyDoor-v0", planes="uint8").spec
    nets = [algorithm(encoder=name).networks(spec) for name in ("auto", "impala")]
    assert [any(isinstance(module, ImpalaResNet) for module in net.modules()) for net in nets] == [False, True]

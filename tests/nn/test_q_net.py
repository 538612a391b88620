"""Networks of Q-learning: shapes for every observation, dueling and noise as in the papers, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rookery.envs.spec import EnvSpec, example
from rookery.nn.encoders import Layers
from rookery.nn.q_net import CategoricalQNet, ImplicitQNet, NoisyLinear, QNet

N, A = 4, 3
VECTOR = spaces.Box(-1, 1, (5,))
GRID = spaces.Box(0, 255, (6, 6, 2), np.uint8)
OBSERVATIONS = {
    "vector": VECTOR,
    "discrete": spaces.Discrete(5, start=2),
    "grid": GRID,
    "pixels": spaces.Box(0, 255, (1, 40, 40), np.uint8),
    "dict": spaces.Dict(vector=VECTOR, image=GRID, action_mask=spaces.MultiBinary(A)),
}
NETS = {
    "values": (QNet, {}, ()),
    "quantiles": (QNet, {"outputs": 7}, (7,)),
    "atoms": (CategoricalQNet, {"atoms": 5, "bounds": (-2, 2)}, (5,)),
    "implicit": (ImplicitQNet, {"acting": 6}, (6,)),
}


def spec(obs: spaces.Space = VECTOR, action: spaces.Space | None = None) -> EnvSpec:
    return EnvSpec("Test-v0", "own", obs, action or spaces.Discrete(A))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("obs", OBSERVATIONS)
@pytest.mark.parametrize(("dueling", "noisy"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_combination_trains(obs: str, kind: str, dueling: bool, noisy: bool) -> None:
    make, settings, event = NETS[kind]
    net = make(
        spec(OBSERVATIONS[obs]),
        **settings,
        layers=Layers((8, 8), "relu"),
        dueling=dueling,
        noisy=noisy,
        normalize_obs=True,
    )
    rows = example(OBSERVATIONS[obs], N)
    drawn = net.draw((N,), generator())
    out = net(rows, net.layer_noise(drawn))
    assert out.shape == (N, A, *event)
    assert net.values(rows).shape == (N, A)
    assert (drawn.shape[-1] > 1 + A) == noisy
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert net(rows, net.layer_noise(drawn)).dtype == net.values(rows).dtype == torch.float32


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (1,)), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_other_actions_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=r"fixed number of actions, and Test-v0 has .*; use sac or td3 .*ppo"):
        QNet(spec(action=space))


def test_a_mask_of_another_size_is_refused() -> None:
    masked = spaces.Dict(vector=VECTOR, action_mask=spaces.MultiBinary(A + 1))
    with pytest.raises(ValueError, match="action_mask"):
        QNet(spec(masked))


def test_own_network_takes_the_place_of_all_but_the_output() -> None:
    net = QNet(spec(), network=nn.Sequential(nn.Linear(5, 9), nn.ReLU()))
    assert len(net.advantage.layers) == 1
    assert net(torch.zeros(2, N, 5)).shape == (2, N, A)


@pytest.mark.parametrize("outputs", [1, 4])
def test_dueling_splits_value_and_advantage(outputs: int) -> None:
    """Q = V + A − mean A: the mean over actions is V, and what is added to all advantages changes nothing."""
    torch.manual_seed(0)
    net = QNet(spec(), Layers((16,), "relu"), dueling=True, outputs=outputs).double()
    obs = torch.randn(N, 5, dtype=torch.float64)
    before = net(obs)
    value = net.value(net.features(obs))
    torch.testing.assert_close(before.mean(1, keepdim=outputs == 1), value)
    with torch.no_grad():
        net.advantage.layers[-1].bias += 3.0
    torch.testing.assert_close(net(obs), before)


def test_noisy_layer_is_a_matrix_of_each_rows_own() -> None:
    """y = (μ + σ ⊙ f(e_out) f(e_in)ᵀ) x + μ_b + σ_b ⊙ f(e_out), written out row by row in float64."""
    torch.manual_seed(0)
    layer = NoisyLinear(5, 3).double()
    nn.init.normal_(layer.sigma.weight)
    nn.init.normal_(layer.sigma.bias)
    x, e = torch.randn(N, 5, dtype=torch.float64), torch.randn(N, 8, dtype=torch.float64)
    expected = []
    for row, inward, outward in zip(x, e[:, :5], e[:, 5:], strict=True):
        weight = layer.weight + layer.sigma.weight * torch.outer(outward, inward)
        expected.append(weight @ row + layer.bias + layer.sigma.bias * outward)
    torch.testing.assert_close(layer(x, e), torch.stack(expected))
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_noisy_layers_begin_as_the_paper_says() -> None:
    """σ = 0.5 / √inputs; f(e)² has the mean of |e|; every row's values differ from every other's."""
    layer = NoisyLinear(400, 2)
    assert layer.sigma.weight.unique().tolist() == pytest.approx([0.5 / 20])
    net = QNet(spec(), Layers((400,), "relu"), noisy=True)
    noise = net.noises(("noise",), 4000, generator())["noise"]
    assert noise.mean().abs() < 0.01
    f = noise.sign() * noise.abs().sqrt()
    assert f.square().mean() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.01)
    out = net(torch.ones(1, 5).expand(4000, 5), noise)
    assert (out.std(0) > 0.1).all()
    assert len(out.unique(dim=0)) == 4000


def test_rows_have_noise_of_their_own() -> None:
    """Changing one row's noise changes no other row."""
    for make, settings, _ in NETS.values():
        net = make(spec(), **settings, layers=Layers((8, 8), "relu"), dueling=True, noisy=True)
        obs, noise = torch.randn(N, 5), net.noises(("noise",), N, generator())["noise"]
        other = noise.clone()
        other[1] += 1
        changed = (net(obs, noise) != net(obs, other)).flatten(1).any(-1)
        assert changed.tolist() == [False, True, False, False]


def test_what_is_drawn() -> None:
    """1 + A uniform numbers, then M normal ones, on any leading dimensions."""
    net = QNet(spec(), Layers((8,), "relu"), noisy=True)
    drawn = net.draw((50, 40), generator())
    uniform, normal = drawn[..., : 1 + A], net.layer_noise(drawn)
    assert normal.shape == (50, 40, 5 + 8 + 8 + A)
    assert 0 <= float(uniform.min()) < 0.01
    assert 0.99 < float(uniform.max()) < 1
    assert float(normal.std()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(net.draw((50, 40), generator()), drawn)
    plain = QNet(spec(), Layers((8,), "relu"))
    assert plain.draw((2,), generator()).shape == (2, 1 + A)
    assert plain.layer_noise(plain.draw((2,), generator())) is None
    assert plain.noises(("noise",), 2, generator()) == {}
    assert [*net.noises(("a", "b"), 2, generator())] == ["a", "b"]


def test_means() -> None:
    """Values are what the outputs stand for: the mean of quantiles, the expectation over atoms."""
    obs = torch.randn(N, 5)
    quantiles = QNet(spec(), Layers((8,), "relu"), outputs=7)
    torch.testing.assert_close(quantiles.values(obs), quantiles(obs).mean(-1))
    atoms = CategoricalQNet(spec(), 5, (-2, 2), layers=Layers((8,), "relu"))
    chances = atoms(obs).softmax(-1)
    expected = sum(chances[..., i] * z for i, z in enumerate((-2, -1, 0, 1, 2)))
    torch.testing.assert_close(atoms.values(obs), expected)


def test_implicit_quantiles_equal_the_equation() -> None:
    """f(ψ(s) ⊙ ReLU(Σ_{i=0}^{63} cos(πiτ) w_i + b)), fraction by fraction in float64; acting takes the midpoints."""
    torch.manual_seed(0)
    net = ImplicitQNet(spec(), 4, layers=Layers((8, 6), "relu")).double()
    obs, fractions = torch.randn(N, 5, dtype=torch.float64), torch.rand(N, 3, dtype=torch.float64)
    out = net(obs, None, fractions)
    for row in range(N):
        for n in range(3):
            cosines = torch.tensor([np.cos(np.pi * i * float(fractions[row, n])) for i in range(64)])
            embedded = torch.relu(net.embedding.weight @ cosines + net.embedding.bias)
            expected = net.advantage(net.trunk(obs[row : row + 1])[0] * embedded)
            torch.testing.assert_close(out[row, :, n], expected, rtol=1e-5, atol=1e-5)
    midpoints = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64).expand(N, 4)
    torch.testing.assert_close(net(obs), net(obs, None, midpoints))


def test_image_features_are_those_of_the_convolutions() -> None:
    """The dense layer of the Nature network is the hidden layer of each stream, as in the papers."""
    net = QNet(spec(spaces.Box(0, 255, (4, 84, 84), np.uint8)), dueling=True, noisy=True)
    assert net.trunk.features == 3136
    for stream, outputs in ((net.advantage, A), (net.value, 1)):
        sizes = [(layer.in_features, layer.out_features) for layer in stream.layers]
        assert sizes == [(3136, 512), (512, outputs)]
        assert all(isinstance(layer, NoisyLinear) for layer in stream.layers)


def test_weights_are_all_in_the_state() -> None:
    """Two networks of one spec agree once one has loaded the other's state."""
    for make, settings, _ in NETS.values():
        first, second = (make(spec(), **settings, layers=Layers((8,), "relu"), normalize_obs=True) for _ in range(2))
        second.load_state_dict(first.state_dict())
        obs: Tensor = torch.randn(N, 5)
        torch.testing.assert_close(first(obs), second(obs), rtol=0, atol=0)

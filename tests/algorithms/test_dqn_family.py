"""DQN, C51, QR-DQN and IQN: targets by hand on tiny tables, and distributions and biases that theory knows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rookery.algorithms.base import Batch, Explore, Now, Refused
from rookery.algorithms.c51 import C51
from rookery.algorithms.dqn import DQN
from rookery.algorithms.iqn import IQN
from rookery.algorithms.off_policy import QLearning, epsilon_greedy
from rookery.algorithms.qr_dqn import QRDQN
from rookery.envs.spec import EnvSpec
from rookery.learner import Learner
from rookery.nn.adam import Adam

N, A, STATES = 6, 3, 4
FAMILY = {
    "dqn": DQN(),
    "c51": C51(atoms=11, v_min=-2, v_max=2),
    "qr_dqn": QRDQN(quantiles=8),
    "iqn": IQN(quantiles=5, target_quantiles=7, acting_quantiles=6),
}
everyone = pytest.mark.parametrize("name", FAMILY)
NOW = Now(torch.ones(()))


def spec(states: int = STATES, actions: int = A) -> EnvSpec:
    """One-hot states, so that a network without hidden layers is a table."""
    return EnvSpec("Table-v0", "own", spaces.Discrete(states), spaces.Discrete(actions))


def changed(name: str, **settings: Any) -> QLearning:
    return type(FAMILY[name])(**{**vars(FAMILY[name]), "hidden": (16,), **settings})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(states: int = STATES, actions: int = A, rows: int = N) -> Batch:
    torch.manual_seed(1)
    return {
        "obs": torch.randint(states, (rows,)),
        "action": torch.randint(actions, (rows,)),
        "reward": torch.randn(rows),
        "discount": torch.full((rows,), 0.9),
        "next_obs": torch.randint(states, (rows,)),
        "weight": torch.ones(rows),
    }


def made(name: str, **settings: Any) -> tuple[QLearning, Any, Any, Batch]:
    """An algorithm with different online and target networks, and a batch with its noise."""
    torch.manual_seed(0)
    algorithm = changed(name, **settings)
    net, target = algorithm.networks(spec()), algorithm.networks(spec())
    batch = batch_of()
    return algorithm, net, target, batch | algorithm.noise(net, batch, generator())


def table(values: list[list[float]]) -> Any:
    """A network that is this table of action values."""
    algorithm = DQN(hidden=())
    net = algorithm.networks(spec(len(values), len(values[0])))
    with torch.no_grad():
        net.advantage.layers[-1].weight.copy_(torch.tensor(values).T)
        net.advantage.layers[-1].bias.zero_()
    return net


def learn(algorithm: QLearning, net: Any, batches: Any, rate: Any, period: int) -> None:
    """Adam on the loss of each batch, with a copy to the target network every `period` updates."""
    target, lr = copy.deepcopy(net), torch.zeros(())
    optimizer = Adam(net.parameters(), lr)
    for update, batch in enumerate(batches):
        if update % period == 0:
            target.load_state_dict(net.state_dict())
        lr.fill_(rate(update))
        net.zero_grad()
        algorithm.loss(net, target, batch, NOW).loss.backward()
        optimizer.step()


@everyone
@pytest.mark.parametrize("flags", [(), ("double",), ("dueling",), ("noisy",), ("double", "dueling", "noisy")])
def test_only_the_online_network_learns(name: str, flags: tuple[str, ...]) -> None:
    """Every parameter of it has a gradient, and none of the target's, nor of the online network at the next state."""
    algorithm, net, target, batch = made(name, **dict.fromkeys(flags, True))
    batch["discount"] = torch.full((N,), 0.9, requires_grad=True)
    loss = algorithm.loss(net, target, batch, NOW)
    loss.loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in target.parameters())
    assert batch["discount"].grad is None
    assert loss.priorities.shape == (N,)
    assert not loss.priorities.requires_grad
    assert (loss.priorities >= 0).all()
    assert all(value.shape == () and not value.requires_grad for value in loss.metrics.values())


@everyone
def test_weights_multiply_each_samples_loss(name: str) -> None:
    """With priorities' weights w the loss is Σ w_i l_i / N, where l_i is the loss with the other weights 0, times N."""
    algorithm, net, target, batch = made(name)
    parts = []
    for row in range(N):
        alone = nn.functional.one_hot(torch.tensor(row), N).float()
        parts.append(algorithm.loss(net, target, batch | {"weight": alone}, NOW).loss)
    weight = torch.rand(N)
    together = algorithm.loss(net, target, batch | {"weight": weight}, NOW)
    torch.testing.assert_close(together.loss, (weight * torch.stack(parts)).sum())
    unweighted = algorithm.loss(net, target, batch, NOW)
    torch.testing.assert_close(unweighted.priorities, together.priorities)
    if name != "dqn":  # whose priorities are |errors|; the others' are the losses
        torch.testing.assert_close(unweighted.priorities.mean(), unweighted.loss)


@everyone
def test_only_the_discount_ends_the_future(name: str) -> None:
    """Where it is 0 the next state does not matter; where it is not, as after a time limit, it does."""
    algorithm, net, target, batch = made(name)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.normal_()
    other = batch | {"next_obs": (batch["next_obs"] + 1) % STATES}
    ended = torch.arange(N) < 3
    first, second = (
        algorithm.loss(net, target, b | {"discount": torch.where(ended, 0.0, 0.9)}, NOW).priorities
        for b in (batch, other)
    )
    assert (torch.isclose(first, second, rtol=1e-4, atol=1e-5) == ended).all()


def test_dqn_and_double_dqn_by_hand() -> None:
    """y = r + γ max Q⁻(s') = 1 + 0.5·4, and r + γ Q⁻(s', argmax Q(s')) = 1 + 0.5·3."""
    net, target = table([[0.0, 0.25], [1.0, 2.0]]), table([[9.0, 9.0], [4.0, 3.0]])
    batch = {
        "obs": torch.tensor([0]),
        "action": torch.tensor([1]),
        "reward": torch.tensor([1.0]),
        "discount": torch.tensor([0.5]),
        "next_obs": torch.tensor([1]),
        "weight": torch.tensor([1.0]),
    }
    for double, y in ((False, 3.0), (True, 2.5)):
        loss = DQN(double=double).loss(net, target, batch, NOW)
        assert loss.priorities.item() == y - 0.25
        assert loss.loss.item() == abs(y - 0.25) - 0.5  # beyond 1 the Huber loss is linear
        squared = DQN(double=double, huber=False).loss(net, target, batch, NOW)
        assert squared.loss.item() == (y - 0.25) ** 2 / 2
        assert loss.metrics["value"].item() == 0.25
        assert loss.metrics["target"].item() == y


def test_the_dqn_of_2013() -> None:
    """`target_period=1, huber=False`: squares of y − Q(s, a), y by the network of the update before."""
    algorithm = changed("dqn", target_period=1, huber=False, batch=N, lr=0.05)
    net = algorithm.networks(spec())
    twin, learner = copy.deepcopy(net), Learner(algorithm, net, 100, seed=0)
    optimizer, batch = Adam(twin.parameters(), torch.tensor(0.05)), batch_of()
    for step in range(1, 6):
        learner.update(dict(batch), step)
        y = (batch["reward"] + batch["discount"] * twin.values(batch["next_obs"]).amax(-1)).detach()
        twin.zero_grad()
        (0.5 * (y - twin.values(batch["obs"])[torch.arange(N), batch["action"]]) ** 2).mean().backward()
        optimizer.step()
        for mine, its in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, its)


@everyone
def test_double_judges_by_the_target_what_the_network_chooses(name: str) -> None:
    """Double equals plain where both networks agree, and differs where they do not."""
    for agree in (True, False):
        losses = []
        for double in (False, True):
            algorithm, net, target, batch = made(name, double=double)
            if agree:
                target.load_state_dict(net.state_dict())
            batch["target_fraction"] = net.midpoints.expand(N, -1) if name == "iqn" else batch["weight"]
            losses.append(algorithm.loss(net, target, batch, NOW).loss)
        assert torch.equal(*losses) == agree


def masked(rows: Tensor, mask: Tensor) -> Any:
    from tensordict import TensorDict

    return TensorDict({"state": rows, "action_mask": mask}, batch_size=[len(rows)])


@everyone
@pytest.mark.parametrize("double", [False, True])
def test_masks_hold_in_targets(name: str, double: bool) -> None:
    """Forbidding all but one next action gives the target of a network that has no other."""
    torch.manual_seed(0)
    algorithm = changed(name, double=double)
    obs = spaces.Dict(state=spaces.Discrete(STATES), action_mask=spaces.MultiBinary(A))
    net, target = (algorithm.networks(EnvSpec("M-v0", "own", obs, spaces.Discrete(A))) for _ in range(2))
    batch = batch_of()
    batch |= algorithm.noise(net, batch, generator())
    free = torch.ones(N, A, dtype=torch.bool)

    def priorities(mask: Tensor) -> Tensor:
        rows = batch | {"obs": masked(batch["obs"], free), "next_obs": masked(batch["next_obs"], mask)}
        return algorithm.loss(net, target, rows, NOW).priorities

    following = masked(batch["next_obs"], free)
    values = net.values(following) if double else target.values(following)
    if name == "iqn" and not double:  # which chooses by the fractions drawn
        values = target(following, None, batch["target_fraction"]).mean(-1)
    single = torch.stack([priorities(free & (torch.arange(A) == only)) for only in range(A)])
    torch.testing.assert_close(priorities(free), single[values.argmax(-1), torch.arange(N)])
    assert not torch.equal(single[0], single[1])


@everyone
def test_masks_hold_in_acting(name: str) -> None:
    """Forbidden actions are never taken, greedily or not; int8 and float masks serve as well as bool."""
    torch.manual_seed(0)
    algorithm = changed(name)
    obs = spaces.Dict(state=spaces.Discrete(STATES), action_mask=spaces.MultiBinary(A))
    net = algorithm.networks(EnvSpec("M-v0", "own", obs, spaces.Discrete(A)))
    lanes = 2000
    mask = torch.rand(lanes, A) < 0.5
    mask[:, 1] |= ~mask.any(-1)
    state = net.initial_state(lanes)
    for given in (mask, mask.to(torch.int8), mask.float()):
        rows = masked(torch.randint(STATES, (lanes,)), given)
        for explore in (None, Explore(net.draw((lanes,), generator()), torch.full((lanes,), 0.7))):
            action = algorithm.act(net, rows, state, explore).action
            assert action.dtype == torch.int64
            assert mask[torch.arange(lanes), action].all()


def test_epsilon_greedy_frequencies() -> None:
    """Each lane explores with its own ε: P(best) = 1 − ε + ε/A, the others ε/A; masked ones share nothing."""
    lanes, actions = 40_000, 4
    net = DQN().networks(spec(actions=actions))
    values = torch.tensor([0.0, 3.0, 1.0, 2.0]).expand(lanes, actions)
    scale = torch.where(torch.arange(lanes) < lanes // 2, 0.2, 0.8)
    explore = Explore(net.draw((lanes,), generator()), scale)
    action = epsilon_greedy(values, None, explore)
    for half, epsilon in ((action[: lanes // 2], 0.2), (action[lanes // 2 :], 0.8)):
        share = half.bincount(minlength=actions) / len(half)
        expected = torch.full((actions,), epsilon / actions)
        expected[1] += 1 - epsilon
        torch.testing.assert_close(share, expected, rtol=0, atol=0.01)  # four deviations
    mask = torch.tensor([True, False, True, False]).expand(lanes, actions)
    share = epsilon_greedy(values, mask, explore)[lanes // 2 :].bincount(minlength=actions) / (lanes // 2)
    torch.testing.assert_close(share, torch.tensor([0.4, 0, 0.6, 0]), rtol=0, atol=0.012)
    assert (epsilon_greedy(values, None, None) == 1).all()
    assert (epsilon_greedy(values, torch.zeros_like(mask), None) == 1).all(), "a row that allows nothing allows all"


def test_exploration_falls_from_the_start_of_learning() -> None:
    place = torch.zeros(1)
    plain = DQN(learning_starts=100, epsilon=0.1, epsilon_start=0.9, epsilon_steps=1000)
    asked = [plain.exploration(steps, place) for steps in (0, 99, 100, 600, 1100, 10**6)]
    assert asked == pytest.approx([1, 1, 0.9, 0.5, 0.1, 0.1])
    noisy = DQN(learning_starts=100, noisy=True)
    assert [noisy.exploration(steps, place) for steps in (0, 99, 100)] == [1, 1, 0]


def test_learning_rate_falls_only_if_asked() -> None:
    assert [DQN(lr=0.5).learning_rate(remaining) for remaining in (1, 0.5, 0)] == [0.5, 0.5, 0.5]
    assert [DQN(lr=0.5, anneal=True).learning_rate(remaining) for remaining in (1, 0.5, 0)] == [0.5, 0.25, 0]


@everyone
def test_noise_changes_what_is_done(name: str) -> None:
    """Noisy layers explore without ε, and are quiet where nothing is explored."""
    algorithm = changed(name, noisy=True, dueling=True)
    net = algorithm.networks(spec())
    obs, state, still = torch.zeros(500, dtype=torch.int64), net.initial_state(500), torch.zeros(500)
    explored = algorithm.act(net, obs, state, Explore(net.draw((500,), generator()), still)).action
    assert len(explored.unique()) > 1
    assert len(algorithm.act(net, obs, state, None).action.unique()) == 1


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (C51, {"atoms": 1}, "atoms=1"),
        (C51, {"v_min": 3.0, "v_max": 1.0}, r"v_min=3.0 has to be below v_max=1.0"),
        (QRDQN, {"quantiles": 1}, "quantiles=1"),
        (QRDQN, {"kappa": 0.0}, "kappa=0.0"),
        (IQN, {"target_quantiles": 0}, "target_quantiles=0"),
    ],
)
def test_wrong_settings_are_refused(make: type, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        make(**settings)


def test_double_dqn_overestimates_less() -> None:
    """A state that leads to ten actions with rewards of mean 0 and deviation 1: every true value is 0."""

    def believed(double: bool, seed: int) -> float:
        algorithm = DQN(double=double, hidden=(), huber=False)
        net = table([[0.0] * 10, [0.0] * 10])
        values = []

        def batches() -> Any:
            torch.manual_seed(seed)
            obs = torch.arange(40) % 2
            for _ in range(400):
                reward = torch.randn(40) * obs
                yield {
                    "obs": obs,
                    "action": torch.randint(10, (40,)),
                    "reward": reward,
                    "discount": 1.0 - obs,
                    "next_obs": torch.ones(40, dtype=torch.int64),
                    "weight": torch.ones(40),
                }
                with torch.no_grad():
                    values.append(float(net(torch.tensor([0])).mean()))

        learn(algorithm, net, batches(), lambda _: 0.1, period=20)
        return sum(values[100:]) / len(values[100:])

    plain = [believed(False, seed) for seed in range(2)]
    double = [believed(True, seed) for seed in range(2)]
    assert min(plain) > 0.25
    assert max(double) < 0.5 * min(plain)


# Five states in a row, then +1 with probability 0.7 and -1 with 0.3 (γ = 0.95): from the first ±0.95⁴.

LENGTH, EDGE = 5, 0.95**4


def chain(algorithm: QLearning, net: Any, updates: int) -> Any:
    drawn = generator()
    obs = torch.cat([torch.arange(LENGTH - 1), torch.full((10,), LENGTH - 1)])
    last = obs == LENGTH - 1
    batch = {
        "obs": obs,
        "action": torch.zeros_like(obs),
        "reward": torch.tensor([0.0] * 4 + [1.0] * 7 + [-1.0] * 3),
        "discount": torch.where(last, 0.0, 0.95),
        "next_obs": (obs + 1).clamp(max=LENGTH - 1),
        "weight": torch.ones(len(obs)),
    }
    for _ in range(updates):
        yield batch | algorithm.noise(net, batch, drawn)


def wasserstein(quantile: Tensor, fraction: Tensor) -> float:
    """∫ |F⁻¹(τ) − quantile(τ)| dτ by the midpoint rule, where F⁻¹ is −0.95⁴ up to 0.3 and 0.95⁴ from there on."""
    return float((quantile - torch.where(fraction < 0.3, -EDGE, EDGE)).abs().mean())


def first_state(algorithm: QLearning, updates: int, lr: float) -> Any:
    torch.manual_seed(0)
    net = algorithm.networks(spec(LENGTH, 1))
    learn(algorithm, net, chain(algorithm, net, updates), lambda update: lr * (1 - update / updates), period=50)
    return net


def test_c51_recovers_the_distribution() -> None:
    """The mass of each outcome stays at the atoms around it, and the mean is exact but for what is learnt."""
    net = first_state(C51(v_min=-1, v_max=1, hidden=()), 600, 0.1)
    chance = net(torch.tensor([0]))[0, 0].softmax(-1).detach()
    for outcome, share in ((EDGE, 0.7), (-EDGE, 0.3)):
        near = (net.support - outcome).abs() < 0.12  # three atoms: each of four projections spreads mass to neighbours
        assert float(chance[near].sum()) == pytest.approx(share, abs=0.03)
    assert net.values(torch.tensor([0])).item() == pytest.approx(0.4 * EDGE, abs=0.05)


def test_qr_dqn_recovers_the_distribution() -> None:
    net = first_state(QRDQN(quantiles=50, kappa=0.01, hidden=()), 1000, 0.03)
    quantile = net(torch.tensor([0]))[0, 0].detach()
    distance = wasserstein(quantile.sort().values, (torch.arange(50) + 0.5) / 50)
    assert distance < 0.05


def test_iqn_recovers_the_distribution() -> None:
    net = first_state(IQN(quantiles=16, target_quantiles=16, kappa=0.01, hidden=(64, 64)), 1500, 0.01)
    fraction = ((torch.arange(100) + 0.5) / 100)[None]
    quantile = net(torch.tensor([0]), None, fraction)[0, 0].detach()
    distance = wasserstein(quantile, fraction[0])
    assert distance < 0.05


# Ape-X


def test_the_ladder_of_epsilon() -> None:
    """εᵢ = 0.4^(1 + 7i/(N−1)) throughout: 0.4 for the first of N lanes, 0.4⁸ for the last (Horgan et al. 2018)."""
    algorithm, place = DQN(epsilon=0.4, ladder=7.0, learning_starts=10), torch.tensor([0.0, 0.5, 1.0])
    expected = torch.tensor([0.4, 0.4**4.5, 0.4**8])
    for steps in (10, 1_000_000):
        torch.testing.assert_close(algorithm.exploration(steps, place), expected)
    assert algorithm.exploration(9, place) == 1.0


def test_priorities_of_actors_by_hand() -> None:
    """Three steps of two lanes, n = 2: the second lane terminates after its first step, and is invalid in the next."""
    algorithm = DQN(n_step=2, gamma=0.5, actor_priorities=True)
    unroll = {
        "reward": torch.tensor([[1.0, 4.0], [2.0, 0.0], [3.0, 1.0], [0.0, 0.0]]),
        "terminated": torch.tensor([[False, True], [False, False], [False, False], [False, False]]),
        "truncated": torch.zeros(4, 2, dtype=torch.bool),
        "q": torch.tensor([[0.0, 1.0], [0.0, 0.0], [10.0, 0.0], [0.0, 0.0]]),
        "best": torch.tensor([[0.0, 0.0], [0.0, 100.0], [8.0, 0.0], [4.0, 6.0]]),
    }
    found = algorithm.priorities(unroll)
    first = [1 + 0.5 * 2 + 0.25 * 8, 4.0 - 1]  # and nothing beyond the end
    second = [2 + 0.5 * 3 + 0.25 * 4, 0 + 0.5 * 1 + 0.25 * 6]
    third = [abs(3 + 0.5 * 4 - 10), 1 + 0.5 * 6]  # the unroll ends: one step
    torch.testing.assert_close(found, torch.tensor([first, second, third]))
    assert DQN().priorities(unroll) is None


def test_what_is_recorded_for_priorities() -> None:
    """The value of the action taken, exploring or not, and the best value that the mask allows."""
    algorithm, net, _, batch = made("dqn")
    algorithm = changed("dqn", actor_priorities=True)
    noise = net.draw((N,), generator())
    acted = algorithm.act(net, batch["obs"], torch.zeros(N, 0), Explore(noise, torch.full((N,), 0.5)))
    values = net.values(batch["obs"])
    torch.testing.assert_close(acted.record["q"], values[torch.arange(N), acted.action])
    torch.testing.assert_close(acted.record["best"], values.amax(-1))
    assert (acted.record["q"] < acted.record["best"]).any()

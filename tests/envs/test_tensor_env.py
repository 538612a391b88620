"""What holds for every tensor environment: the stream convention, seeds, exact continuation, refusals, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from rookery.envs.spec import dtype_of, example, leaves
from rookery.envs.tensor import TENSOR_ENVS, TensorEnv, make_tensor_env
from rookery.envs.vector import Obs, Step

VARIANTS: dict[str, dict[str, Any]] = {
    **{id: {} for id in TENSOR_ENVS},
    "KeyDoor-v0 masked": {"masked": True},
    "KeyDoor-v0 window": {"view": 3, "planes": "uint8", "rooms": 3},
    "KeyDoor-v0 one room": {"rooms": 1, "max_steps": 5},
    "CartPole-v1 short": {"max_steps": 7},
    "Pendulum-v1 endless": {"max_steps": None},
}
every_env = pytest.mark.parametrize("name", VARIANTS)


def make(name: str, lanes: int = 4) -> TensorEnv:
    return make_tensor_env(name.split()[0], lanes, **VARIANTS[name])


def random_action(space: spaces.Space, lanes: int, generator: torch.Generator) -> Obs:
    def of(leaf: spaces.Space) -> torch.Tensor:
        uniform = torch.rand((lanes, *leaf.shape), generator=generator)
        if isinstance(leaf, spaces.Box):
            return uniform * torch.tensor(leaf.high - leaf.low) + torch.tensor(leaf.low)
        if isinstance(leaf, spaces.MultiBinary):
            return uniform < 0.5
        return (uniform * torch.as_tensor(getattr(leaf, "nvec", getattr(leaf, "n", 0)))).long()

    found = leaves(space)
    if () in found:
        return of(found[()])
    result = TensorDict({}, batch_size=[lanes])
    for key, leaf in found.items():
        result[key] = of(leaf)
    return result


def actions(env: TensorEnv, count: int, seed: int = 0) -> list[Obs]:
    generator = torch.Generator().manual_seed(seed)
    return [random_action(env.spec.action_space, env.lanes, generator) for _ in range(count)]


def flat(obs: Obs) -> dict[Any, torch.Tensor]:
    return {(): obs} if isinstance(obs, torch.Tensor) else dict(obs.items(include_nested=True, leaves_only=True))


def both(left: Obs, right: Obs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(value, flat(right)[key]) for key, value in flat(left).items()]


def assert_same(left: Step, right: Step) -> None:
    for name in ("reward", "terminated", "truncated", "valid"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    ours, theirs = flat(left.obs), flat(right.obs)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@every_env
def test_spaces_dtypes_and_episode_ends(name: str) -> None:
    """100 random steps: every leaf lies in its space, flags exclude each other, and autoreset rows are as promised."""
    env, lanes = make(name), 4
    obs = env.reset(seed=3)
    names = {key: value.dtype for key, value in env.carry().items()}
    ended = torch.zeros(lanes, dtype=torch.bool)
    length = torch.zeros(lanes, dtype=torch.int64)
    for action in actions(env, 100):
        blank = flat(example(env.spec.obs_space, lanes))
        for key, leaf in leaves(env.spec.obs_space).items():
            value = flat(obs)[key if len(key) != 1 else key[0]]
            assert value.dtype == dtype_of(leaf)
            assert value.shape == blank[key if len(key) != 1 else key[0]].shape
            for row in value.numpy():
                kind = leaf.dtype if leaf.dtype is not None else row.dtype
                item = np.int64(row) if isinstance(leaf, spaces.Discrete) else np.asarray(row, kind)
                assert leaf.contains(item), (key, row)
        step = env.step(action)
        obs = step.obs
        assert step.reward.dtype == torch.float32
        assert {step.terminated.dtype, step.truncated.dtype, step.valid.dtype} == {torch.bool}
        assert {value.shape for value in step[1:5]} == {(lanes,)}
        assert step.info.keys() <= {"is_success"}
        assert torch.equal(step.valid, ~ended)
        assert not (step.terminated & step.truncated).any()
        assert not step.reward[ended].any()
        assert not (step.terminated | step.truncated)[ended].any()
        length = torch.where(ended, 0, length + 1)
        if env.spec.max_steps is not None:
            assert torch.equal(step.truncated, (length == env.spec.max_steps) & ~step.terminated)
        ended = step.terminated | step.truncated
    assert {key: value.dtype for key, value in env.carry().items()} == names


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "Catch-v0", "KeyDoor-v0", "MountainCar-v0"])
def test_an_ended_lane_begins_anew_whatever_its_action(name: str) -> None:
    """The call after an end gives a first observation, the same for any action in that lane."""
    pair = [make_tensor_env(name.split()[0], 2, max_steps=3) for _ in range(2)]
    first = pair[0].reset(seed=1)
    pair[1].reset(seed=1)
    for action in actions(pair[0], 3):
        last = pair[0].step(action)
        pair[1].step(action)
    assert last.truncated.all()
    zero = torch.zeros(2, dtype=torch.int64)
    begun, other = pair[0].step(zero), pair[1].step(zero + 1)
    assert_same(begun, other)
    assert not begun.valid.any()
    assert not torch.equal(begun.obs, last.obs)
    assert begun.obs.shape == first.shape
    assert pair[0].step(zero).valid.all()


def test_a_first_observation_after_autoreset_is_distributed_like_a_reset() -> None:
    env = make_tensor_env("CartPole-v1", 4096, max_steps=1)
    env.reset(seed=0)
    action = torch.zeros(4096, dtype=torch.int64)
    env.step(action)
    obs = env.step(action).obs
    assert obs.abs().max() <= 0.05
    assert obs.abs().mean() == pytest.approx(0.025, rel=0.03)


@every_env
def test_same_seed_same_future_and_other_seed_another(name: str) -> None:
    def trace(seed: int) -> list[Step]:
        env = make(name)
        start = env.reset(seed=seed)
        blank = torch.zeros(4)
        return [Step(start, blank, blank, blank, blank, {})] + [env.step(action) for action in actions(env, 30)]

    for left, right in zip(trace(5), trace(5), strict=True):
        assert_same(left, right)
    if name.split()[0] not in ("DeepSea-v0", "Probe1-v0", "Probe3-v0", "Probe4-v0"):  # nothing is drawn in these
        pairs = zip(trace(5), trace(6), strict=True)
        assert any(not torch.equal(one, two) for left, right in pairs for one, two in both(left.obs, right.obs))


def test_reset_without_a_seed_goes_on_with_the_stream() -> None:
    env = make("CartPole-v1")
    first = env.reset(seed=0)
    second = env.reset()
    assert not torch.equal(first, second)
    env.reset(seed=0)
    assert torch.equal(env.reset(), second)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in VARIANTS:
        env = make(name)
        env.reset(seed=1)
        for action in actions(env, 3):
            env.step(action)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(before=st.integers(0, 25), seed=st.integers(0, 2**32))
def test_a_saved_state_continues_bit_for_bit(name: str, before: int, seed: int) -> None:
    env, other = make(name), make(name)
    env.reset(seed=seed)
    plan = actions(env, before + 15, seed)
    for action in plan[:before]:
        env.step(action)
    saved = env.state()
    copies = {key: value.clone() for key, value in saved.items()}
    assert all(value.device.type == "cpu" for value in saved.values())
    expected = [env.step(action) for action in plan[before:]]
    assert all(torch.equal(saved[key], copies[key]) for key in saved), "later steps wrote into the saved state"
    other.load_state(saved)
    for action, step in zip(plan[before:], expected, strict=True):
        assert_same(other.step(action), step)
    assert all(torch.equal(saved[key], copies[key]) for key in saved), "the saved state was written into"


@every_env
def test_lanes_do_not_influence_each_other(name: str) -> None:
    """Other actions in lane 0 leave the lanes 1 to 3 as they were."""
    left, right = make(name), make(name)
    left.reset(seed=2)
    right.reset(seed=2)
    for mine, other in zip(actions(left, 30, 0), actions(left, 30, 1), strict=True):
        mixed = mine.clone()
        mixed[0] = other[0]
        one, two = left.step(mine), right.step(mixed)
        rows = slice(1, None)
        assert_same(
            Step(one.obs[rows], *(value[rows] for value in one[1:5]), {}),
            Step(two.obs[rows], *(value[rows] for value in two[1:5]), {}),
        )


@every_env
def test_what_leaves_belongs_to_the_caller(name: str) -> None:
    """Overwriting every tensor a step returned changes nothing later, and later steps change nothing returned."""
    left, right = make(name), make(name)
    first, _ = left.reset(seed=4), right.reset(seed=4)
    for leaf in flat(first).values():
        leaf.zero_()
    for action in actions(left, 20):
        spoilt, step = left.step(action), right.step(action)
        assert_same(spoilt, step)
        for value in (*flat(spoilt.obs).values(), *spoilt[1:5]):
            value.zero_()
    keep = right.step(actions(right, 1)[0])
    copy = keep.obs.clone()
    right.step(actions(right, 1)[0])
    assert_same(keep, keep._replace(obs=copy))


@every_env
def test_one_draw_a_step_and_no_look_at_the_data(name: str) -> None:
    """A step's arithmetic runs on tensors without data, so it cannot read any: no sync, no branch on data."""
    env = make(name)
    env.reset(seed=0)
    calls = []
    draw = env.draw

    def counted(generator: torch.Generator) -> torch.Tensor:
        calls.append(draw(generator))
        return calls[-1]

    env.draw = counted  # type: ignore[method-assign]
    action = actions(env, 1)[0]
    env.step(action)
    assert len(calls) == 1
    assert calls[0].shape[0] == 4
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in env._state.items()}
        nested = action.to_dict() if isinstance(action, TensorDict) else action
        state, *_ = env._transition(fake, env._ended, env._steps, nested, mode.from_tensor(calls[0]))
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in fake.items()}


def test_settle_makes_a_fixed_place_carry_the_future() -> None:
    """What a replayed graph does: the same tensors hold the state again after some steps."""
    env, plain = make("DeepSea-v0"), make("DeepSea-v0")
    env.reset(seed=0)
    plain.reset(seed=0)
    place = env.carry()
    plan = actions(env, 12)
    for index, action in enumerate(plan):
        assert_same(env.step(action), plain.step(action))
        if index % 3 == 2:
            env.settle(place)
            assert all(value is place[key] for key, value in env.carry().items())
    env.reset(seed=0)
    assert env.step(plan[0]).obs[:, 1].sum() == 4, "settling must not write into constants"


@every_env
def test_pictures(name: str) -> None:
    env = make(name)
    env.reset(seed=0)
    first = env.render()
    for action in actions(env, 3):
        env.step(action)
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert min(picture.shape[:2]) >= 200
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0, "video encoders want even sides"
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 2
    if name.split()[0] in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "Catch-v0", "DeepSea-v0", "MemoryChain-v0"):
        assert not np.array_equal(first, picture)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[4\] int64 on cpu; got \[3\] int64"),
        (torch.zeros(4), r"\[4\] int64 on cpu; got \[4\] float32"),
        (torch.zeros((4, 1), dtype=torch.int64), r"got \[4, 1\] int64"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "on meta"),
        (np.zeros(4, dtype=np.int64), "got ndarray"),
        (None, "got nothing"),
    ],
)
def test_a_misshapen_action_is_refused(action: Any, said: str) -> None:
    env = make("CartPole-v1")
    with pytest.raises(ValueError, match=said):
        env.step(action)


def test_a_misshapen_structured_action_is_refused() -> None:
    env = make("ProbeTuple-v0")
    with pytest.raises(ValueError, match=r"takes a TensorDict of 0: \[4\] int64, 1: \[4, 1\] float32; got \[4\] int64"):
        env.step(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="got nothing"):
        env.step(TensorDict({"0": torch.zeros(4, dtype=torch.int64)}, batch_size=[4]))


def test_a_foreign_state_is_refused() -> None:
    env = make("CartPole-v1")
    with pytest.raises(ValueError, match=r"'ended' where CartPole-v1 with 4 lanes on cpu has \[4\] bool"):
        env.load_state(make("CartPole-v1", lanes=5).state())
    with pytest.raises(ValueError, match="same environment"):
        env.load_state(make("Catch-v0").state())
    missing = env.state()
    del missing["generator"]
    with pytest.raises(ValueError, match="nothing as 'generator'"):
        env.load_state(missing)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"id": "CartPole"}, "no environment 'CartPole'; the nearest are CartPole-v1"),
        ({"id": "Zzz"}, "the nearest are CartPole-v1|the nearest are"),
        ({"lanes": 0}, "lanes=0; use 1 or more"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot hold a tensor here"),
        ({"id": "DeepSea-v0", "sise": 3}, "no option 'sise'; it takes size, seed, device, max_steps, compile"),
        ({"id": "DeepSea-v0", "size": 1}, "size=1; use 2 or more"),
        ({"id": "Catch-v0", "rows": 1}, "1 rows"),
        ({"id": "TMaze-v0", "length": 0}, "length=0"),
        ({"id": "MemoryChain-v0", "length": 0}, "length=0"),
        ({"id": "KeyDoor-v0", "rooms": 0}, "0 rooms"),
        ({"id": "KeyDoor-v0", "view": 4}, "view=4"),
        ({"id": "KeyDoor-v0", "planes": "int8"}, "planes='int8'"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_tensor_env(**({"id": "CartPole-v1", "lanes": 2} | options))


def test_the_registry_is_keyed_by_each_class_own_id() -> None:
    assert {id: env.id for id, env in TENSOR_ENVS.items()} == {id: id for id in TENSOR_ENVS}
    for id in TENSOR_ENVS:
        spec = make_tensor_env(id, 1).spec
        assert (spec.id, spec.backend, spec.saves_state) == (id, "tensor", True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CartPole-v1", "KeyDoor-v0 masked", "ProbeTuple-v0"])
def test_compiled_equals_eager(name: str) -> None:
    eager = make(name)
    compiled = make_tensor_env(name.split()[0], 4, compile=True, **VARIANTS[name])
    eager.reset(seed=0)
    compiled.reset(seed=0)
    for action in actions(eager, 40):
        one, two = eager.step(action), compiled.step(action)
        for key, value in flat(one.obs).items():
            torch.testing.assert_close(flat(two.obs)[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two.reward, one.reward)
        assert_same(one, two._replace(obs=one.obs, reward=one.reward))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "Catch-v0", "KeyDoor-v0 window"])
def test_a_captured_graph_equals_eager_steps(name: str) -> None:
    """Ten replays of a graph of five steps give what fifty eager steps give."""
    env, plain = (make_tensor_env(name.split()[0], 64, "cuda", **VARIANTS[name]) for _ in range(2))
    plan = [action.cuda() for action in actions(env, 5)]
    for action in plan:  # capture needs warm kernels
        env.step(action)
    env.reset(seed=0)
    plain.reset(seed=0)
    graph, place = torch.cuda.CUDAGraph(), env.carry()
    graph.register_generator_state(env.generator)
    with torch.cuda.graph(graph):
        rewards = torch.stack([env.step(action).reward for action in plan])
        env.settle(place)
    for _ in range(10):
        graph.replay()
        expected = torch.stack([plain.step(action).reward for action in plan])
        torch.testing.assert_close(rewards, expected)
    for key, value in plain.carry().items():
        torch.testing.assert_close(env.carry()[key], value)

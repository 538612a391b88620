"""Environments as batched tensor code: a whole vector of lanes steps in a few dozen torch operations, on any device."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.spec import EnvSpec, dtype_of, leaves
from rookery.envs.tensor import drawing
from rookery.envs.vector import Obs, Step, VectorEnv

__all__ = ["Nested", "State", "TensorEnv"]

State = dict[str, Tensor]  # every tensor [B, ...]
Nested = Tensor | dict[str, Any]  # a tensor [B, ...], or a nested dict of such: a structured observation or action


class TensorEnv(VectorEnv):
    """B lanes of an environment written as pure functions of tensors.

    A subclass gives its `id`, sets its spaces and constants in `build`, and writes `initial`, `advance` and
    `observe`; resets, time limits, the stream convention, saving and drawing are here. Every step is free of host
    synchronisation, of shapes that depend on data and of Python branches on data, so `torch.compile` and CUDA graphs
    can wrap it. `advance` is also called on lanes that are over (its result is dropped there), so it must not fail
    on them: an index has to stay in range one step beyond the end.

    Args:
        lanes: B, how many copies step together.
        device: where all tensors live.
        max_steps: steps after which an episode is truncated; None for no limit.
        compile: run the arithmetic of a step through `torch.compile`.
        options: what the environment's own `build` takes.

    Raises:
        ValueError: for a number of lanes or steps below 1, an option `build` does not take, a device that is not there.
    """

    id: ClassVar[str]
    reward_threshold: ClassVar[float | None] = None
    # A class's, or set in `build` where they depend on the options.
    draws: int = 0  # random numbers a lane and step
    default_max_steps: int | None = None
    obs_space: spaces.Space
    action_space: spaces.Space

    def __init__(
        self,
        lanes: int,
        device: torch.device | str = "cpu",
        max_steps: int | Literal["default"] | None = "default",
        compile: bool = False,
        **options: Any,
    ) -> None:
        if lanes < 1:
            raise ValueError(f"{self.id} was asked for lanes={lanes}; use 1 or more.")
        self.lanes = lanes
        self.device = _device(device)
        self.generator = torch.Generator(self.device)  # public: CUDA graph capture has to register it
        # Set by a caller that has drawn the next step's numbers ahead, so that no generator is in what it compiles.
        self.noise: Tensor | None = None
        self._refuse_unknown(options)
        self.build(**options)
        limit = self.default_max_steps if max_steps == "default" else max_steps
        if limit is not None and limit < 1:
            raise ValueError(f"{self.id} was asked for max_steps={limit}; use 1 or more, or None for no limit.")
        self.spec = EnvSpec(
            id=self.id,
            backend="tensor",
            obs_space=self.obs_space,
            action_space=self.action_space,
            max_steps=limit,
            reward_threshold=self.reward_threshold,
            saves_state=True,
        )
        self._actions = {
            key: (torch.Size((lanes, *(leaf.shape or ()))), dtype_of(leaf))
            for key, leaf in leaves(self.action_space).items()
        }
        self._flat_action = self._actions.get(())
        # Scalars as tensors: a Python number in an operation costs as much again as the operation.
        self._nothing = self.constant(0.0)
        self._count_none, self._count_one = self.constant(0, torch.int32), self.constant(1, torch.int32)
        self._limit = None if limit is None else self.constant(limit, torch.int32)
        # Each environment compiles for itself: a shared cache would count others' versions towards its limit.
        self._pure: Callable[..., Any] = self._transition
        if compile:
            self._pure = torch.compile(  # type: ignore[call-overload]
                self._transition, dynamic=False, fullgraph=True, isolate_recompiles=True
            )
        self.reset()

    # What a subclass writes.

    def build(self, *args: Any, **options: Any) -> None:
        """Set `obs_space`, `action_space` and constants; `lanes` and `device` are there already."""

    def draw(self, generator: torch.Generator, *rows: int) -> Tensor:
        """All random numbers of one step, `[*rows, B, k]`, in one call; uniform in [0, 1) unless a subclass differs."""
        return torch.rand((*rows, self.lanes, self.draws), generator=generator, device=self.device)

    @abstractmethod
    def initial(self, noise: Tensor) -> State:
        """The first state of a new episode in every lane."""

    @abstractmethod
    def advance(self, state: State, action: Nested, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        """Apply the actions: the next state, reward `[B]` float32, terminated `[B]` bool. Writes into nothing."""

    @abstractmethod
    def observe(self, state: State) -> Nested:
        """What the agent sees, in new memory (the caller may write into it)."""

    def picture(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """Draw one lane, `[H, W, 3]` uint8; unless a subclass draws better, its observation as rows of bars."""
        batch = {key: torch.as_tensor(value)[None].to(self.device) for key, value in state.items()}
        return drawing.bars(self.id, drawing.flatten(self.observe(batch)))

    # What a caller uses.

    def reset(self, seed: int | None = None) -> Obs:
        if seed is not None:
            self.generator.manual_seed(seed)
        fresh = self.initial(self.draw(self.generator))
        self._state = {name: value.clone() for name, value in fresh.items()}  # `settle` may write into it
        self._ended = torch.zeros(self.lanes, dtype=torch.bool, device=self.device)
        self._steps = torch.zeros(self.lanes, dtype=torch.int32, device=self.device)
        return self._packed(self.observe(self._state))

    def step(self, action: Obs) -> Step:
        """Apply one action a lane.

        Gradients are followed where the action has one; act under `torch.no_grad()` unless you want them.

        Raises:
            ValueError: for an action whose keys, shape, dtype or device are not those of the action space.
        """
        noise = self.draw(self.generator) if self.noise is None else self.noise
        carried = self._pure(self._state, self._ended, self._steps, self._unpacked(action), noise)
        self._state, self._ended, self._steps, obs, reward, terminated, truncated, valid = carried
        return Step(self._packed(obs), reward, terminated, truncated, valid, {})

    def carry(self) -> State:
        """The tensors one step hands to the next, by name, on the environment's device; not copies."""
        return {"ended": self._ended, "steps": self._steps, **{f"state.{k}": v for k, v in self._state.items()}}

    def settle(self, carry: State) -> None:
        """Write the present `carry()` into these tensors and go on from them.

        The last call of a captured CUDA graph, with the `carry()` taken before the capture: each replay then begins
        where the one before it stopped. `generator` has to be registered with the graph before the capture.
        """
        for name, now in self.carry().items():
            carry[name].copy_(now)
        self._take(carry)

    def state(self) -> dict[str, Tensor]:
        saved = {name: value.detach().to("cpu", copy=True) for name, value in self.carry().items()}
        return saved | {"generator": self.generator.get_state().cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue exactly where `state()` was taken.

        Raises:
            ValueError: if the state is another environment's, another number of lanes' or another kind of device's.
        """
        expected = self.carry() | {"generator": self.generator.get_state()}
        for name in sorted(expected.keys() | state.keys()):
            wanted, got = (_kind(tensors.get(name)) for tensors in (expected, state))
            if wanted != got:
                raise ValueError(
                    f"the saved state has {got} as {name!r} where {self.id} with {self.lanes} lanes on {self.device} "
                    f"has {wanted}; load a state of the same environment, options, lanes and kind of device."
                )
        self.generator.set_state(state["generator"].to("cpu", copy=True))
        self._take({name: state[name].to(self.device, copy=True) for name in self.carry()})

    def render(self) -> np.ndarray:
        return self.picture({name: value[0].cpu().numpy() for name, value in self._state.items()})

    # How it is done.

    def constant(self, values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """A constant on the environment's device; made once in `build`, since capture forbids copies from the host."""
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def _transition(
        self, state: State, ended: Tensor, steps: Tensor, action: Nested, noise: Tensor
    ) -> tuple[State, Tensor, Tensor, Nested, Tensor, Tensor, Tensor, Tensor]:
        """One step of the stream convention as a pure function: what `torch.compile` wraps."""
        moved, reward, terminated = self.advance(state, action, noise)
        fresh = self.initial(noise)
        state = {name: _choose(ended, fresh[name], value) for name, value in moved.items()}
        valid = ~ended
        steps = torch.where(ended, self._count_none, steps + self._count_one)
        reward = torch.where(ended, self._nothing, reward)
        terminated = terminated & valid
        # a > b is "a and not b" for bools, in one operation
        truncated = torch.zeros_like(valid) if self._limit is None else (steps >= self._limit) > terminated
        return state, terminated | truncated, steps, self.observe(state), reward, terminated, truncated, valid

    def _take(self, carry: State) -> None:
        self._ended, self._steps = carry["ended"], carry["steps"]
        self._state = {name: carry[f"state.{name}"] for name in self._state}

    def _packed(self, obs: Nested) -> Obs:
        if isinstance(obs, Tensor):
            return obs
        from tensordict import TensorDict

        return TensorDict(obs, batch_size=[self.lanes], device=self.device)

    def _unpacked(self, action: Obs) -> Nested:
        """The action as plain tensors, checked by what is cheap: keys, shapes, dtypes and devices, not values."""
        flat = self._flat_action
        if flat is not None:
            self._check(action, *flat)
            return action
        from tensordict import TensorDict

        if not isinstance(action, TensorDict):
            raise ValueError(f"{self.id} takes a TensorDict of {self._wanted()}; got {_kind(action)}.")
        nested: dict[str, Any] = action.to_dict()
        for key, (shape, dtype) in self._actions.items():
            self._check(action.get(key, None), shape, dtype)
        return nested

    def _check(self, leaf: Any, shape: torch.Size, dtype: torch.dtype) -> None:
        fits = isinstance(leaf, Tensor) and leaf.shape == shape and leaf.dtype == dtype and leaf.device == self.device
        if not fits:
            place = f" on {leaf.device}" if isinstance(leaf, Tensor) else ""
            raise ValueError(
                f"{self.id} takes actions {self._wanted()} on {self.device}; got {_kind(leaf)}{place}; "
                "reshape or convert it."
            )

    def _wanted(self) -> str:
        return ", ".join(
            f"{'.'.join(key)}{': ' if key else ''}{list(shape)} {str(dtype).removeprefix('torch.')}"
            for key, (shape, dtype) in self._actions.items()
        )

    def _refuse_unknown(self, options: dict[str, Any]) -> None:
        known = [name for name in inspect.signature(self.build).parameters if name not in ("args", "options")]
        known += ["device", "max_steps", "compile"]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"{self.id} has no option {unknown[0]!r}; it takes {', '.join(known)}.")


def _choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Row by row `yes` where the mask `[B]` is set, else `no`; both `[B, ...]`."""
    return torch.where(mask if no.dim() == 1 else mask.view(-1, *(1,) * (no.dim() - 1)), yes, no)


def _kind(value: Any) -> str:
    """A tensor's dtype and shape in words, or what else it is."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return "nothing" if value is None else type(value).__name__


def _device(device: torch.device | str) -> torch.device:
    """The device with its index (`cuda` becomes `cuda:0`), so that it compares equal with that of a tensor."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"device {str(device)!r} cannot hold a tensor here ({reason}); use 'cpu'.") from error

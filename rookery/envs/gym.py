"""Any Gymnasium environment as lanes, in this process or in workers that write rows into common memory."""

from __future__ import annotations

import ctypes
import difflib
import importlib
import itertools
import multiprocessing
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, ClassVar, NoReturn

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rookery.envs import gym_worker
from rookery.envs.goals import ComputedGoal, has_goals
from rookery.envs.gym_worker import LaneError, Maker
from rookery.envs.native import agent_space, lane_seeds
from rookery.envs.spec import EnvSpec, leaves
from rookery.envs.vector import EnvError, Obs, Step, VectorEnv

__all__ = ["GymEnv", "gym_ids", "imported", "register_namespace"]

SUCCESS = "is_success"  # info that goal-conditioned environments have
FAREWELL = 2.0  # seconds a worker has to close its environments before it is killed


def gym_ids() -> list[str]:
    """Every id registered with Gymnasium, Atari's among them where ale-py is installed."""
    _register_atari()
    return list(gymnasium.registry)


class GymEnv(VectorEnv):
    """B lanes of a Gymnasium environment, each its own copy, with next-step autoreset made here.

    In place (`workers=0`) the lanes step one after the other. With workers, each of N spawned processes steps a share
    of the lanes and writes observations, rewards and flags straight into common memory; one byte a step travels. Both
    give the same streams. The memory has no name, so nothing is left behind however a process ends, and a worker
    leaves when its parent is gone.

    Discrete values count from 0 in tensors even where the environment's `start` is another, and bounded boxes of
    integer actions become MultiDiscrete.
    """

    def __init__(
        self,
        source: str | Callable[..., gymnasium.Env] | gymnasium.Env,
        lanes: int = 1,
        seed: int = 0,
        workers: int = 0,
        timeout: float = 120.0,
        info: Sequence[str] = (),
        render: bool = False,
        **env_kwargs: Any,
    ) -> None:
        """Make the lanes.

        Args:
            source: a registered id, a class or function that makes an environment, or one environment (one lane).
            seed: spread over the lanes.
            workers: processes that step the lanes; 0 steps them here.
            timeout: seconds a worker may take for one step of its lanes, or to start, before it counts as hung.
            info: names of scalars in the environment's info to carry in `Step.info`, NaN in rows that lack them.
            render: make lane 0 with `render_mode="rgb_array"`, so that `render()` can draw it.
            env_kwargs: what the environment is made with.

        Raises:
            ValueError: for an unknown id, a space without fixed-size tensors, or a source that cannot go to workers.
            EnvError: if making an environment fails.
        """
        if lanes < 1:
            raise ValueError(f"lanes={lanes} is not a positive number of lanes.")
        if not 0 <= workers <= lanes:
            raise ValueError(f"workers={workers} does not fit {lanes} lanes; use 0 (in place) to {lanes}.")
        self.lanes, self.device = lanes, torch.device("cpu")
        self._seed: int | None = seed
        self._info, self._render, self._steps = list(info), render, 0
        maker = _maker(source, lanes, workers, env_kwargs)
        name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
        try:
            made = gym_worker.make_envs(maker, range(1 if workers else lanes), render and not workers, np.zeros(1))
        except LaneError as error:
            raise EnvError(f"{name}, lane {error.lane}, {error.text}") from error
        self.spec = _describe(made[0], name, own=not isinstance(source, str))
        if self.spec.goal_reward is not None and SUCCESS not in self._info:
            self._info.append(SUCCESS)
        layout = gym_worker.fields(self.spec.obs_space, self.spec.action_space, lanes, len(self._info))
        self._share: _InPlace | _Workers
        if workers:
            made[0].close()
            self._share = _Workers(maker, layout, lanes, workers, timeout, {"info": self._info, "render": render})
        else:
            self._share = _InPlace(made, layout, self._info)
        self._begin(started=not workers)

    def _begin(self, started: bool) -> None:
        self._finish = weakref.finalize(self, self._share.close)
        rows = self._rows = self._share.rows
        self._obs = [(key, rows[f"obs{i}"]) for i, key in enumerate(leaves(self.spec.obs_space))]
        self._action = [(key, rows[f"action{i}"]) for i, key in enumerate(leaves(self.spec.action_space))]
        if not started:
            self._do(None, "while starting")

    def reset(self, seed: int | None = None) -> Obs:
        """Begin an episode in every lane; the first reset uses the constructor's seed where none is given."""
        seed = self._seed if seed is None else seed
        self._seed, self._steps = None, 0  # from the second reset on, the environments' own generators go on
        if seed is not None:
            self._rows["seed"][:] = lane_seeds(seed, self.lanes)
        self._do("reset" if seed is None else "reset_seeded", "in reset")
        return self._observation()

    def step(self, action: Obs) -> Step:
        for key, array in self._action:
            values = action if isinstance(action, Tensor) else action[key]
            if values.shape != array.shape:
                raise ValueError(
                    f"{self.spec.id} got actions of shape {tuple(values.shape)}; "
                    f"expected {array.shape}, one for each lane."
                )
            array[...] = values.numpy()
        self._steps += 1
        self._do("step", f"step {self._steps}")
        rows = self._rows
        return Step(
            obs=self._observation(),
            reward=torch.from_numpy(rows["reward"].copy()),
            terminated=torch.from_numpy(rows["terminated"].copy()),
            truncated=torch.from_numpy(rows["truncated"].copy()),
            valid=torch.from_numpy(rows["valid"].copy()),
            info={name: torch.from_numpy(rows["info"][:, i].copy()) for i, name in enumerate(self._info)},
        )

    def _observation(self) -> Obs:
        if len(self._obs) == 1 and not self._obs[0][0]:
            return torch.from_numpy(self._obs[0][1].copy())
        from tensordict import TensorDict

        obs = TensorDict({}, batch_size=[self.lanes])
        for key, array in self._obs:
            obs[key] = torch.from_numpy(array.copy())
        return obs

    def _do(self, command: str | None, doing: str) -> None:
        """Have all lanes do `command` (None: only become ready), or close everything and say what failed."""
        try:
            self._share.do(command)
        except LaneError as error:
            self.close()
            raise EnvError(f"{self.spec.id}, lane {error.lane}, {doing}: {error.text}") from error
        except BaseException:
            self.close()  # interrupted between a question and its answer: the next answer would be to the wrong one
            raise

    def render(self) -> np.ndarray:
        if not self._render:
            raise RuntimeError(f"{self.spec.id} draws itself only if built for it; make it with render=True.")
        return self._share.render()

    def close(self) -> None:
        self._finish()


class _InPlace:
    """All lanes in this process."""

    def __init__(self, envs: list[gymnasium.Env], layout: list[gym_worker.Field], info: list[str]) -> None:
        self.rows = gym_worker.arrays(layout, bytearray(gym_worker.size(layout)))
        self.block: gym_worker.Block | None = gym_worker.Block(envs, 0, self.rows, 0, info)

    def do(self, command: str | None) -> None:
        if self.block is None:
            raise LaneError(0, "the environment is closed; make a new one.")
        if command == "step":
            self.block.step()
        elif command is not None:
            self.block.reset(seeded=command == "reset_seeded")

    def render(self) -> np.ndarray:
        assert self.block is not None, "rendering a closed environment"
        return self.block.render()

    def close(self) -> None:
        block, self.block = self.block, None
        if block is not None:
            block.close()


class _Workers:
    """Lanes shared out over spawned processes; one byte each way a step, everything else through common memory."""

    ASK: ClassVar = {"step": b"s", "reset": b"r", "reset_seeded": b"R", "render": b"v"}

    def __init__(
        self,
        maker: Maker,
        layout: list[gym_worker.Field],
        lanes: int,
        workers: int,
        timeout: float,
        options: dict[str, Any],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        # Backed by a file that has lost its name already: the memory goes when the last process that maps it does.
        memory = context.RawArray(ctypes.c_byte, gym_worker.size(layout))
        self.rows = gym_worker.arrays(layout, memory)
        self.timeout, self.closed = timeout, False
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        bounds = [lanes * slot // workers for slot in range(workers + 1)]
        self.spans = [range(*pair) for pair in itertools.pairwise(bounds)]
        for slot, span in enumerate(self.spans):
            ours, theirs = context.Pipe()
            arguments = (maker, layout, memory, span.start, len(span), slot, options, theirs)
            process = context.Process(target=gym_worker.serve, args=arguments, name=f"rookery-env-{slot}", daemon=True)
            self.pipes.append(ours)
            try:
                process.start()
            except Exception as error:
                self.close()
                raise ValueError(
                    f"workers={workers} start new processes, to which {maker.source!r} cannot travel ({error}); "
                    "define it at the top of a module, or use workers=0."
                ) from error
            theirs.close()
            self.processes.append(process)

    def do(self, command: str | None) -> None:
        """Have all workers do `command` and wait for all; the deadline is one for all of them."""
        if self.closed:
            raise LaneError(0, "the environment is closed; make a new one.")
        deadline = time.monotonic() + self.timeout
        if command is not None:
            for slot in range(len(self.pipes)):
                self._ask(slot, self.ASK[command])
        for slot in range(len(self.pipes)):
            self._expect(slot, deadline)

    def render(self) -> np.ndarray:
        deadline = time.monotonic() + self.timeout
        self._ask(0, self.ASK["render"])
        shape = np.frombuffer(self._receive(0, deadline), np.int64)
        picture = np.frombuffer(self._receive(0, deadline), np.uint8).reshape(shape)
        self._expect(0, deadline)
        return picture

    def _ask(self, slot: int, byte: bytes) -> None:
        try:
            self.pipes[slot].send_bytes(byte)
        except OSError:
            self._died(slot)

    def _expect(self, slot: int, deadline: float) -> None:
        answer = self._receive(slot, deadline)
        if answer != b"k":
            lane, _, text = answer.decode().partition(" ")
            raise LaneError(int(lane), text)

    def _receive(self, slot: int, deadline: float) -> bytes:
        try:
            if not self.pipes[slot].poll(max(0.0, deadline - time.monotonic())):
                self._hangs(slot)
            return self.pipes[slot].recv_bytes()
        except (EOFError, OSError):
            self._died(slot)

    def _hangs(self, slot: int) -> NoReturn:
        if not self.processes[slot].is_alive():
            self._died(slot)
        raise LaneError(
            int(self.rows["at"][slot]),
            f"worker {slot} ({self._holds(slot)}) hangs in this lane: no answer in {self.timeout:g} s; "
            "mend the environment or raise timeout.",
        )

    def _died(self, slot: int) -> NoReturn:
        process = self.processes[slot]
        process.join(FAREWELL)
        code = process.exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"left with code {code}"
        )
        raise LaneError(
            int(self.rows["at"][slot]),
            f"worker {slot} ({self._holds(slot)}) {how}; its own output above may say why. "
            "(A script that makes workers needs `if __name__ == '__main__':`.)",
        )

    def _holds(self, slot: int) -> str:
        span = self.spans[slot]
        return f"process {self.processes[slot].pid}, lanes {span.start} to {span.stop - 1}"

    def close(self) -> None:
        """Close the pipes, at which workers close their environments and leave; kill those that do not in time."""
        self.closed = True
        for pipe in self.pipes:
            pipe.close()
        deadline = time.monotonic() + FAREWELL
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _maker(source: Any, lanes: int, workers: int, env_kwargs: dict[str, Any]) -> Maker:
    if isinstance(source, str):
        return Maker(_registered(source), env_kwargs)
    if isinstance(source, gymnasium.Env):
        if lanes > 1 or workers:
            raise ValueError(
                f"one {type(source).__name__} object is one lane in this process; for {lanes} lanes and {workers} "
                "workers give a function or class that makes it."
            )
        return Maker(lambda **kwargs: source, env_kwargs)
    if not callable(source):
        raise ValueError(f"{source!r} makes no environment; give an id, a function or class, or a gymnasium.Env.")
    return Maker(source, env_kwargs)


def imported(module: str) -> ModuleType:
    """The module of this name.

    Raises:
        ValueError: for whatever is raised as it is imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # what stands in a user's file
        advice = "run where it is, or install it" if isinstance(error, ImportError) else "mend it"
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the module {module!r} cannot be imported: {reason}; {advice}.") from error


def _registered(id: str) -> gymnasium.envs.registration.EnvSpec:
    if id.startswith("ALE/"):
        _register_atari()
    module, _, name = id.rpartition(":")
    if module:  # importing the module registers the id
        found, id = imported(module), name
        if id not in gymnasium.registry and id.isidentifier():
            made_there = {
                each: getattr(value, "__module__", "") for each, value in vars(found).items() if callable(value)
            }
            own = [each for each, where in made_there.items() if where == module]
            raise ValueError(f"the module {module!r} has no {id!r}; it has: {', '.join(own) or 'nothing to call'}.")
    if id not in gymnasium.registry:
        register_namespace(id)
    if id not in gymnasium.registry:
        near = difflib.get_close_matches(id, list(gymnasium.registry), 3, cutoff=0.3)
        raise ValueError(f"Gymnasium has no environment {id!r}; nearest: {', '.join(near)}.")
    return gymnasium.registry[id]


def _register_atari() -> None:
    try:
        import ale_py
    except ImportError:
        return
    if "ALE/Pong-v5" not in gymnasium.registry:
        gymnasium.register_envs(ale_py)


def register_namespace(id: str) -> None:
    """Let the packages that declare the id's namespace as theirs register it, as Gymnasium itself did before 1.0.

    They do so by an entry point of the group `gymnasium.envs` that bears the namespace's name, as MinAtar's does.
    """
    namespace, _, name = id.partition("/")
    for point in entry_points(group="gymnasium.envs", name=namespace) if name else ():
        point.load()()


def _describe(env: gymnasium.Env, name: str, own: bool) -> EnvSpec:
    for needed in ("reset", "step", "observation_space", "action_space"):
        if not hasattr(env, needed):
            raise ValueError(f"{name} gave a {type(env).__name__} without `{needed}`; it must be a gymnasium.Env.")
    registered = getattr(env, "spec", None)
    frame_skip = registered.kwargs.get("frameskip", 1) if registered else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium warns of float64 bounds cast to float32
        obs_space, action_space = agent_space(env.observation_space), agent_space(env.action_space, is_action=True)
    compute = getattr(getattr(env, "unwrapped", env), "compute_reward", None)
    leaves(obs_space), leaves(action_space)  # refuses what has no fixed-size tensor
    return EnvSpec(
        id=registered.id if registered else name,
        backend="own" if own else "gym",
        obs_space=obs_space,
        action_space=action_space,
        frame_skip=frame_skip if isinstance(frame_skip, int) else 1,
        max_steps=registered.max_episode_steps if registered else None,
        reward_threshold=registered.reward_threshold if registered else None,
        goal_reward=ComputedGoal(compute) if compute and has_goals(obs_space) else None,
    )

"""What an actor does: act in B lanes with the weights it was given, and fill unrolls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rookery.algorithms.base import Acted, Algorithm, PolicyNet
from rookery.data.unroll import UnrollBuffer
from rookery.envs.vector import Obs, Step, VectorEnv
from rookery.estimators import linear_recurrence
from rookery.nn.flat import FlatParameters, restore

__all__ = ["Collector", "Unroll"]

COLUMNS = ("reward", "terminated", "truncated", "valid")


class Unroll:
    """A slot for T steps of B lanes, and what was noted when it was filled."""

    def __init__(self, buffer: UnrollBuffer, state: Tensor) -> None:
        self.buffer = buffer
        self.state_in = state.clone()  # [B, S] recurrent state before row 0
        self.version = 0  # weights version that acted

    def batch(self) -> dict[str, Obs]:
        """The rows by name, `[T+1, B, ...]`, and the recurrent `state` before row 0, `[B, S]`."""
        storage = self.buffer.storage
        return {**{name: storage[name] for name in storage.keys()}, "state": self.state_in}  # noqa: SIM118


class Collector:
    """Steps an environment with an algorithm's policy, T rows at a time.

    Args:
        net: acts; the collector keeps it to itself, and fills it by `load`.
        steps: T, the rows of an unroll.
        compile: wrap acting in `torch.compile`.
        bf16: run the trunk in bfloat16.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        net: PolicyNet,
        env: VectorEnv,
        steps: int,
        seed: int,
        compile: bool = False,
        bf16: bool = False,
    ) -> None:
        self.algorithm, self.net, self.env, self.T = algorithm, net.requires_grad_(False), env, steps
        self.generator = torch.Generator(env.device).manual_seed(seed)
        self.returns: list[float] = []  # of the episodes that ended since they were last taken
        self.lengths: list[int] = []
        self._flat, self._version = FlatParameters(net), 0
        self._act = torch.compile(self._choose, dynamic=False) if compile else self._choose
        self._bf16 = bf16
        self._obs = env.reset(seed)
        self._state = net.initial_state(env.lanes, env.device)
        self._start = torch.ones(env.lanes, dtype=torch.bool, device=env.device)  # the row is an episode's first
        self._ended = torch.zeros_like(self._start)  # the row before ended its episode
        self._sums = torch.zeros(3, env.lanes, device=env.device)  # return, length and discounted return so far

    def _choose(self, obs: Obs, state: Tensor, noise: Tensor) -> Acted:
        with torch.autocast(self.env.device.type, torch.bfloat16, enabled=self._bf16):
            return self.algorithm.act(self.net, obs, state, noise)

    def load(self, version: int, values: dict[str, Tensor]) -> None:
        """Act with these weights from now on."""
        restore(self.net, self._flat, values)
        self._version = version

    @torch.no_grad()
    def slot(self) -> Unroll:
        """A new slot, allocated from one example row."""
        floats = torch.zeros(self.env.lanes, device=self.env.device)
        noise = self.net.draw((self.env.lanes,), torch.Generator(self.env.device))
        acted = self._choose(self._obs, self._state, noise)
        row = {
            "obs": self._obs,
            "action": acted.action,
            "reward": floats,
            "discounted_return": floats,
            **{name: floats.bool() for name in ("terminated", "truncated", "valid", "start")},
            **acted.record,
        }
        return Unroll(UnrollBuffer(row, self.T), self._state)

    @torch.no_grad()
    def fill(self, unroll: Unroll) -> int:
        """T steps of every lane into the slot; gives how many were valid."""
        rows: dict[str, list[Any]] = {"obs": [], "action": [], "start": []}
        steps: list[Step] = []
        unroll.state_in.copy_(self._state)
        for noise in self.net.draw((self.T + 1, self.env.lanes), self.generator).unbind(0):
            acted = self._act(self._obs, self._state, noise)
            rows["obs"].append(self._obs)
            rows["start"].append(self._start)
            for name, value in acted.record.items():
                rows.setdefault(name, []).append(value)
            if len(steps) == self.T:
                break  # the last row is for bootstrapping; its lanes act again, with newer weights
            step = self.env.step(acted.action)
            rows["action"].append(acted.action)
            steps.append(step)
            self._advance(step, acted.state)
        for column in COLUMNS:
            rows[column] = [getattr(step, column) for step in steps]
        unroll.buffer.write(rows)
        unroll.version = self._version
        return self._account(unroll.buffer, steps)

    def _advance(self, step: Step, state: Tensor) -> None:
        """To the next row. The row after an invalid one is an episode's first, and begins with an empty memory."""
        self._obs = step.obs
        if state.shape[-1]:
            self._start = ~step.valid
            self._state = state.masked_fill(self._start.unsqueeze(-1), 0)

    def _account(self, buffer: UnrollBuffer, steps: list[Step]) -> int:
        """Returns, lengths and discounted returns so far in every row; takes down the episodes that ended."""
        rows = buffer.storage[:-1]
        ended = rows["terminated"] | rows["truncated"]
        raw = (
            torch.stack([step.info["raw_reward"] for step in steps])
            if "raw_reward" in steps[0].info
            else rows["reward"]
        )
        goes_on = torch.cat([self._ended[None], ended[:-1]]).logical_not().float()
        decay = torch.stack([goes_on, goes_on, self.algorithm.gamma * goes_on], 1)  # [T, 3, B]
        terms = torch.stack([raw, rows["valid"].float(), rows["reward"]], 1)
        sums = linear_recurrence(decay, terms, self._sums, reverse=False)
        rows["discounted_return"].copy_(sums[:, 2])
        self._sums, self._ended = sums[-1], ended[-1]
        self.returns += sums[:, 0][ended].tolist()
        self.lengths += [int(length) for length in sums[:, 1][ended].tolist()]
        return int(rows["valid"].sum())

    def episodes(self) -> dict[str, Any]:
        """The episodes that ended since the last call: their number, mean return and length, and each return."""
        returns, lengths, self.returns, self.lengths = self.returns, self.lengths, [], []
        if not returns:
            return {}
        mean_return, mean_length = sum(returns) / len(returns), sum(lengths) / len(lengths)
        return {
            "episodes": len(returns),
            "episode_return": mean_return,
            "episode_length": mean_length,
            "returns": returns,
        }

    def state(self) -> dict[str, Any]:
        """All that decides the next unroll but the weights; without the environment's, where it cannot save its own."""
        own = {"noise": self.generator.get_state(), "returns": self.returns, "lengths": self.lengths}
        if not self.env.spec.saves_state:
            return own
        lanes = {"state": self._state, "start": self._start, "ended": self._ended, "sums": self._sums, "obs": self._obs}
        lanes["obs"] = self._obs if isinstance(self._obs, Tensor) else self._obs.to_dict()
        return {**own, "lanes": lanes, "env": self.env.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken; the lanes begin new episodes where the environment was not saved."""
        self.generator.set_state(state["noise"])
        self.returns, self.lengths = list(state["returns"]), list(state["lengths"])
        if "lanes" not in state:
            return
        self.env.load_state(state["env"])
        lanes = {name: value for name, value in state["lanes"].items() if name != "obs"}
        for name, value in lanes.items():
            setattr(self, f"_{name}", value.to(self.env.device))
        obs = state["lanes"]["obs"]
        if isinstance(obs, Tensor):
            self._obs = obs.to(self.env.device)
        else:
            self._obs = type(self._obs)(obs, batch_size=[self.env.lanes], device=self.env.device)

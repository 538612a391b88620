"""What an evaluator does: play whole episodes on lanes of its own, with the greedy policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rookery.algorithms.base import Algorithm, Explore, PolicyNet, flat, sampled
from rookery.envs.vector import VectorEnv
from rookery.nn.compiled import precision

__all__ = ["Evaluation", "Evaluator"]

SUCCESS = ("is_success", "success")  # what environments call it in `Step.info`


class Evaluation(NamedTuple):
    """Whole episodes, in the order of their lanes."""

    returns: list[float]
    lengths: list[int]  # steps
    successes: list[float] | None = None  # 1 where the environment's last step says so; None where it never does

    def summary(self) -> dict[str, Any]:
        """Mean, standard deviation and number of the returns, and the share of successes where that is known.

        The deviation is that of these episodes (divided by their number); it says nothing about other seeds.
        """
        found = {
            "eval_return_mean": float(np.mean(self.returns)),
            "eval_return_std": float(np.std(self.returns)),
            "eval_episodes": len(self.returns),
        }
        return found if self.successes is None else {**found, "eval_success": float(np.mean(self.successes))}


class Evaluator:
    """Plays episodes with the weights it is given.

    Every lane plays the same number of episodes, so that short ones are not favoured.

    Args:
        greedy: the most likely action rather than a sampled one.
    """

    def __init__(
        self, algorithm: Algorithm, net: PolicyNet, env: VectorEnv, seed: int, greedy: bool = True, bf16: bool = False
    ) -> None:
        self.algorithm, self.net, self.env, self.greedy = algorithm, net, env, greedy
        self.generator = torch.Generator(env.device).manual_seed(seed)
        self.due = 0  # steps at which the next evaluation falls due
        self.seconds = {"evaluation": 0.0}
        self._flat = flat(algorithm, net, learns=False)
        self._bf16 = bf16

    def load(self, values: dict[str, Tensor]) -> None:
        """Play with these weights from now on."""
        self._flat.restore(values)

    @torch.no_grad()
    def play(self, episodes: int, limit: int = 1_000_000) -> Evaluation:
        """Play `episodes`, a multiple of the lanes.

        Raises:
            RuntimeError: if an episode takes more than `limit` steps.
        """
        began, each = time.perf_counter(), -(-episodes // self.env.lanes)
        sums = torch.zeros(3, self.env.lanes, device=self.env.device)  # return, length, success
        found: list[list[list[float]]] = [[] for _ in range(self.env.lanes)]  # of a lane's episodes, `sums`
        obs, state = self.env.reset(), self.net.initial_state(self.env.lanes, self.env.device)
        for _ in range(limit):
            with precision(self.env.device, self._bf16):
                action, _, state = self.algorithm.act(self.net, obs, state, self._explore())
            step = self.env.step(action)
            obs = step.obs
            if state.shape[-1]:
                state = state.masked_fill(~step.valid.unsqueeze(-1), 0)
            sums[0] += step.info.get("raw_reward", step.reward)
            sums[1] += step.valid
            sums[2] = next((step.info[name] for name in SUCCESS if name in step.info), torch.nan)
            ended = step.terminated | step.truncated
            if ended.any():
                for lane in ended.nonzero().flatten().tolist():
                    found[lane].append(sums[:, lane].tolist())
                sums.masked_fill_(ended, 0)
                if all(len(lane) >= each for lane in found):
                    self.seconds["evaluation"] += time.perf_counter() - began
                    columns = zip(*(episode for lane in found for episode in lane[:each]), strict=True)
                    returns, lengths, successes = map(list, columns)
                    return Evaluation(returns, [*map(int, lengths)], None if np.isnan(successes).any() else successes)
        raise RuntimeError(f"an episode of {self.env.spec.id} takes more than {limit} steps; give it a time limit.")

    @torch.no_grad()
    def frames(self, steps: int) -> Iterator[np.ndarray]:
        """Pictures `[H, W, 3]` of lane 0 playing one episode, of at most `steps` steps."""
        obs, state = self.env.reset(), self.net.initial_state(self.env.lanes, self.env.device)
        for _ in range(steps):
            yield self.env.render()
            action, _, state = self.algorithm.act(self.net, obs, state, self._explore())
            obs, _, terminated, truncated, _, _ = self.env.step(action)
            if terminated[0] or truncated[0]:
                yield self.env.render()
                return

    def _explore(self) -> Explore | None:
        return None if self.greedy else sampled(self.algorithm, self.net, self.env.lanes, self.generator)

    def state(self) -> dict[str, Any]:
        """When the next evaluation falls due, and what decides its episodes, where the environment can save that."""
        own = {"due": self.due, "noise": self.generator.get_state()}
        return {**own, "env": self.env.state()} if self.env.spec.saves_state else own

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        self.due = state["due"]
        self.generator.set_state(state["noise"])
        if "env" in state:
            self.env.load_state(state["env"])

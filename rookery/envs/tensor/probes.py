"""Probe environments: episodes of a step or two with known values and best actions, so that a failure names its cause.

The first five isolate one part of a learner each; run them in order, and the first one that fails tells what is broken.
The others do the same for every kind of space. Final observations are real ones with a value of their own if the
episode went on: a learner that bootstraps through `terminated` gets a wrong answer here.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rookery.envs.spec import MASK
from rookery.envs.tensor.base import Nested, State, TensorEnv

__all__ = [
    "Probe1",
    "Probe2",
    "Probe3",
    "Probe4",
    "Probe5",
    "ProbeBox",
    "ProbeDict",
    "ProbeDictBox",
    "ProbeImageBox",
    "ProbeMask",
    "ProbeMultiBinary",
    "ProbeMultiDiscrete",
    "ProbeTuple",
]


class _OneStep(TensorEnv):
    """An episode of one step: the state is a drawn situation, and only `reward` differs between the probes."""

    draws = 1

    def initial(self, noise: Tensor) -> State:
        return {"noise": noise}

    def advance(self, state: State, action: Nested, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        return state, self.reward(state["noise"], action), self._over

    def build(self) -> None:
        self._over = torch.ones(self.lanes, dtype=torch.bool, device=self.device)
        self.obs_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def observe(self, state: State) -> Nested:
        return _sign(state["noise"])

    def reward(self, noise: Tensor, action: Nested) -> Tensor:
        """`[B]` float32, from the situation `[B, k]` and the action."""
        raise NotImplementedError


def _sign(noise: Tensor) -> Tensor:
    """±1 with equal chance."""
    return (noise < 0.5) * 2.0 - 1.0


class Probe1(_OneStep):
    """Constant value: observation 0, reward 1, neither action matters. Answer: V = 1. Isolates the value loss."""

    id = "Probe1-v0"
    reward_threshold = 1.0

    def observe(self, state: State) -> Tensor:
        return torch.zeros_like(state["noise"])

    def reward(self, noise: Tensor, action: Nested) -> Tensor:
        return torch.ones_like(noise[:, 0])


class Probe2(_OneStep):
    """Value of the observation: observation ±1 at random, reward equal to it. Answer: V(obs) = obs.

    Isolates whether the network sees the observation and the gradient reaches its first layer.
    """

    id = "Probe2-v0"

    def reward(self, noise: Tensor, action: Nested) -> Tensor:
        return _sign(noise[:, 0])


class Probe3(TensorEnv):
    """Discounting: observation 0, then 1; reward 0, then 1. Answer: V(0) = γ, V(1) = 1. Isolates the bootstrap."""

    id = "Probe3-v0"
    reward_threshold = 1.0

    def build(self) -> None:
        self.obs_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._start = torch.zeros((self.lanes, 1), dtype=torch.bool, device=self.device)

    def initial(self, noise: Tensor) -> State:
        return {"second": self._start}

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        over = state["second"][:, 0]
        return {"second": torch.ones_like(state["second"])}, over.float(), over

    def observe(self, state: State) -> Tensor:
        return state["second"].float()


class Probe4(_OneStep):
    """Best action: observation 0; action 1 gives +1, action 0 gives −1. Answer: action 1 always, and then V = 1.

    Isolates the policy's gradient, or the maximum over actions.
    """

    id = "Probe4-v0"
    reward_threshold = 0.95

    def observe(self, state: State) -> Tensor:
        return torch.zeros_like(state["noise"])

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return action * 2.0 - 1.0


class Probe5(_OneStep):
    """Action given the observation: observation ±1 at random; +1 for action 1 at +1 and 0 at −1, else −1.

    Answer: action = obs > 0, and then V = 1. Isolates whether actions, observations and advantages stay aligned.
    """

    id = "Probe5-v0"
    reward_threshold = 0.95

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return (action * 2.0 - 1.0) * _sign(noise[:, 0])


class ProbeMultiDiscrete(_OneStep):
    """Two choices, of 2 and of 3; the observation `[5]` shows the right ones one-hot; 0.5 each. Answer: return 1."""

    id = "ProbeMultiDiscrete-v0"
    reward_threshold = 0.95
    draws = 2
    choices = (2, 3)

    def build(self) -> None:
        super().build()
        self.obs_space = spaces.Box(0.0, 1.0, (sum(self.choices),), np.float32)
        self.action_space = spaces.MultiDiscrete(list(self.choices))
        self._choices = self.constant(self.choices)
        self._offsets = self.constant([0, 2], torch.int64)
        self._cells = torch.arange(sum(self.choices), device=self.device)

    def _right(self, noise: Tensor) -> Tensor:
        return (noise * self._choices).long()

    def observe(self, state: State) -> Tensor:
        return (self._cells == (self._right(state["noise"]) + self._offsets).unsqueeze(-1)).any(1).float()

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return (action == self._right(noise)).float().mean(-1)


class ProbeMultiBinary(_OneStep):
    """Three bits to copy: observation and action are `[3]` bool; 1/3 for each bit that matches. Answer: return 1."""

    id = "ProbeMultiBinary-v0"
    reward_threshold = 0.95
    draws = 3

    def build(self) -> None:
        super().build()
        self.obs_space = spaces.MultiBinary(3)
        self.action_space = spaces.MultiBinary(3)

    def observe(self, state: State) -> Tensor:
        return state["noise"] < 0.5

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return (action == (noise < 0.5)).float().mean(-1)


class ProbeBox(_OneStep):
    """Two numbers in [−1, 1] to copy: reward −Σ (action − obs)². Answer: action = obs, return 0."""

    id = "ProbeBox-v0"
    reward_threshold = -0.05
    draws = 2

    def build(self) -> None:
        super().build()
        self.obs_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def observe(self, state: State) -> Tensor:
        return state["noise"] * 2.0 - 1.0

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return -(action - (noise * 2.0 - 1.0)).square().sum(-1)


class ProbeTuple(_OneStep):
    """A choice and a number at once: the action holds keys "0" (Discrete 2) and "1" (Box `[1]`); observation `[2]`.

    Reward: 1 if the choice is 1 exactly where obs[0] = +1, minus (number − obs[1])². Answer: return 1.
    """

    id = "ProbeTuple-v0"
    reward_threshold = 0.95
    draws = 2

    def build(self) -> None:
        super().build()
        self.obs_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Tuple((spaces.Discrete(2), spaces.Box(-1.0, 1.0, (1,), np.float32)))

    def observe(self, state: State) -> Tensor:
        noise = state["noise"]
        return torch.stack((_sign(noise[:, 0]), noise[:, 1] * 2.0 - 1.0), dim=-1)

    def reward(self, noise: Tensor, action: Nested) -> Tensor:
        obs = self.observe({"noise": noise})
        assert isinstance(action, dict)
        right = action["0"] == (obs[:, 0] > 0)
        return right.float() - (action["1"][:, 0] - obs[:, 1]).square()


class ProbeDict(_OneStep):
    """Every kind of leaf in one nested observation: five leaves vote 0 or 1, and the action that most name gives 1.

    `choice` is the vote itself (Discrete); `inner.bytes` is 0 or 255 (uint8 `[4]`); `pair.0` is ±1 (float32 `[1]`);
    `pair.1` is both bits (bool `[2]`); `counts` is (vote, 2·vote) (MultiDiscrete). Answer: return 1; reading any four
    leaves only gives 13/16 at best.
    """

    id = "ProbeDict-v0"
    reward_threshold = 0.95
    draws = 5

    def build(self) -> None:
        super().build()
        pair = spaces.Tuple((spaces.Box(-1.0, 1.0, (1,), np.float32), spaces.MultiBinary(2)))
        self.obs_space = spaces.Dict(
            {
                "choice": spaces.Discrete(2),
                "inner": spaces.Dict({"bytes": spaces.Box(0, 255, (4,), np.uint8)}),
                "pair": pair,
                "counts": spaces.MultiDiscrete([2, 3]),
            }
        )

    def observe(self, state: State) -> Nested:
        votes = state["noise"] < 0.5
        return {
            "choice": votes[:, 0].long(),
            "inner": {"bytes": votes[:, 1:2].expand(-1, 4).to(torch.uint8) * 255},
            "pair": {"0": votes[:, 2:3] * 2.0 - 1.0, "1": votes[:, 3:4].repeat(1, 2)},
            "counts": torch.stack((votes[:, 4].long(), 2 * votes[:, 4]), dim=-1),
        }

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return (action == ((noise < 0.5).sum(-1) > 2)).float()


class ProbeDictBox(ProbeDict):
    """The observation of ProbeDict, and a number for an action: 1 − (action − answer)², the answer being ±1."""

    id = "ProbeDictBox-v0"

    def build(self) -> None:
        super().build()
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        answer = ((noise < 0.5).sum(-1) > 2) * 2.0 - 1.0
        return 1.0 - (action.squeeze(-1) - answer).square()


class ProbeImageBox(_OneStep):
    """A grey image of one brightness (uint8 `[1, 8, 8]`), to be named by a number in [−1, 1]. Answer: return 0."""

    id = "ProbeImageBox-v0"
    reward_threshold = -0.05

    def build(self) -> None:
        super().build()
        self.obs_space = spaces.Box(0, 255, (1, 8, 8), np.uint8)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def observe(self, state: State) -> Tensor:
        return (state["noise"] * 255).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)

    def reward(self, noise: Tensor, action: Tensor) -> Tensor:
        return -(action - ((noise * 255).to(torch.uint8) / 127.5 - 1)).square().sum(-1)


class ProbeMask(TensorEnv):
    """Ten steps of which any allowed action gives 0.1 and a masked one ends the episode with −1. Answer: return 1.

    The mask `[4]` changes every step and always allows an action; `left` `[1]` is the share of steps still to come.
    Uniform over all four actions, an episode survives a step with a chance of about 0.52.
    """

    id = "ProbeMask-v0"
    reward_threshold = 1.0
    draws = 4
    length = 10

    def build(self) -> None:
        box = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.obs_space = spaces.Dict({"left": box, MASK: spaces.MultiBinary(4)})
        self.action_space = spaces.Discrete(4)

    def initial(self, noise: Tensor) -> State:
        return {"allowed": self._mask(noise), "time": torch.zeros_like(noise[:, :1])}

    def _mask(self, noise: Tensor) -> Tensor:
        return (noise > 0.5) | (noise == noise.amax(-1, keepdim=True))

    def advance(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor, Tensor]:
        legal = state["allowed"].gather(-1, action.unsqueeze(-1)).squeeze(-1)
        time = state["time"] + 1.0
        reward = legal * (1.0 + 1.0 / self.length) - 1.0
        return {"allowed": self._mask(noise), "time": time}, reward, ~legal | (time[:, 0] >= self.length)

    def observe(self, state: State) -> Nested:
        return {"left": 1.0 - state["time"] / self.length, MASK: state["allowed"].clone()}

"""What a sample of replay is: a transition of n steps, one with a goal reached later, or a sequence.

Each kind says which columns it derives, works out `span` for new rows (0 where none can be sampled), and reads samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rookery.data.frames import Observations
from rookery.data.plan import ReplayPlan
from rookery.data.storage import Key, Ring
from rookery.data.windows import FAR, steps_in_episode, steps_left
from rookery.envs.spec import GoalReward
from rookery.envs.vector import Obs

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["FLAGS", "SPAN", "STEP", "Hindsight", "Samples", "Sequences", "Transitions"]

FLAGS = ("reward", "terminated", "truncated", "valid")  # of a row, the columns that every insert brings
SPAN = ("replay", "span")  # rows that a sample goes on for from here; 0 where none can be drawn
STEP = ("replay", "step")  # rows since the episode's first
LEFT = ("replay", "left")  # rows to the episode's last


class Samples:
    """What the kinds share: a ring, and how to read rows from it.

    Attributes:
        columns: what is derived for each cell, a number each.
    """

    columns: dict[Key, torch.dtype]

    def __init__(self, ring: Ring, observations: Observations, plan: ReplayPlan) -> None:
        self.ring, self.observations, self.plan = ring, observations, plan

    def follow(self, writer: int, first: int, head: int) -> tuple[int, Tensor]:
        """Work out what follows each row, once those from `first` to below `head` are new.

        Returns:
            The first row whose span may have changed, and the spans `[T, B]` from there on, int16.
        """
        raise NotImplementedError

    def read(self, cells: Tensor, generator: torch.Generator) -> dict[str, Obs]:
        """The samples that begin in these cells `[N]`."""
        raise NotImplementedError

    def flags(self, writer: int, low: int, head: int) -> list[Tensor]:
        """reward, terminated, truncated and valid of rows `low` to below `head`, each `[T, B]`."""
        return [self.ring.get((name,), writer, low, head - low) for name in FLAGS]

    def recorded(self, cells: Tensor, but: tuple[str, ...] = ()) -> dict[str, Obs]:
        """What else was stored in these cells."""
        names = [name for name in self.ring.names if name not in ("replay", "obs", *FLAGS, *but)]
        return {name: self.ring.read(name, cells) for name in names}

    def count_steps(self, writer: int, first: int, head: int) -> None:
        """Note in new rows how many rows before each its episode began."""
        valid = self.ring.get(("valid",), writer, first - 1, head - first)
        begins = valid.logical_not()
        if first == 0:
            begins[0] = True
        before = self.ring.get(STEP, writer, first - 1, 1)[0]
        self.ring.put(STEP, writer, first, steps_in_episode(begins, before))


class Transitions(Samples):
    """A row, its n-step return, and the observation after it."""

    def __init__(self, ring: Ring, observations: Observations, plan: ReplayPlan) -> None:
        super().__init__(ring, observations, plan)
        self.columns = {}
        self.powers = plan.gamma ** torch.arange(plan.n_step + 1.0)

    def follow(self, writer: int, first: int, head: int) -> tuple[int, Tensor]:
        n = self.plan.n_step
        low = max(0, first - n + 1)
        _, terminated, truncated, valid = self.flags(writer, low, head)
        if n == 1:
            return low, valid.short()
        span = (steps_left(terminated | truncated) + 1).clamp(max=n)
        return low, (span * (valid & known(span))).short()

    def read(self, cells: Tensor, generator: torch.Generator) -> dict[str, Obs]:
        reward, discount, following = self.one_step(cells) if self.plan.n_step == 1 else self.n_steps(cells)
        return {
            "obs": self.observations.read(cells),
            **self.recorded(cells),
            "reward": reward,
            "discount": discount,
            "next_obs": self.observations.read(following),
        }

    def one_step(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `n_steps` for n = 1, in fewer reads."""
        discount = torch.where(self.ring.take(("terminated",), cells), 0.0, self.plan.gamma)
        return self.ring.take(("reward",), cells), discount, self.ring.later(cells, 1)

    def n_steps(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ_{k<m} γ^k r_{t+k} (Sutton and Barto 2018, eq. 7.1), γ^m·(1 − terminated), and the cells m = span on."""
        span, powers = self.ring.take(SPAN, cells).long(), self.powers.to(cells.device)
        place = torch.arange(self.plan.n_step, device=cells.device).unsqueeze(-1)
        row = torch.minimum(place, span - 1)
        at = self.ring.later(cells, row)
        discounted = self.ring.take(("reward",), at) * powers[:-1, None]
        discount = self.ring.take(("terminated",), at[-1]).logical_not() * powers.index_select(0, span)
        return torch.where(row == place, discounted, 0.0).sum(0), discount, self.ring.later(cells, span)


class Hindsight(Transitions):
    """Transitions of which a share is shown a goal that the same episode reached later (Andrychowicz et al. 2017).

    That is the strategy "future" (section 4.5): an achieved goal after this or a later step, all equally likely.
    Rows can be sampled once their episode has ended.
    """

    def __init__(self, ring: Ring, observations: Observations, plan: ReplayPlan, goal_reward: GoalReward) -> None:
        super().__init__(ring, observations, plan)
        self.columns = {STEP: torch.int32, LEFT: torch.int32}
        self.goal_reward = goal_reward

    def follow(self, writer: int, first: int, head: int) -> tuple[int, Tensor]:
        _, valid = super().follow(writer, first, head)
        self.count_steps(writer, first, head)
        _, terminated, truncated, _ = self.flags(writer, first, head)
        if not (terminated | truncated).any():
            return first, torch.zeros_like(valid)
        longest = int(self.ring.get(STEP, writer, first, 1).max())
        low = max(0, first - longest, head + 1 - self.ring.rows)
        _, terminated, truncated, valid = self.flags(writer, low, head)
        left = steps_left(terminated | truncated)
        self.ring.put(LEFT, writer, low, left)
        return low, (valid & (left < FAR // 2)).short()

    def read(self, cells: Tensor, generator: torch.Generator) -> dict[str, Obs]:
        batch = super().read(cells, generator)
        size, device = len(cells), cells.device
        lots = torch.rand(2, size, generator=generator, device=device)
        left = self.ring.take(LEFT, cells)
        ahead = (lots[0] * (left + 1)).long().clamp(max=left)  # float32 may round up to the end
        reached = self.ring.take(("obs", "achieved_goal"), self.ring.later(cells, ahead + 1))
        relabelled = lots[1] < self.plan.hindsight
        obs, next_obs = (cast("TensorDict", batch[name]) for name in ("obs", "next_obs"))
        goal = torch.where(relabelled.view(-1, *[1] * (reached.ndim - 1)), reached, obs["desired_goal"])
        batch["obs"], batch["next_obs"] = (_with_goal(whole, goal) for whole in (obs, next_obs))
        own, reward = cast(Tensor, batch["reward"]), self.goal_reward(next_obs["achieved_goal"], goal)
        batch["reward"] = torch.where(relabelled, reward.to(own.dtype), own)
        return batch


class Sequences(Samples):
    """T rows that follow each other, from every (T − overlap)th of an episode on; never of two episodes.

    Before them come `burn_in` rows of the same episode, to bring a recurrent network's memory up (Kapturowski et al.
    2019, section 3); where it had fewer, its first row fills the front.
    """

    def __init__(self, ring: Ring, observations: Observations, plan: ReplayPlan) -> None:
        super().__init__(ring, observations, plan)
        self.columns = {STEP: torch.int32}

    def follow(self, writer: int, first: int, head: int) -> tuple[int, Tensor]:
        plan = self.plan
        self.count_steps(writer, first, head)
        low = max(0, first - plan.sequence + 1)
        _, terminated, truncated, valid = self.flags(writer, low, head)
        step = self.ring.get(STEP, writer, low, head - low)
        span = (steps_left(terminated | truncated) + 1).clamp(max=plan.sequence)
        # One that would begin in the overlap and end with it shows nothing that the one before does not.
        begins = (step % (plan.sequence - plan.overlap) == 0) & ((step == 0) | (span > plan.overlap))
        return low, (span * (begins & valid & known(span))).short()

    def read(self, cells: Tensor, generator: torch.Generator) -> dict[str, Obs]:
        span, step = (self.ring.take(key, cells).long() for key in (SPAN, STEP))
        place = torch.arange(-self.plan.burn_in, self.plan.sequence + 1, device=cells.device).unsqueeze(-1)
        # Before the episode's first row that is shown again; beyond its end, its last row and its final observation.
        row = place[:-1].clamp(-step, span - 1)
        at, inside = self.ring.later(cells, row), row == place[:-1]
        batch = {
            "obs": self.observations.read(self.ring.later(cells, place.clamp(-step, span))),
            **self.recorded(at, but=("state",)),
            **{name: self.ring.take((name,), at) * inside for name in FLAGS},
            "start": place == -step,
        }
        batch["valid"][: self.plan.burn_in] = False
        if ("state",) in self.ring.columns:
            batch["state"] = self.ring.take(("state",), at[0])
        return batch


def known(span: Tensor) -> Tensor:
    """Whether the observation `span` rows after each of T rows `[T, B]` has come: that after the last of them has."""
    place = torch.arange(len(span), device=span.device).unsqueeze(-1)
    return place + span <= len(span)


def _with_goal(obs: TensorDict, goal: Tensor) -> TensorDict:
    changed = obs.copy()  # its own keys, the same tensors
    changed["desired_goal"] = goal
    return changed

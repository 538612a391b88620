"""Replay as it would be written without tensors, in lists of rows and loops over them; and streams to feed both."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rookery.data.plan import ReplayPlan

__all__ = ["Model", "Stream", "sample_of"]


class Row(NamedTuple):
    """One row of one lane; of the newest, only the observation is known."""

    obs: tuple[float, ...]  # K frames
    reach: int | None  # earlier frames that were stored; None: it shows some that never were
    action: float = 0.0
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    valid: bool = False


class Stream:
    """B lanes that obey the stream convention, with stacks of K frames that are unique numbers.

    Args:
        pad: what an episode's first stack shows of the past: "zeros", "repeats" of its frame, or "carries" on with
            the frames of the episode before, as EnvPool does where a lost life ends an episode.
    """

    def __init__(self, lanes: int, stack: int, pad: str, seed: int) -> None:
        self.lanes, self.stack, self.pad = lanes, stack, pad
        self.random = random.Random(seed)
        self.frame = 0
        self.newest = [self.first_row("zeros" if pad == "carries" else pad) for _ in range(lanes)]
        self.over = [False] * lanes  # the newest observation is an episode's final one
        self.age = [0] * lanes  # frames since those that were made up

    def next_frame(self) -> float:
        self.frame += 1
        return float(self.frame)

    def first_row(self, pad: str) -> Row:
        frame = self.next_frame()
        past = {"zeros": [0.0] * (self.stack - 1), "repeats": [frame] * (self.stack - 1)}
        past["foreign"] = [self.next_frame() for _ in range(self.stack - 1)]
        return Row((*past[pad], frame), None if pad == "foreign" and self.stack > 1 else 0)

    def moved_on(self, row: Row, age: int) -> Row:
        reach = min(age, self.stack - 1)
        return Row((*row.obs[1:], self.next_frame()), reach if row.reach is not None or age >= self.stack - 1 else None)

    def begin_anew(self, foreign: bool) -> None:
        """The actor is another one now; `foreign`: it begins in the middle of episodes."""
        pad = "foreign" if foreign else "zeros" if self.pad == "carries" else self.pad
        self.newest, self.over = [self.first_row(pad) for _ in range(self.lanes)], [False] * self.lanes
        self.age = [0] * self.lanes

    def step(self, lane: int) -> Row:
        """What happens in the newest row; the next one becomes the newest."""
        row, ages = self.newest[lane], self.age
        if self.over[lane]:
            self.over[lane] = False
            if self.pad == "carries":
                ages[lane] += 1
                self.newest[lane] = self.moved_on(row, ages[lane])
            else:
                ages[lane] = 0
                self.newest[lane] = self.first_row(self.pad)
            return row
        ages[lane] += 1
        self.newest[lane] = self.moved_on(row, ages[lane])
        terminated, truncated = self.random.random() < 0.12, self.random.random() < 0.08
        self.over[lane] = terminated or truncated
        return row._replace(
            action=self.random.random(),
            reward=self.random.uniform(-1.0, 1.0),
            terminated=terminated,
            truncated=truncated,
            valid=True,
        )

    def unroll(self, count: int) -> tuple[dict[str, Tensor], list[list[Row]], list[Row]]:
        """T rows of every lane as an actor gives them; the same as lists, by row; and the newest ones."""
        rows = [[self.step(lane) for lane in range(self.lanes)] for _ in range(count)]
        whole = [*rows, self.newest]
        obs = torch.tensor([[row.obs for row in each] for each in whole])
        columns = {"obs": obs if self.stack > 1 else obs.squeeze(-1), "state": obs[..., -1:]}
        for name in ("action", "reward", "terminated", "truncated", "valid"):
            columns[name] = torch.tensor([[getattr(row, name) for row in each] for each in rows])
            poison = torch.full_like(columns[name][:1], 1 if name not in ("action", "reward") else float("nan"))
            columns[name] = torch.cat([columns[name], poison])  # row T is not to be read
        return columns, rows, list(self.newest)


class Model:
    """All rows of all lanes since the beginning, and which of them a buffer of C rows can draw."""

    def __init__(self, plan: ReplayPlan, lanes: int, writers: int, stack: int) -> None:
        self.plan, self.lanes, self.writers, self.stack = plan, lanes, writers, stack
        self.capacity = plan.capacity // (lanes * writers) + stack
        self.rows: list[list[Row]] = [[] for _ in range(lanes * writers)]
        self.newest: list[Row | None] = [None] * (lanes * writers)

    def insert(self, writer: int, rows: list[list[Row]], newest: list[Row]) -> int:
        mine = range(writer * self.lanes, (writer + 1) * self.lanes)
        old = [self.newest[lane] for lane in mine]
        if old[0] is not None and [row.obs for row in old if row] != [row.obs for row in rows[0]]:
            for lane in mine:
                last, final = self.rows[lane][-1], self.newest[lane]
                assert final is not None
                self.rows[lane][-1] = last._replace(truncated=last.truncated or (last.valid and not last.terminated))
                self.rows[lane].append(final._replace(valid=False, reward=0.0))
        for place, lane in enumerate(mine):
            self.rows[lane] += [row[place] for row in rows]
            self.newest[lane] = newest[place]
        return sum(row.valid for each in rows for row in each)

    def ended(self, lane: int, place: int, most: int) -> int | None:
        """m: rows to the end of the episode, or `most` if that comes first; None while neither has come."""
        for span, row in enumerate(self.rows[lane][place : place + most], start=1):
            if row.terminated or row.truncated or span == most:
                return span
        return None

    def step(self, lane: int, place: int) -> int:
        """Rows since the episode's first."""
        before = 0
        while place - before > 0 and self.rows[lane][place - before - 1].valid:
            before += 1
        return before

    def shown(self, lane: int, place: int) -> int:
        """The first row that a sample from here shows: as many before it as its burn-in and its episode have."""
        return place - min(self.plan.burn_in, self.step(lane, place))

    def span(self, lane: int, place: int) -> int:
        """Rows of the sample that begins here; 0 if there is none."""
        rows, plan = self.rows[lane], self.plan
        first = self.shown(lane, place)
        reach, oldest = rows[first].reach, len(rows) + 1 - self.capacity
        if not rows[place].valid or reach is None or first - reach < oldest:
            return 0
        if plan.hindsight:
            return 1 if self.ended(lane, place, 10**9) else 0
        span = self.ended(lane, place, plan.sequence or plan.n_step) or 0
        if plan.sequence:
            step = self.step(lane, place)
            if step % (plan.sequence - plan.overlap) or (step and span <= plan.overlap):
                return 0
        return span

    def ready(self) -> dict[int, tuple[int, int]]:
        """Lane and row of every sample, by its serial number."""
        width = self.lanes * self.writers
        return {
            place * width + lane: (lane, place)
            for lane, rows in enumerate(self.rows)
            for place in range(len(rows))
            if self.span(lane, place)
        }

    def obs(self, lane: int, place: int) -> Any:
        """As the actor saw it."""
        row = [*self.rows[lane], self.newest[lane]][place]
        assert row is not None
        return list(row.obs) if self.stack > 1 else row.obs[0]


def sample_of(model: Model, lane: int, place: int) -> dict[str, Any]:
    """The sample that begins in this row, in float64."""
    rows, span, plan = model.rows[lane], model.span(lane, place), model.plan
    if not plan.sequence:
        window = rows[place : place + span]
        return {
            "obs": model.obs(lane, place),
            "action": rows[place].action,
            "reward": sum(plan.gamma**k * row.reward for k, row in enumerate(window)),
            "discount": plan.gamma**span * (not window[-1].terminated),
            "next_obs": model.obs(lane, place + span),
        }
    first = model.shown(lane, place)
    window, last = rows[first : place + span], place + span - 1
    missing, rest = plan.burn_in - (place - first), plan.sequence - span
    filled = [rows[first]] * missing + window + [rows[last]] * rest
    there = range(-plan.burn_in, plan.sequence + 1)
    return {
        "obs": [model.obs(lane, min(max(place + k, first), place + span)) for k in there],
        "action": [row.action for row in filled],
        **{
            name: [zero] * missing + [getattr(row, name) for row in window] + [zero] * rest
            for name, zero in (("reward", 0.0), ("terminated", False), ("truncated", False))
        },
        "valid": [0 <= k < span for k in there[:-1]],
        "start": [place + k == first and model.step(lane, first) == 0 for k in there],
        "state": [rows[first].obs[-1]],
    }

"""Data plans: which data an algorithm's loss eats, and how often."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["OnPolicy", "Refused", "ReplayPlan", "axis_of"]

PER_SAMPLE = ("weight", "index", "state")  # of sampled sequences, these have no time dimension


class Refused(ValueError):
    """A combination that cannot work, refused before anything is built; the message says what would work."""


@dataclass(frozen=True)
class OnPolicy:
    """Data plan: each unroll is learnt from at once, in shuffled minibatches, and then dropped."""

    unroll: int  # T, steps of an unroll
    epochs: int = 1  # passes over the unrolls
    minibatches: int = 1  # updates an epoch
    sequences: bool = False  # minibatches are whole lanes, in order of time, for recurrent networks
    stale: bool = False  # the loss corrects for older weights: actors go on with those there are, and wait for none
    unrolls: int = 0  # a batch, of whichever actors are first; 0 takes one of each actor

    def __post_init__(self) -> None:
        for name in ("unroll", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise Refused(f"{name}={getattr(self, name)} leaves nothing to learn from; use 1 or more.")

    def slots(self, batch: int, actors: int) -> int:
        """Unrolls of each actor that there are room for, where the learner takes so many at once.

        One of each, or one to fill while the learner has one, and as many as a batch takes.
        """
        return 1 + math.ceil(batch / actors) if self.stale else 1

    def check(self, lanes: int) -> None:
        """Refuse minibatches that do not divide what an update has."""
        whole = lanes if self.sequences else self.unroll * lanes
        if whole % self.minibatches:
            nearest = min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - self.minibatches))
            what = f"{lanes} lanes" if self.sequences else f"{whole} samples"
            raise Refused(
                f"minibatches={self.minibatches} does not divide the {what} of an update "
                f"(unroll={self.unroll} × envs={lanes}); use {nearest} instead."
            )


@dataclass(frozen=True)
class ReplayPlan:
    """Data plan: rows are stored, and transitions or sequences of them are sampled again and again.

    Raises:
        Refused: for numbers that cannot work, when it is made.
    """

    capacity: int  # rows kept, over all lanes
    batch: int  # samples an update
    learning_starts: int  # valid rows stored before the first sample
    updates_per_step: float = 1.0  # updates for each valid row stored after that, honoured exactly
    gamma: float = 0.99  # discount, of n-step returns
    n_step: int = 1  # n
    alpha: float = 0.0  # exponent of priorities; 0 samples uniformly
    beta: float = 0.4  # exponent of importance weights, rising linearly to 1 over the run
    sequence: int = 0  # T, steps of a sequence; 0 samples transitions
    overlap: int = 0  # steps that a sequence shares with the one before it
    burn_in: int = 0  # steps before a sequence, shown to bring a network's memory up and not to be learnt from
    unroll: int = 0  # T, steps of a lane between rounds of updates; 0 takes what an update is owed for, rounded
    ahead: int = 0  # unrolls that each actor may be ahead of the learner; 0 takes turns
    hindsight: float = 0.0  # share of samples whose goal is one the episode reached later

    def __post_init__(self) -> None:
        least_of = dict.fromkeys(("capacity", "batch", "learning_starts", "n_step"), 1)
        for name, least in (least_of | dict.fromkeys(("unroll", "ahead", "burn_in"), 0)).items():
            if getattr(self, name) < least:
                raise Refused(f"{name}={getattr(self, name)} is too small; use {least} or more.")
        if not 0 < self.updates_per_step < math.inf:
            raise Refused(f"updates_per_step={self.updates_per_step} is no rate to learn at; use a number above 0.")
        for name in ("gamma", "alpha", "beta", "hindsight"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(f"{name}={getattr(self, name)} has to be between 0 and 1.")
        if self.sequence and not 0 <= self.overlap < self.sequence:
            raise Refused(f"overlap={self.overlap} has to be from 0 to below sequence={self.sequence}.")
        if self.burn_in and not self.sequence:
            raise Refused(f"burn_in={self.burn_in} comes before sequences, and sequence=0 samples transitions; use 0.")
        if self.hindsight and (self.n_step > 1 or self.sequence):
            name, single = ("sequence", 0) if self.sequence else ("n_step", 1)
            raise Refused(
                f"hindsight={self.hindsight} relabels single transitions, and {name}={getattr(self, name)} makes "
                f"samples of several; use {name}={single}."
            )
        if self.capacity <= self.longest:
            raise Refused(f"capacity={self.capacity} rows hold no sample of {self._in_words}; use more.")

    @property
    def longest(self) -> int:
        """The most rows that a sample is made of."""
        return max(self.burn_in + self.sequence, self.n_step)

    @property
    def _in_words(self) -> str:
        return f"{self.longest} steps" + f" (burn_in={self.burn_in} and sequence={self.sequence})" * bool(self.burn_in)

    @property
    def samples_per_insert(self) -> float:
        """How often a row is sampled, on average."""
        return self.updates_per_step * self.batch

    def rows(self, lanes: int) -> int:
        """T, the rows that so many lanes step before the learner's turn."""
        return self.unroll or max(1, round(1 / (self.updates_per_step * lanes)))

    def updates(self, lanes: int) -> int:
        """The whole updates that those rows are worth; at least 1."""
        return max(1, int(self.updates_per_step * lanes * self.rows(lanes)))

    def tolerance(self, lanes: int, actors: int) -> float:
        """Samples that may be owed or taken ahead before a side waits, with so many lanes an actor."""
        return self.batch + (1 + self.ahead * actors) * self.rows(lanes) * lanes * self.samples_per_insert

    def check_unrolls(self, lanes: int, actors: int) -> None:
        """Refuse unrolls, of so many lanes an actor, that overwrite what a sample is made of."""
        rows, lanes = self.rows(lanes), lanes * actors
        each = self.capacity // lanes
        if rows > each - self.longest:
            raise Refused(
                f"capacity={self.capacity} gives each of {lanes} lanes {each} rows, of which an unroll of {rows} may "
                f"overwrite {max(0, each - self.longest)}; use capacity={lanes * (rows + self.longest)} or more."
            )

    def check(self, lanes: int) -> None:
        """Refuse what cannot work with so many lanes."""
        least = self.longest + 2
        if self.capacity < lanes * least:
            raise Refused(
                f"capacity={self.capacity} gives each of {lanes} lanes {self.capacity // lanes} rows, and a sample of "
                f"{self._in_words} needs {least}; use capacity={lanes * least} or more."
            )
        if self.learning_starts > self.capacity:
            raise Refused(
                f"learning_starts={self.learning_starts} rows never fit capacity={self.capacity}; use at most that."
            )


def axis_of(plan: ReplayPlan, name: str) -> int:
    """The axis along which samples are numbered in what they have by that name."""
    return 0 if not plan.sequence or name in PER_SAMPLE else 1

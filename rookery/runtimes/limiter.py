"""How often what is stored is sampled, kept to a ratio by making the faster side wait."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RateLimiter"]

PLACES = 6  # decimals that count: the ratio may be a fraction that floats do not hold


@dataclass
class RateLimiter:
    """Counts inserts and samples; says who may go on.

    Invariant: owed < tolerance, where owed = (inserts − start) · samples_per_insert − samples; and no sample is taken
    before it is owed. Samplers wait while less than their batch is owed, inserters while their items would reach the
    tolerance. With a tolerance of a batch and an inserter's items · samples_per_insert exactly one side can go on at
    any time: they alternate. A larger tolerance lets them overlap.
    """

    samples_per_insert: float
    min_size: int  # items stored before the first sample
    tolerance: float  # samples
    inserts: int = 0
    samples: int = 0
    start: int = -1  # inserts from which on samples are owed
    unlearnt: int = 0  # samples taken that their sampler still learns from: nobody inserts on their account

    def __post_init__(self) -> None:
        self.start = self.min_size if self.start < 0 else self.start

    @property
    def owed(self) -> float:
        """Samples that are due; negative until there are enough items."""
        return round((self.inserts - self.start) * self.samples_per_insert - self.samples, PLACES)

    def may_insert(self, items: int) -> bool:
        ahead = self.owed + self.unlearnt + items * self.samples_per_insert
        return self.inserts + items <= self.start or ahead < self.tolerance

    def may_sample(self, count: int) -> bool:
        return self.owed >= count

    def begin_again(self) -> None:
        """What was stored is lost: as many inserts as in the beginning come before the next sample."""
        self.start = min(self.inserts, self.start) + self.min_size

    def state(self) -> dict[str, int]:
        return {"inserts": self.inserts, "samples": self.samples, "start": self.start}

    def load_state(self, state: dict[str, int]) -> None:
        self.inserts, self.samples, self.start = state["inserts"], state["samples"], state["start"]

"""What a role keeps that both acts and learns."""

from __future__ import annotations

from rookery.actor import Collector
from rookery.learner import Learner

__all__ = ["ActorLearner"]


class ActorLearner:
    """A collector and a learner, as one part that tells of its work."""

    collector: Collector
    learner: Learner

    @property
    def steps(self) -> int:
        """Its own."""
        return self.collector.steps

    @property
    def seconds(self) -> dict[str, float]:
        """By activity."""
        return {**self.collector.seconds, **self.learner.seconds}

"""Every number that an algorithm is set to has bounds, and what is beyond them is refused when it is made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import get_type_hints

import pytest

from rookery.algorithms.base import Algorithm, Refused
from rookery.algorithms.ddpg import DDPG
from rookery.algorithms.td3 import TD3
from rookery.systems import SYSTEMS

ABSURD = (-1, 0, math.nan, math.inf)
ANY_NUMBER = {"target_entropy", "v_min", "v_max"}
MAY_BE_ZERO = {
    *("gamma", "lam", "alpha", "beta", "hindsight", "epsilon", "epsilon_start", "epsilon_steps", "ladder"),
    *("value_coef", "entropy_coef", "temperature", "sigma", "smoothing", "smoothing_clip"),
    "ahead",  # takes turns
}
ZERO_OF_SOME = {("TD3", "target_period")}  # with the actor


KINDS = dict.fromkeys(system.algorithm_class() for system in SYSTEMS.values())


def numbers(kind: type[Algorithm]) -> list[str]:
    """The settings that are numbers, or may be."""
    hints = get_type_hints(kind)
    plain = (int, float, int | None, float | None)
    return [field.name for field in dataclasses.fields(kind) if hints[field.name] in plain]


def allowed(kind: type[Algorithm], name: str, value: float) -> bool:
    if name in ANY_NUMBER:
        return math.isfinite(value)
    replay = name == "unroll" and hasattr(kind, "updates_per_step")  # the fewest that an update is owed for
    return value == 0 and (name in MAY_BE_ZERO or replay or (kind.__name__, name) in ZERO_OF_SOME)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_number_has_bounds(kind: type[Algorithm]) -> None:
    for name, value in itertools.product(numbers(kind), ABSURD):
        if allowed(kind, name, value):
            kind(**{name: value})
        else:
            with pytest.raises(Refused, match=rf"^[^\n]*{name}={value}[^\n]*\.$"):
                kind(**{name: value})


def test_the_target_of_td3_moves_with_its_actor() -> None:
    assert [each.target.period for each in (TD3(), TD3(policy_delay=3), TD3(policy_delay=3, target_period=2))] == [
        2,
        3,
        2,
    ]


def test_a_ladder_of_noise_begins_above_zero() -> None:
    with pytest.raises(Refused, match=r"sigma_last=0\.1 ends a ladder that cannot begin at sigma=0; use a sigma"):
        DDPG(sigma=0.0, sigma_last=0.1)

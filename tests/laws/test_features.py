"""docs/features.md says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feature_table import FEATURES, PAGE, SLOW, documented, page, try_cell
from tiny import home, tiny

import rookery
from rookery.systems import SYSTEMS

ADVICE = "write the page anew: python tests/laws/feature_table.py"


@pytest.mark.parametrize(
    "name", [pytest.param(f["name"], marks=[pytest.mark.slow] if f["name"] in SLOW else []) for f in FEATURES]
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_page_says_what_happens(system: str, name: str, tmp_path: Path) -> None:
    feature = next(feature for feature in FEATURES if feature["name"] == name)
    found = try_cell(system, feature, tmp_path)
    assert documented().get((system, name)) == found, ADVICE


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_normaliser_learns_what_is_observed(system: str, tmp_path: Path) -> None:
    settings = tiny(system, normalize_obs=True)
    run = rookery.train(system, home(system), run_dir=tmp_path / "run", quiet=True, **settings)
    untrained, learnt = run._make_net().norm.state_dict(), run.net().norm.state_dict()
    assert all(not torch.equal(learnt[name], untrained[name]) for name in untrained)


def test_the_page_is_whole() -> None:
    """Every system and feature has its cell, and nothing else stands there."""
    cells = documented()
    assert list(cells) == [(system, feature["name"]) for system in SYSTEMS for feature in FEATURES], ADVICE
    assert PAGE.read_text(encoding="utf-8") == page(cells), ADVICE
    assert all(cell == "works" or cell.endswith((".", ")")) for cell in cells.values())

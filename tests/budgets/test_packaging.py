"""What pyproject.toml asks for and what constraints.txt pins agree, and the pins work on any machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
ASKED = [
    text
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
    if not text.startswith("rookery")
]


@pytest.mark.parametrize("text", ASKED)
def test_pin_is_within_what_is_asked(text: str) -> None:
    asked = Requirement(text)
    assert canonicalize_name(asked.name) in PINS, f"constraints.txt has no tested version of {asked.name}"
    version = PINS[canonicalize_name(asked.name)]
    assert asked.specifier.contains(version), f"constraints.txt pins {asked.name}=={version}, against {text}"


def test_pins_are_plain_versions() -> None:
    """No local paths, and no `+cpu`: such a version exists on one machine only."""
    odd = [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert not odd, odd


def test_version_is_said_once_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changelog.count(f"\n## {PROJECT['version']} ") == 1

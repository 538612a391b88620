"""The documentation says what is so: its snippets run, its tables of settings are the dataclasses'."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import rookery
from rookery import cli
from rookery.settings import ELSEWHERE
from rookery.systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^(?P<skip><!-- no test[^\n]*\n\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^rookery (.*?)\s*(?:#.*)?$", re.MULTILINE)
LEAST, PART = 512, 50  # a budget of N steps becomes N / PART, at least LEAST: a few updates

OWN = {name: system.algorithm_class() for name, system in SYSTEMS.items() if not system.preset}
SETTINGS = {"docs/tour.md": rookery.Options, **{f"docs/systems/{name}.md": kind for name, kind in OWN.items()}}


class Block(NamedTuple):
    """A fenced block that is to be run."""

    line: int
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    """The blocks of Python and of shell commands in a page, without those marked `<!-- no test -->`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("code")), found["language"], found["code"])
        for found in BLOCK.finditer(text)
        if found["language"] in ("python", "bash") and not found["skip"]
    ]


def smaller(code: str) -> str:
    """The same with tiny budgets; the larger of two stays the larger."""

    def tiny(found: re.Match[str]) -> str:
        return f"{found[1]}{max(LEAST, int(found[2].replace('_', '')) // PART)}"

    return re.sub(r"(\bsteps[= ])([\d_]+)", tiny, code)


@pytest.mark.parametrize("page", ["docs/tour.md", "docs/coming_from.md", "README.md", "docs/index.md"])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder, the Python ones in one namespace."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "snippets", module)  # dataclasses look for the module of their class
    ran = 0
    for block in blocks(page):
        if block.language == "python":
            code = "\n" * block.line + smaller(block.code)
            exec(compile(code, str(ROOT / page), "exec", dont_inherit=True), module.__dict__)
            ran += 1
        for command in COMMAND.findall(block.code) if block.language == "bash" else ():
            cli.main(shlex.split(smaller(command)))
            ran += 1
    assert ran or page == "docs/index.md", "the page has no snippet, or none is found any more"


@pytest.mark.parametrize("page", SETTINGS)
def test_tables_of_settings(page: str) -> None:
    """Every field has its row, with its default, in the order of the dataclass."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text[text.index("| name | default | meaning |") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
    assert rows == [(field.name, shown(field.default)) for field in dataclasses.fields(SETTINGS[page])]


def test_table_of_names_elsewhere() -> None:
    """Each name that is answered with ours, once, on the row of ours."""
    text = (ROOT / "docs/coming_from.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`.*`) \|$", text, re.MULTILINE)
    assert {theirs: ours for ours, names in rows for theirs in re.findall(r"`(\w+)`", names)} == ELSEWHERE


def shown(default: Any) -> str:
    return default[0] if isinstance(default, tuple) and len(default) == 1 else str(default)


@pytest.mark.parametrize("page", ["README.md", "docs/systems/ppo.md"])
def test_the_learning_table_is_what_was_measured(page: str) -> None:
    """Mean and sample deviation over seeds, from the newest file that has the row."""
    measured = {}
    for path in sorted((ROOT / "benchmarks/results").glob("learning-????-??-??.json")):
        measured |= {row["env"]: row["scores"] for row in json.loads(path.read_text()) if row["system"] == "ppo"}
    table = (ROOT / page).read_text(encoding="utf-8").split("learning table -->\n")[1]
    rows = re.findall(r"^\| (\S+) \| \S+ \| [2-9] \| (\S+) ± (\S+) \|", table, re.MULTILINE)
    assert len(rows) >= 6
    for env, mean, deviation in rows:
        scores = measured[env]
        assert (mean, deviation) == (f"{statistics.fmean(scores):.1f}", f"{statistics.stdev(scores):.1f}"), env


def test_every_command_is_in_the_tour() -> None:
    tour = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    assert [verb for verb in cli.VERBS if f"rookery {verb} " not in tour] == []

"""What works with what: trains a tiny network for each system and feature. Run as a script, it writes docs/features.md.

A system joins by standing in `rookery.systems`, a feature by a row in FEATURES.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny import home, tiny, weights

import rookery
from rookery.systems import SYSTEMS

__all__ = ["FEATURES", "PAGE", "Cells", "documented", "page", "try_cell"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "features.md"
WORKS = "works"

EITHER = ("tensor:Probe5-v0", "tensor:ProbeBox-v0")  # discrete actions, or a box for systems that need one
IMAGES = {"env": ("tensor:KeyDoor-v0", "tensor:ProbeImageBox-v0"), "env_options": {"planes": "uint8", "max_steps": 5}}
FEATURES: list[dict[str, Any]] = [
    {"name": "discrete", "env": "tensor:Probe5-v0"},
    {"name": "continuous", "env": "tensor:ProbeBox-v0"},
    {"name": "multi-discrete", "env": "tensor:ProbeMultiDiscrete-v0"},
    {"name": "multi-binary", "env": "tensor:ProbeMultiBinary-v0"},
    {"name": "tuple of actions", "env": "tensor:ProbeTuple-v0"},
    {"name": "dict observation", "env": ("tensor:ProbeDict-v0", "tensor:ProbeDictBox-v0")},
    {"name": "action mask", "env": "tensor:ProbeMask-v0"},
    {"name": "images", **IMAGES},
    {"name": "ResNet", **IMAGES, "encoder": "impala"},
    {"name": "frame stack", **IMAGES, "frame_stack": 2},
    {"name": "LSTM", "env": "tensor:ProbeMask-v0", "memory": "lstm"},
    {"name": "GRU", "env": "tensor:ProbeMask-v0", "memory": "gru"},
    {"name": "observations normalised", "env": EITHER, "normalize_obs": True},
    {"name": "rewards normalised", "env": EITHER, "normalize_reward": True},
    {"name": "n-step", "env": EITHER, "n_step": 3},
    {"name": "prioritised", "env": EITHER, "alpha": 0.6},
    {"name": "hindsight", "env": ("tensor:BitFlip-v0", "envpool:FetchReach-v4"), "hindsight": 0.8},
    {"name": "replay in files", "env": EITHER, "replay_memory": "disk"},
    {"name": "bf16", "env": EITHER, "precision": "bf16"},
    {"name": "several actors", "env": EITHER, "actors": 2},
    {"name": "shared inference", "env": EITHER, "actors": 2, "inference": "shared"},
    {"name": "double-buffered", "env": EITHER, "inference": "shared", "double_buffer": True},
    {"name": "several learners", "env": EITHER, "learners": 2, "actors": 2},
    {"name": "several shards", "env": EITHER, "actors": 2, "shards": 2},
    {"name": "local runtime", "env": EITHER, "runtime": "local"},
    {"name": "local, dict observation", "env": ("tensor:ProbeDict-v0", "tensor:ProbeDictBox-v0"), "runtime": "local"},
    {"name": "resumed", "env": EITHER},
    {"name": "compiled", "env": EITHER, "compile": True},
]
SLOW = ("compiled",)

Cells = dict[tuple[str, str], str]  # by system and feature: "works", or the sentence of the refusal


def try_cell(system: str, feature: dict[str, Any], folder: Path) -> str:
    """Train; "works", or the sentence with which it was refused before anything was built.

    Raises:
        Exception: whatever a run that was not refused failed with.
    """
    options = {name: value for name, value in feature.items() if name not in ("name", "env")}
    env = feature["env"] if isinstance(feature["env"], str) else home(system, *feature["env"])
    if env == feature["env"][1]:
        options.pop("env_options", None)  # of the first
    if {"learners", "shards"} & options.keys() and "actors" not in SYSTEMS[system].takes:
        del options["actors"]  # its learners act
    path = folder / f"{system}-{feature['name']}"
    try:
        run = rookery.train(system, env, run_dir=path, quiet=True, **tiny(system, **options))
    except ValueError as error:
        if path.exists():  # refused only after the run had begun
            raise
        return str(error)
    if feature["name"] == "resumed":
        run = rookery.resume(path, steps=2 * run.summary["steps"], quiet=True)
    untrained = run._make_net().state_dict()
    learnt = weights(run)
    assert any(not torch.equal(learnt[name], untrained[name]) for name in untrained), "nothing was learnt"
    assert all(bool(value.isfinite().all()) for value in learnt.values())
    assert len(run.evaluate(3).returns) == 3
    return WORKS


def page(cells: Cells) -> str:
    """The page with these cells."""
    refusals = list(dict.fromkeys(cell for cell in cells.values() if cell != WORKS))
    names = [feature["name"] for feature in FEATURES]
    rows = [
        [system, *(shown(cells[system, name], refusals) for name in names)]
        for system in dict.fromkeys(system for system, _ in cells)
    ]
    table = [line(["system", *names]), line(["---"] * (len(names) + 1)), *map(line, rows)]
    notes = [f"{number}. {sentence}" for number, sentence in enumerate(refusals, 1)] or ["Nothing is refused."]
    return "\n".join([*HEAD, *table, "", "## Refusals", "", *notes, ""])


HEAD = (
    "# Features",
    "",
    "What works with what. Each cell trains a tiny network for a few updates in a test: it *works*, or it is *refused*",
    "before anything is built, with the numbered sentence below. `python tests/laws/feature_table.py` writes this",
    "page, and a test compares it with what it finds.",
    "",
)


def line(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


def shown(cell: str, refusals: list[str]) -> str:
    return cell if cell == WORKS else f"[refused {refusals.index(cell) + 1}](#refusals)"


def documented() -> Cells:
    """The cells that the page holds now."""
    text = PAGE.read_text(encoding="utf-8")
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    head, _, *rows = (row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("|"))
    cells = {}
    for system, *entries in rows:
        for name, entry in zip(head[1:], entries, strict=True):
            number = re.match(r"\[refused (\d+)\]", entry)
            cells[system, name] = notes[number[1]] if number else entry
    return cells


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = {
            (system, feature["name"]): try_cell(system, feature, Path(folder))
            for system in SYSTEMS
            for feature in FEATURES
        }
    PAGE.write_text(page(cells), encoding="utf-8")
    refused = sum(cell != WORKS for cell in cells.values())
    print(f"{PAGE}: {len(cells)} cells, {refused} of them refused", file=sys.stderr)


if __name__ == "__main__":
    main()

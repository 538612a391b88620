"""The library's imports point one way, and the check that says so notices when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_arrows import ALLOWED, PACKAGE, imports_of, modules_of, wrong_arrows


def test_arrows_point_one_way() -> None:
    assert wrong_arrows() == []


def test_package_is_found() -> None:
    assert "rookery.envs.spec" in modules_of(PACKAGE)


def test_table_has_no_cycle() -> None:
    """Peeling off parts that import nothing left in the table ends with an empty table."""
    left = {part: {entry.split(".")[0] for entry in allowed} for part, allowed in ALLOWED.items()}
    while left:
        free = [part for part, needs in left.items() if not needs & left.keys()]
        assert free, f"these parts may import one another in a circle: {sorted(left)}"
        for part in free:
            del left[part]


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("cli.py", "from rookery.train import train"),
        ("train.py", "from rookery.topologies.actors_learner import ActorsLearner"),
        ("topologies/actors_learner.py", "from rookery.runtimes.words import Queue"),
        ("nn/heads.py", "from rookery.envs.spec import EnvSpec"),
        ("nn/heads.py", "from rookery.nn.init import orthogonal"),
        ("algorithms/a2c.py", "from rookery.algorithms.ppo import entropy"),
        ("algorithms/a2c.py", "from rookery.algorithms.base import Algorithm"),
        ("runs/folder.py", "from rookery import __version__"),
        ("estimators.py", "import torch"),
        ("estimators.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rookery.train import train"),
    ],
)
def test_allowed(tmp_path: Path, module: str, statement: str) -> None:
    assert wrong_arrows(package_with(tmp_path, module, statement)) == []


@pytest.mark.parametrize(
    ("module", "statement", "says"),
    [
        ("estimators.py", "from rookery.nn import heads", "nothing else of rookery"),
        ("estimators.py", "def f():\n    import rookery.train", "estimators may import"),
        ("envs/spec.py", "from rookery.nn.heads import head", "rookery.envs.spec imports rookery.nn.heads"),
        ("nn/heads.py", "from rookery.envs.vector import Step", "nn may import envs.spec"),
        ("runtimes/inline.py", "from rookery.envs import spec", "nothing else of rookery"),
        ("runs/folder.py", "from rookery.train import train", "nothing else of rookery"),
        ("algorithms/ppo.py", "from rookery.learner import Learner", "algorithms may import"),
        ("algorithms/ppo.py", "from rookery.runtimes.words import Queue", "algorithms may import"),
        ("algorithms/a2c.py", "from rookery.algorithms.ppo import PPO", "never a class to override"),
        ("algorithms/a2c.py", "import rookery.algorithms.ppo", "name the function"),
        ("algorithms/a2c.py", "from rookery.algorithms import ppo", "name the function"),
        ("learner.py", "from rookery.topologies import actors_learner", "learner may import"),
        ("topologies/actors_learner.py", "from rookery.train import train", "topologies may import"),
        ("train.py", "from rookery.cli import main", "train may import"),
        ("train.py", "from rookery import make_env", "imports the public API"),
        ("train.py", "from .cli import main", "relatively"),
        ("helpers.py", "from rookery.envs import spec", "helpers has no row"),
        ("train.py", "if not TYPE_CHECKING:\n    import rookery.cli", "train may import"),
    ],
)
def test_refused(tmp_path: Path, module: str, statement: str, says: str) -> None:
    found = wrong_arrows(package_with(tmp_path, module, statement))
    assert len(found) == 1, found
    assert says in found[0]
    assert found[0].startswith(f"rookery/{module}:")


def test_type_checking_else_counts() -> None:
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
    assert [target for _, target, _ in imports_of(source)] == ["b"]


def package_with(folder: Path, module: str, source: str) -> Path:
    """A package of empty modules with `source` in one of them."""
    names = ("envs/spec", "envs/vector", "nn/heads", "algorithms/ppo", "algorithms/base", "topologies/actors_learner")
    for name in (*(f"{name}.py" for name in names), module):
        path = folder / "rookery" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in (folder / "rookery", path.parent):
            (package / "__init__.py").touch()
        path.touch()
    (folder / "rookery" / module).write_text(source, encoding="utf-8")
    return folder / "rookery"

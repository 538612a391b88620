"""Budgets of size and weight: what keeps the library readable and quick to import, counted rather than felt."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_arrows import PACKAGE, modules_of

ALGORITHM_LINES = 250
FUNCTION_LINES = 50
PARAMETERS = 8
PPO_SETTINGS = 22

# Slow to import, and `import rookery` needs none of them.
HEAVY = ("torch._dynamo", "tensordict", "gymnasium", "matplotlib", "envpool", "tyro", "rich", "tensorboard", "imageio")
UNPICKLERS = ("torch", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_algorithms_are_short() -> None:
    files = [path for path in (PACKAGE / "algorithms").glob("*.py") if path.name not in ("__init__.py", "base.py")]
    long = {path.name: count for path in files if (count := len(path.read_text().splitlines())) > ALGORITHM_LINES}
    assert not long, f"more than {ALGORITHM_LINES} lines; move shared mathematics to estimators.py or nn/: {long}"


def test_functions_are_short() -> None:
    long = {place: length(node) for place, node in functions(PACKAGE) if length(node) > FUNCTION_LINES}
    assert not long, f"more than {FUNCTION_LINES} lines, docstring included: {long}"


def test_signatures_are_short() -> None:
    long = {place: parameters(node) for place, node in functions(PACKAGE) if parameters(node) > PARAMETERS}
    assert not long, f"more than {PARAMETERS} parameters; group what travels together: {long}"


def test_ppo_has_few_settings() -> None:
    ppo = pytest.importorskip("rookery.algorithms.ppo")
    settings = [field.name for field in dataclasses.fields(ppo.PPO) if field.init]
    assert len(settings) <= PPO_SETTINGS, settings


def test_import_is_light() -> None:
    """Modules are counted instead of milliseconds: the count is the same on every machine."""
    program = "import torch, sys; before = set(sys.modules); import rookery, json; print(json.dumps([*sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(json.loads(result.stdout))
    assert "rookery" in loaded
    found = sorted(loaded & set(HEAVY))
    assert not found, f"`import rookery` also imports {found}; import them where they are used"


@pytest.mark.parametrize("name", modules_of(PACKAGE))
def test_public_names_exist(name: str) -> None:
    """`__all__` lists names that exist, once each, and a module that defines something has one."""
    if name.endswith("__main__"):
        pytest.skip("importing it would run it")
    module = importlib.import_module(name)
    tree = ast.parse(modules_of(PACKAGE)[name].read_text(encoding="utf-8"))
    public = getattr(module, "__all__", None)
    if public is None:
        defined = [node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)]
        assert not defined, f"{name} defines {defined} and has no __all__"
        return
    assert len(public) == len(set(public)), f"{name}.__all__ lists a name twice"
    missing = [entry for entry in public if not hasattr(module, entry)]
    assert not missing, f"{name}.__all__ lists {missing}, which {name} does not define"


def test_nothing_unpickles() -> None:
    found = {
        f"{path.relative_to(PACKAGE.parent)}:{line}": call
        for path in modules_of(PACKAGE).values()
        for line, call in unpickling(path.read_text(encoding="utf-8"))
    }
    assert not found, f"loading these could execute code; use safetensors and JSON: {found}"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=True)", 1),
        ("pickle.loads(data)", 1),
        ("pickle.Unpickler(file).load()", 1),
        ("from pickle import load", 1),
        ("from torch import load as read", 1),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path, allow_pickle=flag)", 1),
        ("np.load(path)", 0),
        ("np.load(path, allow_pickle=False)", 0),
        ("json.loads(text)", 0),
        ("safetensors.torch.load_file(path)", 0),
        ("from torch import Tensor", 0),
    ],
)
def test_unpickling_is_noticed(source: str, count: int) -> None:
    assert len(list(unpickling(source))) == count


def test_counts_are_right() -> None:
    """The counters themselves, on a function whose numbers are plain to see."""
    node = ast.parse("class A:\n    def f(self, a, /, b, *rest, c=1, **more):\n        pass\n").body[0].body[0]
    assert (parameters(node), length(node)) == (3, 2)


def functions(package: Path) -> Iterator[tuple[str, Function]]:
    """Every function and method, with its place as `file:line name`."""
    for path in modules_of(package).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(package.parent)}:{node.lineno} {node.name}", node


def length(node: Function) -> int:
    """Lines from `def` to the last statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> int:
    """Named parameters, `self` and `cls` not counted."""
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def unpickling(source: str) -> Iterator[tuple[int, str]]:
    """`(line, code)` of every call or import that could unpickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
            if node.module in UNPICKLERS and names:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            allow = [word.value for word in node.keywords if word.arg == "allow_pickle"]
            allowed = any(not (isinstance(value, ast.Constant) and value.value is False) for value in allow)
            if allowed or (owner in UNPICKLERS and name in ("load", "loads", "Unpickler")):
                yield node.lineno, ast.unparse(node)

"""The import arrows: which part of the library may import which. Run as a script, it prints the wrong ones.

Imports under `if TYPE_CHECKING` do not count, since they do not happen; imports inside functions do.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ALLOWED", "PACKAGE", "imports_of", "modules_of", "wrong_arrows"]

PACKAGE = Path(__file__).resolve().parents[2] / "rookery"

FOUNDATION = ("algorithms", "data", "envs", "nn", "estimators")
COMMON_USE = ("actor", "learner", "evaluator", "shard")

# Part -> what it may import beside itself: parts, or modules of a part ("envs.spec"). A new part needs a row.
ALLOWED: dict[str, tuple[str, ...]] = {
    "estimators": (),
    "envs": (),
    "runs": (),
    "runtimes": (),
    "recipes": (),
    "interrupts": (),
    "nn": ("envs.spec",),
    "data": ("envs", "nn", "estimators"),
    "algorithms": ("data", "envs", "nn", "estimators"),
    "actor": FOUNDATION,
    "learner": FOUNDATION,
    "evaluator": FOUNDATION,
    "shard": FOUNDATION,
    "topologies": (*COMMON_USE, *FOUNDATION, "runtimes"),
    "systems": ("topologies", "algorithms", "data", "recipes"),
    "settings": ("systems", *FOUNDATION),
    "run": ("settings", "systems", "evaluator", *FOUNDATION, "runs"),
    "trial": ("interrupts", "run", "settings", "systems", "topologies", *FOUNDATION, "runs", "runtimes"),
    "layouts": ("trial", "run", "settings", "systems", "topologies", *FOUNDATION, "runs", "runtimes"),
    "train": (
        "interrupts",
        "layouts",
        "run",
        "settings",
        "systems",
        "topologies",
        *COMMON_USE,
        *FOUNDATION,
        "runs",
        "runtimes",
    ),
    "planner": (
        "trial",
        "train",
        "run",
        "settings",
        "systems",
        "topologies",
        "actor",
        "learner",
        *FOUNDATION,
        "runs",
        "runtimes",
    ),
    "rerun": ("train", "run", "settings", "systems", *FOUNDATION, "runs", "runtimes"),
    "cli": (
        "interrupts",
        "train",
        "rerun",
        "planner",
        "run",
        "settings",
        "systems",
        "topologies",
        *COMMON_USE,
        *FOUNDATION,
        "recipes",
        "runs",
        "runtimes",
    ),
}
ROOT = ""  # the package itself: the public API, which may import anything, and nobody imports but for the version
FREE_NAMES = ("rookery.__version__",)
ALGORITHM_BASES = ("rookery.algorithms.base", "rookery.algorithms.off_policy")  # algorithms may take classes from these


def modules_of(package: Path) -> dict[str, Path]:
    """Every module's dotted name and its file."""
    result = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


def imports_of(source: str) -> Iterator[tuple[int, str, str]]:
    """`(line, module, name)` of every import that can happen; `name` is empty for a plain `import module`."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, "." * node.level + (node.module or ""), alias.name) for alias in node.names)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def wrong_arrows(package: Path = PACKAGE) -> list[str]:
    """One sentence for each import that points the wrong way, with file and line."""
    modules = modules_of(package)
    wrong = []
    for module, path in modules.items():
        for line, target, name in sorted(imports_of(path.read_text(encoding="utf-8"))):
            # `from rookery.envs import spec` imports a module, `from rookery.envs import make_env` does not
            full = f"{target}.{name}" if f"{target}.{name}" in modules else target
            reason = objection(module, full, f"{target}.{name}" if full == target else "")
            if reason:
                wrong.append(f"{path.relative_to(package.parent)}:{line}: {reason}")
    return wrong


def objection(module: str, target: str, name: str) -> str:
    """Why `module` may not import `target` (and `name`, the dotted name of a class, function or number in it)."""
    if target.startswith("."):
        return f"{module} imports {target} relatively; write the full name."
    if target.split(".")[0] != "rookery" or name in FREE_NAMES:
        return ""
    source_part, target_part = part_of(module), part_of(target)
    if source_part not in (ROOT, *ALLOWED):
        return f"{source_part} has no row in ALLOWED (tests/budgets/import_arrows.py); add one."
    if source_part == ROOT:
        return ""
    if target_part == ROOT:
        return f"{module} imports the public API; import the part that defines {name or 'it'}."
    if source_part == target_part:
        return sibling_objection(module, target, name) if source_part == "algorithms" else ""
    allowed = ALLOWED[source_part]
    if any(f"{target}.".startswith(f"rookery.{entry}.") for entry in allowed):
        return ""
    return f"{module} imports {target}; {source_part} may import {', '.join(allowed) or 'nothing else of rookery'}."


def sibling_objection(module: str, target: str, name: str) -> str:
    """Algorithms share functions (`from rookery.algorithms.dqn import td_error`), never a class to override."""
    if target in (*ALGORITHM_BASES, "rookery.algorithms") or module == "rookery.algorithms":
        return ""
    last = name.rpartition(".")[2]
    if not last:
        return f"{module} imports all of {target}; name the function: from {target} import ..."
    if last[0].isupper():
        return f"{module} imports {last} of {target}; algorithms share functions, never a class to override."
    return ""


def part_of(module: str) -> str:
    """`rookery.envs.spec` belongs to `envs`, `rookery` itself to the root."""
    return module.split(".")[1] if "." in module else ROOT


if __name__ == "__main__":
    found = wrong_arrows()
    print("\n".join(found) or "Import arrows: all point one way.")
    sys.exit(bool(found))

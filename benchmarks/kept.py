"""What long benchmarks share (not one itself): results that are kept as they come, so that the same command goes on."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from common import ROOT, child, machine

__all__ = ["keeping", "keeps", "told"]

Result = dict[str, Any]


def keeping(flags: argparse.ArgumentParser, name: str, home: Path = ROOT / "runs" / "benchmarks") -> None:
    """The flags that say where results are kept, and to run no more; those of a smoke run are not kept."""
    said = "folder of single results: those that are there are not measured again (delete it to begin anew)"
    flags.add_argument("--runs", type=Path, default=home / name, help=said)
    flags.add_argument("--kept", action="store_true", help="measure nothing: the table of the results that are kept")


def keeps(
    script: str,
    variants: dict[str, Result],
    args: argparse.Namespace,
    show: Callable[[Result], str],
    limit: float,
) -> tuple[dict[str, list[Result]], list[str]]:
    """Run A B C, A B C, ... in processes of their own, each with `seed`, the number of its round from 0 on.

    A result also gets its `seed`, when it began (`at`), on which processor (`cpu`) and how busy the machine was then
    (`load`). It is kept once it is there, apart from those of other settings or of another number of cores; a run that
    fails, or takes longer than `limit` seconds, is left out, and tried again by the next call.

    Returns:
        Each variant's results, and of those left out who failed of what.
    """
    found: dict[str, list[Result]] = {name: [] for name in variants}
    failed = []
    for seed in range(args.rounds):
        for name, variant in variants.items():
            spec = {**variant, "seed": seed}
            path = args.runs / f"{_named(name, {**spec, 'cores': len(args.cores)})}.json"
            if kept := path.exists() and not args.smoke:
                result = json.loads(path.read_text())
            elif args.kept:
                continue
            else:
                about = {"seed": seed, "at": datetime.now().isoformat(timespec="seconds"), **_here()}
                try:
                    result = {**child(script, spec, args.cores, limit), **about}
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    late = f"it took more than {limit:g} s"
                    failed.append(f"{name}, round {seed + 1}: {error if isinstance(error, RuntimeError) else late}")
                    print(f"  failed: {failed[-1]}", flush=True)
                    continue
                if not args.smoke:
                    _keep(path, result)
            found[name].append(result)
            print(f"  round {seed + 1}/{args.rounds}  {name:<28} {show(result)}{' (kept)' if kept else ''}", flush=True)
    if not any(found.values()):
        raise SystemExit("\n".join(told(failed)) or f"nothing is kept in {args.runs}; run it without --kept.")
    return {name: results for name, results in found.items() if results}, failed


def told(failed: list[str]) -> list[str]:
    """The part of the benchmark's text that says what is left out, if anything is."""
    return ["\n".join(["Left out, because they failed:", "", *(f"- {each}" for each in failed)])] if failed else []


def _named(name: str, spec: Result) -> str:
    """A file's name for what is measured, another for other settings."""
    plain = re.sub(r"[^\w.=-]+", "_", name)
    return f"{plain}-{zlib.crc32(json.dumps(spec, sort_keys=True).encode()):08x}-s{spec['seed']}"


def _here() -> Result:
    """The processor and how busy it is."""
    return {"cpu": machine()["cpu"], "load": os.getloadavg()[0]}


def _keep(path: Path, result: Result) -> None:
    """Write it at once, so that nobody finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result) + "\n")
    aside.replace(path)

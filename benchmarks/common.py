"""What the benchmarks share (not one itself): pinned child processes, interleaved rounds, medians, tables, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "Spread",
    "begin",
    "child",
    "chosen",
    "finish",
    "interval",
    "interleaved",
    "machine",
    "parser",
    "ratios",
    "spread",
    "table",
    "write",
]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # measure this checkout, whether or not it is the one that is installed

RESULTS = ROOT / "benchmarks" / "results"
MARK = "RESULT "  # begins the line in which a child gives its result
PACKAGES = (
    "torch",
    "numpy",
    "tensordict",
    "numba",
    "torchrl",
    "gymnasium",
    "envpool",
    "stable-baselines3",
    "ale-py",
    "opencv-python-headless",
)

Result = dict[str, Any]
Value = TypeVar("Value")


class Spread(NamedTuple):
    """A median with the range of what it is the median of."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """`median (low-high)`, each number by `spec`."""
        middle, low, high = (format(value, spec) if math.isfinite(value) else "never" for value in self)
        return f"{middle} ({low}–{high})"


def spread(values: Sequence[float]) -> Spread:
    """The median, the least and the greatest."""
    return Spread(statistics.median(values), min(values), max(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t, which of one value is unknown."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], math.nan
    reach = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(reach)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round: what ran side by side is compared, so that slow minutes hurt both."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def parser(about: str, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark takes."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="times each variant runs, one after the other")
    made.add_argument("--cores", default="0", help="the cores that every child process is pinned to, as 0,1")
    made.add_argument("--smoke", action="store_true", help="tiny settings: does it run? Its numbers mean nothing.")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def begin(flags: argparse.ArgumentParser, kinds: dict[str, Callable[[Result], Result]]) -> argparse.Namespace:
    """The flags, with `cores` as numbers and one round in a smoke run; a child measures one of the kinds, and ends."""
    args = flags.parse_args()
    if args.child:
        entry(args.child, kinds)
        raise SystemExit
    args.cores, args.rounds = cores_of(args.cores), 1 if args.smoke else args.rounds
    return args


def chosen(named: dict[str, Value], parts: str) -> dict[str, Value]:
    """Those whose names contain one of the parts, between which stand semicolons."""
    return {name: each for name, each in named.items() if any(part in name for part in parts.split(";"))}


def cores_of(text: str) -> list[int]:
    """`0,1` as numbers; refuses cores this process may not use."""
    cores = [int(part) for part in text.split(",")]
    there = os.sched_getaffinity(0)
    if not set(cores) <= there:
        raise SystemExit(f"cores {text} are not all to be had; there are {','.join(map(str, sorted(there)))}.")
    return cores


def child(script: str, spec: Result, cores: list[int], timeout: float = 1800) -> Result:
    """Run `script --child SPEC` as a process of its own on these cores, and give its result.

    The result also gets `wall`, the seconds from the process's start to its end, and `cpu`, its processor time.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    threads = {name: str(len(cores)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    began = time.time()
    words = json.dumps({**spec, "cores": cores, "began": began})
    done = subprocess.run(
        [sys.executable, script, "--child", words], env=environment, capture_output=True, text=True, timeout=timeout
    )
    wall = time.time() - began
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise RuntimeError(f"{spec} failed with status {done.returncode}: {said}")
    return {**json.loads(lines[-1].removeprefix(MARK)), "wall": wall}


def entry(words: str, kinds: dict[str, Callable[[Result], Result]]) -> None:
    """What a child does: pin itself, run the function its spec names by `kind`, give the result."""
    spec = json.loads(words)
    os.sched_setaffinity(0, spec["cores"])
    result = kinds[spec["kind"]](spec)
    print(f"\n{MARK}{json.dumps({**result, 'cpu': time.process_time()})}", flush=True)


def interleaved(
    variants: dict[str, Result], rounds: int, run: Callable[[Result, int], Result], show: Callable[[Result], str]
) -> dict[str, list[Result]]:
    """Run A B C, A B C, ...: each variant's results in order of the rounds. Says how each went."""
    results: dict[str, list[Result]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, spec in variants.items():
            result = run(spec, number)
            results[name].append(result)
            print(f"  round {number + 1}/{rounds}  {name:<44} {show(result)}", flush=True)
    return results


def over_seeds(
    script: str, variants: dict[str, Result], args: argparse.Namespace, first: int, show: Callable[[Result], str]
) -> dict[str, list[Result]]:
    """`interleaved`, each round with a seed of its own from `first` on."""
    return interleaved(
        variants,
        args.rounds,
        lambda spec, number: child(script, {**spec, "seed": first + number}, args.cores),
        show,
    )


def machine(cores: list[int] | None = None) -> Result:
    """The processor, its cores, how busy it was, and the versions of whatever decides a speed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "date": date.today().isoformat(),
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "pinned_to": cores,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": found,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def header(about: Result) -> str:
    """Date, machine and versions in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    pinned = "" if about["pinned_to"] is None else f", processes pinned to {about['pinned_to']}"
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores{pinned}; load before {about['load_before']:.2f}; "
        f"Python {about['python']}, {versions}."
    )


def finish(args: argparse.Namespace, name: str, about: Result, found: Result, title: str, *parts: str) -> Path:
    """Write what every benchmark says of itself, with what it found and the parts of its text."""
    smoke = ["**A smoke run: these numbers mean nothing.**"] if args.smoke else []
    text = "\n\n".join([f"# {title}", *smoke, f"{header(about)} Rounds: {args.rounds}.", *parts])
    return write(args.out, name, {"smoke": args.smoke, "rounds": args.rounds, "machine": about, **found}, text)


def write(out: Path, name: str, result: Result, text: str) -> Path:
    """Write `NAME-DATE.json`, with the command, and the text beside it as `.md`; print the text; give the JSON's path.

    Folders are left out of the command, which says what was measured and not whose machine it was.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{result['machine']['date']}.json"
    words = [word for word in sys.argv[1:] if word != "--out" and Path(word) != out]
    result["command"] = [Path(word).name if Path(word).is_absolute() else word for word in words]
    path.write_text(json.dumps(_finite(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(text.rstrip() + "\n")
    print(f"\n{text.rstrip()}\n\n{path}")
    return path


def _finite(value: Any) -> Any:
    """The value as strict JSON has it: what never happened is null."""
    if isinstance(value, dict):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

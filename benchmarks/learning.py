"""Learning benchmark: scores, time and curves of every recipe in learning.toml, over several seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import sys
import time
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rookery.run import Run, load
from rookery.runs.metrics import read
from rookery.runs.plots import plot_runs
from rookery.settings import resolve
from rookery.train import resume, train

__all__ = ["Row", "finished", "main", "read_rows", "score"]

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of learning.toml: what a recipe must reach."""

    system: str
    env: str
    threshold: float
    seeds: int
    each: bool = False  # every seed must reach the threshold, not only their mean

    @property
    def name(self) -> str:
        """Of files."""
        return f"{self.system}-{self.env}".replace("/", "-")

    @property
    def command(self) -> str:
        """What trains one seed of it."""
        return f"rookery train {self.system} {self.env}"

    def reached(self, scores: list[float]) -> bool:
        """Whether these scores, one a seed, are enough."""
        return (min(scores) if self.each else statistics.fmean(scores)) >= self.threshold


def read_rows(path: Path = HERE / "learning.toml") -> list[Row]:
    """The rows of the table."""
    return [Row(**row) for row in tomllib.loads(path.read_text())["row"]]


def finished(row: Row, seed: int, runs: Path) -> Run:
    """The finished run of this row and seed below `runs`, trained or resumed if need be.

    Its folder bears a checksum of the settings, so that a changed recipe is trained anew.
    """
    settings: dict[str, Any] = {"seed": seed, "sinks": ()}
    _, algorithm, options = resolve(row.system, row.env, settings)
    both = {**dataclasses.asdict(algorithm), **dataclasses.asdict(options)}
    mark = zlib.crc32(json.dumps(both, sort_keys=True).encode())
    path = runs / f"{row.name}_s{seed}_{mark:08x}"
    if (path / "summary.json").exists() and not (run := load(path)).summary["interrupted"]:
        return run
    if (path / "config.json").exists() and load(path).checkpoints.steps():
        run = resume(path, quiet=True)
    else:
        shutil.rmtree(path, ignore_errors=True)  # it ended before its first checkpoint
        run = train(row.system, row.env, run_dir=path, quiet=True, **settings)
    if run.interrupted:
        sys.exit(f"Interrupted; run the same command again to go on with {path}.")
    return run


def score(run: Run) -> float:
    """The mean return of the last evaluation."""
    return float(run.summary["eval_return_mean"])


def solved(run: Run, threshold: float) -> tuple[int, float] | None:
    """Steps and seconds of training up to the first evaluation that reached the threshold; None if none did."""
    rows = read(run.folder.metrics)
    scored = [row for row in rows if row.get("eval_return_mean") is not None]
    first = next((row["step"] for row in scored if row["eval_return_mean"] >= threshold), None)
    if first is None:
        return None
    seconds = [row["seconds"] for row in rows if "seconds" in row and row["step"] <= first]
    return first, seconds[-1] if seconds else 0.0


def result(row: Row, runs: list[Run]) -> dict[str, Any]:
    """What is kept of a row: scores and times by seed, and the settings that made them."""
    scores = [score(run) for run in runs]
    when = [solved(run, row.threshold) for run in runs]
    options = {name: value for name, value in runs[0].config["options"].items() if name != "seed"}
    versions = {name: value for name, value in runs[0].config["versions"].items() if name != "platform"}
    return {
        **vars(row),
        "command": row.command,
        "steps": options["steps"],
        "score_mean": statistics.fmean(scores),
        "score_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "scores": scores,
        "reached": row.reached(scores),
        "seconds": [run.summary["seconds"] for run in runs],
        "steps_to_threshold": [each and each[0] for each in when],
        "seconds_to_threshold": [each and each[1] for each in when],
        "backend": runs[0].summary["backend"],
        "algorithm": runs[0].config["algorithm"],
        "options": options,
        "versions": versions,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
    }


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The results as Markdown."""
    names = (
        "environment",
        "system",
        "steps",
        "mean ± std over seeds",
        "threshold",
        "reached",
        "seconds a seed",
        "command",
    )
    yield f"| {' | '.join(names)} |"
    yield "| --- | --- | --: | --: | --: | --- | --: | --- |"
    for row in results:
        seeds, seconds = len(row["scores"]), statistics.fmean(row["seconds"])
        aim = f"{row['threshold']:,}, each seed" if row["each"] else f"{row['threshold']:,}"
        yield (
            f"| {row['env']} | {row['system']} | {row['steps']:,} "
            f"| {row['score_mean']:,.1f} ± {row['score_std']:,.1f} ({seeds}) "
            f"| {aim} | {'yes' if row['reached'] else 'no'} | {seconds:,.0f} | `{row['command']}` |"
        )


def main() -> None:
    """Train what is missing, one run after the other; write results and curves; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="*", help="only these")
    parser.add_argument("--envs", nargs="*", help="only these")
    parser.add_argument("--seeds", type=int, help="seeds a row; by default as many as the table says")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results and curves go")
    flags = parser.parse_args()
    rows = [row for row in read_rows() if row.env in (flags.envs or [row.env])]
    rows = [row for row in rows if row.system in (flags.systems or [row.system])]
    if not rows:
        parser.error("no row of learning.toml is of these systems and environments.")
    path = flags.results / f"learning-{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else []
    order = [(row.system, row.env) for row in read_rows()]
    results = [old for old in results if (old["system"], old["env"]) in order]
    for row in rows:
        runs = []
        for seed in range(flags.seeds or row.seeds):
            runs.append(finished(row, seed, flags.runs))
            print(f"{row.command} --seed {seed}: {score(runs[-1]):,.1f} in {runs[-1].summary['seconds']:,.0f} s")
        results = [old for old in results if (old["system"], old["env"]) != (row.system, row.env)]
        results.append(result(row, runs))
        results.sort(key=lambda each: order.index((each["system"], each["env"])))
        path.write_text(json.dumps(results, indent=2) + "\n")
        plot_runs([run.path for run in runs], flags.results / f"learning-{row.name}.png")
    print(*table(results), sep="\n")
    print(f"\nresults     {path}")


if __name__ == "__main__":
    main()

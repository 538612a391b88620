"""Throughput by number of actors on an environment that sleeps."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from common import begin, child, finish, interleaved, machine, parser, spread, table
from gymnasium import spaces

NOTES = """**Scaling.** Each step of the environment sleeps, and does nothing else; observations are four zeros, the
network has a layer of 16 units. Actors (workers of `a3c`) are processes of one lane each, the local runtime, unrolls of
128 steps; `apex` makes an update of 32 samples for 128 steps. Steps/s are those learnt from, between the first row of
the learner after the last actor's first episode and its last row. "Linear" is so many times the best of one actor's
rounds. "Cores busy" is the share of the pinned cores that the run took, all its processes together; µs are processor
time for each step, of `a3c`'s workers under "learner", the rest being what moves data, answers and takes down.

**An actor's step** is measured in one process that does nothing else, without sleep: µs of processor time, one lane."""

SYSTEMS: dict[str, dict[str, Any]] = {
    "impala": {"unroll": 128},  # longer unrolls cost the learner less, and take longer to come
    "a3c": {"unroll": 128},
    "apex": {"unroll": 128, "updates_per_step": 1 / 128, "batch": 32, "learning_starts": 128, "capacity": 10_000},
}
QUIET = {"device": "cpu", "threads": 1, "quiet": True, "sinks": (), "eval_every": 10**9, "eval_episodes": 1}
PARTS = ("actor", "learner", "rest")  # of processor time
LENGTH = 50  # steps of an episode
BUSIEST = 5_000  # steps/s that budgets are for, at most


class Sleepy(gymnasium.Env):
    """Sleeps `sleep` seconds a step."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, sleep: float = 0.0, render_mode: str | None = None) -> None:
        self.sleep, self.render_mode, self.steps = sleep, render_mode, 0
        self.obs = np.zeros(4, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.obs, {}

    def step(self, action: Any) -> Any:
        if self.sleep:
            time.sleep(self.sleep)
        self.steps += 1
        return self.obs, 1.0, False, self.steps == LENGTH, {}


def scale(spec: dict[str, Any]) -> dict[str, Any]:
    """A system with so many actors on the local runtime."""
    number, sleep, workers = spec["actors"], spec["sleep"], spec["system"] == "a3c"
    rate = min(number / (sleep + 3e-4), BUSIEST)
    settings = {"envs": 1, "hidden": (16,), "runtime": "local", "env_options": (f"sleep={sleep}",), **QUIET}
    settings |= {**SYSTEMS[spec["system"]], "steps": int(rate * (spec["seconds"] + number))}  # a second to start each
    settings |= {"learners" if workers else "actors": number, "log_every": max(LENGTH, int(0.5 / sleep))}
    return steady(spec["system"], "scaling:Sleepy", settings, "learner" if workers else "actor", number)


def steady(system: str, env: str, settings: dict[str, Any], kind: str, number: int = 1) -> dict[str, Any]:
    """Train; steps/s and processor time from when all of so many roles of the kind have told of an episode."""
    import rookery
    from rookery.runs.metrics import read

    with tempfile.TemporaryDirectory() as folder:
        run = rookery.train(system, env, run_dir=Path(folder) / "run", **settings)
        rows = read(run.path / "metrics.jsonl")
    acting: set[int] = set()
    marks, accounts = [], []
    for row in rows:
        if row["role"] == kind and "episodes" in row:
            acting.add(row["index"])
        if len(acting) == number and row["role"] == "learner" and "seconds" in row:
            marks.append((row["seconds"], row["step"]))
        if len(acting) == number and row["role"] == "runtime":
            accounts.append(row["measured"])
    if len(marks) < 2 or not accounts:
        raise RuntimeError(f"{system} with {number} actors acted together too shortly to be measured; use more steps.")
    (began, before), (ended, after) = marks[0], marks[-1]
    rate = (after - before) / (ended - began)
    accounts = accounts[1:-1] or accounts  # the first and the last tell of other times, too
    processor = [dict(_processor(each)) for each in accounts]
    cores = {name: statistics.fmean(each[name] for each in processor) for name in processor[0]}
    return {
        "steps": after - before,
        "seconds": ended - began,
        "steps_per_second": rate,
        "cores_busy": cores["all"],
        "microseconds": {name: share / rate * 1e6 for name, share in cores.items()},
    }


def _processor(account: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How many cores were busy with each kind of role, with all processes, and with what no role of these did."""
    kinds = {"actor": 0.0, "learner": 0.0}
    for name, role in account["roles"].items():
        kind, _, several = name.partition(" × ")
        if (kind := kind.split()[0]) in kinds:
            kinds[kind] += role.get("processor", 0.0) * int(several or 1)
    yield from kinds.items()
    yield "rest", account["cores_busy"] - sum(kinds.values())
    yield "all", account["cores_busy"]


def actor_step(spec: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of a step of one lane in this process, by what they go into."""
    import torch

    from rookery.actor import Collector
    from rookery.envs.make import make_env
    from rookery.settings import resolve

    torch.set_num_threads(1)
    _, algorithm, _ = resolve("impala", "scaling:Sleepy", {**SYSTEMS["impala"], "hidden": (16,)})
    env = make_env("scaling:Sleepy")
    collector = Collector(algorithm, algorithm.networks(env.spec), env, 64, 0, compile=spec["compile"])
    slot = collector.slot()
    for _ in range(4):
        collector.fill(slot)
    collector.seconds.clear()
    steps = spec["steps"] // 64 * 64
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(steps // 64):
        collector.fill(slot)
    spent, whole = time.process_time() - processor, time.perf_counter() - began
    each = {name: seconds * spent / whole for name, seconds in collector.seconds.items()}  # others may have had a share
    return {
        name: seconds / steps * 1e6
        for name, seconds in {"all": spent, **each, "rows and accounts": spent - sum(each.values())}.items()
    }


def scaling_table(found: dict[str, list[dict[str, Any]]], cores: int) -> str:
    """Steps/s by actors, of linear, and where processor time goes."""
    rows = []
    for name, rounds in found.items():
        system, sleep, number = re.fullmatch(r"(\S+), (\S+) ms, (\d+)", name).groups()  # type: ignore[union-attr]
        rates = [each["steps_per_second"] for each in rounds]
        alone = max(each["steps_per_second"] for each in found[f"{system}, {sleep} ms, 1"])  # a slow one would flatter
        linear = spread([rate / (int(number) * alone) for rate in rates])
        busy = statistics.median(each["cores_busy"] for each in rounds) / cores
        spent = {part: statistics.median(each["microseconds"][part] for each in rounds) for part in PARTS}
        cells = [f"{spread(rates):,.0f}", f"{linear:.0%}", f"{busy:.0%}", *(f"{spent[part]:.0f}" for part in PARTS)]
        rows.append([system, f"{sleep} ms", number, *cells])
    head = ["system", "sleep", "actors", "steps/s", "of linear", "cores busy", *(f"{part}, µs" for part in PARTS)]
    return table(head, rows)


def step_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """What a step of one lane costs."""
    parts = [part for part in next(iter(found.values()))[0] if part not in ("wall", "cpu")]  # of the process
    rows = [[part, *(f"{spread([each[part] for each in rounds]):.0f}" for rounds in found.values())] for part in parts]
    return table(["an actor's step, µs", *found], rows)


def variants_of(args: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """What is measured, by part and name."""
    scaled = {
        f"{system}, {sleep:g} ms, {number}": {"kind": "scale", "system": system, "sleep": sleep / 1e3, "actors": number}
        for sleep in args.sleeps
        for system in args.systems
        for number in args.actors
    }
    return {
        "scaling": {name: {**each, "seconds": args.seconds} for name, each in scaled.items()},
        "actor_step": {"eager": {"kind": "actor_step", "compile": False, "steps": 64_000}},
    }


def main() -> None:
    """Scaling, and an actor's step."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--systems", nargs="*", default=list(SYSTEMS), help="of those that scale")
    flags.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    flags.add_argument("--sleeps", type=float, nargs="*", default=[2.0, 20.0], help="milliseconds a step")
    flags.add_argument("--seconds", type=float, default=15.0, help="for which all actors act, about")
    args = begin(flags, {"scale": scale, "actor_step": actor_step})
    if args.smoke:
        args.systems, args.actors, args.sleeps, args.seconds = ["impala"], [1, 2], [2.0], 2.0
    about, found = machine(args.cores), {}
    for part, variants in variants_of(args).items():
        print(part)
        found[part] = interleaved(variants, args.rounds, lambda spec, _: child(__file__, spec, args.cores), shown)
    parts = [scaling_table(found["scaling"], len(args.cores)), step_table(found["actor_step"])]
    finish(args, "scaling", about, found, "Scaling", *parts, NOTES)


def shown(result: dict[str, Any]) -> str:
    """A result in a line."""
    if "all" in result:
        return f"{result['all']:.0f} µs"
    return f"{result['steps_per_second']:,.0f} steps/s, {result['cores_busy']:.2f} cores busy"


if __name__ == "__main__":
    main()

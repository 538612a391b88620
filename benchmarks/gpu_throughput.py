"""PPO on tensor environments, everything on one GPU: trained steps a second, eager, compiled and as CUDA graphs."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, header, machine, table, write


class NoShapes(types.ModuleType):
    """jaxtyping where there is none: shapes in signatures say nothing at run time, so this benchmark can do without."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return defaultdict(lambda: Any)  # Float[Tensor, "T B"] is anything


try:
    import jaxtyping  # noqa: F401  # only to know whether it is there
except ImportError:
    sys.modules["jaxtyping"] = NoShapes("jaxtyping")

MODES: dict[str, dict[str, bool]] = {
    "eager": {},
    "compiled": {"compile": True},
    "CUDA graphs": {"compile": True, "graphs": True},
}
ENVS = ("CartPole-v1", "Catch-v0")
LANES = (65_536, 16_384, 4_096, 1_024)
SECONDS = 3.0  # how long each cell is measured, at least 3 iterations
AIM = 5e6  # trained steps a second

NOTES = """A trained step is one action applied in one lane and learnt from in all epochs. An iteration is what the
inline runtime does in a round: take the newest weights, fill an unroll, update, publish. Environments, policy,
unrolls and updates stay on the device. Set-up is from building to the end of the second iteration, compilation
included."""


def measure(env_id: str, lanes: int, mode: dict[str, bool], args: argparse.Namespace) -> dict[str, Any]:
    """One cell: build, warm up, iterate for some seconds."""
    from rookery.actor import Collector
    from rookery.algorithms.ppo import PPO
    from rookery.envs.make import make_env
    from rookery.learner import Learner

    torch._dynamo.reset()  # what other cells compiled would count towards the limit of versions of a function
    began = time.perf_counter()
    algorithm = PPO(unroll=args.unroll, epochs=args.epochs, minibatches=args.minibatches, anneal=False)
    env = make_env(f"tensor:{env_id}", lanes, args.device, seed=0)
    nets = [algorithm.networks(env.spec).to(args.device) for _ in range(2)]
    collector = Collector(algorithm, nets[0], env, args.unroll, 1, **mode)
    learner = Learner(algorithm, nets[1], 10**12, 2, **mode)
    slot = collector.slot()

    def iterate() -> None:
        collector.load(learner.version, learner.values())
        collector.fill(slot)
        learner.update(slot.batch(), learner.steps + int(slot.buffer.storage["valid"][:-1].sum()))

    for _ in range(2):
        iterate()
    wait(args.device)
    setup, cold, first = time.perf_counter() - began, learner.steps, time.perf_counter()
    iterate()
    wait(args.device)
    again = max(2, min(1000, int(args.seconds / (time.perf_counter() - first))))
    before, begun = learner.steps, time.perf_counter()
    for _ in range(again):
        iterate()
    wait(args.device)
    seconds = time.perf_counter() - begun
    speed = {"steps_per_second": (learner.steps - before) / seconds, "seconds": seconds, "iterations": again}
    return {
        **speed,
        "setup": setup,
        "steps": learner.steps - cold,
        "phases": phases(collector, learner, slot, args.device),
    }


def phases(collector: Any, learner: Any, slot: Any, device: str) -> dict[str, float]:
    """Seconds of one unroll and of one update, each waited for."""
    found = {}
    for name, call in {
        "fill": lambda: collector.fill(slot),
        "update": lambda: learner.update(slot.batch(), learner.steps),
    }.items():
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        found[name] = time.perf_counter() - began
    return found


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def flags() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--device", default="cuda", help="cpu runs small ones, to try the code")
    made.add_argument("--lanes", default="", help="as 65536,1024; default: all on a GPU, 64 on a CPU")
    made.add_argument("--modes", default="", help="only modes that contain one of these: 'eager;graphs'")
    made.add_argument("--unroll", type=int, default=32, help="T")
    made.add_argument("--epochs", type=int, default=4, help="passes over an unroll")
    made.add_argument("--minibatches", type=int, default=4, help="updates an epoch")
    made.add_argument("--seconds", type=float, default=SECONDS, help="how long each cell is measured")
    made.add_argument("--budget", type=float, default=420.0, help="seconds after which no further cell is begun")
    made.add_argument("--smoke", action="store_true", help="tiny settings: does it run? Its numbers mean nothing.")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    args = made.parse_args()
    small = args.smoke or args.device == "cpu"
    args.sizes = [int(size) for size in args.lanes.split(",")] if args.lanes else [64] if small else list(LANES)
    if args.smoke:
        args.unroll, args.seconds, args.epochs = 8, 0.05, 1
    return args


def cells(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Mode, environment and lanes, in an order in which the first few already tell the most."""
    wanted = [mode for mode in MODES if any(part in mode for part in args.modes.split(";"))]
    if args.device == "cpu":
        wanted = [mode for mode in wanted if mode != "CUDA graphs"]
    quick = [(mode, env, size) for env in ENVS for size in args.sizes for mode in wanted if mode == "eager"]
    return quick + [(mode, env, size) for size in args.sizes for env in ENVS for mode in wanted if mode != "eager"]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell for which there is time; a cell that fails says why, and the others go on."""
    began, found = time.perf_counter(), []
    for mode, env, lanes in cells(args):
        cell: dict[str, Any] = {"env": env, "lanes": lanes, "mode": mode}
        spent = time.perf_counter() - began
        if spent > args.budget:
            cell["error"] = f"not run: {args.budget:.0f} s were over"
        else:
            try:
                cell |= measure(env, lanes, MODES[mode], args)
            except Exception as error:  # one cell must not cost the others their time on the machine
                cell["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
        found.append(cell)
        rate = cell.get("error") or f"{cell['steps_per_second']:>12,.0f} steps/s, set-up {cell['setup']:.1f} s"
        print(f"  {time.perf_counter() - began:5.0f} s  {env:<12} {lanes:>6} lanes  {mode:<12} {rate}", flush=True)
    return found


def table_of(found: list[dict[str, Any]], sizes: list[int]) -> str:
    """A row for each environment and number of lanes, a column for each mode."""
    modes = list(dict.fromkeys(cell["mode"] for cell in found))
    rows = []
    for env, lanes in ((env, lanes) for env in ENVS for lanes in sizes):
        row = {cell["mode"]: cell for cell in found if (cell["env"], cell["lanes"]) == (env, lanes) and "setup" in cell}
        shown = [f"{row[mode]['steps_per_second']:,.0f}" if mode in row else "—" for mode in modes]
        best = max(row.values(), key=lambda cell: cell["steps_per_second"], default={"phases": {}})
        rows.append([env, f"{lanes:,}", *shown, ", ".join(f"{k} {1e3 * v:.1f}" for k, v in best["phases"].items())])
    return table(["environment", "lanes", *(f"{mode}, steps/s" for mode in modes), "parts of the best, ms"], rows)


def main() -> None:
    """Measure every cell on one device."""
    args = flags()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("This machine has no CUDA device, so there is nothing to measure; --device cpu tries the code.")
        return
    about = machine()
    about["device"] = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    found = run(args)
    best = max((cell.get("steps_per_second", 0.0) for cell in found), default=0.0)
    settings = f"PPO, 2×64 tanh, unroll={args.unroll} epochs={args.epochs} minibatches={args.minibatches}, float32."
    parts = [
        f"# PPO on {about['device']}",
        *(["**A smoke run: these numbers mean nothing.**"] if args.smoke else []),
        header(about),
        settings,
        table_of(found, args.sizes),
        f"Best: {best:,.0f} trained steps/s; aim: ≥ {AIM:,.0f}.",
        NOTES,
        "\n".join(f"- {c['env']}, {c['lanes']}, {c['mode']}: {c['error']}" for c in found if "error" in c),
    ]
    result = {"smoke": args.smoke, "machine": about, "settings": settings, "cells": found}
    write(args.out, "gpu_throughput", result, "\n\n".join(parts))


if __name__ == "__main__":
    main()

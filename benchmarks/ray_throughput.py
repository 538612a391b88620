"""The Ray runtime beside the local one, on one machine: IMPALA with roles that share memory, and as Ray actors."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from common import begin, child, finish, interleaved, machine, parser, ratios, spread, table
from scaling import QUIET, shown, steady

NOTES = """IMPALA on `tensor:CartPole-v1` as tuned for it, with as many actors as cores. "local": processes that share
memory. "ray": the same on a Ray cluster of this machine, where roles on the host of the run share memory too. "ray,
apart": each role is a Ray actor, as on other hosts: what it makes and reads travels through Ray. Ratios are round by
round."""

WAYS = ("local", "ray", "ray, apart")


def ray_throughput(spec: dict[str, Any]) -> dict[str, Any]:
    """IMPALA on a runtime."""
    runtime, _, apart = spec["way"].partition(", ")
    if apart:
        from rookery.runtimes.ray import Ray

        module: Any = importlib.import_module("rookery.train")
        module.Ray = functools.partial(Ray, shares=False)
    settings = {**QUIET, "actors": spec["actors"], "steps": spec["steps"], "log_every": 5_000, "runtime": runtime}
    if spec["envs"]:
        settings["envs"] = spec["envs"]
    return steady("impala", spec["env"], settings, "actor", spec["actors"])


def ray_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Each way beside the local runtime."""
    rows = []
    for name, rounds in found.items():
        case = next(name.removesuffix(way) for way in sorted(WAYS, key=len, reverse=True) if name.endswith(way))
        rates = [each["steps_per_second"] for each in rounds]
        local = [each["steps_per_second"] for each in found[f"{case}local"]]
        rows.append([name, f"{spread(rates):,.0f}", f"{ratios(rates, local):.2f}"])
    return table(["IMPALA", "steps/s", "of the local runtime's"], rows)


def main() -> None:
    """Each case on each runtime, in turn."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--steps", type=int, default=300_000)
    flags.add_argument("--env", default="tensor:CartPole-v1")
    args = begin(flags, {"ray_throughput": ray_throughput})
    steps, count = 80_000 if args.smoke else args.steps, len(args.cores)
    variants = {
        f"{lanes or 'recipe'} lanes, {way}": {
            "kind": "ray_throughput",
            "way": way,
            "env": args.env,
            "envs": lanes,
            "actors": count,
            "steps": steps * (4 if lanes else 1),
        }
        for lanes in (0, 64)
        for way in WAYS
    }
    about = machine(args.cores)
    found = interleaved(variants, args.rounds, lambda spec, _: child(__file__, spec, args.cores), shown)
    finish(args, "ray_throughput", about, {"ray_throughput": found}, "The Ray runtime", ray_table(found), NOTES)


if __name__ == "__main__":
    main()

"""What the runtimes cost beside a plain loop: PPO on an environment that takes no time, on one core."""

from __future__ import annotations

import math
import time
from typing import Any

from common import begin, child, finish, interleaved, interval, machine, parser, spread, table
from scaling import QUIET, shown, steady

NOTES = """PPO on `tensor:CartPole-v1`, one actor, settings as tuned for it, or with one pass over an unroll in one
minibatch. "loop" is a `for` of `Collector.fill` and `Learner.update` in one process, without roles, words, metrics or
progress; "inline" and "local" are `rookery.train`, the latter with four processes. Actor and learner take turns, and
all processes are on one core, so nothing of what a runtime adds is hidden behind work. Ratios are taken round by round:
their mean, and its 95 % interval (Student's t); of all else medians, with the least and the greatest."""

PPO: dict[str, dict[str, Any]] = {"as tuned": {}, "one pass": {"epochs": 1, "minibatches": 1}}


def overhead(spec: dict[str, Any]) -> dict[str, Any]:
    """PPO with one actor on a runtime, or in a loop of its own."""
    settings = {**PPO[spec["case"]], **QUIET, "actors": 1, "steps": spec["steps"], "log_every": 5_000}
    if spec["way"] == "loop":
        return _loop(settings)
    return steady("ppo", "tensor:CartPole-v1", {**settings, "runtime": spec["way"]}, "actor")


def _loop(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill and update in turn, as nobody would write it shorter."""
    import torch

    from rookery.actor import Collector
    from rookery.envs.make import make_env
    from rookery.learner import Learner
    from rookery.settings import resolve

    known = {name: value for name, value in settings.items() if name != "quiet"}
    _, algorithm, options = resolve("ppo", "tensor:CartPole-v1", known)
    torch.set_num_threads(1)
    env = make_env("tensor:CartPole-v1", options.envs)
    collector = Collector(algorithm, algorithm.networks(env.spec), env, algorithm.plan.unroll, 0)
    learner = Learner(algorithm, algorithm.networks(env.spec), options.steps, 0)
    slot, marks = collector.slot(), []
    while learner.steps < options.steps:
        collector.load(learner.version, learner.values())
        valid = collector.fill(slot)
        learner.update(slot.batch(), learner.steps + valid)
        marks.append((time.perf_counter(), time.process_time(), learner.steps))
        if learner.steps % options.log_every < valid:  # else they pile up
            learner.metrics()
            collector.episodes()
    (began, processor, before), (ended, after, steps) = marks[len(marks) // 10], marks[-1]
    rate, cores = (steps - before) / (ended - began), (after - processor) / (ended - began)
    result = {"steps": steps - before, "seconds": ended - began, "steps_per_second": rate, "cores_busy": cores}
    return {**result, "microseconds": {"all": cores / rate * 1e6}}


def overhead_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Each way beside the loop of the same case."""
    rows = []
    for name, rounds in found.items():
        case = name.rpartition(", ")[0]
        rates, spent = ([each["steps_per_second"] for each in rounds], [each["microseconds"]["all"] for each in rounds])
        alone = found[f"{case}, loop"]
        slower = [one["steps_per_second"] / rate for one, rate in zip(alone, rates, strict=True)]
        more = [used / one["microseconds"]["all"] for one, used in zip(alone, spent, strict=True)]
        rows.append([name, f"{spread(rates):,.0f}", ratio(slower), f"{spread(spent):.1f}", ratio(more)])
    return table(["PPO", "steps/s", "time, of the loop's", "processor µs a step", "of the loop's"], rows)


def ratio(ratios: list[float]) -> str:
    """The mean over rounds with its 95 % interval by Student's t."""
    mean, reach = interval(ratios)
    return f"{mean:.3f}" if math.isnan(reach) else f"{mean:.3f} ({mean - reach:.3f} to {mean + reach:.3f})"


def main() -> None:
    """PPO in a loop, inline, and with processes."""
    flags = parser(__doc__ or "", rounds=10)
    flags.add_argument("--steps", type=int, default=150_000, help="of PPO as tuned; four times as many with one pass")
    args = begin(flags, {"overhead": overhead})
    steps, cores = 60_000 if args.smoke else args.steps, args.cores[:1]
    variants = {
        f"{case}, {way}": {"kind": "overhead", "case": case, "way": way, "steps": steps * (4 if extra else 1)}
        for case, extra in PPO.items()
        for way in ("loop", "inline", "local")
    }
    about = machine(cores)
    found = interleaved(variants, args.rounds, lambda spec, _: child(__file__, spec, cores), shown)
    finish(args, "overhead", about, {"overhead": found}, "The runtimes' overhead", overhead_table(found), NOTES)


if __name__ == "__main__":
    main()

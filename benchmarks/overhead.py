"""What the runtimes cost beside a plain loop: PPO on an environment that takes no time, on one core."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import begin, child, finish, interval, machine, parser, spread, table
from scaling import QUIET, steady

NOTES = """PPO on `tensor:CartPole-v1`, one actor, settings as tuned for it, or with one pass over an unroll in one
minibatch. "loop" is a `for` of `Collector.fill` and `Learner.update` in one process, without roles, words, metrics or
progress; "inline" and "local" are `rookery.train`, the latter with four processes. Actor and learner take turns, and
all processes are on one core, so nothing of what a runtime adds is hidden behind work. The three of a case run at once,
in slices of that core, since its speed changes by more within a minute than runtimes cost. Processor time for a step is
what is compared: ratios are taken round by round, their mean with its 95 % interval (Student's t); µs are medians, with
the least and the greatest."""

PPO: dict[str, dict[str, Any]] = {"as tuned": {}, "one pass": {"epochs": 1, "minibatches": 1}}
WAYS = ("loop", "inline", "local")


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


def overhead_table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Each way beside the loop of the same case."""
    rows = []
    for case, ways in found.items():
        spent = {way: [each["microseconds"]["all"] for each in rounds] for way, rounds in ways.items()}
        for way, each in spent.items():
            more = [used / alone for used, alone in zip(each, spent["loop"], strict=True)]
            rows.append([f"{case}, {way}", f"{spread(each):.1f}", "" if way == "loop" else ratio(more)])
    return table(["PPO", "processor µs a step", "of the loop's"], rows)


def ratio(ratios: list[float]) -> str:
    """The mean over rounds with its 95 % interval by Student's t."""
    mean, reach = interval(ratios)
    return f"{mean:.3f}" if math.isnan(reach) else f"{mean:.3f} ({mean - reach:.3f} to {mean + reach:.3f})"


def main() -> None:
    """PPO in a loop, inline, and with processes."""
    flags = parser(__doc__ or "", rounds=10)
    flags.add_argument("--steps", type=int, default=150_000, help="of PPO as tuned; four times as many with one pass")
    args = begin(flags, {"overhead": overhead})
    cores, about, found = args.cores[:1], machine(args.cores[:1]), {}
    for case, extra in PPO.items():
        steps = (60_000 if args.smoke else args.steps) * (4 if extra else 1)
        specs = [{"kind": "overhead", "case": case, "way": way, "steps": steps} for way in WAYS]
        rounds = []
        for number in range(args.rounds):
            with ThreadPoolExecutor(len(WAYS)) as pool:
                rounds.append(list(pool.map(lambda spec: child(__file__, spec, cores), specs)))
            spent = (f"{way} {each['microseconds']['all']:.1f}" for way, each in zip(WAYS, rounds[-1], strict=True))
            print(f"  round {number + 1}/{args.rounds}  {case}: {', '.join(spent)} µs a step", flush=True)
        found[case] = dict(zip(WAYS, map(list, zip(*rounds, strict=True)), strict=True))
    finish(args, "overhead", about, {"overhead": found}, "The runtimes' overhead", overhead_table(found), NOTES)


if __name__ == "__main__":
    main()

"""What `rookery plan` predicts beside what is then measured, by number of actors on this machine."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from common import begin, child, chosen, finish, machine, parser, spread, table
from scaling import LENGTH, QUIET, steady

NOTES = """**Predicted** is `rookery.planner`'s forecast from unit costs that it measured just before, in a process of
its own on the same cores; **measured** is a run of that many actors on the local runtime, learning included: the
steps/s that are learnt from, between the first row of the learner after all actors (of a3c: workers) have told of an
episode and its last. Error is predicted over measured, minus one, of the medians. Every round predicts anew, then
trains."""

SLEEPY: dict[str, Any] = {"envs": 1, "unroll": 128, "hidden": (16,), "env_options": ("sleep=0.002",)}
CASES: dict[str, dict[str, Any]] = {
    "impala, 2 ms asleep": {"system": "impala", "env": "scaling:Sleepy", "settings": SLEEPY},
    "impala, CartPole-v1": {"system": "impala", "env": "CartPole-v1", "settings": {"envs": 16}},
    "ppo, CartPole-v1": {"system": "ppo", "env": "CartPole-v1", "settings": {"envs": 16}},
    "apex, CartPole-v1": {
        "system": "apex",
        "env": "CartPole-v1",
        "settings": {"envs": 16, "learning_starts": 1_000, "batch": 64},
    },
    "apex in 2 shards, CartPole-v1": {
        "system": "apex",
        "env": "CartPole-v1",
        "settings": {"envs": 16, "learning_starts": 1_000, "batch": 64, "shards": 2},
    },
    "a3c, 2 ms asleep": {"system": "a3c", "env": "scaling:Sleepy", "settings": SLEEPY},
}
HEAD = ["case", "actors", "predicted steps/s", "measured steps/s", "error", "limit"]
NEAR = 0.15  # error that is asked for


def settings_of(spec: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in spec["settings"].items()}


def predict(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure costs, and simulate each number of actors."""
    from rookery.planner import forecasts

    numbers = ",".join(map(str, spec["actors"]))
    _, costs, found = forecasts(spec["system"], spec["env"], numbers, **settings_of(spec))
    return {"costs": dataclasses.asdict(costs), "forecasts": [dataclasses.asdict(each) for each in found]}


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for some seconds, by what was predicted."""
    number, workers = spec["number"], spec["system"] == "a3c"
    settings = {**settings_of(spec), **QUIET, "runtime": "local", "learners" if workers else "actors": number}
    settings |= {
        "steps": int(spec["rate"] * (spec["seconds"] + number)),
        "log_every": max(LENGTH, int(spec["rate"] / number)),
    }
    return steady(spec["system"], spec["env"], settings, "learner" if workers else "actor", number)


def measured(case: dict[str, Any], args: Any) -> list[dict[str, Any]]:
    """Rounds of a prediction and a run of each number of actors."""
    rounds = []
    for number in range(args.rounds):
        spec = {**case, "actors": [each for each in args.actors if each % case["settings"].get("shards", 1) == 0]}
        predicted = child(__file__, {"kind": "predict", **spec}, args.cores)
        runs = []
        for each in predicted["forecasts"]:
            more = {"number": each["actors"], "rate": each["steps_per_second"], "seconds": args.seconds}
            runs.append(child(__file__, {"kind": "train", **spec, **more}, args.cores))
            pair = f"{each['steps_per_second']:9,.0f} predicted, {runs[-1]['steps_per_second']:9,.0f} measured"
            print(f"  round {number + 1}/{args.rounds}  {each['actors']:3} actors: {pair}", flush=True)
        rounds.append({**predicted, "runs": runs})
    return rounds


def rows_of(name: str, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of actors."""
    rows = []
    for place, first in enumerate(rounds[0]["forecasts"]):
        predicted = [each["forecasts"][place]["steps_per_second"] for each in rounds]
        found = [each["runs"][place]["steps_per_second"] for each in rounds]
        error = statistics.median(predicted) / statistics.median(found) - 1
        row = {"case": name, "actors": first["actors"], "predicted": spread(predicted), "measured": spread(found)}
        rows.append({**row, "error": error, "limit": first["limit"]})
    return rows


def cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    rates = (f"{row[each]:,.0f}" for each in ("predicted", "measured"))
    return [row["case"], row["actors"], *rates, f"{row['error']:+.0%}", row["limit"]]


def main() -> None:
    """Every case."""
    flags = parser(__doc__ or "", rounds=3)
    flags.add_argument("--cases", default="", help="parts of the cases' names, with semicolons between")
    flags.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4, 8])
    flags.add_argument("--seconds", type=float, default=10.0, help="for which all actors act, about")
    args = begin(flags, {"predict": predict, "train": train})
    cases = chosen(CASES, args.cases)
    if args.smoke:
        cases, args.actors, args.seconds = dict(list(cases.items())[:1]), [1, 2], 2.0
    about, found, rows = machine(args.cores), {}, []
    for name, case in cases.items():
        print(name)
        found[name] = measured(case, args)
        rows += rows_of(name, found[name])
        near = f"Within {NEAR:.0%}: {sum(abs(row['error']) <= NEAR for row in rows)} of {len(rows)}."
        shown = table(HEAD, [cells(row) for row in rows])
        finish(args, "planner", about, {"cases": found, "rows": rows}, "Planner", shown, near, NOTES)


if __name__ == "__main__":
    main()

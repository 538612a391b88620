"""Accounts: shares and rates are those of the measurements, and the bottleneck is the one that the figures show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rookery.runs.account import account, bottleneck, condensed, flat, since


def role(work: float = 0.0, steps: int = 0, cpu: float = 0.0, **parts: float) -> dict[str, Any]:
    """Seconds of a role: activities by name, and waits as `wait_WORD`."""
    waiting = {name[5:]: value for name, value in parts.items() if name.startswith("wait_")}
    activities = {name.replace("_", " "): value for name, value in parts.items() if not name.startswith("wait_")}
    own = {"work": work, "waiting": waiting, "activities": activities, "steps": steps, "cpu": cpu}
    return {**own, "restarts": 0, "reason": "", "dropped": {}}


def word(kind: str, given: dict[str, int], taken: dict[str, int], **more: Any) -> dict[str, Any]:
    counts = {"looks": 0, "filled": 0.0, "level": {}, "given_bytes": 0.0, "taken_bytes": 0.0, "undone": 0}
    return {"kind": kind, "given": given, "taken": taken, **counts, **more}


def measured(roles: dict[str, Any], seconds: float = 10.0, processes: int = 4, **more: Any) -> dict[str, Any]:
    words = {
        "unrolls": word(
            "queue", {"actor 0": 40}, {"learner 0": 30}, looks=4, filled=3.0, given_bytes=2e3, taken_bytes=2e3
        ),
        "weights": word("weights", {"learner 0": 30}, {"actor 0": 20}, given_bytes=100.0, taken_bytes=100.0),
        "questions": word("calls", {}, {}),
        "replay": word("replay", {}, {}, level={"inserts": 50, "samples": 200, "fill": 0.25}),
    }
    own = {"seconds": seconds, "processes": processes, "cores": 8, "cpu": 0.1, "keeper": 1.0}
    return {**own, "roles": roles, "words": words, **more}


ACTOR = role(8.0, 4000, 6.0, environment=5.0, inference=2.0, wait_unrolls=1.5, wait_weights=0.5)
LEARNER = role(3.0, 3000, 2.5, learning=2.5, wait_unrolls=7.0)


def test_shares_and_rates() -> None:
    found = account(measured({"actor 0": ACTOR, "learner 0": LEARNER}))
    actor = found["roles"]["actor 0"]
    assert actor["busy"] == pytest.approx(0.8)
    assert [actor[name] for name in ("environment", "inference", "transfer")] == pytest.approx([0.5, 0.2, 0.1])
    assert actor["waiting"] == pytest.approx({"unrolls": 0.15, "weights": 0.05})
    assert actor["steps_per_second"] == pytest.approx(400)
    assert found["roles"]["keeper"] == pytest.approx({"busy": 0.1})
    assert found["words"]["unrolls"] == {"kind": "queue", "fill": 0.75}
    assert found["words"]["replay"] == {"kind": "replay", "fill": 0.25, "samples_per_insert": 4.0}
    assert found["cores_busy"] == pytest.approx(0.86)
    assert found["flows"][0] == {"from": "actor 0", "to": "unrolls", "per_second": 4.0, "bytes_per_second": 8000.0}
    assert [(flow["from"], flow["to"]) for flow in found["flows"]] == [
        ("actor 0", "unrolls"),
        ("unrolls", "learner 0"),
        ("learner 0", "weights"),
        ("weights", "actor 0"),
    ]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nothing_measured_yet_is_no_error() -> None:
    found = account(measured({"actor 0": role(), "learner 0": role()}, seconds=0.0, keeper=0.0))
    assert found["roles"]["actor 0"]["busy"] == 0.0
    assert found["bottleneck"]["limit"] == "waiting"


def test_restarts_and_drops() -> None:
    died = {**ACTOR, "restarts": 2, "reason": "it fell", "dropped": {"died": 3, "stale": 0}}
    found = account(measured({"actor 0": died, "actor 1": {**ACTOR, "dropped": {"died": 1}}}))
    assert found["restarts"] == {"actor 0": {"times": 2, "reason": "it fell"}}
    assert found["dropped"] == {"died": 4}
    assert flat(found)["restarts"] == 2
    assert flat(found)["dropped"] == 4
    later = measured({"actor 0": {**died, "restarts": 3, "reason": "it slept"}})
    assert account(since(later, measured({"actor 0": died})))["restarts"] == {
        "actor 0": {"times": 1, "reason": "it slept"}
    }
    assert account(since(later, later))["restarts"] == {}


def test_since_is_what_was_added() -> None:
    before = measured({"actor 0": ACTOR})
    later = measured({"actor 0": role(9.0, 4100, 7.0, environment=5.5, inference=2.0, wait_unrolls=2.5)}, seconds=12.0)
    later["words"]["unrolls"]["given"] = {"actor 0": 44, "actor 1": 6}
    found = account(since(later, before))
    actor = found["roles"]["actor 0"]
    assert actor["busy"] == pytest.approx(0.5)
    assert actor["environment"] == pytest.approx(0.25)
    assert actor["steps_per_second"] == pytest.approx(50)
    assert found["flows"][0]["per_second"] == pytest.approx(2)
    assert found["flows"][1]["per_second"] == pytest.approx(3)
    assert found["words"]["replay"]["samples_per_insert"] == 4.0, "that is kept over the whole run"
    assert account(since(before, {})) == account(before)


def test_many_of_a_kind_are_one_box() -> None:
    actors = {f"actor {index}": role(index + 1, 100, wait_unrolls=9 - index) for index in range(6)}
    flows = {f"actor {index}": 10 for index in range(6)}
    whole = measured({**actors, "learner 0": LEARNER})
    whole["words"]["unrolls"] = word("queue", flows, {"learner 0": 60})
    found = condensed(account(whole))
    assert list(found["roles"]) == ["actor × 6", "learner 0", "keeper"]
    box = found["roles"]["actor × 6"]
    assert box["busy"] == pytest.approx(0.35)  # mean of 0.1 to 0.6
    assert box["waiting"] == pytest.approx({"unrolls": 0.65})
    assert box["steps_per_second"] == pytest.approx(60)  # of all
    into = [flow for flow in found["flows"] if flow["to"] == "unrolls"]
    assert [(flow["from"], flow["per_second"]) for flow in into] == [("actor × 6", pytest.approx(6))]
    assert condensed(found) == found
    few = account(measured({"actor 0": ACTOR, "learner 0": LEARNER}))
    assert condensed(few) == few


def test_few_roles_with_many_flows_are_one_too() -> None:
    bundles, words = [f"learner {index}" for index in range(3)], [f"gradients_{index}" for index in range(3)]
    whole = measured(dict.fromkeys([*bundles, "shard 0"], LEARNER))
    whole["words"] = {name: word("queue", dict.fromkeys(bundles, 10), {"shard 0": 30}) for name in words}
    assert list(condensed(account(whole))["roles"]) == ["learner × 3", "shard 0", "keeper"]
    del whole["words"][words[0]]
    assert list(condensed(account(whole))["roles"]) == [*bundles, "shard 0", "keeper"]


def test_flat_names() -> None:
    found = flat(
        account(measured({"actor 0": ACTOR, "actor 1": role(2.0, 100, wait_unrolls=8.0), "learner 0": LEARNER}))
    )
    assert found["actor_busy"] == pytest.approx(0.5)
    assert found["actor_steps_per_second"] == pytest.approx(410)
    assert found["learner_busy"] == pytest.approx(0.3)
    assert found["unrolls_fill"] == 0.75
    assert found["replay_samples_per_insert"] == 4.0
    assert all(isinstance(value, (int, float)) for value in found.values())


WAITING = role(1.0, wait_unrolls=9.0)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    # roles, more, limit, role, what the sentences have
    "the learner cannot keep up": (
        {
            "actor 0": role(3.0, environment=2.0, wait_unrolls=7.0),
            "learner 0": role(9.8, learning=9.0, wait_unrolls=0.2),
        },
        {},
        "learner",
        "learner",
        "Learner is busy 98% (learning 90%, transfer 8%), actor waits 70%, most for unrolls.|--compile|--learners",
    ),
    "the environment is slow": (
        {"actor 0": role(9.5, environment=6.0, inference=2.0, wait_unrolls=0.5), "learner 0": WAITING},
        {},
        "environment",
        "actor",
        "Actor is busy 95%|learner waits 90%, most for unrolls|--envs|--actors",
    ),
    "the environment waits for something itself": (
        {"actor 0": role(9.5, cpu=0.95, environment=9.0, wait_unrolls=0.5), "learner 0": WAITING},
        {},
        "environment",
        "actor",
        "10% on a processor|--envs",
    ),
    "acting is slow": (
        {"actor 0": role(9.5, environment=2.0, inference=7.0, wait_unrolls=0.5), "learner 0": WAITING},
        {},
        "inference",
        "actor",
        "inference 70%|--compile",
    ),
    "compiled as one": (
        {"actor 0": role(9.5, environment_and_inference=9.0, wait_unrolls=0.5), "learner 0": WAITING},
        {},
        "environment",
        "actor",
        "environment and inference 90%|--envs",
    ),
    "all goes into handing on": (
        {"actor 0": role(9.5, environment=1.0, inference=1.0, wait_unrolls=0.5), "learner 0": WAITING},
        {},
        "transfer",
        "actor",
        "transfer 75%|--unroll",
    ),
    "the keeper of words is at its limit": (
        {"actor 0": role(9.5, environment=4.0, wait_unrolls=0.5), "learner 0": WAITING},
        {"keeper": 9.7},
        "transfer",
        "keeper",
        "busy 97%|--unroll",
    ),
    "they take turns": (
        {
            "actor 0": role(4.5, environment=4.0, wait_weights=5.5),
            "learner 0": role(5.0, learning=4.0, wait_unrolls=5.0),
        },
        {},
        "waiting",
        "",
        "Nobody is busy (actor 45%, learner 50%)|impala",
    ),
    "they wait for what they asked": (
        {
            "actor 0": role(4.5, environment=4.0, wait_questions=5.5),
            "inference 0": role(5.0, inference=4.0, wait_questions=5.0),
            "learner 0": role(2.0, learning=2.0, wait_unrolls=8.0),
        },
        {},
        "waiting",
        "",
        "Nobody is busy (actor 45%, inference 50%, learner 20%)|--double-buffer|--inference own",
    ),
    "they wait for who learns to be given samples": (
        {
            "actor 0": role(1.0, environment=1.0, wait_replay=9.0),
            "learner 0": role(6.0, learning=4.0, wait_requests_1=4.0),
            "shard 0": role(2.0, wait_requests_0=8.0),
        },
        {},
        "waiting",
        "",
        "Nobody is busy (actor 10%, learner 60%, shard 20%)|shard waits 80%, most for requests.|larger updates",
    ),
    "messages are slow": (
        {
            "actor 0": role(4.5, environment=4.0, wait_unrolls=5.5),
            "learner 0": role(5.0, learning=4.0, wait_unrolls=5.0),
        },
        {},
        "waiting",
        "",
        "--unroll|--actors",
    ),
    "evaluations hold all up": (
        {"actor 0": WAITING, "learner 0": WAITING, "evaluator 0": role(9.0, evaluation=9.0, wait_weights=1.0)},
        {},
        "waiting",
        "evaluator",
        "the evaluator, which is busy 90%|--eval-every",
    ),
    "an evaluator that is busy holds nobody up": (
        {"actor 0": role(9.0, environment=8.0, wait_unrolls=1.0), "evaluator 0": role(10.0, evaluation=10.0)},
        {},
        "environment",
        "actor",
        "Actor is busy 90%",
    ),
    "all cores are in use": (
        {
            "actor 0": role(9.5, cpu=9.0, environment=9.0, wait_unrolls=0.5),
            "learner 0": role(8.0, cpu=7.0, wait_unrolls=2.0),
        },
        {"cores": 1},
        "environment",
        "actor",
        "the only core is in use|with more cores, add actors",
    ),
    "other programs hold up all": (
        {
            "learner 0": role(6.0, cpu=1.0, learning=6.0, wait_gradients=4.0),
            "shard 0": role(3.0, cpu=1.0, wait_gradients=7.0),
        },
        {},
        "waiting",
        "",
        "Nobody is busy (learner 60%, shard 30%)|10% on a processor, the rest held up",
    ),
    "workers in shared memory": (
        {f"learner {index}": role(10.0, environment=9.0) for index in range(2)},
        {"words": {"memory": word("weights", {}, {})}},
        "environment",
        "learner",
        "; add workers (--runtime local --learners N).",
    ),
    "workers that do both": (
        {f"learner {index}": role(10.0, environment=2.0, inference=2.0, learning=5.0) for index in range(2)},
        {},
        "learner",
        "learner",
        "Learner is busy 100% (learning 50%, environment 20%, inference 20%, transfer 10%).",
    ),
    "in one process, learning": (
        {
            "actor 0": role(3.0, environment=2.0, wait_unrolls=7.0),
            "learner 0": role(6.0, learning=5.5, wait_unrolls=4.0),
        },
        {"processes": 1},
        "learner",
        "learner",
        "All roles take turns in one process, whose time is learning 55%, environment 20%|--compile",
    ),
    "in one process, learning from the middle on": (
        {
            "actor 0": role(6.0, environment=6.0, wait_replay=4.0),
            "learner 0": role(3.0, learning=3.0, wait_replay=1.0),
        },
        {"processes": 1},
        "environment",
        "actor",
        "whose time is environment 60%, learning 30%",
    ),
    "in one process, acting": (
        {"actor 0": role(7.0, environment=2.0, inference=5.0, wait_unrolls=3.0), "learner 0": WAITING},
        {"processes": 1},
        "inference",
        "actor",
        "inference 50%|--compile",
    ),
    "in one process, evaluating": (
        {"actor 0": WAITING, "learner 0": WAITING, "evaluator 0": role(8.0, evaluation=8.0, wait_weights=2.0)},
        {"processes": 1},
        "waiting",
        "evaluator",
        "evaluation 80%|--eval-every",
    ),
    "in one process, saving": (
        {"actor 0": WAITING, "learner 0": WAITING},
        {"processes": 1, "keeper": 8.0},
        "waiting",
        "keeper",
        "checkpoints 80%|--no-save-replay",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bottleneck(case: str) -> None:
    roles, more, limit, who, texts = CASES[case]
    found = account(measured(roles, **more))["bottleneck"]
    assert (found["limit"], found["role"]) == (limit, who)
    said = f"{found['because']} {found['change']}"
    for text in texts.split("|"):
        assert text in said
    assert all(found[name][0].isupper() and found[name].endswith(".") for name in ("because", "change"))


def test_bottleneck_is_of_the_account_alone() -> None:
    found = account(measured({"actor 0": ACTOR, "learner 0": LEARNER}))
    again = json.loads(json.dumps(found))
    assert bottleneck(again) == found["bottleneck"]
    assert again == found

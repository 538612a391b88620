"""What a run's measurements say: how busy each role is, what flows where, and what limits the run.

Measurements are what a runtime's `measured()` gives, numbers that only grow; an account has shares and rates. A role is
busy while it does not wait. Of its work, what is no activity that it names is transfer: copying, handing on, messages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

__all__ = ["EVALUATOR", "KEEPER", "account", "bottleneck", "condensed", "flat", "kind_of", "plain", "since"]

Measured = Mapping[str, Any]
Account = dict[str, Any]

KEEPER, EVALUATOR = "keeper", "evaluator"
MEMORY = "memory"  # the word of those who act and learn in shared memory, so that there are no actors to add
BUSY = 0.75  # share of a role's time from which on it is the one that others wait for
FULL = 0.9  # share of what the cores can do, or the keeper, from which on there is no more to be had
STARVED = 0.5  # share of its work, below which a role's time on a processor is worth a word
OWN = ("processor", "steps_per_second")  # of a role's numbers, those that are no shares of its time by activity
BOXES, FLOWS = 4, 8  # of a kind: roles that are shown one by one, if that makes no more flows than so many

# What a limit is called, where it has another name than its cause.
LIMITS = {"environment and inference": "environment", "learning": "learner"}
LIMITS |= dict.fromkeys(("turns", "questions", "draws", "evaluation", KEEPER), "waiting")
MORE_ACTORS = "add actors (--runtime local --actors N)"
# By limit: what helps on the cores that there are, and what needs more of them.
ADVICE = {
    "environment": ("step more lanes at once (--envs)", MORE_ACTORS),
    "inference": (
        "let more lanes share a forward pass (--envs), or compile it (--compile)",
        MORE_ACTORS,
    ),
    "learner": (
        "compile the update (--compile), move it to a GPU (--device cuda), or make fewer and larger updates",
        "share it among several (--learners N, where the system has them)",
    ),
    "transfer": ("hand over more at a time: longer unrolls (--unroll) or more lanes (--envs)", ""),
    "waiting": (
        "do more between two waits: more lanes (--envs) or longer unrolls (--unroll)",
        "add actors (--actors N)",
    ),
    "turns": (
        "do more between two waits (--envs), or take a system whose actors do not wait for the newest weights (impala, "
        "appo)",
        "add actors (--actors N)",
    ),
    "questions": (
        "let half of the lanes step while actions are chosen for the others (--double-buffer), ask for more lanes at a "
        "time (--envs), or let actors choose for themselves (--inference own)",
        "",
    ),
    "draws": ("make fewer and larger updates; where replay has shards, fewer of them (--shards)", ""),
    "evaluation": ("evaluate less often (--eval-every) or on fewer episodes (--eval-episodes)", ""),
    KEEPER: ("save less often (--eval-every), or leave replay out (--no-save-replay)", ""),
}


def plain(word: str) -> str:
    """Its name without the number that tells it from its like: `unrolls` of `unrolls_0`."""
    return word.rstrip("_0123456789")


def kind_of(role: str) -> str:
    """The name that a role shares with its like: `actor` of `actor 3`."""
    return role.split(" ")[0]


def since(now: Measured, before: Measured) -> dict[str, Any]:
    """What was measured between two times."""
    grown = {name: _less(now[name], before.get(name, {})) for name in ("roles", "words")}
    words = {
        name: {**word, **{part: grown["words"][name][part] for part in ("given", "taken", "looks", "filled")}}
        for name, word in now["words"].items()
    }
    own = {name: now[name] - before.get(name, 0) for name in ("seconds", "cpu", KEEPER)}
    return {**now, **own, "roles": grown["roles"], "words": words}


def _less(now: Any, before: Any) -> Any:
    if isinstance(now, Mapping):
        return {name: _less(value, (before or {}).get(name)) for name, value in now.items()}
    return now if isinstance(now, str) else now - (before or 0)


def account(measured: Measured) -> Account:
    """Shares of time by role, levels of words, rates of flows in units and bytes a second, and the bottleneck.

    `restarts` say of each role that died how many `times` it was started again, and the last `reason`.
    """
    seconds = max(measured["seconds"], 1e-9)
    alone = measured["processes"] == 1  # each's time is then everybody's, from the first role's first turn on
    roles = {name: _role(role, seconds, alone) for name, role in measured["roles"].items()}
    roles[KEEPER] = {"busy": min(1.0, measured[KEEPER] / seconds)}
    flows = [
        {"from": source, "to": target, "per_second": units / seconds, "bytes_per_second": units * each / seconds}
        for word, values in measured["words"].items()
        for source, target, units, each in _flows(word, values)
    ]
    dropped: dict[str, int] = defaultdict(int)
    for role in measured["roles"].values():
        for reason, count in role["dropped"].items():
            dropped[reason] += count
    cpu = measured["cpu"] + sum(role["cpu"] for role in measured["roles"].values())
    found: Account = {
        "processes": measured["processes"],
        "cores": measured["cores"],
        "cores_busy": cpu / seconds,
        "roles": roles,
        "words": {name: _word(word) for name, word in measured["words"].items()},
        "flows": flows,
        "restarts": {
            name: {"times": role["restarts"], "reason": role["reason"]}
            for name, role in measured["roles"].items()
            if role["restarts"]
        },
        "dropped": {reason: count for reason, count in dropped.items() if count},
    }
    return {**found, "bottleneck": bottleneck(found)}


def _role(role: Measured, seconds: float, alone: bool) -> dict[str, Any]:
    whole = max(role["work"] + sum(role["waiting"].values()), seconds if alone else 1e-9)
    shares = {name: value / whole for name, value in role["activities"].items()}
    own = {"processor": role["cpu"] / whole} if role["cpu"] else {}
    shares["transfer"] = max(0.0, role["work"] / whole - sum(shares.values()))
    waiting = {word: value / whole for word, value in role["waiting"].items()}
    own |= {"steps_per_second": role["steps"] / seconds} if role["steps"] else {}
    return {"busy": role["work"] / whole, **shares, "waiting": waiting, **own}


def _word(word: Measured) -> dict[str, Any]:
    level = word["level"]
    found = {"kind": word["kind"]}
    if word["looks"]:
        found["fill"] = word["filled"] / word["looks"]
    if "fill" in level:
        found["fill"] = level["fill"]
    if level.get("inserts"):
        found["samples_per_insert"] = level["samples"] / level["inserts"]
    if "units" in word:
        found["units"] = word["units"]
    if word["undone"]:
        found |= {"undone": word["undone"], "undone_steps": word["undone_steps"]}
    return found


def _flows(word: str, values: Measured) -> list[tuple[str, str, int, float]]:
    given = [(role, word, units, values["given_bytes"]) for role, units in values["given"].items()]
    return given + [(word, role, units, values["taken_bytes"]) for role, units in values["taken"].items()]


def condensed(found: Account) -> Account:
    """The same with many roles of a kind as one, `actor × 16`: its shares are their means, its rates their sums."""
    kinds = _by_kind(found["roles"])
    ends = [kind_of(flow[end]) for flow in found["flows"] for end in ("from", "to") if flow[end] in found["roles"]]
    many = {kind for kind, members in kinds.items() if len(members) > BOXES or ends.count(kind) > FLOWS}
    names = {
        role: f"{kind} × {len(members)}" if kind in many and len(members) > 1 else role
        for kind, members in kinds.items()
        for role in members
    }
    flows: dict[tuple[str, str], dict[str, Any]] = {}
    for flow in found["flows"]:
        pair = tuple(names.get(flow[end], flow[end]) for end in ("from", "to"))
        sums = flows.setdefault(pair, {"from": pair[0], "to": pair[1], "per_second": 0.0, "bytes_per_second": 0.0})
        for rate in ("per_second", "bytes_per_second"):
            sums[rate] += flow[rate]
    boxes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for role, name in names.items():
        boxes[name].append(found["roles"][role])
    roles = {name: _mean(members) for name, members in boxes.items()}
    return {**found, "roles": roles, "flows": list(flows.values())}


def _mean(roles: list[dict[str, Any]]) -> dict[str, Any]:
    """Of shares; of paces the sum."""
    if len(roles) == 1:
        return roles[0]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for role in roles for name in role):
        values = [role.get(name, 0.0) for role in roles]
        if name == "waiting":
            found[name] = _mean([role.get(name, {}) for role in roles])
        else:
            found[name] = sum(values) / (1 if name == "steps_per_second" else len(roles))
    return found


def _by_kind(roles: Mapping[str, Any]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for role in roles:
        kinds[kind_of(role)].append(role)
    return kinds


def flat(found: Account) -> dict[str, float]:
    """The account's main numbers by name, for curves."""
    values: dict[str, float] = {}
    for kind, members in _by_kind(found["roles"]).items():
        mean = _mean([found["roles"][role] for role in members])
        values[f"{kind}_busy"] = mean["busy"]
        if "steps_per_second" in mean:
            values[f"{kind}_steps_per_second"] = mean["steps_per_second"]
    for name, word in found["words"].items():
        values |= {f"{name}_{level}": value for level, value in word.items() if level not in ("kind", "units")}
    restarts = sum(role["times"] for role in found["restarts"].values())
    return {**values, "restarts": restarts, "dropped": sum(found["dropped"].values())}


def bottleneck(found: Account) -> dict[str, str]:
    """What limits a run: one of environment, inference, transfer, learner and waiting.

    Roles of one process limit it by the largest share of its time. Of roles in processes of their own, it is the one
    that others wait for, by what it does most; where nobody is busy, all wait for each other.

    Returns:
        `limit`; `because`, a sentence with the figures; `change`, what would help; `role`, its kind or "".
    """
    roles = {
        kind: _mean([found["roles"][role] for role in members]) for kind, members in _by_kind(found["roles"]).items()
    }
    kinds = {name: word["kind"] for name, word in found["words"].items()}
    cause, because, role = _in_turn(roles) if found["processes"] == 1 else _side_by_side(roles, kinds)
    cheap, dear = ADVICE[cause if cause in ADVICE else LIMITS[cause]]
    if MEMORY in found["words"]:
        dear = dear.replace("add actors", "add workers").replace("--actors", "--learners")
    if found["processes"] > 1 and found["cores_busy"] > FULL * found["cores"]:
        because += f"; all {found['cores']} cores are in use" if found["cores"] > 1 else "; the only core is in use"
        dear = dear and f"with more cores, {dear}"
    elif not role:
        because += _held_up(*(each for kind, each in roles.items() if kind not in (KEEPER, EVALUATOR)))
    change = "; ".join(filter(None, (cheap, dear)))
    texts = {"because": because, "change": change}
    sentences = {name: f"{text[0].upper()}{text[1:]}." for name, text in texts.items()}
    return {"limit": LIMITS.get(cause, cause), **sentences, "role": role}


def _in_turn(roles: Mapping[str, Any]) -> tuple[str, str, str]:
    """The cause, the reason and the role, where all take turns in one process."""
    parts: dict[str, dict[str, float]] = defaultdict(dict)  # by activity, the share of each kind of role
    for kind, role in roles.items():
        for activity, share in _work(role).items() if kind != KEEPER else [(KEEPER, role["busy"])]:
            parts[activity][kind] = share
    shares = {activity: sum(each.values()) for activity, each in parts.items()}
    cause = max(shares, key=lambda activity: shares[activity])
    names = {KEEPER: "checkpoints"}
    most = sorted((activity for activity in shares if shares[activity] > 0.01), key=lambda each: -shares[each])[:3]
    figures = ", ".join(f"{names.get(activity, activity)} {shares[activity]:.0%}" for activity in most)
    role = max(parts[cause], key=lambda kind: parts[cause][kind])
    return cause, f"all roles take turns in one process, whose time is {figures}", role


def _side_by_side(roles: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[str, str, str]:
    """The same, where each has its process."""
    keeper = roles[KEEPER]["busy"]
    players = {kind: role for kind, role in roles.items() if kind not in (KEEPER, EVALUATOR)}
    most = max(players, key=lambda kind: players[kind]["busy"])
    busy = ", ".join(f"{kind} {role['busy']:.0%}" for kind, role in players.items())
    if keeper > FULL:
        return "transfer", f"the process that keeps the words is busy {keeper:.0%} (roles: {busy})", KEEPER
    if players[most]["busy"] < BUSY:
        if roles.get(EVALUATOR, {"busy": 0.0})["busy"] > BUSY:
            playing = roles[EVALUATOR]["busy"]
            return "evaluation", f"checkpoints wait for the evaluator, which is busy {playing:.0%} ({busy})", EVALUATOR
        waits = {kind: kinds.get(_most_waited_for(role)) for kind, role in players.items()}
        cause = {"calls": "questions", "replay": "draws"}.get(waits.get("actor") or "", "waiting")
        cause = "turns" if cause == "waiting" and "weights" in waits.values() else cause
        return cause, f"nobody is busy ({busy}): {_waits(players)}", ""
    role, work = players[most], _work(players[most])
    cause = max(work, key=lambda activity: work[activity])
    figures = ", ".join(
        f"{name} {work[name]:.0%}" for name in sorted(work, key=lambda each: -work[each]) if work[name] >= 0.05
    )
    figures += _held_up(role)
    others = _waits({kind: role for kind, role in players.items() if kind != most})
    return cause, f"{most} is busy {role['busy']:.0%} ({figures})" + (f", {others}" if others else ""), most


def _held_up(*roles: Mapping[str, Any]) -> str:
    """What is to be said of roles that are on a processor for too little of their work."""
    busy, processor = (sum(role.get(name, 0.0) for role in roles) / len(roles) for name in ("busy", "processor"))
    told = all("processor" in role for role in roles)
    if not told or processor >= STARVED * busy:
        return ""
    return f"; {processor:.0%} on a processor, the rest held up by something outside or other programs"


def _work(role: Mapping[str, Any]) -> dict[str, float]:
    """Shares of its activities, transfer among them."""
    return {name: share for name, share in role.items() if name not in ("busy", "waiting", *OWN)}


def _waits(roles: Mapping[str, Any]) -> str:
    """What each kind waits for most."""
    found = [(kind, 1 - role["busy"], _most_waited_for(role)) for kind, role in roles.items()]
    return ", ".join(f"{kind} waits {share:.0%}, most for {plain(word)}" for kind, share, word in found if word)


def _most_waited_for(role: Mapping[str, Any]) -> str:
    return max(role["waiting"], key=lambda word: role["waiting"][word], default="")

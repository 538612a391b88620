"""The command line: one verb a function, no logic of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import json
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rookery.interrupts import heed

if TYPE_CHECKING:
    from rookery.run import Run

__all__ = ["main"]

USAGE = """usage: rookery VERB ...

  train SYSTEM ENV [flags]     train; `rookery train ppo CartPole-v1 --help` shows every flag
  resume RUN [--steps N]       go on from the last checkpoint
  rerun RUN [--until N]        repeat a run with processes in one, in the order in which everything arrived
  eval RUN [--episodes N] [--json]
  video RUN                    record an episode
  watch RUN [--once]           who is busy, what flows where, and what limits the run, live
  plot RUN ...                 learning curve and topology of a run, or mean and interval of several
  plan SYSTEM ENV [flags]      how fast it would be with so many actors, on this machine or on a cluster
  list systems|envs
  check-env ENV                does an environment keep the stream convention?

`rookery VERB --help` says more of each. With --traceback, any verb shows where an error came from.
"""

# Verbs whose words no parser takes apart, or, with train, only once system and environment are known.
HELP = {
    "train": """usage: rookery train SYSTEM ENV [flags]

  rookery train ppo CartPole-v1                  begins from the settings tuned for it, where there are some
  rookery train ppo CartPole-v1 --steps 50_000   flags change settings
  rookery train ppo CartPole-v1 --help           every flag, and its value in this run
  rookery train ppo --help                       the same before tuning, whatever the environment
  rookery train ppo my_module:MyEnv              a Gymnasium environment of your own
  rookery train my_module:MyPPO CartPole-v1      an algorithm of your own, a class

SYSTEM is one of these, or module:Name of a class; `rookery list systems` says what they are:
{systems}
ENV is an id that `rookery list envs` prints, or module:Name of a class or function that makes one.
""",
    "plan": """usage: rookery plan SYSTEM ENV [flags]

Measure what the work of a system's roles costs on this machine, half a minute, and simulate the system on a cluster.

  rookery plan impala CartPole-v1                                          1, 2, 4 and 8 actors on this machine
  rookery plan impala CartPole-v1 --actors 1,16,256 --cores-per-host 8     on as many hosts as they need
  rookery plan impala CartPole-v1 --bandwidth 1 --mtbf 24 --plot plan.png  a slow network, hosts that die, a picture
  rookery plan impala CartPole-v1 --help                                   every flag
""",
    "list": """usage: rookery list systems|envs

  systems   what can be trained: name, topology, idea
  envs      ids of every backend installed here, as backend:id; without `backend:`, the fastest that has the id is taken
""",
    "check-env": """usage: rookery check-env ENV

Step an environment with random actions, and say which rules of the stream convention it keeps: where episodes begin and
end, what is observed there, that seeds repeat. ENV is an id, or module:Name of your own. Status 1 if a rule is broken.
""",
}


@dataclasses.dataclass(frozen=True)
class Display:
    """Where a run goes, and how much it says."""

    run_dir: Path | None = None  # a new folder; by default under runs/
    quiet: bool = False  # no progress display
    network: str | None = None  # module:Name of your own part between observation and heads
    recipe: bool = True  # begin from the settings tuned for this environment


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run from its last checkpoint."""

    run: str  # the run's folder, or the URL that it was copied to
    steps: int | None = None  # a new budget, those already done included; by default the run's own
    env: str | None = None  # module:Name, for a run on an environment of your own
    algorithm: str | None = None  # module:Name of its class, for a run with an algorithm of your own
    network: str | None = None  # module:Name, for a run with a network of your own
    quiet: bool = False  # no progress display
    run_dir: Path | None = None  # a new folder for what is fetched from a URL; by default under runs/
    address: str | None = None  # of another Ray cluster than before


@dataclasses.dataclass(frozen=True)
class Rerun:
    """Repeat a run of the local runtime in one process, in the order in which everything arrived, and compare."""

    run: Path  # the run's folder
    until: int | None = None  # stop after so many updates of the learner
    run_dir: Path | None = None  # a new folder; by default under runs/
    env: str | None = None  # module:Name, for a run on an environment of your own
    algorithm: str | None = None  # module:Name of its class, for a run with an algorithm of your own
    network: str | None = None  # module:Name, for a run with a network of your own
    quiet: bool = False  # no progress display


@dataclasses.dataclass(frozen=True)
class Eval:
    """Play whole episodes with the greedy policy of a checkpoint, and say what they return."""

    run: Path  # the run's folder
    episodes: int = 20  # how many, on up to 64 lanes
    seed: int = 1  # of the environment; the same seed plays the same episodes
    which: Literal["latest", "best"] = "latest"  # checkpoint; the best by the evaluations during training
    env: str | None = None  # module:Name, for a run on an environment of your own
    algorithm: str | None = None  # module:Name of its class, for a run with an algorithm of your own
    network: str | None = None  # module:Name, for a run with a network of your own
    json: bool = False  # print one JSON object, each return and length included


@dataclasses.dataclass(frozen=True)
class Video:
    """Record one greedy episode into the run's folder."""

    run: Path  # the run's folder
    steps: int = 1000  # where the recording is cut off, if the episode has not ended
    seed: int = 1  # of the environment
    env: str | None = None  # module:Name, for a run on an environment of your own
    algorithm: str | None = None  # module:Name of its class, for a run with an algorithm of your own
    network: str | None = None  # module:Name, for a run with a network of your own


@dataclasses.dataclass(frozen=True)
class Watch:
    """Show how busy a run's roles are, what flows between them and what limits it, until it is over."""

    run: Path  # the run's folder
    once: bool = False  # print one picture; so it is, too, where there is no terminal


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the learning curve of a run and its topology with what was measured, or the mean and interval of several."""

    runs: tuple[Path, ...]  # the runs' folders
    out: Path = Path("comparison.png")  # the picture of several; those of one go into its folder


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is planned, and how it is shown."""

    actors: str = "1,2,4,8"  # how many, a forecast each; where each actor learns for itself, workers
    envs: int = 8  # lanes of each actor
    shards: int = 1  # of a parameter server
    compile: bool = False  # torch.compile for acting and loss
    frame_stack: int = 0  # frames an observation shows; 0 leaves it to the environment
    env_options: tuple[str, ...] = ()  # what the environment itself takes, as name=value with a JSON value
    plot: Path | None = None  # draw throughput and lag into this file, a .png
    json: bool = False  # print one JSON object, costs and all


def main(arguments: list[str] | None = None) -> None:
    """Run one verb.

    What was asked wrongly ends with one sentence and status 2, what went wrong with one and status 1; an interrupted
    run with 130 (Ctrl-C) or 143 (SIGTERM).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None:
        warnings.formatwarning = lambda message, *_, **__: f"rookery: {message}\n"
        heed()
    traceback = "--traceback" in words
    verb, *rest = [_number(word) for word in words if word != "--traceback"] or ["help"]
    if verb in ("help", "-h", "--help"):
        print(USAGE, end="")
        return
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")  # so that `module:Name` finds what lies in this folder
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, 1)
            raise ValueError(
                f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(VERBS)}.")
            )
        if verb in HELP and rest[:1] in (["-h"], ["--help"]):
            from rookery.systems import SYSTEMS

            systems = textwrap.fill(", ".join(SYSTEMS), 100, initial_indent="  ", subsequent_indent="  ")
            print(HELP[verb].format(systems=systems), end="")
        else:
            VERBS[verb](rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        exec("")  # CPython forgets that one passed through an `exec` before, for which it would end by a signal
        sys.exit(130)
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        if traceback:
            raise
        sentence, cut, _ = str(error).partition("\nTraceback ")
        hint = " (--traceback shows where)" if cut else ""
        print(f"rookery: {' '.join(sentence.split())}{hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def _own(given: Any) -> dict[str, str | None]:
    """What a run needs that is none of ours."""
    return {"env": given.env, "algorithm": given.algorithm, "network": given.network}


def _number(word: str) -> str:
    """The word, or a large number in digits that was written as 1e6."""
    large = re.fullmatch(r"(--[\w-]+=)?(\d+(?:\.\d+)?e\+?\d{1,2})", word, re.IGNORECASE)
    if large is None or not float(large[2]).is_integer():
        return word
    return f"{large[1] or ''}{int(float(large[2]))}"


def train(words: list[str]) -> None:
    """`rookery train SYSTEM ENV [flags]`: the flags are the fields of the algorithm and of a run's options."""
    system, env = _named("train", words)
    from rookery.settings import resolve
    from rookery.systems import recipe
    from rookery.train import train as run_training

    name, algorithm, options = resolve(system, env, {}, tuned="no_recipe" not in _asked(words))
    about = f"Train {name} on {env}. A setting that no flag names keeps its default, which is shown."
    given = _given("train", words, about, name, {"run": options, name: algorithm, "display": Display()})
    settings = {**vars(given["run"]), **vars(given[name])}
    display = given["display"]
    if not (display.quiet or ":" in system or recipe(name, env)):
        print(f"No settings are tuned for {name} on {env}: those of the system hold, which may be of other tasks.")
    means = {"run_dir": display.run_dir, "quiet": display.quiet, "network": display.network}
    _finish(run_training(system, env, **means, **settings))


def plan(words: list[str]) -> None:
    """`rookery plan SYSTEM ENV [flags]`: the flags are those of `Plan`, the algorithm's fields, and the cluster's."""
    system, env = _named("plan", words)
    from rookery.planner import Cluster, as_json, draw, forecasts, show
    from rookery.settings import resolve

    name, algorithm, options = resolve(system, env, {})
    common = vars(Plan()).keys() & vars(options).keys() - {"actors"}
    wanted = Plan(**{each: getattr(options, each) for each in common})
    about = f"Plan {name} on {env}. A setting that no flag names keeps its default, which is shown."
    given = _given("plan", words, about, name, {"plan": wanted, name: algorithm, "cluster": Cluster()})
    wanted, cluster = given["plan"], given["cluster"]
    settings = {**vars(given[name]), **{each: getattr(wanted, each) for each in common}}
    work, costs, found = forecasts(system, env, wanted.actors, cluster, **settings)
    print(json.dumps(as_json(work, costs, cluster, found)) if wanted.json else "\n".join(show(costs, found)))
    if wanted.plot is not None:
        path = draw(found, f"{name} on {env}", wanted.plot)
        print(f"plot: {path}", file=sys.stderr)


def resume(words: list[str]) -> None:
    """`rookery resume RUN [--steps N] [--quiet]`."""
    given = _parse(Resume, "resume", words)
    from rookery.train import resume as go_on

    _finish(
        go_on(
            given.run,
            steps=given.steps,
            quiet=given.quiet,
            run_dir=given.run_dir,
            address=given.address,
            **_own(given),
        )
    )


def rerun(words: list[str]) -> None:
    """`rookery rerun RUN [--until N]`."""
    given = _parse(Rerun, "rerun", words)
    from rookery.rerun import differences, parting
    from rookery.rerun import rerun as repeat
    from rookery.run import load
    from rookery.runtimes.rerun import Diverged

    again = repeat(given.run, until=given.until, run_dir=given.run_dir, quiet=given.quiet, **_own(given))
    original = load(given.run, **_own(given))
    if (step := parting(original, again)) is not None:
        raise Diverged(f"{again.path} learnt something else, first seen at step {step:,}.")
    ours, theirs = (run.saved()["steps"] for run in (again, original))
    if ours != theirs:
        print(f"Equal until step {ours:,}, as far as was told; {again.path} has the checkpoint there.")
        if given.until is None and ours < theirs:
            raise Diverged(f"the record of who came when ends there, and {original.path} went on to step {theirs:,}.")
        return
    if unlike := differences(original, again):
        raise Diverged(f"{again.path} learnt something else: {', '.join(unlike)}.")
    print(f"{again.path} is equal, bit for bit.")


def evaluate(words: list[str]) -> None:
    """`rookery eval RUN [--episodes N] [--json] [--which latest|best]`."""
    given = _parse(Eval, "eval", words)
    from rookery.run import load
    from rookery.runs.metrics import succeeded

    found = load(given.run, **_own(given)).evaluate(given.episodes, given.seed, given.which)
    summary = found.summary()
    if given.json:
        print(json.dumps({**summary, "returns": found.returns, "lengths": found.lengths}))
    else:
        text = "return {eval_return_mean:.2f} ± {eval_return_std:.2f} over {eval_episodes} episodes"
        print(f"{text.format(**summary)}{succeeded(summary)}")


def video(words: list[str]) -> None:
    """`rookery video RUN`."""
    given = _parse(Video, "video", words)
    from rookery.run import load

    print(load(given.run, **_own(given)).record_video(given.steps, given.seed))


def watch(words: list[str]) -> None:
    """`rookery watch RUN [--once]`."""
    given = _parse(Watch, "watch", words)
    from rookery.runs.watch import watch as show_live

    show_live(given.run, given.once)


def plot(words: list[str]) -> None:
    """`rookery plot RUN ... [--out FILE]`."""
    given = _parse(Plot, "plot", words)
    from rookery.runs.flowchart import plot_topology
    from rookery.runs.plots import plot_run, plot_runs

    if not given.runs:
        raise ValueError("plot takes one run folder or several, such as `rookery plot runs/*`.")
    if len(given.runs) > 1:
        print(plot_runs(list(given.runs), given.out))
        return
    for picture in (plot_run(given.runs[0]), plot_topology(given.runs[0])):
        if picture is not None:  # what an older version ran was not measured
            print(picture)


def show(words: list[str]) -> None:
    """`rookery list systems|envs`."""
    what = words[0] if words else ""
    if what == "systems":
        from rookery.systems import SYSTEMS

        width = max(map(len, SYSTEMS))
        for system in SYSTEMS.values():
            print(f"{system.name:<{width}} {system.topology:<22} {system.about}")
    elif what == "envs":
        from rookery.envs.make import BACKENDS, env_ids

        for backend in BACKENDS:
            for name in env_ids(backend):
                print(f"{backend}:{name}")
    else:
        raise ValueError(f"list {what!r}: say `rookery list systems` or `rookery list envs`.")


def check_env(words: list[str]) -> None:
    """`rookery check-env ENV`."""
    from rookery.envs.check import check_env as check

    if len(words) != 1:
        raise ValueError("check-env takes one environment, such as `rookery check-env CartPole-v1`.")
    report = check(words[0])
    print(report)
    if not report.ok:
        sys.exit(1)


def _parse(kind: type[Any], verb: str, words: list[str]) -> Any:
    """The dataclass that the words make; its fields without a default stand before the flags."""
    import tyro

    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=f"rookery {verb}", description=inspect.getdoc(kind), config=config)
    except SystemExit as refusal:
        if not refusal.code:  # --help
            raise
        raise ValueError(f"{_sentence(said.getvalue())}. `rookery {verb} --help` says more.") from None


def _sentence(box: str) -> str:
    """What the parser has to say, without its frame, and the title and hints that rules part from it."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = itertools.groupby(lines, lambda line: bool(line) and set(line) <= {"─", "-"})
    parts = [" ".join(part) for is_rule, part in rules if not is_rule]
    text = parts[0 if box.startswith("╭") or len(parts) == 1 else 1]
    text = re.sub(r"^Error parsing (--\S+:)?(\w+: )?", r"\1", text)
    text = re.sub(r"no type matching .* instantiated from .* - <class '(?:int|float)'>: ", "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text).strip(" .")


def _named(verb: str, words: list[str]) -> list[str]:
    """The system and the environment that the words begin with."""
    if words[1:] in (["-h"], ["--help"]):
        words.insert(1, "ENV")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError(
            f"{verb} takes a system and an environment, such as `rookery {verb} ppo CartPole-v1`; "
            f"`rookery {verb} --help` says more."
        )
    return words[:2]


def _asked(words: list[str]) -> set[str]:
    """The flags among the words, as fields are named."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _given(verb: str, words: list[str], about: str, name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of a verb's flags as the words set them; `name` is the system's."""
    from rookery.settings import refuse_unknown

    known = {each: value for part in parts.values() for each, value in vars(part).items()}
    switches = {f"no_{each}" for each, value in known.items() if isinstance(value, bool)}
    # Says which systems have a setting; the parser cannot.
    refuse_unknown(_asked(words) - switches - {"help"}, set(known), name)
    fields = [(part, type(value), dataclasses.field(default=value)) for part, value in parts.items()]
    # --help takes its titles from the names of the fields
    flags = dataclasses.make_dataclass(verb.title(), fields, namespace={"__doc__": about})
    return vars(_parse(flags, " ".join([verb, *words[:2]]), words[2:]))


def _finish(run: Run) -> None:
    """Say where everything is, and how to go on."""
    from rookery.runs.metrics import succeeded

    summary = run.summary
    if run.signal is not None:
        print(
            f"Interrupted at step {summary['steps']}; the checkpoint is written. Go on with: rookery resume {run.path}"
        )
        sys.exit(128 + run.signal)
    print(
        f"{summary['system']} on {summary['env']}: evaluation {summary['eval_return_mean']:.1f} ± "
        f"{summary['eval_return_std']:.1f} over {summary['eval_episodes']} episodes{succeeded(summary)}, "
        f"{summary['steps']:,} steps in "
        f"{summary['seconds']:.1f} s."
    )
    print(f"limit       {summary['bottleneck']['limit']}: {summary['bottleneck']['because']}")
    print(f"curve       {run.plot()}")
    try:
        print(f"video       {run.record_video()}")
    except Exception as error:  # a picture that cannot be drawn here must not hide what was learnt
        print(f"video       none: {' '.join(str(error).partition('Traceback ')[0].split())}")
    print(f"checkpoint  {run.checkpoints.path(run.checkpoints.steps()[-1])}")


VERBS = {
    "train": train,
    "resume": resume,
    "rerun": rerun,
    "eval": evaluate,
    "video": video,
    "watch": watch,
    "plot": plot,
    "plan": plan,
    "list": show,
    "check-env": check_env,
}


if __name__ == "__main__":
    main()

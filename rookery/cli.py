"""The command line: one verb a function, no logic of its own."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rookery.run import Run

__all__ = ["main"]

USAGE = """usage: rookery VERB ...

  train SYSTEM ENV [flags]     train; `rookery train ppo CartPole-v1 --help` shows every flag
  resume RUN [--steps N]       go on from the last checkpoint
  eval RUN [--episodes N] [--json]
  video RUN                    record an episode
  plot RUN ...                 learning curve of a run, or mean and interval of several
  list systems|envs
  check-env ENV                does an environment keep the stream convention?

With --traceback, any verb shows where an error came from.
"""


@dataclasses.dataclass(frozen=True)
class Display:
    """Where a run goes, and how much it says."""

    run_dir: Path | None = None  # a new folder; by default under runs/
    quiet: bool = False  # no progress display
    recipe: bool = True  # begin from the tuned settings for this environment


def main(arguments: list[str] | None = None) -> None:
    """Run one verb.

    What was asked wrongly ends with one sentence and status 2, what went wrong with one and status 1; an interrupted
    run with 130 (Ctrl-C) or 143 (SIGTERM).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    traceback = "--traceback" in words
    verb, *rest = [word for word in words if word != "--traceback"] or ["help"]
    if verb in ("help", "-h", "--help"):
        print(USAGE)
        return
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")  # so that `module:Name` finds what lies in this folder
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, 1)
            raise ValueError(
                f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(VERBS)}.")
            )
        VERBS[verb](rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        if traceback:
            raise
        sentence, cut, _ = str(error).partition("\nTraceback ")
        hint = " (--traceback shows where)" if cut else ""
        print(f"rookery: {' '.join(sentence.split())}{hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def train(words: list[str]) -> None:
    """`rookery train SYSTEM ENV [flags]`: the flags are the fields of the algorithm and of a run's options."""
    import tyro

    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise ValueError("train takes a system and an environment, such as `rookery train ppo CartPole-v1`.")
    from rookery.settings import resolve
    from rookery.train import train as run_training

    system, env = words[:2]
    _, algorithm, options = resolve(system, env, {}, tuned="--no-recipe" not in words)
    parts = {"display": Display(), "options": options, "algorithm": algorithm}
    fields = [(name, type(part), dataclasses.field(default=part)) for name, part in parts.items()]
    flags = dataclasses.make_dataclass("Train", fields)
    given: Any = tyro.cli(
        flags, args=words[2:], prog=f"rookery train {system} {env}", config=(tyro.conf.OmitArgPrefixes,)
    )
    settings = {**vars(given.options), **vars(given.algorithm)}
    _finish(run_training(system, env, run_dir=given.display.run_dir, quiet=given.display.quiet, **settings))


def resume(words: list[str]) -> None:
    """`rookery resume RUN [--steps N] [--quiet]`."""

    def arguments(run: Path, steps: int | None = None, env: str | None = None, quiet: bool = False) -> Any:
        return run, steps, env, quiet

    run, steps, env, quiet = _parse(arguments, "resume", words)
    from rookery.train import resume as go_on

    _finish(go_on(run, steps=steps, env=env, quiet=quiet))


def evaluate(words: list[str]) -> None:
    """`rookery eval RUN [--episodes N] [--json] [--which latest|best]`."""

    def arguments(
        run: Path,
        episodes: int = 20,
        seed: int = 1,
        which: Literal["latest", "best"] = "latest",
        env: str | None = None,
        json: bool = False,
    ) -> Any:
        return run, episodes, seed, which, env, json

    run, episodes, seed, which, env, as_json = _parse(arguments, "eval", words)
    from rookery.run import load

    found = load(run, env=env).evaluate(episodes, seed, which)
    summary = found.summary()
    if as_json:
        print(json.dumps({**summary, "returns": found.returns, "lengths": found.lengths}))
    else:
        print("return {eval_return_mean:.2f} ± {eval_return_std:.2f} over {eval_episodes} episodes".format(**summary))


def video(words: list[str]) -> None:
    """`rookery video RUN`."""

    def arguments(run: Path, steps: int = 1000, seed: int = 1, env: str | None = None) -> Any:
        return run, steps, seed, env

    run, steps, seed, env = _parse(arguments, "video", words)
    from rookery.run import load

    print(load(run, env=env).record_video(steps, seed))


def plot(words: list[str]) -> None:
    """`rookery plot RUN ... [--out FILE]`."""

    def arguments(runs: tuple[Path, ...], out: Path = Path("comparison.png")) -> Any:
        return runs, out

    runs, out = _parse(arguments, "plot", words)
    from rookery.runs.plots import plot_run, plot_runs

    if not runs:
        raise ValueError("plot takes one run folder or several, such as `rookery plot runs/*`.")
    print(plot_run(runs[0]) if len(runs) == 1 else plot_runs(list(runs), out))


def show(words: list[str]) -> None:
    """`rookery list systems|envs`."""
    what = words[0] if words else ""
    if what == "systems":
        from rookery.systems import SYSTEMS

        for system in SYSTEMS.values():
            print(f"{system.name:<8} {system.topology:<16} {system.about}")
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


def _parse(arguments: Callable[..., Any], verb: str, words: list[str]) -> Any:
    """What the function makes of the words; its arguments without a default stand before the flags."""
    import tyro

    return tyro.cli(arguments, args=words, prog=f"rookery {verb}", config=(tyro.conf.PositionalRequiredArgs,))


def _finish(run: Run) -> None:
    """Say where everything is, and how to go on."""
    summary = run.summary
    if run.signal is not None:
        print(
            f"Interrupted at step {summary['steps']}; the checkpoint is written. Go on with: rookery resume {run.path}"
        )
        sys.exit(128 + run.signal)
    print(
        f"{summary['system']} on {summary['env']}: evaluation {summary['eval_return_mean']:.1f} ± "
        f"{summary['eval_return_std']:.1f} over {summary['eval_episodes']} episodes, {summary['steps']:,} steps in "
        f"{summary['seconds']:.1f} s."
    )
    print(f"curve       {run.plot()}")
    try:
        print(f"video       {run.record_video()}")
    except Exception as error:  # a picture that cannot be drawn here must not hide what was learnt
        print(f"video       none: {' '.join(str(error).partition('Traceback ')[0].split())}")
    print(f"checkpoint  {run.checkpoints.path(run.checkpoints.steps()[-1])}")


VERBS = {
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "video": video,
    "plot": plot,
    "list": show,
    "check-env": check_env,
}


if __name__ == "__main__":
    main()

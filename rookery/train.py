"""Composes algorithm, environment, topology and runtime into a run, and executes it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from rookery.algorithms.base import Algorithm, Network
from rookery.envs.make import pick
from rookery.envs.vector import VectorEnv
from rookery.interrupts import raise_if_heard
from rookery.layouts import fastest, rows, shown
from rookery.learner import NonFinite, non_finite
from rookery.run import Run, build, layout, load, threads
from rookery.runs.account import account, condensed, flat, since
from rookery.runs.checkpoint import CheckpointError, Checkpoints
from rookery.runs.files import write_json
from rookery.runs.folder import RunFolder, RunFolderError
from rookery.runs.metrics import RUNTIME, MetricsError, MetricsLog
from rookery.runs.mirror import Mirror, fetched, is_url
from rookery.runs.progress import Progress
from rookery.runs.recorder import Recorder
from rookery.runs.sinks import open_sink
from rookery.runtimes.arrivals import begin
from rookery.runtimes.cluster import ClusterError
from rookery.runtimes.inline import Inline, RoleError
from rookery.runtimes.local import Local
from rookery.runtimes.process import leave_if_imported
from rookery.runtimes.ray import Ray
from rookery.settings import EnvLike, Options, device_of, env_name, resolve
from rookery.systems import SYSTEMS, find, system_of
from rookery.topologies.setting import ReplaySetting, Setting, crosses

__all__ = ["resume", "setting_of", "train"]

log = logging.getLogger("rookery")

MakeRuntime = Callable[[Callable[[str, int, int, dict[str, Any]], None]], Inline | Local]

ARRIVALS = "arrivals"  # the folder of records of who came when, named by the first step and the budget
LAYOUTS = "layouts.json"  # those that were tried
REPLAY = "replay"  # the folder of a replay that lies in files
# Of an account, in the summary.
MEASURED = ("bottleneck", "roles", "words", "flows", "restarts", "dropped", "processes", "cores", "cores_busy")
SOON, LATE = 2.0, 10.0  # seconds between two rows of the runtime, at least and at most


def train(
    system: str | Algorithm,
    env: EnvLike,
    *,
    network: Network | str | None = None,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train, and leave a run folder behind.

    Args:
        system: a name (`rookery list systems`), which takes the tuned settings for the environment if there are any;
            or an algorithm with its settings, which is taken as it is; or `module:Name` of a class of your own.
        env: an id (`rookery list envs`), a class or function that makes a Gymnasium environment, or an object.
        network: your own part between observation and heads: a module from observations `[B, ...]` to features
            `[B, F]`, or a function that makes one from an EnvSpec; or `module:Name` of either.
        run_dir: the folder; by default a new one under `runs/`.
        quiet: no progress display.
        settings: fields of `Options` (steps, envs, seed, device ...) and, with a name, of the algorithm.

    Raises:
        ValueError: for unknown names and combinations that cannot work, before anything is built.
    """
    leave_if_imported()
    name, algorithm, options = resolve(system, env, settings)
    if options.layout == "auto" and isinstance(env, str):  # one backend for all, whichever suits the lanes as given
        env = pick(env, options.envs, device_of(options.device), options.compile)
    run, options = build(name, algorithm, env, options, network)
    run.folder = RunFolder.create(run_dir, name, env_name(env), options.seed)
    if options.layout == "auto":
        run, options = _laid_out(run, name, options, quiet)
    run.checkpoints, own = Checkpoints(run.folder.checkpoints), run._make_net.network
    config = {
        "system": name,
        "env": env_name(env),
        "seed": options.seed,
        "algorithm": {"class": type(algorithm).__name__, **dataclasses.asdict(cast(Any, algorithm))},
        "options": dataclasses.asdict(options),
        "network": None if own is None else getattr(own, "__name__", type(own).__name__),
        "own": {"env": not isinstance(env, str), "algorithm": not _is_ours(name, algorithm)},
    }
    try:
        with run.folder.claimed():
            run.folder.write_config(config)
            return execute(run, name, options, quiet=quiet)
    except (ClusterError, RunFolderError, KeyboardInterrupt):
        if not run.checkpoints.steps():  # nothing was begun: the folder is free for another attempt
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def resume(
    path: str | Path,
    *,
    steps: int | None = None,
    quiet: bool = False,
    algorithm: Algorithm | type[Algorithm] | str | None = None,
    env: EnvLike | None = None,
    network: Network | str | None = None,
    run_dir: str | Path | None = None,
    address: str | None = None,
) -> Run:
    """Go on with a run from its last checkpoint, to its budget or to `steps`.

    A URL that a run was copied to (`mirror`) is fetched first, to `run_dir` or a new folder under `runs/`. With
    `address` it goes on on another Ray cluster than before.

    On environments that can save their state the result is the same, bit for bit, as if it had never stopped; on
    others episodes begin anew. An own algorithm, environment or network is code, which no run folder holds: hand it in.

    Raises:
        ValueError: for a budget below that of the run, and below what it has done.
    """
    leave_if_imported()
    if is_url(path):
        path = fetched(str(path), Path(run_dir or Path("runs") / str(path).rstrip("/").rpartition("/")[2]))
    run = load(path, algorithm=algorithm, env=env, network=network)
    if (now := type(run.algorithm).__name__) != (before := run.config["algorithm"]["class"]):
        log.warning("%s was trained with %s, and goes on with %s", run.path, before, now)
    with run.folder.claimed():
        options = run._make_env.options
        saved = saved_whole(run, options)
        if steps is not None and steps < min(options.steps, saved["steps"]):
            done = f"has done {saved['steps']:,} of {options.steps:,} already"
            raise ValueError(f"steps={steps}: {run.path} {done}; use more, or leave it out.")
        if _is_over(run) and saved["steps"] >= (steps or options.steps):
            log.warning("%s is over, at step %s; ask for more than that to go on", run.path, f"{saved['steps']:,}")
            return run
        changed: dict[str, Any] = {"steps": steps, "address": address}
        options = dataclasses.replace(options, **{name: new for name, new in changed.items() if new is not None})
        fields = {"class": type(run.algorithm).__name__, **dataclasses.asdict(cast(Any, run.algorithm))}
        run.folder.write_config({**run.config, "algorithm": fields, "options": dataclasses.asdict(options)})
        return execute(run, run.config["system"], options, quiet=quiet, saved=saved)


def _is_over(run: Run) -> bool:
    """Whether it came to its end; a summary that cannot be read is written anew."""
    try:
        return (run.path / "summary.json").exists() and not run.summary["interrupted"]
    except (RunFolderError, KeyError):
        return False


def saved_whole(run: Run, options: Options) -> dict[str, Any]:
    """The state in the newest checkpoint of a run with these options, to go on from, replay included."""
    saved = run.saved()
    replay = run.checkpoints.replay(saved["steps"])
    if replay is not None:
        store, shards = (replay["store"], replay["roles"]) if "roles" in replay else (replay, {})
        if store is not None:
            saved["run"]["words"].setdefault("replay", {})["store"] = store
        for name, shard in shards.items():
            saved["run"]["roles"][name]["replay"] = shard
    evaluator = saved["run"]["roles"].get("evaluator_0")
    if evaluator is not None and saved["steps"] >= options.steps:  # the run itself makes the evaluation at its end
        evaluator["due"] = max(evaluator["due"], (saved["steps"] // options.eval_every + 1) * options.eval_every)
    return saved


def without_replay(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A run's state, and apart from it what is large and only needed to go on: what replay holds, and roles' own."""
    words, roles = (
        {name: {part: value for part, value in kept.items() if part != large} for name, kept in state[kind].items()}
        for kind, large in (("words", "store"), ("roles", "replay"))
    )
    store = state["words"].get("replay", {}).get("store")
    own = {name: kept["replay"] for name, kept in state["roles"].items() if "replay" in kept}
    return {**state, "words": words, "roles": roles}, {"store": store, "roles": own} if own else store


def execute(
    run: Run,
    name: str,
    options: Options,
    quiet: bool = False,
    saved: dict[str, Any] | None = None,
    make_runtime: MakeRuntime | None = None,
) -> Run:
    """Run the topology on the runtime, with checkpoints, and write down how it went."""
    system = system_of(name, run.algorithm)
    graph = system.module.wire(setting_of(run, options), options.seed, **layout(system, run.algorithm, options))
    try:
        with threads(options.threads), Keeper(run, options, quiet, saved) as keeper:
            raise_if_heard()
            make = make_runtime or partial(_runtime, run.path, options, keeper.step)
            runtime = make(keeper.report)
            keeper.measured = runtime.measured
            try:
                state = runtime.run(graph, keeper.between, None if saved is None else saved["run"])
            except RoleError as error:
                if error.state is not None:
                    keeper.rescue(error.state)
                if make_runtime is None and (steps := run.checkpoints.steps()):
                    newest = f"{steps[-1]:,}"
                    log.warning("the newest checkpoint is of step %s; go on with: rookery resume %s", newest, run.path)
                raise
            keeper.finish(state)
    finally:
        shutil.rmtree(run.path / REPLAY, ignore_errors=True)  # memory, not data: checkpoints have what is to be kept
    return run


def setting_of(run: Run, options: Options) -> Setting:
    """What the run's roles are built from."""
    return Setting(
        run.algorithm,
        run._make_env,
        run._make_net,
        options.envs,
        options.steps,
        options.log_every,
        options.eval_every,
        options.eval_episodes,
        options.compile or options.cuda_graphs,
        options.cuda_graphs,
        options.precision == "bf16",
        ReplaySetting(
            run.path / REPLAY if options.replay_memory == "disk" else "ram",
            options.device if options.replay_memory == "device" else "cpu",
            options.save_replay,
            run._make_net.spec.stack,
            run._make_net.spec,
        ),
        {"device": "cpu"} if options.device != "cpu" and options.actors_apart else {},
    )


def _laid_out(run: Run, name: str, options: Options, quiet: bool) -> tuple[Run, Options]:
    """The run with the fastest layout; what was tried is in its folder, which is gone if nothing came of it."""
    env, folder = run._make_env.env, run.folder
    make = partial(build, name, run.algorithm, env, network=run._make_net.network)

    def make_setting(each: Options) -> Setting:
        trial, each = make(each)
        trial.folder = RunFolder(Path(tempfile.mkdtemp(dir=aside)))
        return setting_of(trial, each)

    own = isinstance(env, VectorEnv)  # its lanes are as many as they are
    try:
        with tempfile.TemporaryDirectory(dir=folder.path) as aside, shown(quiet) as show:
            best, trials = fastest(
                system_of(name, run.algorithm), run.algorithm, options, make_setting, splits=not own, show=show
            )
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            folder.path.rmdir()
        raise
    write_json(folder.path / LAYOUTS, rows(trials, best))
    run, options = make(dataclasses.replace(best, layout="given"))
    run.folder = folder
    return run, options


def _runtime(path: Path, options: Options, step: int, report: Callable[..., None]) -> Inline | Local:
    """Where the roles run; with several processes it is written down who came when (`rookery rerun`)."""
    if options.runtime == "inline":
        return Inline(report)
    arrivals = begin(path / ARRIVALS, step, options.steps)
    means: dict[str, Any] = {"threads": options.threads, "deadline": options.deadline, "arrivals": arrivals}
    if options.runtime == "local":
        return Local(report, **means)
    where: dict[str, Any] = {"address": options.address, "placement": options.placement, "needs": options.needs}
    return Ray(report, least=options.min_actors, **where, **means)


class Keeper:
    """Sees to a run's metrics, checkpoints and signals while its roles are at work."""

    def __init__(self, run: Run, options: Options, quiet: bool, saved: dict[str, Any] | None) -> None:
        self.run, self.options, self.quiet = run, options, quiet
        self.step = 0 if saved is None else saved["steps"]
        self._saved_at = -1 if saved is None else self.step  # the first round saves: every run can be resumed
        self._updates = None if saved is None else _updates(saved["run"])  # that are saved
        self.signal: int | None = None
        self.reached = False  # whether the last evaluation was as good as `stop_at`
        self.measured: Callable[[], dict[str, Any]] = dict  # the runtime's
        self._measured: dict[str, Any] = {}  # the last that were written
        self._first: tuple[int, dict[str, Any]] | None = None  # steps when they first grew, and what was measured then
        self._wrote = (time.monotonic(), self.step)  # and when that was
        self._seconds = 0.0 if saved is None else saved["seconds"]
        self._anew = 0 if saved is None else saved.get("episodes_restarted", 0) + (not run._make_net.spec.saves_state)
        self._score: tuple[int, float] | None = None  # of a checkpoint that is still to come, and of which period
        self._unwritten: MetricsError | None = None  # the first time that the log took no row
        self._began, self._asked, self._last = time.monotonic(), 0.0, (self._seconds, self.step)
        log = MetricsLog(run.folder.metrics)
        if saved is None:
            log.truncate_after(self.step)
        else:
            due = saved["run"]["roles"].get("evaluator_0", {}).get("due", math.inf)
            log.truncate_after(self.step, saved["recorder"].get("rows"), due)
        sinks = [open_sink(name, run.folder.path, run.config, self.step) for name in options.sinks]
        self.recorder = Recorder(log, sinks, Progress(options.steps, quiet, self.step))
        self.mirror = Mirror(options.mirror, run.path, saved is not None) if options.mirror else None
        if saved is not None:
            self.recorder.load_state(saved["recorder"])
            if not quiet and not run._make_net.spec.saves_state:
                print("This environment cannot save its state: episodes begin anew.")
            if not quiet and "store" not in saved["run"]["words"].get("replay", {"store": None}):
                print("The checkpoint holds no replay (save_replay=False): it is filled anew before learning goes on.")

    def __enter__(self) -> Keeper:
        self._handlers = {}
        for each in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[each] = signal.signal(each, self._stop)
            except ValueError:  # not in the main thread, where signals do not arrive anyway
                break
        return self

    def __exit__(self, *failure: Any) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        self.recorder.close()
        if self.mirror is not None:
            self.mirror.close()

    def _stop(self, number: int, _frame: Any) -> None:
        """Ask the run to stop after this round; a second Ctrl-C, a second or more later, does not wait for that."""
        if number == self.signal == signal.SIGINT and time.monotonic() - self._asked > 1:
            raise KeyboardInterrupt
        self.signal, self._asked = number, time.monotonic()

    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._seconds + time.monotonic() - self._began

    def report(self, role: str, index: int, step: int, values: dict[str, Any]) -> None:
        """Write down a role's row, a learner's with the time it took."""
        if role == "learner" and index == 0:
            now, (before, step_before) = self.seconds(), self._last
            rate = (step - step_before) / max(now - before, 1e-9)
            pace = {"steps_per_second": rate} if step >= step_before else {}  # a learner that began anew fell back
            values, self._last = {**values, "seconds": now, **pace}, (now, step)
        self.write(role, index, step, values)
        if role == "evaluator":
            self._rate(step, values["eval_return_mean"])
            self.reached = self.options.stop_at is not None and values["eval_return_mean"] >= self.options.stop_at

    def _rate(self, step: int, score: float) -> None:
        """An evaluation is the score of the checkpoint before it of the same period, or else of the next one."""
        checkpoints, period = self.run.checkpoints, step // self.options.eval_every
        of_it = [at for at in checkpoints.steps() if at <= step and at // self.options.eval_every == period]
        if of_it:
            checkpoints.rate(of_it[-1], score)
        else:
            self._score = (period, score)

    def write(self, role: str, index: int, step: int, values: Mapping[str, Any]) -> None:
        """Write down a row; if the log takes none, the run goes on to its next checkpoint, and stops there."""
        try:
            self.recorder.report(role, index, step, values)
        except MetricsError as error:
            self._unwritten = self._unwritten or error

    def between(self, steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        """After each round: whether to stop; with each evaluation a checkpoint."""
        if self._first is None and steps > self.step:
            self._first = (steps, self.measured())
        self.step = steps
        now, (then, before) = time.monotonic(), self._wrote
        if now - then > SOON and (now - then > LATE or crosses(before, steps, self.options.log_every)):
            self.measure()
        if self._unwritten or crosses(self._saved_at, steps, self.options.eval_every):
            self.save(snapshot())
        return self.reached or self.signal is not None

    def measure(self) -> dict[str, Any]:
        """Write down what the runtime measured since the last time; gives what it measured altogether."""
        measured, self._wrote = self.measured(), (time.monotonic(), self.step)
        if measured["seconds"]:  # else processes are being started
            found = account(since(measured, self._measured))
            self.write(RUNTIME, 0, self.step, {**flat(found), "measured": condensed(found)})
            self._measured = measured
        return measured

    def _whole(self, measured: dict[str, Any]) -> dict[str, Any]:
        """The run's account, from its first update on: before, roles are built, compile, and wait for each other."""
        whole = account(measured)
        if self._first is None or self._first[0] == self.step:
            return whole
        return {**account(since(measured, self._first[1])), **{name: whole[name] for name in ("restarts", "dropped")}}

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, scored by its evaluation; in processes that comes later.

        Raises:
            NonFinite: in place of one whose weights are not finite.
            MetricsError: after it, if a row could not be written before.
        """
        self.step = state["steps"]  # roles that are not in this process finish what they are at, and come further
        self._updates = _updates(state)
        self._refuse_non_finite(state["roles"])
        state, replay = without_replay(state)
        kept = {"run": state, "recorder": self.recorder.state(), "steps": self.step, "seconds": self.seconds()}
        kept["episodes_restarted"] = self._anew
        period, score = self._score or (-1, None)
        own = score if period == self.step // self.options.eval_every else None
        self.run.checkpoints.save(self.step, kept, own, replay)
        self._saved_at = self.step
        if self.mirror is not None:
            self.mirror.copy()
        if self._unwritten:
            raise self._unwritten

    def _refuse_non_finite(self, roles: dict[str, Any]) -> None:
        """Weights that a step itself made infinite would be noticed at the next gradient alone.

        What is not finite in a fresh network either may stay so.
        """
        for kept in roles.values():
            odd = [name for name, value in kept.get("net", {}).items() if not torch.isfinite(value).all()]
            fresh = self.run._make_net().state_dict() if odd else {}
            for name in odd:
                if name in fresh and torch.isfinite(fresh[name]).all():
                    raise non_finite(f"the weights {name}", kept["counts"]["updates"], self.step)

    def rescue(self, state: dict[str, Any]) -> None:
        """A checkpoint of a run that has failed, unless the last one has come as far."""
        if state["steps"] > self._saved_at:
            with contextlib.suppress(NonFinite, CheckpointError):  # what ended the run is what is to be told
                self.save(state)

    def finish(self, state: dict[str, Any]) -> None:
        """The last checkpoint, the last evaluation and the summary."""
        self.step = state["steps"]
        found = self._whole(self.measure())
        if self._unwritten or self._saved_at != self.step or self._updates != _updates(state):
            self.save(state)
        run, options, seconds = self.run, self.options, self.seconds()
        run.signal = self.signal
        if not run.interrupted:
            evaluation = run.evaluate(options.eval_episodes, options.seed + 1).summary()
            self.recorder.report("evaluator", 0, self.step, evaluation)
            run.checkpoints.rate(self.step, evaluation["eval_return_mean"])
        config, spec = run.config, run._make_net.spec
        run.folder.write_summary(
            {
                "system": config["system"],
                "env": config["env"],
                "seed": options.seed,
                "steps": self.step,
                "frames": self.step * spec.frame_skip,
                "seconds": seconds,
                "steps_per_second": self.step / max(seconds, 1e-9),
                **self.recorder.summary(),
                **{name: found[name] for name in MEASURED},
                "episodes_restarted": self._anew,
                "device": options.device,
                "backend": spec.backend,
                "interrupted": run.interrupted,
                "versions": config["versions"],
            }
        )


def _updates(state: dict[str, Any]) -> int | None:
    """Of the first learner."""
    counts = state["roles"].get("learner_0", {}).get("counts", {})
    return cast("int | None", counts.get("updates"))


def _is_ours(name: str, algorithm: Algorithm) -> bool:
    """Whether a name and settings are enough to make it again."""
    return name in SYSTEMS and type(algorithm) is find(name).algorithm_class()

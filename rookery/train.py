"""Composes algorithm, environment, topology and runtime into a run, and brings runs back."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from rookery.algorithms.base import Algorithm, Network, PolicyNet
from rookery.envs.make import make_env
from rookery.envs.spec import EnvSpec, dtype_of, leaves
from rookery.envs.transforms import transform
from rookery.envs.vector import Obs, VectorEnv
from rookery.evaluator import Evaluation, Evaluator
from rookery.runs.checkpoint import CheckpointError, Checkpoints
from rookery.runs.folder import RunFolder, RunFolderError
from rookery.runs.metrics import MetricsLog
from rookery.runs.progress import Progress
from rookery.runs.recorder import Recorder
from rookery.runs.sinks import open_sink
from rookery.runtimes.inline import Inline
from rookery.systems import SYSTEMS, find, recipe
from rookery.topologies.actors_learner import Setting, crosses

__all__ = ["Options", "Policy", "Run", "evaluate", "load", "resume", "train"]

EnvLike = Any  # an id, a VectorEnv, a Gymnasium environment, or a class or function that makes one


@dataclass(frozen=True)
class Options:
    """What a run is besides its algorithm."""

    steps: int = 100_000  # budget: actions applied, over all lanes
    envs: int = 8  # lanes of each actor
    seed: int = 0
    actors: int = 1
    runtime: Literal["inline"] = "inline"  # where the roles run
    device: str = "auto"  # "auto" takes a GPU if there is one
    precision: Literal["auto", "float32", "bf16"] = "auto"  # of encoders; "auto" takes bf16 for images where it is fast
    compile: bool = False  # torch.compile for acting and loss: faster, but tens of seconds to begin with
    cuda_graphs: bool = False  # replay what is compiled as CUDA graphs
    threads: int = 0  # of torch; 0 takes one for vectors and every core for images
    frame_stack: int = 0  # frames an observation shows; 0 leaves it to the environment
    clip_reward: bool = False  # to [-1, 1], for learning only
    env_options: tuple[str, ...] = ()  # what the environment itself takes, as name=value with a JSON value
    log_every: int = 0  # steps between rows of metrics; 0 for 1/200 of the run
    eval_every: int = 0  # steps between evaluations, with a checkpoint each; 0 for 1/10 of the run
    eval_episodes: int = 20  # greedy episodes on lanes of their own
    stop_at: float | None = None  # end the run once an evaluation reaches this mean return
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        least_of = dict.fromkeys(("steps", "envs", "actors", "eval_episodes"), 1)
        least_of |= dict.fromkeys(("seed", "threads", "frame_stack", "log_every", "eval_every"), 0)
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use {least} or more.")
        for pair in self.env_options:
            if "=" not in pair:
                raise ValueError(f"env_options has {pair!r}, and takes name=value, such as frame_skip=4.")

    @property
    def env_settings(self) -> dict[str, Any]:
        """The environment's own settings by name; a value that is no JSON is a string."""
        pairs = dict(pair.split("=", 1) for pair in self.env_options)
        return {name: _json(value) for name, value in pairs.items()}

    def resolved(self, env: EnvSpec) -> Options:
        """With every choice that was left open made."""
        images = any(
            dtype_of(leaf) == torch.uint8 and len(leaf.shape or ()) >= 2 for leaf in leaves(env.obs_space).values()
        )
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        fast = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return dataclasses.replace(
            self,
            device=device,
            precision=("bf16" if images and fast else "float32") if self.precision == "auto" else self.precision,
            threads=self.threads or (len(os.sched_getaffinity(0)) if images else 1),
            log_every=self.log_every or max(1, self.steps // 200),
            eval_every=self.eval_every or max(1, self.steps // 10),
        )


@dataclass(frozen=True)
class MakeEnv:
    """How every role makes its own lanes; data, so that it can cross to another process."""

    env: EnvLike
    options: Options

    def __call__(self, lanes: int, seed: int, **more: Any) -> VectorEnv:
        options, env = self.options, self.env
        if isinstance(env, VectorEnv):
            env = Copies(env)()
            env.reset(seed)
        elif not isinstance(env, str) and not callable(env):
            env = Copies(env)
        device = "cpu" if options.device == "auto" else options.device
        made = make_env(env, lanes, device, seed, **options.env_settings, **more)
        return transform(made, frame_stack=options.frame_stack or None, clip_reward=options.clip_reward)


class Copies:
    """Makes copies of a user's environment object, which has one stream of episodes: each lane or role has its own."""

    def __init__(self, env: Any) -> None:
        self.env, self.__name__ = env, type(env).__name__
        self()  # what cannot be copied says so here

    def __call__(self, **_: Any) -> Any:
        try:
            return copy.deepcopy(self.env)
        except Exception as error:  # whatever the object's parts raise
            raise ValueError(
                f"this {self.__name__} cannot be copied ({error}); hand in its class or a function that makes it."
            ) from error


@dataclass(frozen=True)
class MakeNet:
    """How every role makes its own copy of the network; the global random generator is left alone."""

    algorithm: Algorithm
    spec: EnvSpec
    network: Network | None
    seed: int
    device: str

    def __call__(self) -> PolicyNet:
        network = copy.deepcopy(self.network) if isinstance(self.network, torch.nn.Module) else self.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.algorithm.networks(self.spec, network).to(self.device)


class Policy:
    """A trained network that chooses actions.

    `action, state = policy(obs, state)`: obs `[B, ...]` as the environment gives them; begin with
    `state = policy.initial_state(B)`, which is empty without memory. Actions on a bounded box are in [-1, 1].
    """

    def __init__(self, algorithm: Algorithm, net: PolicyNet) -> None:
        self.algorithm, self.net = algorithm, net.requires_grad_(False)

    def initial_state(self, lanes: int) -> Tensor:
        return self.net.initial_state(lanes, next(self.net.parameters()).device)

    @torch.no_grad()
    def __call__(
        self, obs: Obs, state: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Obs, Tensor]:
        """The greedy action for each lane; with a generator, a sampled one."""
        lanes = obs.shape[0]
        state = self.initial_state(lanes) if state is None else state
        noise = None if generator is None else self.net.draw((lanes,), generator)
        action, _, state = self.algorithm.act(self.net, obs, state, noise)
        return action, state


class Run:
    """A run and its folder: what it learnt, and what it wrote down."""

    def __init__(self, folder: RunFolder, algorithm: Algorithm, make_env: MakeEnv, make_net: MakeNet) -> None:
        self.folder, self.algorithm, self._make_env, self._make_net = folder, algorithm, make_env, make_net
        self.checkpoints = Checkpoints(folder.checkpoints)
        self.signal: int | None = None  # the number of the one that interrupted it

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped this call before the budget was used up."""
        return self.signal is not None

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def config(self) -> dict[str, Any]:
        """Every setting as it was resolved, and the versions."""
        return self.folder.read_config()

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of summary.json."""
        return self.folder.read_summary()

    def net(self, which: Literal["latest", "best"] = "latest") -> PolicyNet:
        """The network with the weights of the newest checkpoint, or of the best evaluated one."""
        net = self._make_net()
        try:
            net.load_state_dict(self.saved(which)["run"]["roles"]["learner_0"]["net"])
        except (KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"The checkpoints of {self.path} do not fit its network: {error}.") from error
        return net

    def saved(self, which: Literal["latest", "best"] = "latest") -> dict[str, Any]:
        """The state in the newest checkpoint, or in the best evaluated one."""
        _, state = self.checkpoints.latest() if which == "latest" else self.checkpoints.best()
        missing = {"run", "recorder", "steps", "seconds"} - state.keys()
        if missing:
            raise CheckpointError(f"The checkpoint in {self.folder.checkpoints} is no run's: {missing} is not in it.")
        return state

    @property
    def policy(self) -> Policy:
        """The policy of the newest checkpoint."""
        return Policy(self.algorithm, self.net())

    def evaluate(self, episodes: int = 20, seed: int = 1, which: Literal["latest", "best"] = "latest") -> Evaluation:
        """Play greedy episodes with the weights of a checkpoint."""
        options = self._make_env.options
        with threads(options.threads), closing(self._make_env(episodes, seed)) as env:
            return self._evaluator(env, seed, which).play(episodes)

    def _evaluator(self, env: VectorEnv, seed: int, which: Literal["latest", "best"] = "latest") -> Evaluator:
        bf16 = self._make_env.options.precision == "bf16"
        return Evaluator(self.algorithm, self.net(which), env, seed, bf16=bf16)

    def record_video(self, steps: int = 1000, seed: int = 1) -> Path:
        """One greedy episode as a video in the run's folder; gives its path."""
        from rookery.runs.video import write_video

        with closing(self._make_env(1, seed, render=True)) as env:
            self.folder.video.mkdir(exist_ok=True)
            step = self.checkpoints.steps()[-1]
            return write_video(self.folder.video / f"step_{step}", self._evaluator(env, seed).frames(steps))

    def plot(self) -> Path:
        """Draw the learning curve; gives its path."""
        from rookery.runs.plots import plot_run

        return plot_run(self.path)

    def save(self, path: str | Path) -> Path:
        """Write a run folder that `rookery.load` reads, with the settings, the summary and the newest checkpoint."""
        config = {name: value for name, value in self.config.items() if name != "versions"}
        target = RunFolder.create(path, config["system"], str(config["env"]), config["options"]["seed"])
        target.write_config(config)
        Checkpoints(target.checkpoints).save(*self.checkpoints.latest())
        if (self.path / "summary.json").exists():
            target.write_summary(self.summary)
        return target.path


def train(
    system: str | Algorithm,
    env: EnvLike,
    *,
    network: Network | None = None,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train, and leave a run folder behind.

    Args:
        system: a name (`rookery list systems`), which takes the tuned settings for the environment if there are any;
            or an algorithm with its settings, which is taken as it is.
        env: an id (`rookery list envs`), a class or function that makes a Gymnasium environment, or an object.
        network: your own part between observation and heads: a module from observations `[B, ...]` to features
            `[B, F]`, or a function that makes one from an EnvSpec.
        run_dir: the folder; by default a new one under `runs/`.
        quiet: no progress display.
        settings: fields of `Options` (steps, envs, seed, device ...) and, with a name, of the algorithm.

    Raises:
        ValueError: for unknown names and combinations that cannot work, before anything is built.
    """
    name, algorithm, options = resolve(system, env, settings)
    run, options = build(name, algorithm, env, options, network)
    run.folder = RunFolder.create(run_dir, name, env_name(env), options.seed)
    run.checkpoints = Checkpoints(run.folder.checkpoints)
    config = {
        "system": name,
        "env": env_name(env),
        "seed": options.seed,
        "algorithm": {"class": type(algorithm).__name__, **dataclasses.asdict(cast(Any, algorithm))},
        "options": dataclasses.asdict(options),
        "network": None if network is None else getattr(network, "__name__", type(network).__name__),
        "own": {"env": not isinstance(env, str), "algorithm": not _is_ours(name, algorithm)},
    }
    run.folder.write_config(config)
    return execute(run, name, options, quiet=quiet)


def resume(
    path: str | Path,
    *,
    steps: int | None = None,
    quiet: bool = False,
    algorithm: Algorithm | None = None,
    env: EnvLike | None = None,
    network: Network | None = None,
) -> Run:
    """Go on with a run from its last checkpoint, to its budget or to `steps`.

    On environments that can save their state the result is the same, bit for bit, as if it had never stopped; on
    others episodes begin anew. An own algorithm, environment or network is code, which no run folder holds: hand it in.
    """
    run = load(path, algorithm=algorithm, env=env, network=network)
    options, saved = run._make_env.options, run.saved()
    over = (run.path / "summary.json").exists() and not run.summary["interrupted"]
    if over and saved["steps"] >= (steps or options.steps):
        return run
    if steps is not None:
        config = {name: value for name, value in run.config.items() if name != "versions"}
        options = dataclasses.replace(options, steps=steps)
        run.folder.write_config({**config, "options": dataclasses.asdict(options)})
    return execute(run, run.config["system"], options, quiet=quiet, saved=saved)


def load(
    path: str | Path,
    *,
    algorithm: Algorithm | None = None,
    env: EnvLike | None = None,
    network: Network | None = None,
) -> Run:
    """A run from its folder. No code is taken from there: hand in what was your own.

    Raises:
        RunFolderError, CheckpointError: if there is no run, or it is damaged.
        ValueError: if the run needs an own algorithm, environment or network and none was given.
    """
    folder = RunFolder.open(path)
    config = _checked(folder.read_config(), folder.path)
    own = config["own"]
    for what, needed, given in (
        ("env", own.get("env"), env),
        ("network", config["network"], network),
        ("algorithm", own.get("algorithm"), algorithm),
    ):
        if needed and given is None:
            raise ValueError(f"{folder.path} was trained with its own {what}; load(path, {what}=...) needs it again.")
    fields = {name: value for name, value in config["algorithm"].items() if name != "class"}
    try:
        if algorithm is None:
            algorithm = _dataclass(find(config["system"]).algorithm_class(), fields)
        options = _dataclass(Options, config["options"])
    except ValueError as error:
        raise RunFolderError(f"{folder.path / 'config.json'} does not describe a run: {error}") from error
    run, _ = build(config["system"], algorithm, config["env"] if env is None else env, options, network)
    run.folder, run.checkpoints = folder, Checkpoints(folder.checkpoints)
    return run


def evaluate(path: str | Path, episodes: int = 20, **own: Any) -> Evaluation:
    """Load a run and play greedy episodes."""
    return load(path, **own).evaluate(episodes)


def resolve(
    system: str | Algorithm, env: EnvLike, settings: dict[str, Any], tuned: bool = True
) -> tuple[str, Algorithm, Options]:
    """The system's name, the algorithm and the options that the caller's settings and the recipe (`tuned`) make."""
    names = {each.name for each in dataclasses.fields(Options)}
    if isinstance(settings.get("env_options"), dict):
        pairs = (f"{name}={json.dumps(value)}" for name, value in settings["env_options"].items())
        settings = {**settings, "env_options": tuple(pairs)}
    if isinstance(env, VectorEnv):
        settings = {"envs": env.lanes, **settings}
        if settings["envs"] != env.lanes:
            raise ValueError(
                f"envs={settings['envs']}, but the environment handed in has {env.lanes} lanes; use those."
            )
    if isinstance(system, Algorithm):
        _refuse_unknown(settings, names, f"a run (the algorithm's settings go into {type(system).__name__}(...))")
        return type(system).__name__.lower(), system, _dataclass(Options, settings)
    name, kind = find(system).name, find(system).algorithm_class()
    merged = {**(recipe(name, env) if tuned and isinstance(env, str) else {}), **settings}
    fields = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]  # every algorithm is one
    _refuse_unknown(merged, fields | names, name)
    algorithm = _dataclass(kind, {name: value for name, value in merged.items() if name in fields})
    return name, algorithm, _dataclass(Options, {name: value for name, value in merged.items() if name in names})


def build(
    name: str, algorithm: Algorithm, env: EnvLike, options: Options, network: Network | None
) -> tuple[Run, Options]:
    """Check that everything fits, and make the run that is to be executed, without a folder yet."""
    with closing(MakeEnv(env, dataclasses.replace(options, device=_device(options.device)))(1, options.seed)) as one:
        spec = one.spec
    options = options.resolved(spec)
    algorithm.check(spec, options.envs * options.actors)
    make_net = MakeNet(algorithm, spec, network, options.seed, options.device)
    make_net()  # what does not fit says so here
    return Run(RunFolder(Path()), algorithm, MakeEnv(env, options), make_net), options


def execute(run: Run, name: str, options: Options, quiet: bool = False, saved: dict[str, Any] | None = None) -> Run:
    """Run the topology on the runtime, with checkpoints, and write down how it went."""
    setting = Setting(
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
    )
    topology = find(name).topology if name in SYSTEMS else "actors_learner"
    graph = import_module(f"rookery.topologies.{topology}").wire(setting, options.seed, options.actors)
    with threads(options.threads), Keeper(run, options, quiet, saved) as keeper:
        state = Inline(keeper.report).run(graph, keeper.between, None if saved is None else saved["run"])
        keeper.finish(state)
    return run


class Keeper:
    """Sees to a run's metrics, checkpoints and signals while its roles are at work."""

    def __init__(self, run: Run, options: Options, quiet: bool, saved: dict[str, Any] | None) -> None:
        self.run, self.options, self.quiet = run, options, quiet
        self.step = 0 if saved is None else saved["steps"]
        self._saved_at = -1 if saved is None else self.step  # the first round saves: every run can be resumed
        self.signal: int | None = None
        self.reached = False  # whether the last evaluation was as good as `stop_at`
        self._seconds = 0.0 if saved is None else saved["seconds"]
        self._began, self._asked, self._last = time.monotonic(), 0.0, (self._seconds, self.step)
        log = MetricsLog(run.folder.metrics)
        log.truncate_after(self.step)
        sinks = [open_sink(name, run.folder.path, run.config, self.step) for name in options.sinks]
        self.recorder = Recorder(log, sinks, Progress(options.steps, quiet, self.step))
        if saved is not None:
            self.recorder.load_state(saved["recorder"])
            if not quiet and "env" not in saved["run"]["roles"].get("actor_0", {}):
                print("This environment cannot save its state: episodes begin anew.")

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
        if role == "learner":
            now, (before, step_before) = self.seconds(), self._last
            rate = (step - step_before) / max(now - before, 1e-9)
            values, self._last = {**values, "seconds": now, "steps_per_second": rate}, (now, step)
        self.recorder.report(role, index, step, values)
        if role == "evaluator" and self.options.stop_at is not None:
            self.reached = values["eval_return_mean"] >= self.options.stop_at

    def between(self, steps: int, snapshot: Callable[[], dict[str, Any]]) -> bool:
        """After each round: whether to stop; with each evaluation a checkpoint."""
        self.step = steps
        if crosses(self._saved_at, steps, self.options.eval_every):
            self.save(snapshot())
        return self.reached or self.signal is not None

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, scored by the last evaluation."""
        kept = {"run": state, "recorder": self.recorder.state(), "steps": self.step, "seconds": self.seconds()}
        self.run.checkpoints.save(self.step, kept, self.recorder.summary()["eval_return_mean"])
        self._saved_at = self.step

    def finish(self, state: dict[str, Any]) -> None:
        """The last checkpoint, the last evaluation, the summary and the pictures."""
        if self._saved_at != self.step:
            self.save(state)
        run, options, seconds = self.run, self.options, self.seconds()
        run.signal = self.signal
        if not run.interrupted:
            evaluation = run.evaluate(options.eval_episodes, options.seed + 1)
            self.recorder.report("evaluator", 0, self.step, evaluation.summary())
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
                "device": options.device,
                "backend": spec.backend,
                "interrupted": run.interrupted,
                "versions": config["versions"],
            }
        )


def env_name(env: EnvLike) -> str:
    """An environment's id, or the name of what makes it."""
    if isinstance(env, str):
        return env
    return env.spec.id if isinstance(env, VectorEnv) else getattr(env, "__name__", type(env).__name__)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def closing(env: VectorEnv) -> Iterator[VectorEnv]:
    """Close the environment afterwards, whatever happens."""
    try:
        yield env
    finally:
        env.close()


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _is_ours(name: str, algorithm: Algorithm) -> bool:
    """Whether a name and settings are enough to make it again."""
    return name in SYSTEMS and type(algorithm) is find(name).algorithm_class()


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's config, if it has what `train` writes."""
    kinds = {"system": str, "env": str, "algorithm": dict, "options": dict, "network": str | None, "own": dict}
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise RunFolderError(f"{path / 'config.json'} has no usable {name!r}; train the run again.")
    return config


def _refuse_unknown(settings: Iterable[str], known: set[str], owner: str) -> None:
    """Raise for the first setting there is none of, with the nearest names."""
    for name in sorted(set(settings) - known):
        near = difflib.get_close_matches(name, known, 3, 0.5) or sorted(known)
        raise ValueError(f"{name}: no setting of {owner}; nearest: {', '.join(near)}.")


def _dataclass(kind: Any, values: dict[str, Any]) -> Any:
    """The dataclass from settings as a user, JSON or TOML has them: lists become tuples, 1e6 an int where one is due.

    Raises:
        ValueError: for a setting there is none of, or a value of a wrong type.
    """
    hints = get_type_hints(kind)
    _refuse_unknown(values, {each.name for each in dataclasses.fields(kind)}, kind.__name__)
    fitting = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        whole = isinstance(value, float) and value.is_integer() and not _fits(value, hints[name])
        fitting[name] = int(cast(float, value)) if whole else value
        if not _fits(fitting[name], hints[name]):
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
            wanted = getattr(hints[name], "__name__", hints[name]) if type(hints[name]) is type else hints[name]
            raise ValueError(f"{name}={value!r} is not {' or '.join(map(repr, choices)) or f'of type {wanted}'}.")
    return kind(**fitting)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; an int passes for a float, a bool for neither."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, parts[0]) for each in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

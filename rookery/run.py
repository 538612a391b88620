"""A run and its folder: what it was made of, what it learnt, and how it is brought back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rookery.algorithms.base import Algorithm, Network, PolicyNet, Refused, ReplayPlan, sampled
from rookery.envs.make import BACKENDS, make_env, pick
from rookery.envs.spec import EnvSpec
from rookery.envs.transforms import Checked, transform
from rookery.envs.vector import Obs, VectorEnv
from rookery.evaluator import Evaluation, Evaluator
from rookery.runs.checkpoint import CheckpointError, Checkpoints
from rookery.runs.folder import RunFolder, RunFolderError
from rookery.settings import EnvLike, Options, as_dataclass, device_of, named, own_algorithm
from rookery.systems import SYSTEMS, System, find, system_of

__all__ = ["MakeEnv", "MakeNet", "Policy", "Run", "build", "evaluate", "layout", "load", "threads"]

# What a run's state has at least, and of which kind.
SAVED: dict[str, Any] = {
    "run": {"roles": {"learner_0": {"net": dict}}, "words": dict, "steps": int},
    "recorder": {
        "episodes": int,
        "returns": list,
        "evaluation": dict,
        "steps": dict,
        "lags": dict | None,
        "rows": int | None,
    },
    "steps": int,
    "seconds": float,
}

# Options that a topology is wired by.
LAYOUT = ("actors", "learners", "shards", "max_delay", "outliers", "inference", "double_buffer")
FEW = 6  # systems that are named one by one


@dataclass(frozen=True)
class MakeEnv:
    """How every role makes its own lanes; data, so that it can cross to another process."""

    env: EnvLike
    options: Options

    def __call__(self, lanes: int, seed: int, device: str | None = None, **more: Any) -> VectorEnv:
        options, env = self.options, self.env
        if isinstance(env, VectorEnv):
            env = Copies(env)()
            env.reset(seed)
            env = env if env.spec.backend in BACKENDS else Checked(env)
        elif not isinstance(env, str) and not callable(env):
            env = Copies(env)
        if isinstance(env, str):
            env = pick(env, options.envs, options.device, options.compile)  # the backend trained on, for any lanes
        settings = options.env_settings
        if "workers" in settings:
            settings["workers"] = min(settings["workers"], lanes)
        made = make_env(env, lanes, device or options.device, seed, **settings, **more)
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

    def __call__(self, device: str | None = None) -> PolicyNet:
        network = copy.deepcopy(self.network) if isinstance(self.network, torch.nn.Module) else self.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.algorithm.networks(self.spec, network).to(device or self.device)


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
        explore = None if generator is None else sampled(self.algorithm, self.net, lanes, generator)
        action, _, state = self.algorithm.act(self.net, obs, state, explore)
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
            first = str(error).strip().splitlines()
            raise CheckpointError(
                f"The checkpoints of {self.path} do not fit its network, which is made for the environment and the "
                f"settings: {' '.join(line.strip() for line in first[:2])}"
            ) from error
        return net

    def saved(self, which: Literal["latest", "best"] = "latest") -> dict[str, Any]:
        """The state in the newest checkpoint, or in the best evaluated one."""
        _, state = self.checkpoints.latest() if which == "latest" else self.checkpoints.best()
        lacks = _lacks(state, SAVED)
        if lacks:
            raise CheckpointError(f"The checkpoint in {self.folder.checkpoints} is no run's: it has no usable {lacks}.")
        return state

    @property
    def policy(self) -> Policy:
        """The policy of the newest checkpoint."""
        return Policy(self.algorithm, self.net())

    def evaluate(self, episodes: int = 20, seed: int = 1, which: Literal["latest", "best"] = "latest") -> Evaluation:
        """Play greedy episodes with the weights of a checkpoint, on up to 64 lanes."""
        if episodes < 1:
            raise ValueError(f"episodes={episodes} plays nothing; use 1 or more.")
        lanes = next(lanes for lanes in range(min(episodes, 64), 0, -1) if episodes % lanes == 0)
        with threads(self._make_env.options.threads), closing(self._make_env(lanes, seed)) as env:
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
        config = self.config
        target = RunFolder.create(path, config["system"], str(config["env"]), config["options"]["seed"])
        target.write_config(config)
        step, state = self.checkpoints.latest()
        Checkpoints(target.checkpoints).save(step, state, replay=self.checkpoints.replay(step))
        if (self.path / "summary.json").exists():
            target.write_summary(self.summary)
        return target.path


def load(
    path: str | Path,
    *,
    algorithm: Algorithm | type[Algorithm] | str | None = None,
    env: EnvLike | None = None,
    network: Network | str | None = None,
) -> Run:
    """A run from its folder. No code is taken from there: hand in what was your own, or `module:Name` of it.

    An algorithm's class is enough: its settings are in the folder.

    Raises:
        RunFolderError, CheckpointError: if there is no run, or it is damaged.
        ValueError: if the run needs an own algorithm, environment or network and none was given.
    """
    folder = RunFolder.open(path)
    config = _checked(folder.read_config(), folder.path)
    own = config["own"]
    for what, needed, given in (
        ("env", own.get("env") or _names_a_module(config["env"]), env),
        ("network", config["network"], network),
        ("algorithm", own.get("algorithm"), algorithm),
    ):
        if needed and given is None:
            raise ValueError(
                f"{folder.path} was trained with its own {what}; load(path, {what}=...) needs it again (on the command "
                f"line: --{what} module:Name)."
            )
    fields = {name: value for name, value in config["algorithm"].items() if name != "class"}
    kind = own_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    try:
        kind = find(config["system"]).algorithm_class() if kind is None else kind
        algorithm = as_dataclass(kind, fields) if isinstance(kind, type) else kind
        options = as_dataclass(Options, config["options"])
    except ValueError as error:
        raise RunFolderError(f"{folder.path / 'config.json'} does not describe a run: {error}") from error
    run, _ = build(config["system"], algorithm, config["env"] if env is None else env, options, network)
    run.folder, run.checkpoints = folder, Checkpoints(folder.checkpoints)
    return run


def _names_a_module(env: str) -> bool:
    """Whether making this id imports a module that it names, which a run folder is not to decide."""
    backend, _, name = env.partition(":")
    return ":" in (name if backend in BACKENDS else env)


def evaluate(path: str | Path, episodes: int = 20, **own: Any) -> Evaluation:
    """Load a run and play greedy episodes."""
    return load(path, **own).evaluate(episodes)


def build(
    name: str, algorithm: Algorithm, env: EnvLike, options: Options, network: Network | str | None
) -> tuple[Run, Options]:
    """Check that everything fits, and make the run that is to be executed, without a folder yet."""
    if isinstance(network, str) and ":" in network:
        network = named(network)
    if network is not None and not callable(network):
        raise ValueError(
            f"network={network!r} is neither a module nor what makes one from an EnvSpec; of the usual network, "
            "`hidden` sets the layers."
        )
    with closing(MakeEnv(env, dataclasses.replace(options, device=device_of(options.device)))(1, options.seed)) as one:
        spec = one.spec
    options = options.resolved(spec)
    algorithm.check(spec, options.envs * options.actors)
    make_net = MakeNet(algorithm, spec, network, options.seed, options.device)
    net, plan = make_net(), algorithm.plan  # what does not fit says so here, before what other settings would mend
    if net.state_size and not (plan.sequence if isinstance(plan, ReplayPlan) else plan.sequences):
        raise Refused(
            f"the network of {type(algorithm).__name__} has a memory, and its plan learns from single rows; give the "
            f"plan {'sequence=16' if isinstance(plan, ReplayPlan) else 'sequences=True'}, or use no memory."
        )
    if isinstance(plan, ReplayPlan) and plan.learning_starts >= options.steps:
        raise Refused(
            f"learning_starts={plan.learning_starts} leaves nothing of the {options.steps} steps to learn in; use more "
            f"steps, or learning_starts={max(1, options.steps // 10)}."
        )
    layout(system_of(name, algorithm), algorithm, options)
    if isinstance(env, VectorEnv):
        _check_object(env, options)
    if not isinstance(plan, ReplayPlan) and options.replay_memory != "device":
        raise Refused(f"replay_memory={options.replay_memory!r}: {name} learns from no replay; leave it out.")
    return Run(RunFolder(Path()), algorithm, MakeEnv(env, options), make_net), options


def _check_object(env: VectorEnv, options: Options) -> None:
    """Refuse what an environment that was handed in cannot follow: it has its lanes, where they are."""
    if options.double_buffer:
        raise Refused("double_buffer=True halves an actor's lanes; those of an environment object stay as they are.")
    if env.device.type != "cpu" and options.actors_apart:
        raise Refused(
            f"an environment object on {env.device} cannot be stepped by actors on the CPU, where those of "
            f"runtime={options.runtime!r} with inference={options.inference!r} are; make it with device='cpu'."
        )


def layout(system: System, algorithm: Algorithm, options: Options) -> dict[str, Any]:
    """How many of each role there are, as the system's topology takes it.

    Raises:
        Refused: if it has no use for one that is set, or they do not fit the algorithm.
    """
    takes = [name for name in LAYOUT if name in system.takes]
    for each in dataclasses.fields(Options):
        value = getattr(options, each.name)
        if each.name in LAYOUT and each.name not in takes and value != each.default:
            others = {other.name: other.topology for other in SYSTEMS.values() if each.name in other.takes}
            kinds = f"a system that runs as {' or '.join(sorted(set(others.values())))} (`rookery list systems`)"
            where = f"one of {', '.join(others)}" if len(others) <= FEW else kinds
            runs = f"{system.name} runs as {system.topology}, which takes {', '.join(takes)} instead"
            raise Refused(f"{each.name}={value}: {runs}; leave it out, or use {where}.")
    plan = algorithm.plan
    if isinstance(plan, ReplayPlan):
        joins = plan.ahead > 0 and hasattr(system.module, "actor")
    else:
        joins = plan.stale
    if options.min_actors and not joins:
        raise Refused(
            f"min_actors={options.min_actors}: {system.name} waits for each of its actors, and would not begin; leave "
            "it out, or use a system whose actors run ahead, such as impala or apex."
        )
    numbers = {name: getattr(options, name) for name in takes}
    if hasattr(system.module, "check"):
        system.module.check(algorithm, options.envs, **numbers)
    return numbers


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


def _lacks(state: dict[str, Any], kinds: dict[str, Any], path: str = "") -> str | None:
    """Where a state first has nothing of the kind that stands there."""
    for name, kind in kinds.items():
        value, at = state.get(name), f"{path}/{name}"
        if not isinstance(value, dict if isinstance(kind, dict) else kind):
            return at
        if isinstance(kind, dict) and (found := _lacks(value, kind, at)):
            return found
    return None


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's config, if it has what `train` writes."""
    kinds = {"system": str, "env": str, "algorithm": dict, "options": dict, "network": str | None, "own": dict}
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise RunFolderError(f"{path / 'config.json'} has no usable {name!r}; train the run again.")
    return config

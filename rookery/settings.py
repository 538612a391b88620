"""What a run is set to: options, an algorithm's fields, and the recipe behind them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch

from rookery.algorithms.base import Algorithm, fitting
from rookery.envs.spec import EnvSpec, dtype_of, leaves
from rookery.envs.vector import VectorEnv
from rookery.nn.compiled import fast_bf16
from rookery.systems import SYSTEMS, find, name_of, recipe

__all__ = [
    "EnvLike",
    "Options",
    "as_dataclass",
    "device_of",
    "env_name",
    "named",
    "own_algorithm",
    "refuse_unknown",
    "resolve",
]

EnvLike = Any  # an id, a VectorEnv, a Gymnasium environment, or a class or function that makes one

# What the run itself hands to `make_env` and its backends, and what to do instead of naming it in env_options.
RESERVED = {name: f"use the option {name}" for name in ("device", "seed", "envs")}
RESERVED |= {"lanes": "use the option envs", "render": "leave it out, for a video draws anyhow"}
RESERVED |= dict.fromkeys(("id", "source"), "the environment is named in its own place")

# What other libraries call them (Stable-Baselines3, CleanRL, RLlib).
ELSEWHERE = {
    theirs: ours
    for ours, names in {
        "actors": "num_workers num_env_runners n_workers num_actors",
        "alpha": "prioritized_replay_alpha",
        "batch": "batch_size train_batch_size",
        "beta": "prioritized_replay_beta",
        "capacity": "buffer_size replay_buffer_capacity",
        "clip": "clip_range clip_coef clip_param",
        "entropy_coef": "ent_coef entropy_coeff",
        "envs": "n_envs num_envs num_envs_per_env_runner num_envs_per_worker",
        "epochs": "n_epochs num_epochs update_epochs num_sgd_iter",
        "epsilon": "exploration_final_eps",
        "epsilon_start": "exploration_initial_eps",
        "hidden": "net_arch fcnet_hiddens",
        "lam": "gae_lambda lambda_",
        "learners": "num_learners",
        "lr": "learning_rate",
        "max_grad_norm": "grad_clip max_gradient_norm",
        "minibatches": "num_minibatches",
        "steps": "total_timesteps timesteps",
        "target_period": "target_update_interval target_network_update_freq",
        "unroll": "n_steps num_steps rollout_fragment_length",
        "updates_per_step": "gradient_steps",
        "value_coef": "vf_coef vf_loss_coeff",
    }.items()
    for theirs in names.split()
}

OF_CLUSTER = ("address", "placement", "min_actors", "role_needs")  # options that mean nothing elsewhere


@dataclass(frozen=True)
class Options:
    """What a run is besides its algorithm."""

    steps: int = 100_000  # budget: actions applied, over all lanes
    envs: int = 8  # lanes of each actor
    seed: int = 0  # of environments, networks, exploration and shuffling
    actors: int = 1  # each with its own lanes
    learners: int = 1  # that learn in parallel, each from its share of the data
    shards: int = 1  # of replay, each with its share of the rows; of a parameter server, of the parameters
    max_delay: int = 0  # updates since its weights were read, above which a shard drops a gradient; 0 keeps all
    outliers: float = 0.0  # deviations above the mean loss, above which a gradient is dropped; 0 keeps all
    runtime: Literal["inline", "local", "ray"] = "inline"  # roles take turns here, have processes, or a cluster's hosts
    address: str | None = None  # of a Ray cluster: "HOST:PORT", or "auto"; without, Ray begins one of this machine
    placement: Literal["spread", "pack"] = "spread"  # of roles over a cluster's hosts
    min_actors: int = 0  # that a run on a cluster begins with, others join as hosts do; 0 for all
    role_needs: tuple[str, ...] = ()  # of a cluster, as role.resource=amount: actor.CPU=0.5; without, a core each
    inference: Literal["own", "shared"] = "own"  # each actor chooses its actions, or one role for all
    double_buffer: bool = False  # half of an actor's lanes step while shared inference chooses for the others
    deadline: float = 600.0  # seconds a process may work without a word (an evaluation, say) before it is replaced
    layout: Literal["given", "auto"] = "given"  # "auto" tries a few for seconds each, and takes the fastest
    device: str = "auto"  # "auto" takes a GPU if there is one
    precision: Literal["auto", "float32", "bf16"] = "auto"  # of encoders; "auto" takes bf16 for images where it is fast
    compile: bool = False  # torch.compile for acting and loss: faster, but tens of seconds to begin with
    cuda_graphs: bool = False  # replay what is compiled as CUDA graphs
    threads: int = 0  # of torch, in each process; 0 takes one for vectors, and for images each its share of the cores
    frame_stack: int = 0  # frames an observation shows; 0 leaves it to the environment
    clip_reward: bool = False  # to [-1, 1], for learning only
    replay_memory: Literal["device", "ram", "disk"] = "device"  # "disk" maps files in the run folder into memory
    save_replay: bool = True  # replay in checkpoints; without, a resumed run fills it anew before it learns on
    env_options: tuple[str, ...] = ()  # what the environment itself takes, as name=value with a JSON value
    mirror: str | None = None  # a URL (s3://bucket/run) that checkpoints are copied to; resume takes it too
    log_every: int = 0  # steps between rows of metrics; 0 for 1/200 of the run
    eval_every: int = 0  # steps between evaluations, with a checkpoint each; 0 for 1/10 of the run
    eval_episodes: int = 20  # greedy episodes on lanes of their own
    stop_at: float | None = None  # end the run once an evaluation reaches this mean return
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)  # beside metrics.jsonl

    def __post_init__(self) -> None:
        least_of = dict.fromkeys(("steps", "envs", "actors", "learners", "shards", "eval_episodes"), 1)
        least_of |= dict.fromkeys(("seed", "threads", "frame_stack", "log_every", "eval_every"), 0)
        least_of |= dict.fromkeys(("max_delay", "outliers", "min_actors"), 0)
        least_of["deadline"] = 1
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use {least} or more.")
        for pair in self.env_options:
            if "=" not in pair:
                raise ValueError(f"env_options has {pair!r}, and takes name=value, such as frame_skip=4.")
            name = pair.partition("=")[0]
            if name in RESERVED:
                raise ValueError(f"env_options has {pair!r}, which the run itself sets; {RESERVED[name]}.")
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in OF_CLUSTER and value != each.default and self.runtime != "ray":
                raise ValueError(f"{each.name}={value!r} is for a Ray cluster; use it with runtime='ray'.")
        if self.address not in (None, "auto") and not re.fullmatch(r"\S+:\d+", str(self.address)):
            raise ValueError(
                f"address={self.address!r} is neither 'auto' nor of the form HOST:PORT, such as head:6379."
            )
        if self.min_actors > self.actors:
            raise ValueError(
                f"min_actors={self.min_actors} of actors={self.actors} there never are; use as many at most."
            )
        _ = self.needs
        workers = self.env_settings.get("workers", 0)
        if type(workers) is not int or workers < 0:
            raise ValueError(f"env_options has workers={workers!r}; use a whole number, such as workers=2.")

    @property
    def actors_apart(self) -> bool:
        """Whether actors are not where the learner is, but on the CPU."""
        return self.runtime != "inline" or self.inference == "shared"

    @property
    def needs(self) -> dict[str, dict[str, float]]:
        """What roles take of a host, by role and resource; a core where a role has nothing else said of it.

        Raises:
            ValueError: for what is not of the form role.resource=amount.
        """
        found: dict[str, dict[str, float]] = {}
        for need in self.role_needs:
            role, _, rest = need.partition(".")
            resource, _, amount = rest.partition("=")
            try:
                number = float(amount)
            except ValueError:
                number = math.nan
            if not (role and resource and 0 <= number < math.inf):
                raise ValueError(f"role_needs has {need!r}, and takes role.resource=amount, such as actor.CPU=0.5.")
            found.setdefault(role, {"CPU": 1.0})[resource] = number
        return found

    @property
    def cores_each(self) -> int:
        """Cores for each of the processes that compute, at least one."""
        processes = 1 if self.runtime == "inline" else self.actors + self.learners
        return max(1, len(os.sched_getaffinity(0)) // processes)

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
        device = device_of(self.device)
        fitting: Literal["float32", "bf16"] = "bf16" if images and fast_bf16(device) else "float32"
        return dataclasses.replace(
            self,
            device=device,
            precision=fitting if self.precision == "auto" else self.precision,
            threads=self.threads or (self.cores_each if images else 1),
            log_every=self.log_every or max(1, self.steps // 200),
            eval_every=self.eval_every or max(1, self.steps // 10),
        )


def resolve(
    system: str | Algorithm, env: EnvLike, settings: dict[str, Any], tuned: bool = True
) -> tuple[str, Algorithm, Options]:
    """The system's name, the algorithm and the options that the caller's settings and the recipe (`tuned`) make."""
    names = _fields(Options)
    for several in ("sinks", "role_needs"):
        if isinstance(settings.get(several), str):
            settings = {**settings, several: (settings[several],)}
    if isinstance(settings.get("env_options"), dict):
        pairs = (f"{name}={json.dumps(value)}" for name, value in settings["env_options"].items())
        settings = {**settings, "env_options": tuple(pairs)}
    if isinstance(env, VectorEnv):
        settings = {"envs": env.lanes, **settings}
        if settings["envs"] != env.lanes:
            raise ValueError(
                f"envs={settings['envs']}, but the environment handed in has {env.lanes} lanes; use those."
            )
    if isinstance(system, type):
        raise ValueError(f"{system.__name__} is a class; hand in {system.__name__}(...), or the name of a system.")
    if isinstance(system, Algorithm):
        refuse_unknown(settings, names, f"a run (the algorithm's settings go into {type(system).__name__}(...))")
        return name_of(system), system, as_dataclass(Options, settings)
    if ":" in system:
        name, kind, begins = system.rpartition(":")[2].lower(), own_algorithm(system), {}
    else:
        row = find(system)
        name, kind = row.name, row.algorithm_class()
        begins = {**row.preset, **(recipe(name, env) if tuned and isinstance(env, str) else {})}
    merged = {**begins, **settings}
    fields = _fields(kind)
    refuse_unknown(merged, fields | names, name)
    algorithm = as_dataclass(kind, {name: value for name, value in merged.items() if name in fields})
    return name, algorithm, as_dataclass(Options, {name: value for name, value in merged.items() if name in names})


def named(what: str) -> Any:
    """What `module:Name` names.

    Raises:
        ValueError: if there is no such module, or it has no such name.
    """
    from rookery.envs.gym import imported

    module, _, name = what.rpartition(":")
    if not hasattr(imported(module), name):
        raise ValueError(f"the module {module!r} has no {name!r}.")
    return getattr(imported(module), name)


def own_algorithm(what: str) -> type[Algorithm]:
    """The class that `module:Name` names.

    Raises:
        ValueError: if that is no algorithm's.
    """
    kind = named(what)
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise ValueError(f"{what} is no class of an algorithm; make it a subclass of one, as of rookery.DQN.")
    return kind


def device_of(device: str) -> str:
    """The device that "auto" stands for here; any other as it is.

    Raises:
        ValueError: for what is no device of torch's.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, with pages of text
        raise ValueError(f"device={device!r} is none that torch can use here; use 'auto', 'cpu' or 'cuda'.") from error
    return device


def env_name(env: EnvLike) -> str:
    """An environment's id, or the name of what makes it."""
    if isinstance(env, str):
        return env
    return env.spec.id if isinstance(env, VectorEnv) else getattr(env, "__name__", type(env).__name__)


def refuse_unknown(settings: Iterable[str], known: set[str], owner: str) -> None:
    """Raise for the first setting there is none of, with the systems that have it, or the nearest names."""
    for name in sorted(set(settings) - known):
        others = [system for system in SYSTEMS if name in _fields(find(system).algorithm_class())]
        if others:
            raise ValueError(f"{name}: no setting of {owner}, but of {', '.join(others)}.")
        elsewhere = {ELSEWHERE[name]} & known if name in ELSEWHERE else set()
        near = [*elsewhere] or difflib.get_close_matches(name, known, 3, 0.5) or sorted(known)
        raise ValueError(f"{name}: no setting of {owner}; nearest: {', '.join(near)}.")


def _fields(kind: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(kind)}


def as_dataclass(kind: Any, values: dict[str, Any]) -> Any:
    """The dataclass from settings as a user, JSON or TOML has them: lists become tuples, 1e6 an int where one is due.

    Raises:
        ValueError: for a setting there is none of, or a value of a wrong type.
    """
    hints = get_type_hints(kind)
    refuse_unknown(values, _fields(kind), kind.__name__)
    return kind(**{name: fitting(name, value, hints[name]) for name, value in values.items()})


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

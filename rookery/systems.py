"""The table of systems: which algorithm runs on which topology. A published system is a row here, not a code base."""

from __future__ import annotations

import difflib
import inspect
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from rookery.data.plan import ReplayPlan

if TYPE_CHECKING:
    from rookery.algorithms.base import Algorithm

__all__ = ["SYSTEMS", "System", "find", "name_of", "recipe", "system_of"]


@dataclass(frozen=True)
class System:
    """A named composition."""

    name: str
    algorithm: str  # module:class below rookery.algorithms, imported when it is used
    about: str
    preset: dict[str, Any] = field(default_factory=dict)  # settings that make the system
    topology: str = "actors_replay_learner"  # module below rookery.topologies

    def algorithm_class(self) -> type[Algorithm]:
        """The algorithm's dataclass."""
        module, _, name = self.algorithm.partition(":")
        return getattr(import_module(f"rookery.algorithms.{module}"), name)

    @property
    def module(self) -> Any:
        """The topology: `wire` makes its graph of a `Setting`, a seed, and the numbers of roles that it takes by name.

        `check`, if there is one, refuses numbers that do not fit an algorithm and the lanes of an actor.
        """
        return import_module(f"rookery.topologies.{self.topology}")

    @property
    def takes(self) -> set[str]:
        """The numbers of roles, and what else the topology is wired by."""
        return set(inspect.signature(self.module.wire).parameters) - {"setting", "seed"}


RAINBOW = {"double": True, "dueling": True, "noisy": True, "n_step": 3, "alpha": 0.5}  # Hessel et al. 2018, table 1
# Horgan et al. 2018, section 4.1 and appendix C; `ahead` stands for its actors that are never held up.
APEX = {"double": True, "dueling": True, "n_step": 3, "alpha": 0.6, "actor_priorities": True, "ahead": 2}
APEX |= {"epsilon": 0.4, "ladder": 7.0, "batch": 512, "max_grad_norm": 40.0}
# The same, appendix D; n is of what is said of it, noise has one σ.
APEX_DPG = {"n_step": 5, "alpha": 0.6, "actor_priorities": True, "ahead": 2, "batch": 256, "lr": 1e-4, "sigma": 0.3}
APEX_DPG |= {"target_period": 100, "tau": 1.0}
# Nair et al. 2015: AdaGrad at the server, and both safeguards, whose numbers are not theirs.
GORILA = {"adagrad": True, "lr": 0.03, "max_delay": 100, "outliers": 30.0}
# One pass over an unroll: what older weights did is learnt from once.
APPO = {"vtrace": True, "epochs": 1}
# Mnih et al. 2016, whose t_max, γ, β and α of RMSProp are A2C's defaults; they had 16 workers, of one lane each.
A3C = {"learners": 4}
# Stooke and Abbeel 2018: asynchronous learners of many lanes each; PPO's minibatches are 512 steps.
ASYNC_A2C = {"learners": 2, "envs": 32, "value_coef": 0.25}
ASYNC_PPO = {"learners": 2, "envs": 32, "unroll": 64, "minibatches": 4, "lr": 1e-3, "value_coef": 1.0}
# The same: a row is sampled 8 times however large the batch is, and targets are copied every 10,000 steps.
DQN_512 = {"batch": 512, "updates_per_step": 8 / 512, "envs": 32, "unroll": 4, "lr": 2.5e-4, "target_period": 156}
C51_2048 = {"batch": 2048, "updates_per_step": 8 / 2048, "envs": 64, "unroll": 4, "target_period": 39}
C51_2048 |= {"adam_eps": 0.01 / 2048}

TABLE = (
    System("ppo", "ppo:PPO", "clipped surrogate, several epochs an unroll", topology="actors_learner"),
    System("a2c", "a2c:A2C", "one policy-gradient step an unroll", topology="actors_learner"),
    System("impala", "impala:IMPALA", "actors that never wait, corrected by V-trace", topology="actors_learner"),
    System("appo", "ppo:PPO", "PPO whose actors never wait, corrected by V-trace", APPO, "actors_learner"),
    System("a3c", "a2c:A2C", "workers that act, and step shared weights without locks", A3C, "hogwild"),
    System("async_a2c", "a2c:A2C", "A3C with many lanes a worker", ASYNC_A2C, "hogwild"),
    System("async_ppo", "ppo:PPO", "PPO's workers step shared weights without locks", ASYNC_PPO, "hogwild"),
    System("dqn", "dqn:DQN", "Q-learning from replay, with later papers' parts as settings"),
    System("c51", "c51:C51", "the distribution of returns on fixed atoms"),
    System("dqn_512", "dqn:DQN", "DQN with few updates from large batches", DQN_512),
    System("c51_2048", "c51:C51", "C51 with few updates from large batches", C51_2048),
    System("qr_dqn", "qr_dqn:QRDQN", "the distribution of returns by fixed quantiles"),
    System("iqn", "iqn:IQN", "the distribution of returns by sampled quantiles"),
    System("rainbow", "c51:C51", "C51, double, dueling, noisy, prioritised, three-step", RAINBOW),
    System("apex", "dqn:DQN", "many actors on a ladder of ε, one prioritised replay, one learner", APEX),
    System("gorila", "dqn:DQN", "bundles of actor, replay, learner; parameters in shards", GORILA, "parameter_server"),
    System("ddpg", "ddpg:DDPG", "a deterministic policy up the gradient of Q"),
    System("apex_dpg", "ddpg:DDPG", "Ape-X with DDPG in Q-learning's place", APEX_DPG),
    System("td3", "td3:TD3", "DDPG with twin critics, smoothed targets, a delayed policy"),
    System("sac", "sac:SAC", "twin critics and a policy of high entropy, continuous or discrete"),
    System("d4pg", "d4pg:D4PG", "DDPG with a distribution of n-step returns"),
    System("mpo", "mpo:MPO", "the policy moves to reweighted actions, within KL bounds"),
)
SYSTEMS = {system.name: system for system in TABLE}


def find(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: for an unknown one; names the nearest.
    """
    if name.lower() in SYSTEMS:
        return SYSTEMS[name.lower()]
    near = difflib.get_close_matches(name.lower(), SYSTEMS, 3, 0.5) or list(SYSTEMS)
    raise ValueError(f"no system {name!r}; nearest: {', '.join(near)} (`rookery list systems` shows all).")


def system_of(name: str, algorithm: Algorithm) -> System:
    """The system of that name; for an algorithm that is none of ours, the topology that its data plan needs."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    replay = isinstance(algorithm.plan, ReplayPlan)
    return System(name, "", "your own", topology="actors_replay_learner" if replay else "actors_learner")


def name_of(algorithm: Algorithm) -> str:
    """The system that an algorithm's settings are enough for; for one that is none of ours, its class in lower case."""
    own = type(algorithm)
    place = f"{own.__module__}:{own.__name__}"
    plain = (row.name for row in TABLE if not row.preset and place == f"rookery.algorithms.{row.algorithm}")
    return next(plain, own.__name__.lower())


def recipe(system: str, env: str) -> dict[str, Any]:
    """Tuned settings for this system on this environment; empty where there are none."""
    return dict(_recipes(system).get(env.partition(":")[2] if env.split(":")[0] in BACKENDS else env, {}))


BACKENDS = ("tensor", "envpool", "gym")


@cache
def _recipes(system: str) -> dict[str, dict[str, Any]]:
    file = resources.files("rookery.recipes") / f"{system}.toml"
    return tomllib.loads(file.read_text()) if file.is_file() else {}

"""Stable-Baselines3 and RLlib as the benchmarks use them (not one itself): their environments, their algorithms."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["RLLIB_EXAMPLES", "make_rllib", "make_sb3", "vec_env"]

ATARI = {"Pong-v5": "PongNoFrameskip-v4"}  # the id in Stable-Baselines3's usual stack


def vec_env(env: str, lanes: int, seed: int, envpool: bool = False) -> Any:
    """Lanes for Stable-Baselines3: in its usual stack (`make_vec_env`, `make_atari_env`), or on EnvPool."""
    if envpool:
        return envpool_vec_env(env, lanes, seed)
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    if env not in ATARI:
        return make_vec_env(env, lanes, seed=seed)
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    return VecFrameStack(make_atari_env(ATARI[env], lanes, seed=seed), n_stack=4)


def make_sb3(spec: dict[str, Any]) -> Any:
    """Stable-Baselines3's PPO with the settings of a case, on as many threads as there are cores."""
    import torch
    from stable_baselines3 import PPO

    torch.set_num_threads(len(spec["cores"]))
    lanes = vec_env(spec["env"], spec["envs"], spec["seed"], spec.get("envpool", False))
    policy = "CnnPolicy" if spec["env"] in ATARI else "MlpPolicy"
    return PPO(policy, lanes, seed=spec["seed"], device="cpu", verbose=0, **spec["hyper"])


def envpool_vec_env(env: str, lanes: int, seed: int) -> Any:
    """EnvPool behind Stable-Baselines3's interface, which wants a lane reset in the very step that ended it."""
    import envpool
    from stable_baselines3.common.vec_env import VecEnv

    class EnvPoolVecEnv(VecEnv):
        def __init__(self) -> None:
            self.pool = envpool.make(env, env_type="gymnasium", num_envs=lanes, seed=seed)
            super().__init__(lanes, self.pool.observation_space, self.pool.action_space)

        def reset(self) -> np.ndarray:
            return self.pool.reset()[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            obs, reward, terminated, truncated, _ = self.pool.step(self.actions.astype(np.int32))
            done = terminated | truncated
            infos: list[dict[str, Any]] = [{} for _ in range(lanes)]
            ended = np.flatnonzero(done)
            if len(ended):
                for lane in ended:
                    infos[lane] = {"terminal_observation": obs[lane].copy(), "TimeLimit.truncated": truncated[lane]}
                obs[ended] = self.pool.reset(ended.astype(np.int32))[0]
            return obs, reward, done, infos

        def close(self) -> None:
            self.pool.close()

        def get_attr(self, name: str, indices: Any = None) -> list[Any]:
            return [getattr(self.pool, name, None)] * lanes

        def set_attr(self, name: str, value: Any, indices: Any = None) -> None:
            setattr(self.pool, name, value)

        def env_method(self, name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError(f"EnvPool's lanes have no method {name}.")

        def env_is_wrapped(self, wrapper: Any, indices: Any = None) -> list[bool]:
            return [False] * lanes

    return EnvPoolVecEnv()


CONV = {"conv_filters": [[16, 4, 2], [32, 4, 2], [64, 4, 2], [128, 4, 2]], "conv_activation": "relu"}
CONV |= {"head_fcnet_hiddens": [256], "vf_share_layers": True}
SHARED = {"vf_share_layers": True}

# What RLlib's own examples have (rllib/examples/algorithms, `SYSTEM/cartpole_SYSTEM.py`, `SYSTEM/pong_SYSTEM.py`; for
# PPO `ppo/atari_ppo.py`, which leaves the lanes open): lanes of a runner, `training`, model, and what else they set.
RLLIB_EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "lanes": 16,
        "learners": 1,
        "training": {"lr": 3e-4, "num_epochs": 6, "vf_loss_coeff": 0.01},
        "model": {**SHARED, "fcnet_hiddens": [32], "fcnet_activation": "linear"},
    },
    ("appo", "CartPole-v1"): {
        "lanes": 16,
        "training": {"circular_buffer_iterations_per_batch": 2, "vf_loss_coeff": 0.05, "entropy_coeff": 0.0},
        "model": SHARED,
    },
    ("impala", "CartPole-v1"): {
        "lanes": 16,
        "filter": True,
        "training": {
            "train_batch_size_per_learner": 500,
            "grad_clip": 40.0,
            "grad_clip_by": "global_norm",
            "lr": 5e-4,
            "vf_loss_coeff": 0.05,
            "entropy_coeff": 0.0,
        },
        "model": SHARED,
    },
    ("ppo", "ALE/Pong-v5"): {
        "lanes": 8,
        "pixels": 64,
        "training": {
            "train_batch_size_per_learner": 4000,
            "minibatch_size": 128,
            "lambda_": 0.95,
            "kl_coeff": 0.5,
            "clip_param": 0.1,
            "vf_clip_param": 10.0,
            "entropy_coeff": 0.01,
            "num_epochs": 10,
            "lr": 1.5e-4,
            "grad_clip": 100.0,
            "grad_clip_by": "global_norm",
        },
        "model": CONV,
    },
    ("appo", "ALE/Pong-v5"): {
        "lanes": 2,
        "pixels": 64,
        "aggregators": 2,
        "training": {
            "train_batch_size_per_learner": 500,
            "target_network_update_freq": 2,
            "lr": 5e-4,
            "vf_loss_coeff": 1.0,
            "entropy_coeff": [[0, 0.01], [3_000_000, 0.0]],
            "broadcast_interval": 5,
            "circular_buffer_num_batches": 4,
            "circular_buffer_iterations_per_batch": 2,
        },
        "model": CONV,
    },
    ("impala", "ALE/Pong-v5"): {
        "lanes": 5,
        "pixels": 64,
        "training": {
            "train_batch_size_per_learner": 500,
            "grad_clip": 30.0,
            "grad_clip_by": "global_norm",
            "lr": 9e-4,
            "vf_loss_coeff": 1.0,
            "entropy_coeff": [[0, 0.02], [3_000_000, 0.0]],
        },
        "model": CONV,
    },
}


def make_rllib(spec: dict[str, Any]) -> Any:
    """An RLlib algorithm of the new API stack, running: a case's system, environment, runners, and settings as above.

    Ray is begun with as many processors as the actors ask for, however few there are: with fewer RLlib waits for ever.
    """
    import ray
    from ray.rllib.algorithms.appo import APPOConfig
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    config = {"ppo": PPOConfig, "appo": APPOConfig, "impala": IMPALAConfig}[spec["system"]]()
    runners = {"num_env_runners": spec["runners"], "num_envs_per_env_runner": spec["lanes"]}
    if "fragment" in spec:
        runners["rollout_fragment_length"] = spec["fragment"]
    if spec.get("filter"):
        runners["env_to_module_connector"] = lambda env, spaces, device: MeanStdFilter()
    training = dict(spec["training"])
    if spec["env"].startswith("ALE/"):
        atari(config, spec, runners, training)
    else:
        config.environment(spec["env"])
    config.env_runners(**runners).training(**training)
    config.rl_module(model_config=DefaultModelConfig(**spec["model"]))
    learners = spec.get("learners", config.num_learners)
    aggregators = spec.get("aggregators", 0)
    config.learners(num_learners=learners, num_aggregator_actors_per_learner=aggregators)
    # An iteration of the asynchronous algorithms lasts 10 s by default, and only then is the return known.
    config.reporting(min_time_s_per_iteration=min(1, config.min_time_s_per_iteration or 0))
    config.debugging(seed=spec["seed"])
    ray.init(
        address="local",  # a cluster of its own, whatever else runs here
        num_cpus=spec["runners"] + learners + aggregators,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=500 * 2**20,
        _temp_dir=f"{spec['folder']}/ray",
    )
    return config.build_algo()


def atari(config: Any, spec: dict[str, Any], runners: dict[str, Any], training: dict[str, Any]) -> None:
    """RLlib's own preprocessing, frames stacked by its connectors, as its examples have it."""
    from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
    from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
    from ray.tune.registry import register_env

    pixels = spec["pixels"]

    def create(settings: Any) -> Any:
        import ale_py
        import gymnasium
        from ray.rllib.env.wrappers.atari_wrappers import wrap_atari_for_new_api_stack

        gymnasium.register_envs(ale_py)
        return wrap_atari_for_new_api_stack(gymnasium.make(spec["env"], **settings), dim=pixels)

    register_env("atari", create)
    # As the game without skipped frames and repeated actions, which are the wrappers' work.
    settings = {"frameskip": 1, "full_action_space": False, "repeat_action_probability": 0.0}
    config.environment("atari", env_config=settings, clip_rewards=True)
    runners["env_to_module_connector"] = lambda env, spaces, device: FrameStackingEnvToModule(num_frames=4)
    training["learner_connector"] = lambda obs_space, action_space: FrameStackingLearner(num_frames=4)

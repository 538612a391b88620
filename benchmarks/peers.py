"""Stable-Baselines3 as the benchmarks use it (not one itself): its environments, and its PPO."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["make_sb3", "vec_env"]

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

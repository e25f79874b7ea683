"""``slalom/Dispatch-v0``: one cluster, simulated or on the real engine, as a ``gymnasium.Env``."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np

from engine.core.columns import Kind
from engine.errors import SlalomError
from env.gym.vector_env import SlalomVecEnv
from env.scenario import Scenario


class DispatchEnv(gym.Env[np.ndarray, int]):
    """One decision per step. Observation, reward and truncation as in :class:`env.gym.vector_env.SlalomVecEnv`.

    ``info`` of every step holds ``action_mask`` (bool (K,)) and ``elapsed_s``; ``action_masks()`` gives the mask in
    the form sb3-contrib expects. An action that is masked is replaced by the first allowed one.

    :param scenario: name, path or Scenario
    :param backend: "surrogate", or "gpu": the engine in this process, in real time (:mod:`env.gym.engine_env`)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        scenario: str | Scenario = "azure-conv-4xa100",
        *,
        backend: str = "surrogate",
        n_requests: int = 400,
        rates: tuple[float, float] | None = None,
        kinds: tuple[Kind, ...] | None = None,
        policy: str = "linear_score",
        split: Literal["train", "valid", "test"] = "train",
        render_mode: None = None,
    ) -> None:
        if backend not in ("surrogate", "gpu"):
            raise SlalomError("backend", backend, 'use "surrogate" or "gpu"')
        self.scenario = scenario if isinstance(scenario, Scenario) else Scenario.load(scenario)
        self._options: dict[str, Any] = {
            "n_requests": n_requests, "rates": rates, "kinds": kinds, "policy": policy, "split": split
        }  # fmt: skip
        self.render_mode, self._backend = render_mode, backend
        self._env: Any
        if backend == "gpu":
            from env.gym.engine_env import EngineVecEnv

            self._env = EngineVecEnv(self.scenario, seed=0, auto_reset=False, **self._options)
        else:
            self._env = SlalomVecEnv(self.scenario, 1, seed=0, **self._options)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self._mask = self._env.action_masks()[0]

    def action_masks(self) -> np.ndarray:
        """Allowed actions, bool (K,)."""
        return self._mask

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        episodes = self._env.episodes
        if seed is not None:
            episodes.seed = seed
            episodes.number[:] = -1
            episodes.forget()
        if self._backend == "surrogate":  # the engine counts its episodes as they begin
            episodes.number[0] += 1
        observation = self._env.reset()[0]
        self._mask = self._env.action_masks()[0].copy()
        return observation, {"action_mask": self._mask, "elapsed_s": 0.0}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observations, rewards, dones, infos = self._env.step(np.array([action]))
        info: dict[str, Any] = {"elapsed_s": float(self._env.elapsed_s[0])}
        truncated = bool(dones[0])
        observation: np.ndarray = np.asarray(observations)[0]
        if truncated:
            observation = infos[0]["terminal_observation"]
            info["attainment"] = infos[0]["attainment"]
        self._mask = self._env.action_masks()[0].copy()
        info["action_mask"] = self._mask
        return observation, float(rewards[0]), False, truncated, info

    def close(self) -> None:
        self._env.close()

"""What both batched environments are: a scenario whose decisions a learner answers, as one SB3 ``VecEnv``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Kind
from engine.core.policy import Policy
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.surrogate.simulate import bind_policy


def _asked_kinds(scenario: Scenario) -> tuple[Kind, ...]:
    """Decision kinds that occur in ``scenario``."""
    d = scenario.decisions
    kinds = [Kind.PLACE_PREFILL]
    if d.place_decode or d.reallocate or any(group.role == "prefill" for group in scenario.cluster):
        kinds.append(Kind.PLACE_DECODE)
    if d.reallocate:
        kinds.append(Kind.REALLOCATE)
    if d.tune:
        kinds.append(Kind.TUNE)
    return tuple(kinds)


def _observed_candidates(n_instances: int, kinds: Collection[Kind]) -> int:
    """Candidate rows of an observation."""
    k = n_instances + 2
    if Kind.REALLOCATE in kinds:
        k = max(k, 1 + 3 * n_instances)
    return max(k, 5) if Kind.TUNE in kinds else k


class SharedVecEnv(VecEnv):
    """Environments that share their attributes and are never wrapped one by one."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        chosen = list(self._get_indices(indices))
        if method_name == "action_masks":
            masks = getattr(self, method_name)()
            return [masks[i] for i in chosen]
        return [getattr(self, method_name)(*args, **kwargs)] * len(chosen)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class DecisionVecEnv(SharedVecEnv):
    """``n_envs`` clusters.

    :param rates: (low, high) arrival rates, requests per second; 0.7 to 1.3 times the reference rate if not given
    :param kinds: decision kinds the learner answers; None: all that occur
    :param beta: discount rate, 1/s; None: a horizon of 8 TTFT targets
    :param advise: observations end with K columns more, 1 at what ``policy`` would answer
    """

    def __init__(
        self,
        scenario: Scenario,
        n_envs: int,
        policy: Policy | str,
        *,
        rates: tuple[float, float] | None,
        kinds: Collection[Kind] | None,
        beta: float | None,
        advise: bool,
    ) -> None:
        arena, reference = arena_of(scenario), scenario.reference_rate
        self.scenario = scenario
        self.rates = rates or (0.7 * reference, 1.3 * reference)
        self.kinds = tuple(_asked_kinds(scenario) if kinds is None else kinds)
        self.n_candidates = _observed_candidates(len(arena.specs), self.kinds)
        self.n_features, self.n_context = CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS
        self.beta = beta if beta is not None else 1.0 / (8.0 * max(max(c.ttft_s for c in arena.classes), 0.25))
        self.policy: Policy = bind_policy(policy, scenario)
        self.render_mode = None
        self._elapsed = np.zeros(n_envs)
        low, size = np.float32(-100.0), self.n_context + self.n_candidates * (self.n_features + advise)
        super().__init__(n_envs, gym.spaces.Box(low, -low, (size,), np.float32), gym.spaces.Discrete(self.n_candidates))

    @property
    def elapsed_s(self) -> np.ndarray:
        """Seconds between the decision that the last step answered and the next one, (n_envs,)."""
        return self._elapsed

    def action_masks(self) -> np.ndarray:
        """Allowed actions, bool (n_envs, K)."""
        raise NotImplementedError

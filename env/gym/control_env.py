"""``slalom/Control-v0`` and its batched form: when to have more or fewer instances prefill, on a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import gymnasium as gym
import numpy as np

from engine.errors import SlalomError
from env.gym.dispatch_env import DispatchEnv
from env.gym.vector_env import SlalomVecEnv
from env.scenario import Scenario
from env.surrogate.looks import advance_looks
from env.surrogate.simulate import bind_policy
from policies.rule import Value
from policies.rules.parts.shift import N_INPUTS, SHIFTS


class ControlVecEnv(SlalomVecEnv):
    """``n_envs`` clusters under the rule ``planner``; one step is ten seconds of each.

    Action: index into ``policies.rules.parts.shift.SHIFTS``, by how many instances more than the planner wants prefill
    only until the next step; 0 leaves it alone. Observation: what ``policies.rules.planner.shift_inputs`` says, then
    for each action the share of instances that would prefill only. Reward: minus the class weights of the requests
    sealed as missed in the step, and minus one for each that has waited longer for its first token than the scenario's
    ``tail_factor`` allows. An episode is one day of the workload (``duration_s``); it is truncated, never terminated.

    :param values: of the planner
    :param rate: arrivals per second (None: the scenario's reference rate)
    :param groups: clusters of a group share arrivals
    :param horizon_s: rewards are discounted by e over this time
    :raises SlalomError: a workload without an episode of its own length, several routers, or nothing to plan
    """

    _advance_kernel = staticmethod(advance_looks)

    def __init__(
        self,
        scenario: Scenario,
        n_envs: int,
        *,
        values: Mapping[str, Value] | None = None,
        rate: float | None = None,
        seed: int = 0,
        split: Literal["train", "valid", "test"] = "train",
        groups: int = 1,
        horizon_s: float = 1200.0,
    ) -> None:
        natural_s = scenario.workload.natural_s
        if natural_s <= 0.0:
            raise SlalomError("workload.duration_s", natural_s, "give the length of an episode in seconds")
        if scenario.routers > 1:
            raise SlalomError("routers", scenario.routers, "a planner of roles is one; give 1")
        planner, load = bind_policy("planner", scenario, values), rate or scenario.reference_rate
        super().__init__(
            scenario, n_envs, seed=seed, split=split, n_requests=math.ceil(load * natural_s), rates=(load, load),
            kinds=(), policy=planner, groups=groups, beta=1.0 / horizon_s, jitter=False,
        )  # fmt: skip
        self.n_context, self.n_features, self.n_candidates = N_INPUTS, 1, len(SHIFTS)
        size = N_INPUTS + len(SHIFTS)
        self.buffers = self.buffers._replace(
            observation=np.zeros((n_envs, size), np.float32), mask=np.zeros((n_envs, len(SHIFTS)), np.bool_)
        )
        self.observation_space = gym.spaces.Box(np.float32(-5.0), np.float32(5.0), (size,), np.float32)
        self.action_space = gym.spaces.Discrete(len(SHIFTS))


class ControlEnv(DispatchEnv):
    """One cluster of :class:`ControlVecEnv` as a ``gymnasium.Env``; ``info`` as in :class:`DispatchEnv`.

    :param scenario: name, path or Scenario, e.g. of a day that drifts
    """

    def __init__(
        self,
        scenario: str | Scenario = "daynight-70b-30min",
        *,
        values: Mapping[str, Value] | None = None,
        rate: float | None = None,
        split: Literal["train", "valid", "test"] = "train",
        render_mode: None = None,
    ) -> None:
        self.scenario = scenario if isinstance(scenario, Scenario) else Scenario.load(scenario)
        self.render_mode = render_mode
        self._open("surrogate", ControlVecEnv(self.scenario, 1, values=values, rate=rate, split=split))

"""The real engine as a learner's environment: one cluster, in real time, one decision a step.

Same observations, masks and actions as :class:`env.gym.vector_env.SlalomVecEnv`. Two things are as reality has them.
While the learner thinks, the scheduler waits and lanes go on with the steps they are in. A miss is part of the reward
when the engine seals the request's fate (its first token, or its end), not when the deadline passes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from engine.core.columns import Ctx, Kind, Need
from engine.core.policy import Policy
from engine.live.engine import Engine
from env.gym.base import DecisionVecEnv
from env.live.replay import Park, park_for, replay
from env.scenario import Scenario

_KINDS = {
    Ctx.IS_PLACE_PREFILL: Kind.PLACE_PREFILL, Ctx.IS_PLACE_DECODE: Kind.PLACE_DECODE,
    Ctx.IS_REALLOCATE: Kind.REALLOCATE, Ctx.IS_TUNE: Kind.TUNE,
}  # fmt: skip
_THINK_S = 60.0


class _Asked:
    """One decision that waits: what a learner sees of it, and the books at that moment."""

    def __init__(
        self, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, engine: Engine, advice: int
    ) -> None:
        self.advice = advice
        self.context, self.candidates, self.mask = context.copy(), candidates.copy(), mask.astype(bool)
        cluster = engine.state.cluster[0]
        self.good, self.missed = float(cluster["good_weight"]), float(cluster["miss_weight"])
        self.last = bool(cluster["n_sent"] >= len(engine.state.req))
        self.at_s = engine.clock.now * 1e-12


class _Learner:
    """The policy that the engine runs: asks whoever steps the environment, and ``rule`` once nobody does any more."""

    name = "learner"

    def __init__(self, rule: Policy, kinds: Collection[Kind], advise: bool) -> None:
        self._advise = advise
        self.rule, self.arrangement = rule, rule.arrangement
        self.needs = int(rule.needs) | int(Need.DIMENSIONLESS)
        self.params, self.memory = rule.params, rule.memory
        self._kinds = frozenset(kinds)
        self.asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.engine: Engine | None = None
        self.left = threading.Event()  # the learner has gone: finish what is open by the rule

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        kind = next(k for column, k in _KINDS.items() if context[column] == 1.0)
        if self.engine is None or self.left.is_set() or kind not in self._kinds:
            return int(self.rule.decide(context, candidates, mask, params, memory))
        advice = int(self.rule.decide(context, candidates, mask, params, memory)) if self._advise else -1
        asked = _Asked(context, candidates, mask, self.engine, advice)
        self.asked.put(asked)
        try:
            action = self.answers.get(timeout=_THINK_S)
        except queue.Empty:
            self.left.set()
            action = -1
        if action < 0:
            return int(self.rule.decide(context, candidates, mask, params, memory))
        return action if action < len(asked.mask) and asked.mask[action] else int(asked.mask.argmax())

    def describe(self) -> dict[str, Any]:
        return {"rule": self.rule.describe()}


class EngineVecEnv(DecisionVecEnv):
    """One cluster on the engine; parameters as :class:`env.gym.vector_env.SlalomVecEnv`, which has those not named
    here.

    :param park: the model served; that of the scenario's profile if not given
    :param auto_reset: begin the next episode when one ends, as a ``VecEnv`` does; else wait for ``reset``
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        seed: int = 0,
        split: Literal["train", "valid", "test"] = "train",
        n_requests: int = 100,
        rates: tuple[float, float] | None = None,
        kinds: Collection[Kind] | None = None,
        policy: Policy | str = "linear_score",
        beta: float | None = None,
        park: Park | None = None,
        auto_reset: bool = True,
        advise: bool = False,
    ) -> None:
        super().__init__(scenario, 1, policy, rates=rates, kinds=kinds, beta=beta, advise=advise)
        self.split, self.n_requests = split, n_requests
        self.park = park or park_for(scenario)
        self.episodes = SimpleNamespace(seed=seed, number=np.full(1, -1, np.int64), forget=lambda: None)
        self._auto_reset, self.advise = auto_reset, advise
        self._learner: _Learner | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._now: _Asked | None = None
        self._action = 0
        self._return, self._length = 0.0, 0

    @property
    def trace(self) -> np.ndarray:
        """Which arrival sequence is played, int64 (1,)."""
        return self.episodes.number

    def action_masks(self) -> np.ndarray:
        """Allowed actions, bool (1, K)."""
        mask = np.zeros((1, self.n_candidates), bool)
        if self._now is not None:
            mask[0, : len(self._now.mask)] = self._now.mask[: self.n_candidates]
        return mask

    # -- episodes ------------------------------------------------------------------------------------------------

    def reset(self) -> np.ndarray:
        self._leave()
        if self._seeds[0] is not None:
            self.episodes.seed, self.episodes.number[0] = self._seeds[0], -1
            self._reset_seeds()
        self._begin()
        return self._observation()

    def _begin(self) -> None:
        """Start the next episode and wait for its first decision."""
        self.episodes.number[0] += 1
        rng = np.random.default_rng([self.episodes.seed, int(self.episodes.number[0])])
        learner = self._learner = _Learner(self.policy, self.kinds, self.advise)
        self._failure = None

        def watch(engine: Engine) -> None:
            learner.engine = engine

        def play(rate: float, seed: int) -> None:
            try:
                replay(
                    self.scenario, learner, rate=rate, n_requests=self.n_requests, seed=seed, split=self.split,
                    park=self.park, watch=watch,
                )  # fmt: skip
            except BaseException as error:
                self._failure = error
            finally:
                learner.asked.put(None)

        rate, seed = float(rng.uniform(*self.rates)), int(rng.integers(2**31))
        self._thread = threading.Thread(target=play, args=(rate, seed), name="episode", daemon=True)
        self._thread.start()
        self._return, self._length = 0.0, 0
        self._now = self._next()

    def _next(self) -> _Asked | None:
        assert self._learner is not None
        asked = self._learner.asked.get()
        if self._failure is not None:
            raise self._failure
        return asked

    def _leave(self) -> None:
        """End the running episode: what is open is answered by the rule, and waited for."""
        if self._learner is not None:
            self._learner.left.set()
            self._learner.answers.put(-1)
        if self._thread is not None:
            self._thread.join()
        self._learner = self._thread = None

    def _observation(self) -> np.ndarray:
        row = np.zeros((1, *(self.observation_space.shape or ())), np.float32)
        if self._now is not None:
            row[0, : self.n_context] = self._now.context[: self.n_context]
            rows = self._now.candidates[: self.n_candidates, : self.n_features]
            row[0, self.n_context : self.n_context + rows.size] = rows.ravel()
            if 0 <= self._now.advice < self.n_candidates and self.advise:
                row[0, self.n_context + self.n_candidates * self.n_features + self._now.advice] = 1.0
        return row

    # -- VecEnv --------------------------------------------------------------------------------------------------

    def step_async(self, actions: np.ndarray) -> None:
        self._action = int(actions[0])

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        before = self._now
        assert self._learner is not None
        assert before is not None, "reset first"
        self._learner.answers.put(self._action)
        self._now = self._next()
        reward, now = 0.0, self._now
        if now is not None:
            self._elapsed[0] = now.at_s - before.at_s
            reward = -(now.missed - before.missed)
        self._return += reward
        self._length += 1
        done = now is None or now.last
        info: dict[str, Any] = {}
        observation = self._observation()
        if done:
            last = now or before
            sealed = last.good + last.missed
            info = {
                "terminal_observation": observation[0].copy(),
                "TimeLimit.truncated": now is not None,
                "episode": {"r": self._return, "l": self._length, "t": last.at_s},
                "attainment": last.good / sealed if sealed > 0 else float("nan"),
            }
            self._leave()
            self._now = None
            if self._auto_reset:
                self._begin()
            observation = self._observation()
        return observation, np.array([reward], np.float32), np.array([done]), [info]

    def close(self) -> None:
        """End the running episode."""
        self._leave()

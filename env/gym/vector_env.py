"""``SlalomVecEnv``: many clusters as one stable-baselines3 ``VecEnv`` with action masks."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

import numba
import numpy as np

from engine.core.columns import Kind, max_candidates
from engine.core.policy import Policy
from env.gym.base import DecisionVecEnv
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.surrogate.batch import ENDED, LAST, advance_many, new_buffers
from env.surrogate.compiled import POLICY_ARGS, FirstClass, compiled
from env.surrogate.episodes import Episodes

_F8, _F8T, _I8, _I8T = numba.float64[::1], numba.float64[:, ::1], numba.int64[::1], numba.int64[:, ::1]
_SIGNATURE = (
    _I8T, _I8T, _I8, _I8, numba.int64, *POLICY_ARGS[:4], _F8, _F8T, numba.int64,
    numba.float32[:, ::1], numba.boolean[:, ::1], _F8, _F8, _I8, _F8, _F8,
)  # fmt: skip


class SlalomVecEnv(DecisionVecEnv):
    """``n_envs`` simulated clusters; one step answers one decision in each of them.

    An episode serves ``n_requests`` and is *truncated* at the decision about the last of them (never terminated):
    the value of what is still in the system belongs to the learner's bootstrap. Reward: minus the class weights
    of the requests sealed as missed until the next decision, discounted inside the interval with ``beta``.
    An action that is masked is replaced by the first allowed one.

    :param scenario: the scenario
    :param n_envs: clusters
    :param seed: everything random follows from it
    :param split: window of the workload
    :param n_requests: requests per episode
    :param rates: (low, high) arrival rates, drawn uniformly per episode, requests per second
    :param kinds: decision kinds the learner answers (default: all that occur)
    :param policy: rule or bound policy that answers the others and gives the static arrangement
    :param groups: clusters of a group share arrivals and jitter
    :param beta: discount rate, 1/s (default: a horizon of 8 TTFT targets)
    :param jitter: train on step times that stray from the profile by its held-out error
    :param advise: observations end with K columns more, 1 at what ``policy`` would answer
    """

    def __init__(
        self,
        scenario: Scenario,
        n_envs: int,
        *,
        seed: int = 0,
        split: Literal["train", "valid", "test"] = "train",
        n_requests: int = 400,
        rates: tuple[float, float] | None = None,
        kinds: Collection[Kind] | None = None,
        policy: Policy | str = "linear_score",
        groups: int | None = None,
        beta: float | None = None,
        jitter: bool = True,
        advise: bool = False,
    ) -> None:
        super().__init__(scenario, n_envs, policy, rates=rates, kinds=kinds, beta=beta, advise=advise)
        most = max_candidates(len(arena_of(scenario).specs))
        self.buffers = new_buffers(n_envs, self.n_candidates, most, advise)
        self.episodes = Episodes(
            scenario,
            n_envs,
            seed=seed,
            split=split,
            n_requests=n_requests,
            rates=self.rates,
            groups=min(groups or max(n_envs // 8, 1), n_envs),
            plan=self.policy.arrangement,
            beta=self.beta,
            cells=len(self.policy.memory),
            jitter=jitter,
            buffers=self.buffers,
        )
        self._kind_bits = sum(1 << int(k) for k in self.kinds)
        self._memory = np.tile(self.policy.memory, (n_envs, 1))
        self._advance_many = compiled(advance_many, *_SIGNATURE)
        self._decide = FirstClass(self.policy.decide)
        self._everyone = np.arange(n_envs)
        self._actions = np.full(n_envs, -1, np.int64)
        self._infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self._returns, self._lengths = np.zeros(n_envs), np.zeros(n_envs, np.int64)

    # -- what a learner reads beside the usual --------------------------------------------------------

    @property
    def trace(self) -> np.ndarray:
        """Which arrival sequence each cluster is on, int64 (n_envs,)."""
        return self.episodes.trace_id

    def action_masks(self) -> np.ndarray:
        """Allowed actions, bool (n_envs, K); a view."""
        return self.buffers.mask

    # -- VecEnv ---------------------------------------------------------------------------------------

    def _advance(self, chosen: np.ndarray) -> None:
        b, e = self.buffers, self.episodes
        self._advance_many(
            e.state_words, e.sim_words, self._actions, chosen, self._kind_bits, b.context, b.candidates, b.allowed,
            self._decide, self.policy.params, self._memory, int(self.policy.needs),
            b.observation, b.mask, b.reward, b.elapsed_s, b.status, b.good, b.missed,
        )  # fmt: skip

    def _begin(self, chosen: np.ndarray) -> None:
        """Bring clusters that are at the start of an episode to their first decision."""
        self._memory[chosen] = self.policy.memory
        self._actions[chosen] = -1
        self._advance(chosen)
        self._returns[chosen] = 0.0
        self._lengths[chosen] = 0

    def reset(self) -> np.ndarray:
        """The first decision of every cluster, (n_envs, ...); after :meth:`seed` the first episodes of that seed."""
        if self._seeds[0] is not None:
            self.episodes.reseed(self._seeds[0])
            self._reset_seeds()
        for b in range(self.num_envs):
            self.episodes.reset(b)
        self._begin(self._everyone)
        return self.buffers.observation.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions[:] = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self._advance(self._everyone)
        b = self.buffers
        rewards = b.reward.astype(np.float32)
        self._elapsed[:] = b.elapsed_s
        self._returns += b.reward
        self._lengths += 1
        dones = b.status >= LAST
        infos: list[dict[str, Any]] = self._infos
        if dones.any():
            infos = list(self._infos)
            ended = np.flatnonzero(dones)
            for i in ended:
                infos[i] = self.end_episode(int(i))
        return b.observation.copy(), rewards, dones, infos

    def end_episode(self, i: int) -> dict[str, Any]:
        """What there is to say of cluster ``i``, whose episode is over; it is at the first decision of its next one."""
        info = self._last_info(i)
        self.episodes.next(i)
        self._begin(self._everyone[i : i + 1])
        return info

    def _last_info(self, i: int) -> dict[str, Any]:
        """``attainment``: good ÷ sealed requests, NaN where none was sealed."""
        b = self.buffers
        sealed = b.good[i] + b.missed[i]
        now = int(self.episodes.sims[i].sim[0]["now"]) * 1e-12
        return {
            "terminal_observation": b.observation[i].copy(),
            # Where every request has already ended there is nothing left to bootstrap from.
            "TimeLimit.truncated": bool(b.status[i] != ENDED),
            "episode": {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": now},
            "attainment": float(b.good[i] / sealed) if sealed > 0 else float("nan"),
        }

    def close(self) -> None:
        """Nothing to release."""

    # -- resume ---------------------------------------------------------------------------------------

    def env_state(self) -> bytes:
        """Where in its sequence of episodes each cluster is."""
        return json.dumps({"episode": self.episodes.number.tolist()}).encode()

    def set_env_state(self, state: bytes) -> None:
        """Continue with the episodes after those of ``env_state``; the next ``reset`` starts them."""
        self.episodes.number[:] = np.asarray(json.loads(state)["episode"], np.int64) + 1
        self._reset_seeds()  # it is the sequence of the seed in force that goes on

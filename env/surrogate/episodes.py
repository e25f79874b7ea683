"""Episodes of simulated clusters for learning: which requests, which load, which jitter, and the reset between them.

Clusters of one group get the same episodes (same arrivals, same jitter), so that what arrivals alone do to the
return can be subtracted. Everything about episode ``k`` of group ``g`` follows from (seed, g, k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from engine.core.columns import max_candidates
from engine.core.policy import InstancePlan
from engine.core.state import ClusterState
from engine.jit.rows import addresses
from env.scenario import Scenario
from env.surrogate.arena import Arena, arena_of, build_trace, horizon_s, jittered, requests_of, seen_in
from env.surrogate.batch import Buffers, release_all
from env.surrogate.clock import Sim, new_sim
from env.workload import Trace


class Episodes:
    """``n`` clusters on successive episodes.

    :param rates: arrival rates are drawn uniformly from (low, high), requests per second
    :param groups: clusters are split into this many groups of equal episodes
    :param cells: of the memory of the rule that answers what the learner does not
    :param jitter: let step times stray from the profile by its measured error
    """

    def __init__(
        self,
        scenario: Scenario,
        n: int,
        *,
        seed: int,
        split: Literal["train", "valid", "test"],
        n_requests: int,
        rates: tuple[float, float],
        groups: int,
        plan: Sequence[InstancePlan] | None,
        beta: float,
        cells: int,
        jitter: bool,
        buffers: Buffers,
    ) -> None:
        self.arena: Arena = arena_of(scenario)
        self.scenario, self.seed, self.split = scenario, seed, split
        self.n_requests, self.rates, self.jitter, self.beta = n_requests, rates, jitter, beta
        self.plan, self.buffers, self.cells = plan, buffers, cells
        self.group = np.arange(n) * groups // n
        self.number = np.zeros(n, np.int64)
        self.trace_id = np.zeros(n, np.int64)
        self.states: list[ClusterState] = []
        self.sims: list[Sim] = []
        self._cache: dict[tuple[int, int], tuple[Trace, np.ndarray, dict[str, Any]]] = {}
        for b in range(n):
            state, sim = self._fresh(b)
            self.states.append(state)
            self.sims.append(sim)
        self.state_words = np.stack([addresses(s) for s in self.states])
        self.sim_words = np.stack([addresses(q) for q in self.sims])
        self.k_max = max_candidates(len(self.arena.specs))

    def _episode(self, b: int) -> tuple[Trace, np.ndarray, dict[str, Any]]:
        """Requests, truth and what is seen of it of the present episode of cluster ``b``."""
        key = (int(self.group[b]), int(self.number[b]))
        self.trace_id[b] = key[0] * 1_000_000 + key[1]
        if key not in self._cache:
            rng = np.random.default_rng([self.seed, *key])
            rate = float(rng.uniform(*self.rates))
            trace = build_trace(self.scenario, rate, self.n_requests, int(rng.integers(2**31)), self.split)
            state = self.states[b] if b < len(self.states) else self.arena.cluster(self.plan, None)
            truth: dict[str, Any] = dict(jittered(state, self.arena.error, rng)) if self.jitter else {}
            truth["seen"] = seen_in(self.scenario, self.split, [self.seed, *key, 11])
            oldest = int(self.number[self.group == key[0]].min())
            for old in [k for k in self._cache if k[0] == key[0] and k[1] < oldest]:
                del self._cache[old]
            self._cache[key] = trace, requests_of(trace), truth
        return self._cache[key]

    def _fresh(self, b: int) -> tuple[ClusterState, Sim]:
        """New arrays for cluster ``b``, at the start of its present episode."""
        trace, _, truth = self._episode(b)
        state = self.arena.cluster(self.plan, trace, horizon_s(trace))
        state.cluster["counted"] = trace.hash_tokens == 0
        return state, self._clock(state, trace, truth)

    def _clock(self, state: ClusterState, trace: Trace, truth: dict[str, Any]) -> Sim:
        sim = new_sim(state, n_roots=trace.n_roots, beta=self.beta, cells=self.cells, **truth)
        b = self.buffers
        return sim._replace(context=b.context, candidates=b.candidates, mask=b.allowed)

    def reset(self, b: int) -> None:
        """Put cluster ``b`` at the start of its present episode, reusing its block arrays where no cache is kept."""
        trace, requests, truth = self._episode(b)
        old = self.states[b]
        if trace.hash_tokens or len(requests) != len(old.req):
            state, sim = self._fresh(b)
            self.state_words[b] = addresses(state)
        else:
            release_all(self.state_words[b])
            clean = self._blank(trace)
            for name in ("cluster", "inst", "lane", "link", "lists", "cls", "due", "watch", "itl"):
                getattr(old, name)[...] = getattr(clean, name)
            old.req[...] = requests
            state, sim = old, self._clock(old, trace, truth)
        self.states[b], self.sims[b] = state, sim
        self.sim_words[b] = addresses(sim)

    def _blank(self, trace: Trace) -> ClusterState:
        """The small arrays of an idle cluster (made once; its requests are never used)."""
        if not hasattr(self, "_template"):
            self._template = self.arena.cluster(self.plan, None)
            self._template.cluster["counted"] = 1  # clusters that keep a cache are never reused
        self._template.cluster["n_requests"] = trace.n
        self._template.cluster["horizon_ticks"] = int(horizon_s(trace) * 1e12)
        return self._template

    def reseed(self, seed: int) -> None:
        """The episodes of another seed, from the first one on; those in place go on until they are reset."""
        self.seed = seed
        self.number[:] = 0
        self.forget()

    def forget(self) -> None:
        """Drop the requests prepared for a former seed."""
        self._cache.clear()

    def next(self, b: int) -> None:
        """Move cluster ``b`` on to its next episode."""
        self.number[b] += 1
        self.reset(b)

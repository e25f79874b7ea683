"""Who did what when: the roles of a run over time, for pictures and for counting what a policy changed."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.core.kinds import Role
from engine.latency.evaluate import TICKS_PER_S
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, horizon_s, seen_in
from env.surrogate.clock import new_sim
from env.surrogate.simulate import bind_policy, driver

_LOOK = 8  # decisions between two looks


class RoleTimeline(NamedTuple):
    """Instances by role, each entry from its time on. An instance in a role change counts as what it becomes.

    ``at_s`` float64 (T,); ``instances`` int64 (T, 4), columns as in :class:`engine.core.kinds.Role`; ``switches``:
    role changes done at the end.
    """

    at_s: np.ndarray
    instances: np.ndarray
    switches: int


def role_timeline(
    scenario: Scenario, policy: Any, rate: float, seed: int, split: Literal["train", "valid", "test"] = "test"
) -> RoleTimeline:
    """The roles over one episode of the workload (or the scenario's number of requests where it has no length)."""
    bound = bind_policy(policy, scenario)
    natural_s = scenario.workload.natural_s
    n = math.ceil(rate * natural_s) if natural_s else scenario.n_requests
    trace = build_trace(scenario, rate, n, seed, split)
    state = arena_of(scenario).cluster(bound.arrangement, trace, horizon_s(trace))
    seen = seen_in(scenario, split, [seed, 11])
    sim = new_sim(state, n_roots=trace.n_roots, seen=seen, cells=len(bound.memory))
    go_on = driver(state, sim, bound, _LOOK)
    times, counts, before = [], [], b""
    taken = _LOOK
    while True:
        roles = np.where(state.inst["target_role"] >= 0, state.inst["target_role"], state.inst["role"])
        now = np.bincount(roles, minlength=len(Role))
        if now.tobytes() != before:
            before = now.tobytes()
            times.append(float(sim.sim[0]["now"]) / TICKS_PER_S)
            counts.append(now)
        if taken < _LOOK:
            return RoleTimeline(np.array(times), np.array(counts), int(state.cluster[0]["n_switches"]))
        taken = go_on()

"""One run of a scenario under a policy on the surrogate, from requests to a ``RunResult``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numba
import numpy as np

from engine.core.kinds import RequestState
from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.jit.rows import addresses
from engine.latency.evaluate import TICKS_PER_S
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, horizon_s, jittered, seen_in, slowed
from env.surrogate.clock import Sim, new_sim
from env.surrogate.compiled import POLICY_ARGS, WORDS, FirstClass, compiled
from env.surrogate.long import LongRun, is_long
from env.surrogate.loop import run
from env.workload import Trace
from policies.rules.parts.python import watched

_SLICE = 200_000  # decisions, about a second


@dataclass(frozen=True, eq=False, kw_only=True)
class RunResult:
    """What a run left behind. Times in ``req`` are ticks of 1 ps; stamps that never happened are -1.

    :param req: REQUEST (R,), with the turns that nobody sent because an earlier one was refused or failed: see
        :func:`abandon`
    :param cluster: CLUSTER record; ``inst`` INSTANCE (N,); ``cls`` SLO_CLASS (C,)
    :param itl: int64 (ITL_BINS,), token gaps counted in ``engine.core.slo.itl_edges_s()``
    :param duration_s: simulated seconds
    :param wall_s: seconds the event loop took
    :param origin_s: (R,), seconds that the stamps of each request count from; None: all from the beginning
    """

    req: np.ndarray
    cluster: np.void
    inst: np.ndarray
    cls: np.ndarray
    itl: np.ndarray
    class_names: tuple[str, ...]
    n_gpus: int
    duration_s: float
    wall_s: float
    decisions: int
    events: int
    rate: float
    seed: int
    policy: str
    scenario: str
    origin_s: np.ndarray | None = None


def bind_policy(policy: Any, scenario: Scenario, values: Mapping[str, Any] | None = None) -> Policy:
    """A policy ready to decide in ``scenario``.

    :param policy: a name, ``name:param=value,...``, a checkpoint folder, or a bound policy
    :raises SlalomError: unknown policy or parameter, damaged checkpoint
    """
    if not isinstance(policy, str) and isinstance(policy, Policy):
        return policy
    from policies.load import load_policy

    return load_policy(policy, arena_of(scenario).setting, values)


def ready() -> Any:
    """The compiled loop. Whoever starts processes that simulate calls this first, or each of them compiles it."""
    return compiled(run, WORDS, WORDS, *POLICY_ARGS, numba.float64[::1], numba.int64, numba.int64)


def driver(state: ClusterState, sim: Sim, policy: Policy, most: int = 0) -> Callable[[], int]:
    """The compiled loop over one cluster: each call takes at most ``most`` decisions (0: all) and says how many.

    A call raises what a policy in plain Python has raised in it.
    """
    loop = partial(
        ready(), addresses(state), addresses(sim), sim.context, sim.candidates, sim.mask,
        FirstClass(policy.decide), policy.params, policy.memory.copy(), int(policy.needs), most,
    )  # fmt: skip
    return watched(policy, loop)


def simulate(
    scenario: Scenario,
    policy: Any,
    *,
    rate: float,
    n_requests: int | None = None,
    seed: int = 0,
    split: Literal["train", "valid", "test"] = "test",
    values: Mapping[str, Any] | None = None,
    trace: Trace | None = None,
    fast_forward: bool = True,
    jitter: bool = False,
    slowdown: float = 1.0,
) -> RunResult:
    """Serve ``n_requests`` of the scenario's workload at ``rate`` under ``policy``; same arguments, same bytes.

    :param rate: arrivals per second (sessions per second where the workload has sessions)
    :param values: parameters of a rule
    :param trace: these requests instead of the scenario's workload
    :param fast_forward: jump over decode steps in which nothing changes (same timeline either way)
    :param jitter: let step times stray from the profile by its held-out error
    :param slowdown: steps take this much longer than the profile, by which the scheduler goes on to predict, says
    :raises SlalomError: bad rate or number of requests, unknown policy, states known late in a run of months
    """
    if not rate > 0:
        raise SlalomError("rate", rate, "give a positive number of requests per second")
    if not slowdown > 0 or (jitter and slowdown != 1.0):
        raise SlalomError("slowdown", slowdown, "give a positive factor, and no jitter beside it")
    if n_requests is not None and n_requests < 1:
        raise SlalomError("requests", n_requests, "simulate at least one request")
    arena = arena_of(scenario)
    bound = bind_policy(policy, scenario, values)
    if trace is None:
        trace = build_trace(scenario, rate, n_requests or scenario.n_requests, seed, split)
    long = LongRun(trace, horizon_s(trace)) if is_long(trace) else None
    state = arena.cluster(bound.arrangement, long.trace if long else trace, horizon_s(trace))
    truth: dict[str, Any] = dict(jittered(state, arena.error, np.random.default_rng([seed, 7]))) if jitter else {}
    if slowdown != 1.0:
        truth = dict(slowed(state, slowdown))
    seen = seen_in(scenario, split, [seed, 11])
    if long is not None and seen.delay_s > 0:
        fix = "leave it out of a run of months: its clock starts anew on the way"
        raise SlalomError("observation_delay_s", seen.delay_s, fix)
    sim = new_sim(state, n_roots=trace.n_roots, fast_forward=fast_forward, seen=seen, cells=len(bound.memory), **truth)
    go_on = driver(state, sim, bound, _SLICE)

    def play() -> None:
        while go_on() == _SLICE:  # compiled code hears no Ctrl-C: it comes up for air
            pass

    begin, origin_s = time.perf_counter(), None
    if long is None:
        play()
    else:
        origin_s = long.play(state, sim, play)
    wall = time.perf_counter() - begin
    abandon(state.req, origin_s)
    return replace(_result(scenario, state, sim, rate, seed, bound.name, wall, arena.n_gpus), origin_s=origin_s)


def abandon(req: np.ndarray, origin_s: np.ndarray | None = None) -> None:
    """Whoever is refused, or fails, gives up the session: the turns after it end as it did, when they would have come.

    Each counts as sent and missed, as if answers took no time. Else refusing the first turn of a long session would
    take all its work away for the price of one missed request.

    :param req: REQUEST (R,) of a finished run, changed in place
    :param origin_s: (R,), as in :class:`RunResult`
    """
    rows = np.flatnonzero(req["next_turn"] > 0)  # none, where nobody waits for answers: every run comes by here
    rows = rows[np.isin(req["state"][rows], (RequestState.SHED, RequestState.FAILED))]
    while len(rows):
        turns = req["next_turn"][rows]
        req["state"][turns] = req["state"][rows]
        req["arrival"][turns] = req["finished"][turns] = req["finished"][rows] + req["think"][rows]
        if origin_s is not None:
            origin_s[turns] = origin_s[rows]
        rows = turns[req["next_turn"][turns] > 0]


def _result(
    scenario: Scenario, state: ClusterState, sim: Any, rate: float, seed: int, policy: str, wall_s: float, n_gpus: int
) -> RunResult:
    return RunResult(
        req=state.req,
        cluster=state.cluster[0],
        inst=state.inst,
        cls=state.cls,
        itl=state.itl,
        class_names=tuple(c.name for c in scenario.classes),
        n_gpus=n_gpus,
        duration_s=float(state.cluster[0]["origin_s"]) + float(sim.sim[0]["now"]) / TICKS_PER_S,
        wall_s=wall_s,
        decisions=int(sim.sim[0]["decisions"]),
        events=int(sim.sim[0]["events"]),
        rate=rate,
        seed=seed,
        policy=policy,
        scenario=scenario.name,
    )

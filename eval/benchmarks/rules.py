"""What one decision of each rule costs, compiled, on 16 instances in states that it met under load.

Every rule first runs a scenario near its knee; decisions on the way are kept as they were (context, candidates,
mask, memory) and then answered again many times. The figure is the rule's own time, without the features that
the core computes for it.
"""

from __future__ import annotations

import time
from typing import Any

import numba
import numpy as np

from engine.core.columns import Ctx, Kind
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from engine.jit.rows import addresses
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, horizon_s
from env.surrogate.clock import new_sim
from env.surrogate.compiled import POLICY_ARGS, WORDS, FirstClass, compiled
from env.surrogate.loop import run as drive
from env.surrogate.simulate import bind_policy

BAR_US = 20.0
INSTANCES = 16
REQUESTS = 3_000
KEPT = 300  # decisions per scenario and rule
BATCHES, REPEATS = 5, 40  # of each kept decision: the median batch counts, so that an interruption does not


def settings() -> list[Scenario]:
    """Eight prefill and eight decode instances whose roles may move, and 16 that share their SMs."""
    split = Scenario.load("shift-pd-8xa100").with_overrides(
        {"cluster.0.count": 8, "cluster.1.count": 8, "reference_rate": 40.0, "rates.high": 100.0}
    )
    shared = Scenario.load("azure-code-mux-4xa100").with_overrides(
        {"cluster.0.count": INSTANCES, "reference_rate": 34.0, "rates.high": 100.0}
    )
    return [split, shared]


@kernel
def _again(context, candidates, mask, decide, params, memory, before, times):
    """Answer one decision ``times`` times, each with the memory it had then; the sum keeps the calls alive."""
    total = np.int64(0)
    for _ in range(times):
        memory[:] = before
        total += decide(context, candidates, mask, params, memory)
    return total


def _decisions(scenario: Scenario, rule: str) -> tuple[Any, list[tuple[np.ndarray, ...]]]:
    """The bound rule, and decisions that it met, evenly spaced over a run."""
    arena, bound = arena_of(scenario), bind_policy(rule, scenario)
    step = compiled(drive, WORDS, WORDS, *POLICY_ARGS, numba.float64[::1], numba.int64, numba.int64)
    decide = FirstClass(bound.decide)
    trace = build_trace(scenario, scenario.reference_rate, REQUESTS, 0, "train")
    state = arena.cluster(bound.arrangement, trace, horizon_s(trace))
    sim = new_sim(state, n_roots=trace.n_roots)
    memory = bound.memory.copy()
    kept: list[tuple[np.ndarray, ...]] = []
    words, clock = addresses(state), addresses(sim)
    every = max(2 * REQUESTS // KEPT, 1)
    seen = 0
    while True:
        before = memory.copy()
        taken = step(
            words, clock, sim.context, sim.candidates, sim.mask, decide, bound.params, memory, int(bound.needs), 1
        )
        if taken == 0:
            return bound, kept
        seen += 1
        control = int(sim.context[Ctx.KIND]) in (Kind.REALLOCATE, Kind.TUNE)
        if seen % every == 0 or (control and seen % 7 == 0):
            k = int(sim.sim[0]["candidates"])
            kept.append((sim.context.copy(), sim.candidates[:k].copy(), sim.mask[:k].copy(), before))


def measure(rule: str, scenarios: list[Scenario]) -> dict[Kind, list[float]]:
    """Microseconds of each kept decision (mean of many answers), by kind.

    :raises SlalomError: the rule fits none of the scenarios
    """
    signature = (*POLICY_ARGS, numba.float64[::1], numba.float64[::1], numba.int64)
    again, refused = compiled(_again, *signature), None
    spent: dict[Kind, list[float]] = {}
    for scenario in scenarios:
        try:
            bound, kept = _decisions(scenario, rule)
        except SlalomError as error:
            refused = error
            continue
        decide, memory = FirstClass(bound.decide), bound.memory.copy()
        for context, candidates, mask, before in kept:
            arguments = (context, candidates, mask, decide, bound.params, memory, before)
            again(*arguments, 3)
            batches = []
            for _ in range(BATCHES):
                started = time.perf_counter()
                again(*arguments, REPEATS)
                batches.append(1e6 * (time.perf_counter() - started) / REPEATS)
            spent.setdefault(Kind(int(context[Ctx.KIND])), []).append(float(np.median(batches)))
    if not spent:
        raise refused or SlalomError("policy", rule, "no decision was asked")
    return spent


def run() -> dict[str, Any]:
    """``p50_us`` and ``p99_us`` by rule over all decisions, and the median by kind of decision."""
    from policies.registry import get, names

    scenarios = settings()
    result: dict[str, Any] = {"p50_us": {}, "p99_us": {}, "p50_us_by_kind": {}, "decisions": {}, "left_out": {}}
    for name in names():
        if get(name).python:
            result["left_out"][name] = "a plain Python class, not compiled"
            continue
        try:
            spent = measure(name, scenarios)
        except SlalomError as error:
            result["left_out"][name] = str(error)
            continue
        every = [us for kind in spent.values() for us in kind]
        result["p50_us"][name] = float(np.median(every))
        result["p99_us"][name] = float(np.percentile(every, 99))
        result["p50_us_by_kind"][name] = {kind.name.lower(): float(np.median(us)) for kind, us in spent.items()}
        result["decisions"][name] = len(every)
    slowest = max(result["p50_us"], key=result["p50_us"].get)
    return result | {
        "slowest": slowest,
        "slowest_p50_us": result["p50_us"][slowest],
        "bar_us": BAR_US,
        "within_bar": bool(result["p50_us"][slowest] <= BAR_US),
        "instances": INSTANCES,
        "repeats": BATCHES * REPEATS,
    }

"""Speed of the surrogate on the reference workload, one core."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from eval.benchmarks.reference import POLICY, RATE, reference_scenario

REQUESTS = 10_000
REPEATS = 15


def run() -> dict[str, Any]:
    """Requests per second: median of repeats after a warm-up.

    ``requests_per_second`` times the event loop, as the figures of other simulators do; the whole call adds
    drawing the arrivals, laying out the state and the result.
    """
    from env.surrogate.simulate import simulate

    scenario = reference_scenario()
    first = simulate(scenario, POLICY, rate=RATE, n_requests=REQUESTS, seed=0)
    wall, inner = [], []
    for seed in range(REPEATS):
        started = time.perf_counter()
        result = simulate(scenario, POLICY, rate=RATE, n_requests=REQUESTS, seed=seed)
        wall.append(time.perf_counter() - started)
        inner.append(result.wall_s)
    return {
        "requests_per_second": REQUESTS / float(np.median(inner)),
        "slowest_requests_per_second": REQUESTS / max(inner),
        "fastest_requests_per_second": REQUESTS / min(inner),
        "whole_call_requests_per_second": REQUESTS / float(np.median(wall)),
        "requests": REQUESTS,
        "repeats": REPEATS,
        "decisions": int(first.decisions),
        "simulated_s": float(first.duration_s),
    }

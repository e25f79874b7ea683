"""Speed of the surrogate on the reference workload, one core."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from eval.benchmarks.reference import POLICY, RATE, reference_scenario

__all__ = ["run"]

REQUESTS = 10_000
REPEATS = 7


def run() -> dict[str, Any]:
    """Requests per second: median of repeats after a warm-up, each the whole of a run (arrivals included)."""
    from env.simulate import simulate

    scenario = reference_scenario()
    first = simulate(scenario, POLICY, rate=RATE, n_requests=REQUESTS, seed=0)
    wall, inner = [], []
    for seed in range(REPEATS):
        started = time.perf_counter()
        result = simulate(scenario, POLICY, rate=RATE, n_requests=REQUESTS, seed=seed)
        wall.append(time.perf_counter() - started)
        inner.append(result.wall_s)
    return {
        "requests_per_second": REQUESTS / float(np.median(wall)),
        "requests_per_second_event_loop_only": REQUESTS / float(np.median(inner)),
        "slowest_requests_per_second": REQUESTS / max(wall),
        "fastest_requests_per_second": REQUESTS / min(wall),
        "requests": REQUESTS,
        "repeats": REPEATS,
        "decisions": int(first.decisions),
        "simulated_s": float(first.duration_s),
    }

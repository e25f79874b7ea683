"""How cost and memory grow with the number of requests; each size in a fresh process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from eval.benchmarks.reference import POLICY, RATE, reference_scenario

__all__ = ["measure", "run"]

SIZES = (10_000, 100_000, 1_000_000)


def measure(n_requests: int) -> dict[str, float]:
    """Cost per request and peak memory of this process for one run after a short warm-up."""
    from env.simulate import simulate

    scenario = reference_scenario()
    simulate(scenario, POLICY, rate=RATE, n_requests=1_000, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    simulate(scenario, POLICY, rate=RATE, n_requests=n_requests, seed=0)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "microseconds_per_request": 1e6 * seconds / n_requests,
        "peak_rss_mib": peak / 1024,
        "grown_by_mib": (peak - before) / 1024,
    }


def run() -> dict[str, Any]:
    """One entry per size, keyed by the number of requests."""
    sizes = {}
    for n_requests in SIZES:
        command = [sys.executable, "-m", "eval.benchmarks.scale", str(n_requests)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes[str(n_requests)] = json.loads(done.stdout)
    return {"requests": sizes}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))

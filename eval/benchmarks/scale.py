"""How cost and memory grow with the number of requests, each size in a fresh process; and with an overload."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from eval.benchmarks.reference import POLICY, RATE, reference_scenario

SIZES = (10_000, 100_000, 1_000_000)
REPEATS = 3
#: Requests of runs at four times what the policy holds, queues on time.
OVERLOADS = (5_000, 20_000, 80_000)
OVERLOADED = ("azure-conv-4xa100", "checkpoints/policies/azure-conv-4xa100", 28.0)


def measure(n_requests: int) -> dict[str, float]:
    """Cost per request and peak memory of this process, median of repeats after a warm-up."""
    from env.surrogate.simulate import simulate

    scenario = reference_scenario()
    simulate(scenario, POLICY, rate=RATE, n_requests=1_000, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for seed in range(REPEATS):
        started = time.perf_counter()
        simulate(scenario, POLICY, rate=RATE, n_requests=n_requests, seed=seed)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "microseconds_per_request": 1e6 * float(np.median(seconds)) / n_requests,
        "peak_rss_mib": peak / 1024,
        "grown_by_mib": (peak - before) / 1024,
    }


def overloaded() -> dict[str, dict[str, float]]:
    """Microseconds per request at what the shipped policy holds and at four times that, per number of requests."""
    from env.scenario import Scenario
    from env.surrogate.simulate import simulate

    name, policy, rate = OVERLOADED
    scenario, found = Scenario.load(name), {}
    simulate(scenario, policy, rate=rate, n_requests=1_000)
    for n in OVERLOADS:
        walls = {f: simulate(scenario, policy, rate=f * rate, n_requests=n, seed=1).wall_s for f in (1, 4)}
        found[str(n)] = {"held": 1e6 * walls[1] / n, "overloaded": 1e6 * walls[4] / n}
    return found


def run() -> dict[str, Any]:
    """One entry per size, keyed by the number of requests."""
    _in_fresh_process(1_000)  # compiles if need be: the compiler's memory is not the simulator's
    grown = {str(n): _in_fresh_process(n) for n in SIZES}
    return {"requests": grown, "overload_microseconds_per_request": overloaded(), "repeats": REPEATS}


def _in_fresh_process(n_requests: int) -> dict[str, float]:
    command = [sys.executable, "-m", "eval.benchmarks.scale", str(n_requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))

"""Speed on larger and harder runs than the reference workload: 64 instances, and real prompts with a prefix cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.reference import POLICY, RATE, reference_scenario

REPEATS = 5
_TRACE = "traces/mooncake_conversation.w1.jsonl.gz"


def run() -> dict[str, Any]:
    """Requests per second of the event loop, median of repeats."""
    result = {"requests_per_second_64_instances": _many_instances(64)}
    return result | _prefix_cache()


def _many_instances(n: int) -> float:
    """The reference load per instance on ``n`` instances, 50,000 requests."""
    from env.surrogate.simulate import simulate

    scenario = reference_scenario().with_overrides({"cluster.0.count": n, "rates.high": 2000.0})
    requests = 50_000
    walls = [
        simulate(scenario, POLICY, rate=RATE * n / 4, n_requests=requests, seed=seed).wall_s for seed in range(REPEATS)
    ]
    return requests / float(np.median(walls))


def _prefix_cache() -> dict[str, Any]:
    """Mooncake's conversation prompts with their block hashes: the file under SLALOM_SHARED, else the generator."""
    from env.scenario import Scenario
    from env.surrogate.simulate import simulate
    from env.workload import read_trace, scale_rate

    scenario = Scenario.load("mooncake-pd-8xh100")
    path = Path(os.environ.get("SLALOM_SHARED", "../shared")) / _TRACE
    trace = None
    if path.is_file():
        trace = read_trace(path, "mooncake", time_unit="ms", spread_s=3.0)
        trace = scale_rate(trace, scenario.reference_rate)
    walls, hit, n = [], 0.0, 0
    for seed in range(REPEATS):
        run = simulate(scenario, "predicted_ttft", rate=scenario.reference_rate, seed=seed, trace=trace)
        walls.append(run.wall_s)
        n = len(run.req)
        hit = float(run.cluster["cached_tokens"]) / float(run.req["prompt"].sum())
    return {
        "requests_per_second_mooncake": n / float(np.median(walls)),
        "mooncake_source": "trace" if trace is not None else "generator",
        "mooncake_prefix_hit_share": hit,
        "mooncake_mean_prompt_tokens": float(run.req["prompt"].mean()),
    }

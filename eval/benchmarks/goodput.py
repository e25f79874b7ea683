"""What one sustained goodput costs, in simulated requests and seconds, beside plain bisections with full runs."""

from __future__ import annotations

from typing import Any

from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.measure.sustained_search import Search, measure_sustained
from env.scenario import Scenario

SCENARIO = "azure-conv-4xa100"
POLICIES = ("least_tokens", "static_split", "muxwise")
SEEDS = (0, 1, 2)


def run() -> dict[str, Any]:
    """Both searches for some rules: rates at every target, requests, seconds; ``ok``: they agree within 2 %."""
    scenario = Scenario.load(SCENARIO)
    policies = {name: _both(scenario, name) for name in POLICIES}
    apart = max(found["apart"] for found in policies.values())
    total = {
        mode: {key: sum(found[mode][key] for found in policies.values()) for key in ("simulated_requests", "seconds")}
        for mode in ("sequential", "plain")
    }
    return {"scenario": SCENARIO, "seeds": len(SEEDS), "policies": policies, "total": total, "apart": apart,
            "ok": apart <= 0.02}  # fmt: skip


def _both(scenario: Scenario, policy: str) -> dict[str, Any]:
    found: dict[str, Any] = {mode: _search(scenario, policy, mode) for mode in ("sequential", "plain")}
    rates = zip(found["sequential"]["rates"], found["plain"]["rates"], strict=True)
    return found | {"apart": max(abs(a / b - 1.0) if b else float(a > 0.0) for a, b in rates)}


def _search(scenario: Scenario, policy: str, mode: Any) -> dict[str, Any]:
    with Evaluator(scenario, PointSettings(), measure=measure_sustained) as evaluator:
        search = Search(evaluator, Contender(policy), SEEDS, mode=mode)
    return {
        "rates": [found.rate for found in search.found],
        "simulated_requests": search.simulated_requests,
        "seconds": search.wall_s,
    }

"""The reference workload of the speed figures: 4 instances, 512 tokens in, 128 out, Poisson arrivals."""

from __future__ import annotations

from env.scenario import Scenario

POLICY = "least_tokens"
RATE = 40.0  # requests per second


def reference_scenario() -> Scenario:
    """Four MIXED instances of llama-8b-a100 under chunked prefill, without latency jitter."""
    return Scenario.parse(
        {
            "name": "reference",
            "description": "Fixed lengths on four mixed instances, for speed figures.",
            "regime": "balanced",
            "profile": "llama-8b-a100",
            "cluster": [{"count": 4, "role": "mixed"}],
            "workload": {
                "kind": "synthetic",
                "arrival": {"kind": "poisson"},
                "lengths": {"kind": "fixed", "prompt": 512, "output": 128},
            },
            "classes": [{"name": "chat", "ttft_s": 0.5, "tpot_s": 0.05}],
            "rates": {"low": 1.0, "high": 200.0},
            "reference_rate": RATE,
            "latency_jitter": 0.0,
        },
        "reference",
    )

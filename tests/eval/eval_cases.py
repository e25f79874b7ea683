"""Runs made by hand and points whose attainment curve is known exactly."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import RequestState
from engine.latency.evaluate import TICKS_PER_S
from env.measure.contender import Point

MS = TICKS_PER_S // 1000


def request(arrival_ms, first_ms=None, last_ms=None, out=1, state=RequestState.FINISHED, **columns):
    """One REQUEST record as a dict of columns; times in ms, targets 100 ms TTFT and 10 ms TPOT."""
    stamp = {"first_token": first_ms, "last_token": last_ms}
    row = {name: -1 if ms is None else int(ms * MS) for name, ms in stamp.items()}
    row |= {"arrival": int(arrival_ms * MS), "state": int(state), "generated": out, "output": out}
    return row | {"prompt": 10, "ttft_slo": 100 * MS, "tpot_slo": 10 * MS} | columns


def steady(n, **columns):
    """``n`` requests 10 ms apart, each answered after 20 ms; prompts of 10 to n + 9 tokens."""
    return [
        request(10 * i, 10 * i + 20, 10 * i + 20, prompt=10 + i * 7 % n, finished=(10 * i + 20) * MS, **columns)
        for i in range(n)
    ]


class Scenario:
    """What an evaluation asks of a scenario."""

    name, reference_rate, n_requests, tail_factor = "synthetic", 8.0, 500, 10.0

    def __init__(self, capacity: float = 40.0) -> None:
        self.capacity = capacity

    def hash(self) -> str:
        return str(self.capacity)

    def load_profiles(self) -> tuple:
        return ()

    def poor_fits(self) -> list:
        return []

    def to_yaml(self) -> str:
        return f"capacity: {self.capacity}"


def true_attainment(rate: float, capacity: float) -> float:
    return 1.0 / (1.0 + (rate / capacity) ** 6)


def true_goodput(capacity: float, target: float) -> float:
    return capacity * (1.0 / target - 1.0) ** (1.0 / 6.0)


def capacity_of(scenario, contender) -> float:
    """``x1.2`` in a policy's name multiplies the capacity; the parameter ``weight`` is best at 0.3."""
    factor = float(contender.policy[1:]) if contender.policy.startswith("x") else 1.0
    return max(scenario.capacity * factor * (1.0 - (contender.values.get("weight", 0.3) - 0.3) ** 2), 1e-12)


def synthetic_measure(scenario, contender, rate, seed, settings) -> Point:
    """A point with common random numbers: request i of a seed needs the same luck under every policy."""
    luck = np.random.default_rng(seed).random(settings.n_requests)
    good = luck < true_attainment(rate, capacity_of(scenario, contender))
    block = np.arange(len(good)) * settings.n_blocks // len(good)
    share = float(good.mean())
    figures = ("p90_ttft_ms", "p99_ttft_ms", "p90_tpot_ms", "p99_tpot_ms", "p90_itl_ms", "p99_itl_ms", "p90_e2el_ms")
    means = ("request_goodput", "goodput_per_gpu", "token_goodput", "output_throughput", "prefix_hit_rate")
    counts = ("shed", "failed", "unfinished", "preemptions", "migrations", "role_switches")
    metrics = {
        "num_prompts": len(good),
        "slo_attainment_by_metric": {"ttft": share, "tpot": 1.0},
        "slo_attainment_by_class": {"only": {"sent": len(good), "slo_attainment": share, "ttft": share, "tpot": 1.0}},
        "worst_wait_s": 1.0,
        "level": share,
        "n_gpus": 4,
        **dict.fromkeys(figures, 10.0 * rate),
        **dict.fromkeys(means, rate * share),
        **dict.fromkeys(counts, 0),
    }
    sent = np.bincount(block, minlength=settings.n_blocks).tolist()
    return Point(rate, seed, metrics, sent, np.bincount(block, good, settings.n_blocks).astype(int).tolist())

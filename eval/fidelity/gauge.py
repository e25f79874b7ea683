"""How fast a machine computes just now, against a latency profile.

A shared machine drifts: its memory bandwidth belongs to others too. A surrogate that knows the profile only would be
blamed for that. So a few reference steps are timed right before and after every engine run, on all instances at
once as the profile assumes, and the run is also compared with a surrogate whose steps take that much longer. The
reference steps are no part of the run, and the scheduler's own predictions stay those of the profile on both sides.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import torch

from engine.calibration.assemble import predict_s
from engine.calibration.bench import Bench
from engine.calibration.points import Point
from engine.latency import pack
from env.scenario import Scenario

#: A decode batch, a prompt, and one of each in a step: what serving consists of.
_REFERENCE = (
    Point("decode", bs=4, ctx=48),
    Point("prefill", n=48, prompts=1),
    Point("fused", n=32, prompts=1, bs=3, ctx=48),
)


class Gauge:
    """:param model: of the engine
    :param scenario: whose instances compute at once, each by its profile
    :param rounds: times that each reference step is taken
    """

    def __init__(self, model: Any, scenario: Scenario, rounds: int = 3) -> None:
        heads, shares = pack(scenario.load_profiles())
        self._rounds = rounds
        self._expected, self._benches = [], []
        for placement in scenario.placements():
            head = heads[placement.profile]
            whole = shares[placement.profile, int(head["n_shares"]) - 1]
            self._expected.append([predict_s(head, whole, point) for point in _REFERENCE])
            self._benches.append(Bench(model, kv_tokens=512, max_batch=4))  # with lanes, streams and graphs of its own

    def slowdown(self) -> float:
        """Seconds that the reference steps take now ÷ seconds by the profile; the mean over instances."""
        found: list[float] = [1.0] * len(self._benches)

        def work(k: int) -> None:
            torch.set_num_threads(1)
            bench, ratios = self._benches[k], []
            for point, expected in zip(_REFERENCE, self._expected[k], strict=True):
                spans = bench.spans(point)
                for _ in range(self._rounds):
                    begin = time.perf_counter()
                    bench.step(spans)
                    ratios.append((time.perf_counter() - begin) / expected)
            found[k] = statistics.median(ratios)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(self._benches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statistics.mean(found)

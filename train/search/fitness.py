"""How good a bound policy is, for the direct search: attainment over common arrivals, cheap and repeatable.

Traces are built once and shared by every policy (common random numbers). At one rate what counts is the attainment
of requests sent, less what the worst SLO class lacks to its floor, so that no class is starved for the others.
Rates are put together by :func:`merged`, because a mean over attainments would be deaf to the targets of 95 and
99 %: at 80 % of the knee a policy that misses 3 % instead of 1 % loses two points there, no more than it loses by
meeting 86 instead of 88 % beyond the knee.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from engine.core.policy import Policy
from engine.errors import SlalomError
from env.measure.goodput import find_goodput
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from env.workload import Trace
from policies.setting import Setting
from train.search.space import Design

__all__ = ["Fitness", "merged"]

_LEAST_MISSED = 0.01  # share below which missing less counts little: some requests of one simulation
_TRACES = 64
_WARMUP = 0.05


def merged(attainment: Sequence[float]) -> float:
    """One number for several rates: 1 less the geometric mean of the shares missed, 0.01 added to each.

    To miss half as much counts alike at every rate, so a policy gains as much by holding 98 instead of 96 % where
    load is moderate as by holding 90 instead of 80 % at the knee.
    """
    missed = np.maximum(1.0 - np.asarray(attainment), 0.0) + _LEAST_MISSED
    return 1.0 + _LEAST_MISSED - float(np.exp(np.log(missed).mean()))


class Fitness:
    """Scores designs on one scenario and counts what that cost.

    :param class_floor: attainment below which a class costs extra, per point as much as the mean itself
    :param wait_limit_s: whoever waits longer for a first token counts as two misses; None: no such limit
    """

    def __init__(
        self,
        scenario: Scenario,
        setting: Setting,
        split: Literal["train", "valid"] = "train",
        class_floor: float = 0.6,
        wait_limit_s: float | None = None,
    ) -> None:
        self.scenario, self.setting, self.split, self.class_floor = scenario, setting, split, class_floor
        self.wait_limit_s = wait_limit_s
        self.requests = 0
        self._traces: OrderedDict[tuple[float, int, int], Trace] = OrderedDict()

    def trace(self, rate: float, seed: int, n: int) -> Trace:
        """Arrivals of (rate, seed), built once while they are in use."""
        key = (rate, seed, n)
        if key not in self._traces:
            self._traces[key] = build_trace(self.scenario, rate, n, seed, self.split)
            if len(self._traces) > _TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(key)
        return self._traces[key]

    def attainment(self, policy: Policy, rate: float, seed: int, n: int) -> float:
        """Share of requests sent that met both targets, less the lack of the worst class."""
        run = simulate(self.scenario, policy, rate=rate, seed=seed, split=self.split, trace=self.trace(rate, seed, n))
        self.requests += n
        found = outcomes(run, warmup=_WARMUP)
        good = found.good
        score = float(good.mean())
        if self.wait_limit_s is not None:
            score -= float(np.mean(~(found.ttft_s <= self.wait_limit_s)))  # NaN: never served
        if len(self.scenario.classes) > 1:
            cls = run.req["cls"][found.rows]
            worst = min((float(good[cls == c].mean()) for c in np.unique(cls)), default=1.0)
            score -= max(0.0, self.class_floor - worst)
        return score

    def score(self, design: Design, rates: Sequence[float], seeds: Sequence[int], n: int) -> float:
        """Mean over seeds, :func:`merged` over rates; 0 where the rule does not fit the scenario."""
        try:
            policy = design.bind(self.setting)
            cells = [[self.attainment(policy, rate, seed, n) for seed in seeds] for rate in rates]
        except SlalomError:
            return 0.0
        return merged([sum(row) / len(row) for row in cells])

    def worst_wait_s(self, design: Design, rate: float, seed: int, n: int) -> float:
        """Longest time to a first token among the requests that got one; 0 where the design does not fit."""
        try:
            policy = design.bind(self.setting)
        except SlalomError:
            return 0.0
        run = simulate(self.scenario, policy, rate=rate, seed=seed, split=self.split, trace=self.trace(rate, seed, n))
        waits = outcomes(run, warmup=_WARMUP).ttft_s
        return float(np.nanmax(waits)) if np.isfinite(waits).any() else 0.0

    def knee(self, design: Design, start: float, seeds: Sequence[int], n: int, tolerance: float = 0.03) -> float:
        """Goodput at 90 %, requests per second; 0 where the targets are met at no rate."""
        try:
            policy = design.bind(self.setting)
        except SlalomError:
            return 0.0
        return self.goodput(policy, start, seeds, n, tolerance)

    def goodput(self, policy: Policy, start: float, seeds: Sequence[int], n: int, tolerance: float = 0.03) -> float:
        """The same of a bound policy."""
        return self._goodputs(policy, start, seeds, n, (0.9,), tolerance)[0]

    def knees(self, design: Design, start: float, seeds: Sequence[int], n: int) -> tuple[float, float]:
        """Goodput at 90 and at 99 % of a design known to hold 90 % near ``start``; 0 where it does not."""
        found = self._goodputs(design.bind(self.setting), start, seeds, n, (0.9, 0.99), 0.03, step=1.2, widest=16.0)
        return found[0], found[1]

    def _goodputs(
        self, policy: Policy, start: float, seeds: Sequence[int], n: int, targets: Sequence[float], tolerance: float,
        **search: float,
    ) -> list[float]:  # fmt: skip
        def attainment(rate: float) -> float:
            return sum(self.attainment(policy, rate, seed, n) for seed in seeds) / len(seeds)

        found = find_goodput(attainment, start, targets=targets, tolerance=tolerance, **search)
        return [at.rate for at in found.goodput]

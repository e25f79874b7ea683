"""How good a bound policy is, for the direct search: its level over common arrivals, cheap and repeatable.

Traces are built once and shared by every policy (common random numbers). What counts at one rate is the level of
``env.measure.level``: attainment of requests sent, held down by the class and the prompt lengths that are worst off and
by waits that are too long. Rates are put together by :func:`merged`, because a mean over levels would be deaf to the
targets of 95 and 99 %: at 80 % of the knee a policy that misses 3 % instead of 1 % loses two points there, no more than
it loses by meeting 86 instead of 88 % beyond the knee.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from engine.core.policy import Policy
from engine.errors import SlalomError
from env.measure.goodput import find_goodput
from env.measure.level import WARM, has_sessions, level_of, run_length
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from env.workload import Trace
from policies.setting import Setting
from train.search.space import Design

BEYOND = 1.15  # highest rate of the objective, as a multiple of the knee

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


def rates_between(strict: float, knee: float, beyond: float = BEYOND) -> list[float]:
    """From where a policy holds 99 % (``strict``) over the middle to its knee and ``beyond`` times that."""
    return [strict, (strict * knee) ** 0.5, knee, beyond * knee]


class Fitness:
    """Scores designs on one scenario and counts what that cost; runs are at least as long as their level asks for.

    A design of the search is no contender that an :class:`env.measure.evaluator.Evaluator` could name and keep: it is
    bound once and asked thousands of times, on arrivals that are built once. Levels and knees are theirs.
    """

    def __init__(self, scenario: Scenario, setting: Setting, split: Literal["train", "valid"] = "train") -> None:
        self.scenario, self.setting, self.split = scenario, setting, split
        self.requests = 0
        self._traces: OrderedDict[tuple[float, int, int], Trace] = OrderedDict()

    def length(self, rate: float, n: int, waits: bool = True) -> int:
        """Requests of a run at ``rate``: ``n``, or more, see ``env.measure.level.run_length``."""
        return run_length(self.scenario, rate, n, self.split, waits=waits)

    def trace(self, rate: float, seed: int, n: int) -> Trace:
        """Arrivals of (rate, seed), built once while they are in use."""
        key = (rate, seed, n)
        if key not in self._traces:
            self._traces[key] = build_trace(self.scenario, rate, n, seed, self.split)
            if len(self._traces) > _TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(key)
        return self._traces[key]

    def level(self, policy: Policy, rate: float, seed: int, n: int, waits: bool = True) -> float:
        """Of one run; see ``env.measure.level``."""
        n = self.length(rate, n, waits)
        run = simulate(self.scenario, policy, rate=rate, seed=seed, split=self.split, trace=self.trace(rate, seed, n))
        self.requests += n
        settled = has_sessions(self.scenario)
        warmup = WARM if settled else _WARMUP
        return level_of(run, tail_factor=self.scenario.tail_factor, warmup=warmup, settled=settled)

    def score(
        self, design: Design, rates: Sequence[float], seeds: Sequence[int], n: int, *, waits: bool = True
    ) -> float:
        """Mean over seeds, :func:`merged` over rates; 0 where the rule does not fit the scenario.

        :param waits: False: a first look, in runs too short for starvation to show
        :raises SlalomError: what is wrong with the scenario or its workload: no design is to blame for that
        """
        try:
            policy = design.bind(self.setting)
        except SlalomError:
            return 0.0
        cells = [[self.level(policy, rate, seed, n, waits) for seed in seeds] for rate in rates]
        return merged([sum(row) / len(row) for row in cells])

    def knee(
        self, design: Design, start: float, seeds: Sequence[int], n: int, tolerance: float = 0.03, *, waits: bool = True
    ) -> float:
        """The largest rate with a level of 90 %, requests per second; 0 where there is none.

        :param waits: as in :meth:`score`
        :raises SlalomError: as in :meth:`score`
        """
        try:
            policy = design.bind(self.setting)
        except SlalomError:
            return 0.0
        return self._rates(policy, start, seeds, n, (0.9,), waits, tolerance=tolerance)[0]

    def knees(self, design: Design, start: float, seeds: Sequence[int], n: int) -> tuple[float, float]:
        """The same at 90 and at 99 % for a design known to hold 90 % near ``start``."""
        near = {"tolerance": 0.03, "step": 1.2, "widest": 16.0}
        found = self._rates(design.bind(self.setting), start, seeds, n, (0.9, 0.99), True, **near)
        return found[0], found[1]

    def _rates(
        self, policy: Policy, start: float, seeds: Sequence[int], n: int, targets: Sequence[float], waits: bool,
        **search: float,
    ) -> list[float]:  # fmt: skip
        def level(rate: float) -> float:
            return sum(self.level(policy, rate, seed, n, waits) for seed in seeds) / len(seeds)

        return [at.rate for at in find_goodput(level, start, targets=targets, **search).goodput]

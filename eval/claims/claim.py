"""What a reproduced result is made of, and how rates and shares of it are measured on the surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from env.measure.goodput import find_goodput
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.simulate import RunResult, simulate
from eval.placement.disaggregation import LEAST_LOAD

__all__ = ["Claim", "Curve", "Passes", "clustered", "joint", "ratio", "ratio_interval", "search", "share_at"]


@dataclass(frozen=True)
class Curve:
    """Points of one system. ``published`` ones are drawn as markers, ours as a line over them.

    :param x: numbers, or names where the axis has none
    """

    label: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    published: bool = False


@dataclass(frozen=True)
class Claim:
    """One published result and ours.

    :param name: S1, S2, ...
    :param unit: of ``value`` and ``band``
    :param published: the figure as published
    :param value: ours
    :param band: pass band of ``value``
    :param extra: whether what the band does not cover (a choice, an order) came out too
    :param note: one honest sentence
    :param rows: what was measured on the way, ablations included: (label, figure, unit)
    :param interval: least and greatest of ``value`` over single seeds
    :param curves: what the page draws over axes named ``axes``
    """

    name: str
    title: str
    source: str
    unit: str
    published: str
    value: float
    band: tuple[float, float]
    note: str
    extra: bool = True
    rows: tuple[tuple[str, float, str], ...] = field(default=())
    interval: tuple[float, float] | None = None
    curves: tuple[Curve, ...] = ()
    axes: tuple[str, str] = ("", "")

    @property
    def holds(self) -> bool:
        """Whether ours lies in the band, and the rest came out."""
        return self.extra and self.band[0] <= self.value <= self.band[1]


# -- measuring -------------------------------------------------------------------------------------------------


Passes = Callable[[RunResult], float]


def share_at(scenario: Scenario, passes: Passes, policy: str, rate: float, n: int, seeds: Sequence[int]) -> float:
    """Mean of ``passes`` over ``seeds`` at one rate."""
    runs = (simulate(scenario, policy, rate=rate, n_requests=n, seed=seed) for seed in seeds)
    return float(np.mean([passes(run) for run in runs]))


def search(
    scenario: Scenario, passes: Passes, policy: str, goal: float, n: int, seeds: Sequence[int] = (0, 1)
) -> float:
    """Largest rate at which ``passes`` (a share, mean over ``seeds``) reaches ``goal``."""

    def share(rate: float) -> float:
        if rate < LEAST_LOAD * scenario.reference_rate:
            return 0.0
        return share_at(scenario, passes, policy, rate, n, seeds)

    return find_goodput(share, scenario.reference_rate, targets=(goal,), tolerance=0.01).at(goal).rate


def ratio(ours: float, theirs: float) -> float:
    """Infinite where theirs reaches the goal at no rate."""
    return ours / theirs if theirs > 0.0 else math.inf


def ratio_interval(
    ours: tuple[Scenario, str], theirs: tuple[Scenario, str], passes: Passes, goal: float, n: int
) -> tuple[float, float]:
    """Least and greatest ratio of the two rates over single seeds."""
    found = []
    for seed in range(3):
        top, bottom = (search(scenario, passes, policy, goal, n, (seed,)) for scenario, policy in (ours, theirs))
        found.append(ratio(top, bottom))
    return min(found), max(found)


def joint(run: RunResult) -> float:
    return float(outcomes(run).good.mean())


def clustered(scenario: Scenario, *groups: Mapping[str, Any], **overrides: Any) -> Scenario:
    fixed = {"cluster": [dict(g) for g in groups], "decisions": {}, "min_prefill": 1, "min_decode": 1}
    return scenario.with_overrides(fixed | overrides)

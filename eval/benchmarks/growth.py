"""Whether a figure goes on growing from round to round, as memory does that leaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import theilslopes


class Growth(NamedTuple):
    """Growth a round, and the interval in which it lies with a probability of 95 %."""

    slope: float
    low: float
    high: float


def growth_of(figures: Sequence[float]) -> Growth:
    """The slope of ``figures``, one a round, warmed up; at least three.

    The median of the slopes between all pairs of rounds (Theil 1950, Sen 1968), with Sen's interval: what happens
    once, a cache that fills or an outlier, is no growth, however large; what happens in every round is, however small.
    """
    assert len(figures) >= 3, "no slope without three rounds"
    slope, _, low, high = theilslopes(figures, alpha=0.95)
    return Growth(float(slope), float(low), float(high))

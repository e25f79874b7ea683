"""Goodput: the largest request rate at which a share of requests *sent* (90 %) meets both targets.

Brackets by doubling or halving, then bisects in the logarithm of the rate. Every rate is answered by the
same seeds (common random numbers, requests of all seeds pooled) and every answer is kept: 90, 95 and 99 %
share them. Attainment is noisy and need not fall monotonically, so each step looks at the best
non-increasing fit through all rates measured so far instead of trusting single values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from env.measure.stats import antitonic, crossing

TARGETS = (0.90, 0.95, 0.99)
_WIDEST = 2.0**12  # the search stays within this factor of the starting rate
_FLAT = 0.002  # gain of attainment over three halvings of the rate that counts as none


@dataclass(frozen=True)
class Goodput:
    """Goodput at one target.

    :param target: attainment asked for
    :param rate: requests per second, on the smoothed curve; 0 when no rate reaches the target
    :param low: largest measured rate that reaches it
    :param high: smallest measured rate above ``low``; None when no measured rate misses the target
    """

    target: float
    rate: float
    low: float
    high: float | None


@dataclass(frozen=True)
class GoodputResult:
    """Goodput at every target, and every rate that was evaluated (ascending, with its attainment)."""

    goodput: tuple[Goodput, ...]
    rates: tuple[float, ...]
    attainment: tuple[float, ...]

    def at(self, target: float) -> Goodput:
        return next(g for g in self.goodput if g.target == target)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def goodput_of_curve(rates: Sequence[float], attainment: Sequence[float], target: float) -> Goodput:
    """Read goodput off measured points.

    :param rates: ascending, requests per second
    :param attainment: measured, may be noisy
    """
    fit = antitonic(attainment)
    reached = int((fit >= target).sum())
    return Goodput(
        target=target,
        rate=float(crossing(rates, fit, target)),
        low=rates[reached - 1] if reached else 0.0,
        high=rates[reached] if reached < len(rates) else None,
    )


def find_goodput(
    attainment: Callable[[float], float],
    start: float,
    *,
    targets: Sequence[float] = TARGETS,
    tolerance: float = 0.01,
    step: float = 2.0,
    widest: float = _WIDEST,
) -> GoodputResult:
    """Search the goodput at every target.

    :param attainment: pooled attainment at a rate [1/s]; called once per rate
    :param start: first rate tried, requests per second
    :param targets: shares of requests, each between 0 and 1
    :param tolerance: relative width of the final bracket of each target
    :param step: first factor between rates while bracketing, squared each time up to 2: below 2 where a
        neighbour's goodput is known
    :param widest: the search stays within this factor of ``start``; who fails there has goodput 0
    :return: bracket and interpolated rate per target, with all points evaluated
    """
    known: dict[float, float] = {}

    def ask(rate: float) -> float:
        if rate not in known:
            known[rate] = attainment(rate)
        return known[rate]

    ordered = sorted(targets)
    rate, factor = start, step
    while ask(rate) >= ordered[0] and rate < start * widest:
        rate, factor = rate * factor, min(factor**2, 2.0)
    rate, factor = start, step
    while ask(rate) < ordered[-1] and rate > start / widest and not _unloaded(known, rate):
        rate, factor = rate / factor, min(factor**2, 2.0)
    for target in ordered:
        _bisect(known, ask, target, tolerance)
    rates = sorted(known)
    curve = [known[r] for r in rates]
    return GoodputResult(
        tuple(goodput_of_curve(rates, curve, target) for target in targets), tuple(rates), tuple(curve)
    )


def largest_rate(
    attainment: Callable[[float], float], start: float, target: float = 0.9, *, tolerance: float = 0.01, **search: float
) -> float:
    """:func:`find_goodput` at one target: requests per second, 0 where no rate reaches it.

    :param search: ``step`` and ``widest``
    """
    found = find_goodput(attainment, start, targets=(target,), tolerance=tolerance, **search)
    return found.goodput[0].rate


def _unloaded(known: dict[float, float], rate: float) -> bool:
    """Whether fewer arrivals no longer help: some requests miss their targets even alone on the cluster.

    Deep overload is flat as well, but there next to nobody is served in time.
    """
    above = [r for r in known if r >= 8.0 * rate]
    return bool(above) and known[rate] > 0.05 and known[rate] - known[min(above)] < _FLAT


def _bisect(known: dict[float, float], ask: Callable[[float], float], target: float, tolerance: float) -> None:
    """Halve the bracket of one target until it is narrow; a new point may move it either way."""
    for _ in range(64):
        rates = sorted(known)
        reached = int((antitonic([known[r] for r in rates]) >= target).sum())
        if reached == 0 or reached == len(rates):
            return
        low, high = rates[reached - 1], rates[reached]
        if high <= low * (1.0 + tolerance):
            return
        ask(float(np.round(math.sqrt(low * high), 12)))

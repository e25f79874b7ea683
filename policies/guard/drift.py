"""Drift: does what happens still agree with what was predicted when it was decided?

Per metric (TTFT, TPOT) an exponentially weighted mean of log(actual ÷ predicted), corrected for its start; the alarm
goes on at ±log(1 + tolerance) and off at half of it.
"""

from __future__ import annotations

import math

from policies.guard.config import DriftConfig

#: Added to both sides, seconds: below this a ratio says nothing.
_FLOOR = {"ttft": 1e-3, "tpot": 1e-4}


class Drift:
    """One metric."""

    def __init__(self, metric: str, config: DriftConfig) -> None:
        self.metric, self.config = metric, config
        self.n = 0
        self.alarm = False
        self._mean = self._weight = 0.0
        self._rate = 1.0 / config.memory
        self._limit = math.log1p(config.tolerance)

    @property
    def ratio(self) -> float:
        """Typical actual ÷ predicted, 1.0 before anything was seen."""
        return math.exp(self._mean / self._weight) if self._weight else 1.0

    def observe(self, actual_s: float, predicted_s: float) -> bool:
        """Take one request; True when the alarm went on or off."""
        floor = _FLOOR[self.metric]
        if not (math.isfinite(predicted_s) and predicted_s > 0.0):
            return False
        off = math.log((actual_s + floor) / (predicted_s + floor))
        self._mean += self._rate * (off - self._mean)
        self._weight += self._rate * (1.0 - self._weight)
        self.n += 1
        mean = abs(self._mean / self._weight)
        was = self.alarm
        if self.n >= self.config.min_requests:
            self.alarm = mean > (0.5 * self._limit if was else self._limit)
        return self.alarm != was

"""The circuit breaker: who fails too often is not asked for a while.

closed ── failures within a window ──► open ── cooldown ──► half-open ── probes good ──► closed; from half-open, one bad
answer leads back to open, with twice the cooldown.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum

from policies.guard.config import BreakerConfig


class BreakerState(IntEnum):
    """Values of the gauge ``slalom:policy_breaker_state``."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Knows no clock: seconds come in as arguments."""

    def __init__(self, config: BreakerConfig) -> None:
        self.config = config
        self.state = BreakerState.CLOSED
        self.trips = 0
        self._failures: deque[float] = deque(maxlen=config.failures)
        self._cooldown = config.cooldown_s
        self._until = 0.0
        self._good = 0

    def lets(self, now_s: float) -> bool:
        """Whether the policy may be asked."""
        if self.state == BreakerState.OPEN and now_s >= self._until:
            self.state, self._good = BreakerState.HALF_OPEN, 0
        return self.state != BreakerState.OPEN

    def succeeded(self) -> None:
        """The policy answered well. Only called while it is being probed: a closed breaker forgets by time."""
        self._good += 1
        if self._good >= self.config.probes:
            self.state = BreakerState.CLOSED
            self._cooldown = self.config.cooldown_s
            self._failures.clear()

    def failed(self, now_s: float) -> None:
        """The policy did not answer, too late or nonsense."""
        if self.state == BreakerState.HALF_OPEN:
            self._cooldown = min(2.0 * self._cooldown, self.config.max_cooldown_s)
            self._open(now_s)
            return
        self._failures.append(now_s)
        full = len(self._failures) == self.config.failures
        if self.state == BreakerState.CLOSED and full and now_s - self._failures[0] <= self.config.window_s:
            self._open(now_s)

    def _open(self, now_s: float) -> None:
        self.state = BreakerState.OPEN
        self._until = now_s + self._cooldown
        self.trips += 1

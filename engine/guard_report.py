"""What a guard says about itself: plain numbers, for metrics, administration and the dashboard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["DriftReport", "GuardReport", "RecentDecision"]


@dataclass(frozen=True)
class RecentDecision:
    """One of the last decisions. ``instance`` is -1 for HOLD, SHED and KEEP; ``advised`` -1 without an answer."""

    seq: int
    now_s: float
    kind: str
    request: int
    choice: int
    instance: int
    advised: int
    reason: str
    latency_us: float
    generation: int


@dataclass(frozen=True)
class DriftReport:
    """Typical actual ÷ predicted of one metric over ``requests``."""

    metric: str
    ratio: float
    alarm: bool
    requests: int


@dataclass(frozen=True)
class GuardReport:
    """:param breaker: ``closed``, ``half_open`` or ``open``; ``breaker_code`` 0, 1, 2
    :param reasons: decisions by what answered them
    :param latency_edges_s: upper edges; ``latency_counts`` has one more entry, for what is above
    :param role_results: (from, to, result) → changes
    :param records_dropped: of the decision log, None without one
    """

    policy: dict[str, Any]
    generation: int
    mode: str
    isolated: bool
    fallback: str
    deadline_us: float
    breaker: str
    breaker_code: int
    breaker_trips: int
    reasons: dict[str, int]
    latency_edges_s: tuple[float, ...]
    latency_counts: tuple[int, ...]
    latency_sum_s: float
    drift: tuple[DriftReport, ...]
    advised: int
    agreed: int
    role_results: dict[tuple[str, str, str], int]
    role_drain_s: float
    role_changes_halted: bool
    records_written: int | None = None
    records_dropped: int | None = None
    log_writing: bool = False
    recent: tuple[RecentDecision, ...] = field(default=(), repr=False)

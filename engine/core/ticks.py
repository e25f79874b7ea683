"""Seconds from outside as the ticks that the core counts in: never an overflow, never a time that wraps around."""

from __future__ import annotations

import numpy as np

from engine.errors import SlalomError
from engine.latency.evaluate import FOREVER, TICKS_PER_S

#: So long a stretch of simulated time may be counted from one origin: 49 days. With targets and step times added, its
#: stamps still fit 64 bits.
LONGEST_STRETCH_S = 49 * 86_400.0
#: A simulated run may last ten years: its origin moves (``env.surrogate.long``).
LONGEST_RUN_S = 3653 * 86_400.0


def check_length(field: str, seconds: np.ndarray, most: float = LONGEST_RUN_S) -> None:
    """:raises SlalomError: arrivals later than ``most`` seconds"""
    last = float(seconds.max()) if len(seconds) else 0.0
    if not last <= most:
        fix = f"a run may last {most / 86400:g} days; cut it into parts, take fewer requests or a higher rate"
        raise SlalomError(field, f"{last / 86400:.4g} days", fix)


def arrival_ticks(field: str, seconds: np.ndarray) -> np.ndarray:
    """Arrivals in ticks of one stretch, int64.

    :param field: named where they are refused
    :raises SlalomError: they last longer
    """
    check_length(field, seconds, LONGEST_STRETCH_S)
    ticks: np.ndarray = np.rint(seconds * TICKS_PER_S).astype(np.int64)
    return ticks


def duration_ticks(seconds: np.ndarray, least: int = 0) -> np.ndarray:
    """Durations in ticks, int64, from ``least`` to FOREVER (26 days)."""
    with np.errstate(over="ignore"):
        most = np.minimum(seconds * TICKS_PER_S, float(FOREVER))
    ticks: np.ndarray = np.maximum(np.rint(most).astype(np.int64), least)
    return ticks

"""The guard's last decisions as plain data, for administration and dashboard."""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.columns import Kind
from engine.live.guard import RecentDecision
from policies.guard.log.writer import REASONS

#: Upper edges of the histogram of decision times.
LATENCY_EDGES_S = (5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)

#: A decision as it is kept: seq, ticks, kind, request, choice, instance, advised, reason, nanoseconds, generation.
Taken = tuple[int, int, int, int, int, float, int, int, int, int]


def plain(decisions: Sequence[Taken]) -> tuple[RecentDecision, ...]:
    """The same in words and seconds."""
    return tuple(
        RecentDecision(
            seq,
            now * 1e-12,
            Kind(kind).name.lower(),
            request,
            choice,
            int(instance),
            advised,
            REASONS[reason],
            took / 1e3,
            generation,
        )
        for seq, now, kind, request, choice, instance, advised, reason, took, generation in decisions
    )

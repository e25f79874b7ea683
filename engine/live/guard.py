"""What the engine asks of a guard, and what a guard says about itself for metrics, administration and dashboard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.core.policy import Policy
from engine.live.observer import Observer

if TYPE_CHECKING:  # it knows torch, and nobody here needs that
    from engine.live.request import Ticket


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


class Guard(Protocol):
    """Stands between the scheduler and a policy (``policies.guard``). All of it belongs to the loop's thread."""

    #: Answers in the policy's place, by reason.
    fallbacks: Counter[str]

    @property
    def needs(self) -> int:
        """What to compute for the next decision (bit mask of Need)."""
        ...

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        ...

    def adopt(self, ready: Any) -> None:
        """Let another policy answer from the next decision on."""
        ...

    def attach(self, requests: Sequence[Ticket | None], observers: list[Observer]) -> None:
        """Learn how the ``requests`` of slots are called outside, and subscribe to their ends."""
        ...

    def report(self, recent: int = 0) -> GuardReport:
        """How things stand; any thread may ask. ``recent``: decisions to include."""
        ...

    def prepare(self, policy: Policy, *, rehearse: bool = False) -> Any:
        """What :meth:`adopt` takes, made in any thread; ``rehearse`` refuses a policy that fails at once."""
        ...

    def freeze(self, *, restore: bool = False) -> None:
        """At once: the fallback rule places and nothing else changes, or goes back to the start."""
        ...

    def thaw(self, *, advisory: bool | None = None) -> None:
        """Let the policy decide again, or only advise."""
        ...

    def close(self) -> None:
        """The engine has ended."""
        ...

    def choose(
        self, kind: int, subject: int, now: int, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray
    ) -> int:
        """The row to carry out; always an allowed one. ``now``: ticks since the clock was made."""
        ...

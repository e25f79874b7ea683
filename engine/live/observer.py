"""Who wants to hear of a live cluster's work: metrics, a guard, a probe of its steps, the client of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.live.door import TurnedAway
from engine.live.fate import Fate

if TYPE_CHECKING:  # it knows torch, and nobody here needs that
    from engine.live.request import Ticket


class Observer:
    """Hears everything and does nothing. Override what is of interest and append to ``Scheduler.observers``.

    All of it is called in the scheduler's thread. One that raises is logged, and nothing else happens.
    """

    def step_started(self, i: int, l: int) -> None:
        """The step that is written in lane (i, l) begins. Steps and links of engines of others are not heard of."""

    def step_ended(self, i: int, l: int, run_s: float, cpu_s: float) -> None:
        """The step of lane (i, l) is booked; seconds that the lane's thread ran it, and of its CPU meanwhile."""

    def link_started(self, link: int, blocks: int) -> None:
        """A transfer of ``blocks`` KV blocks begins on ``link``."""

    def link_ended(self, link: int) -> None:
        """The transfer of ``link`` is booked. One that failed is not: its request starts over."""

    def request_begun(self, request: Ticket, record: np.void) -> None:
        """The first token of ``request`` is out; ``record`` is its REQUEST record."""

    def request_ended(self, request: Ticket, record: np.void, finish: str, fate: Fate) -> None:
        """``request`` ended; ``finish``: why (``engine.live.fate``), empty where its last token has said it."""

    def request_refused(self, away: TurnedAway, fate: Fate) -> None:
        """A request was not even taken in."""

    def settled(self) -> None:
        """Everything that follows from an event is under way, and every sink was told of it."""

"""What the event loop saw of the engines, on its way to the scheduler: ends and first tokens at once, others soon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from engine.remote.request import RemoteRequest

#: A client's token goes out first: the scheduler, woken at once, would compete with that for the interpreter.
_AT_ONCE_S, _SOON_S = 0.001, 0.005


class End(IntEnum):
    """What became of an attempt."""

    NONE = 0  # it goes on
    DONE = 1  # the answer is complete
    REFUSED = 2  # the engine takes no more at present: nothing is wrong with the request
    LOST = 3  # the engine, or the connection, is gone, or failed
    REJECTED = 4  # the engine answered that the request is wrong, which its client has been told
    BROKEN = 5  # it failed after its client had got a part
    PREFILLED = 6  # the prompt is computed, its KV waits for an engine to go on with it


class Report(NamedTuple):
    """What was seen of attempt ``attempt``: ``total`` tokens until ``stamp`` (``WallClock.stamp``), maybe its end."""

    request: RemoteRequest
    attempt: int
    total: int
    stamp: int
    end: End = End.NONE


class Reports:
    """Collects what is seen and hands it over together, so that a burst of tokens wakes the scheduler once.

    :param hand_over: takes the reports, in order
    """

    def __init__(self, hand_over: Callable[[list[Report]], None]) -> None:
        self._hand_over = hand_over
        self._seen: list[Report] = []
        self._timer: asyncio.TimerHandle | None = None
        self._urgent = False

    def put(self, report: Report, *, urgent: bool) -> None:
        """Pass ``report`` on; ``urgent``: others may wait for what the scheduler makes of it."""
        self._seen.append(report)
        if self._timer is not None and (self._urgent or not urgent):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._urgent = urgent
        self._timer = asyncio.get_running_loop().call_later(_AT_ONCE_S if urgent else _SOON_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        seen, self._seen = self._seen, []
        self._hand_over(seen)

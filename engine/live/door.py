"""The door of an engine: how many requests are inside, and who was turned away."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # it knows torch, and nobody here needs that
    from engine.live.request import Ticket


class Overloaded(RuntimeError):
    """Every request slot is taken: try again later."""


class Unavailable(RuntimeError):
    """The engine is shutting down, or has stopped."""


class TurnedAway(NamedTuple):
    """A request that was not taken in; ``reason`` is one of those of :mod:`engine.live.fate`."""

    number: int
    cls: int
    reason: str


class Door:
    """Knows the requests that were handed in and have not ended, also those that the scheduler has not met yet.

    :ivar lock: held while one is handed in, so that :meth:`engine.live.engine.Engine.drain` knows that nothing follows
    :ivar inside: they; under the lock
    :ivar refused: those turned away that nobody has booked yet; under the lock
    """

    def __init__(self) -> None:
        self.inside: set[Ticket] = set()
        self.lock = threading.Lock()
        self.refused: list[TurnedAway] = []
        self._none = threading.Condition(self.lock)

    @property
    def n(self) -> int:
        """How many they are."""
        return len(self.inside)

    def leaves(self, request: Ticket) -> None:
        """``request`` has ended."""
        with self.lock:
            self.inside.discard(request)
            if not self.inside:
                self._none.notify_all()

    def forget(self) -> set[Ticket]:
        """Nobody will end those that are left: who they are."""
        with self.lock:
            left, self.inside = self.inside, set()
            self._none.notify_all()
        return left

    def take_refused(self) -> list[TurnedAway]:
        """Those turned away since the last call."""
        with self.lock:
            found, self.refused = self.refused, []
        return found

    def wait_for_none(self, timeout_s: float) -> None:
        with self.lock:
            self._none.wait_for(lambda: not self.inside, min(timeout_s, threading.TIMEOUT_MAX))

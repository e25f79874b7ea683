"""The door of an engine: how many requests are inside, and who was turned away."""

from __future__ import annotations

import threading
from typing import NamedTuple


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
    """Counts the requests that were handed in and have not ended.

    :ivar lock: held while one is handed in, so that :meth:`engine.live.engine.Engine.drain` knows that nothing follows
    :ivar refused: those turned away that nobody has booked yet; under the lock
    """

    def __init__(self) -> None:
        self.n, self.lock = 0, threading.Lock()
        self.refused: list[TurnedAway] = []
        self._none = threading.Condition(self.lock)

    def one_less(self) -> None:
        with self.lock:
            self.n -= 1
            if self.n == 0:
                self._none.notify_all()

    def forget(self) -> None:
        """Nobody will end those that are left."""
        with self.lock:
            self.n = 0
            self._none.notify_all()

    def take_refused(self) -> list[TurnedAway]:
        """Those turned away since the last call."""
        with self.lock:
            found, self.refused = self.refused, []
        return found

    def wait_for_none(self, timeout_s: float) -> None:
        with self.lock:
            self._none.wait_for(lambda: self.n == 0, min(timeout_s, threading.TIMEOUT_MAX))

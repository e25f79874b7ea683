"""Who a worker works for: one ``serve`` at a time, by a lease that its owner renews.

Two owners would make their KV pools over each other and read each other's keys and values: both would go on answering,
with wrong tokens. So an owner is given an epoch, every message carries it, and a message of any other epoch is refused.
A lease that has run out may be taken over; while nobody takes it, its holder keeps it, since a slow network is no loss.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

#: Seconds without a word from the owner after which another may take the worker over.
LEASE_S = 30.0


class Disowned(ConnectionError):
    """The worker works for somebody else."""


class Lease:
    """The lease of one worker; any thread may ask.

    :param clock: seconds, monotonic
    """

    def __init__(self, seconds: float = LEASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._lock = threading.Lock()
        self._epoch: str | None = None
        self._heard = 0.0

    def take(self) -> str:
        """A new epoch, whose messages alone are answered from now on.

        :raises Disowned: somebody else holds the worker and was heard of within the lease
        """
        with self._lock:
            silent = self._clock() - self._heard
            if self._epoch is not None and silent < self._seconds:
                raise Disowned(
                    f"another serve uses this worker and was heard of {silent:.0f} s ago: stop that one first, "
                    f"or wait {self._seconds - silent:.0f} s if it is gone"
                )
            self._epoch, self._heard = secrets.token_hex(8), self._clock()
            return self._epoch

    def check(self, epoch: object) -> None:
        """Note that the owner lives.

        :raises Disowned: ``epoch`` is not the owner's
        """
        with self._lock:
            if self._epoch is None or epoch != self._epoch:
                raise Disowned("this worker works for another serve, or for none")
            self._heard = self._clock()

    def give_back(self, epoch: str | None) -> bool:
        """The owner has hung up; True if it was the owner."""
        with self._lock:
            ours = epoch is not None and epoch == self._epoch
            if ours:
                self._epoch = None
            return ours

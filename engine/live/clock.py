"""Two clocks for one runtime: one that waits for the world, one that jumps to the next event.

An event is a *slot* (what ended, see :mod:`engine.core.events.slots`) and, with the wall clock, what came of it. Time
is an int64 count of ticks of 1 ps since the clock was made, or since the origin that it was last moved to.
"""

from __future__ import annotations

import queue
import time
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from engine.core.origin import FAR
from engine.core.state import NEVER

_TICKS_PER_NS = 1000


class Event(NamedTuple):
    """What happened: the slot that it belongs to, and the outcome that its poster attached."""

    slot: int
    outcome: Any = None


class Clock(Protocol):
    """Tells the time and which event is next."""

    @property
    def now(self) -> int:
        """Ticks at the event being handled."""
        ...

    @property
    def origin(self) -> int:
        """Ticks from the clock's beginning to the origin that ``now`` counts from."""
        ...

    @property
    def is_far(self) -> bool:
        """Whether the origin should be moved (:mod:`engine.core.origin`) before anything else."""
        ...

    def move(self, shift: int) -> None:
        """Count from an origin ``shift`` ticks later."""
        ...

    def at(self, slot: int, when: int) -> None:
        """Let the event of ``slot`` happen at time ``when`` (``NEVER``: not at all), not when it was to before."""
        ...

    def is_set(self, slot: int) -> bool:
        """Whether the event of ``slot`` has a time."""
        ...

    def next(self) -> Event | None:
        """The next event, whose time is then ``now``; None when nothing will ever happen."""
        ...


class VirtualClock:
    """Jumps from event to event: earliest first, the lowest slot on a tie, none after ``horizon``."""

    origin, is_far = 0, False  # a simulated run has one origin

    def __init__(self, n_slots: int, horizon: int = NEVER) -> None:
        self.now = 0
        self._when = [NEVER] * n_slots
        self._horizon = min(horizon, NEVER - 1)

    def move(self, shift: int) -> None:
        raise NotImplementedError("simulated time has one origin")

    def at(self, slot: int, when: int) -> None:
        self._when[slot] = when

    def is_set(self, slot: int) -> bool:
        return self._when[slot] < NEVER

    def next(self) -> Event | None:
        when = min(self._when)
        if when > self._horizon:
            return None
        slot = self._when.index(when)
        self.now, self._when[slot] = when, NEVER
        return Event(slot)


class WallClock:
    """Real time. Threads :meth:`post` what ended; timers are for the few events that only time brings."""

    def __init__(self) -> None:
        self._zero = time.perf_counter_ns()
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._timers: dict[int, int] = {}
        self._timers_turn = False  # the last event was a post
        self.now = self.origin = 0

    def read(self) -> int:
        """The time at this moment; any thread may ask. Stale once the origin has moved: to keep, :meth:`stamp`."""
        return self.ticks(self.stamp())

    @staticmethod
    def stamp() -> int:
        """This moment, whatever the origin, for :meth:`ticks`."""
        return time.perf_counter_ns()

    def ticks(self, stamp: int) -> int:
        """The time at ``stamp``."""
        return (stamp - self._zero) * _TICKS_PER_NS

    def uptime_s(self) -> float:
        """Seconds since the clock was made."""
        return (self.read() + self.origin) * 1e-12

    @property
    def is_far(self) -> bool:
        return self.now > FAR

    def move(self, shift: int) -> None:
        self._zero += shift // _TICKS_PER_NS
        self._timers = {slot: when - shift for slot, when in self._timers.items()}
        self.now -= shift
        self.origin += shift

    def post(self, slot: int, outcome: Any = None) -> None:
        """Report an event from any thread."""
        self._inbox.put(Event(slot, outcome))

    def at(self, slot: int, when: int) -> None:
        if when == NEVER:
            self._timers.pop(slot, None)
        else:
            self._timers[slot] = when

    def is_set(self, slot: int) -> bool:
        return slot in self._timers

    def next(self) -> Event:
        """The next event. Timers and posts take turns: neither may starve the other on a slow machine."""
        while True:
            slot = min(self._timers, key=self._timers.__getitem__, default=-1)
            wait_s = (self._timers[slot] - self.read()) * 1e-12 if slot >= 0 else None
            due = wait_s is not None and wait_s <= 0.0
            event = None
            if not (due and self._timers_turn):
                with suppress(queue.Empty):
                    event = self._inbox.get(block=not due, timeout=None if due else wait_s)
            if event is None:
                if not due:
                    continue
                del self._timers[slot]
                event = Event(slot)
                self._timers_turn = False
            else:
                self._timers_turn = True
            self.now = self.read()
            return event

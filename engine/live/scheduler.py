"""What serves requests by the scheduling core, wherever they are computed: its life, its door, its administration."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Self, TypeVar

from engine.core.events import interrupt
from engine.core.kinds import Role
from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.errors import SlalomError
from engine.latency.evaluate import to_ticks
from engine.live.book import RequestBook
from engine.live.clock import WallClock
from engine.live.door import Door, Overloaded, TurnedAway, Unavailable
from engine.live.fate import DRAINING, OVERLOADED, UNAVAILABLE
from engine.live.guard import Guard
from engine.live.integrity import faults
from engine.live.request import ABORT, ERROR, Ticket
from engine.live.runtime import Runtime

_log = logging.getLogger("slalom.engine")
T = TypeVar("T")


class Scheduler:
    """A thread that drives the core, and a door that any thread may use. Serves requests until :meth:`close`.

    :param state: an idle cluster
    :param policy: answers its decisions
    :param clock: shared with ``instances``
    :param guard: stands between scheduler and policy, and already has ``policy``
    :ivar observers: hear of steps, transfers and requests; add to it before :meth:`start`
    :ivar max_tokens: tokens of the longest request, prompt and answer
    :ivar failure: what ended the scheduler's loop
    """

    max_tokens: int

    def __init__(
        self,
        state: ClusterState,
        policy: Policy,
        instances: RequestBook[Any],
        clock: WallClock,
        guard: Guard | None = None,
    ) -> None:
        self.state, self.clock = state, clock
        self.instances = instances
        self.runtime = Runtime(state, policy, instances, clock, guard)
        self.observers = instances.observers
        if guard is not None:
            guard.attach(instances.requests, self.observers)
        self._open = Door()
        instances.on_gone = self._open.leaves
        self._accepting = True
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to serve."""
        self._thread.start()
        return self

    @property
    def accepting(self) -> bool:
        """Whether a new request would be taken."""
        return self._accepting and not self.is_dead

    @property
    def is_dead(self) -> bool:
        """Whether it will never take a request again, however long one waits."""
        return self.failure is not None or len(self.instances.lost) >= len(self.state.inst)

    @property
    def n_open(self) -> int:
        """Requests handed in and not yet ended."""
        return self._open.n

    def drain(self) -> None:
        """Take no new request; those that are here go on."""
        with self._open.lock:
            self._accepting = False

    def undrain(self) -> None:
        """Take requests again after :meth:`drain`."""
        self._accepting = True

    def close(self, timeout_s: float = 30.0) -> bool:
        """Shut down, in this order:

        1. no new request is taken;
        2. those that are here get ``timeout_s`` seconds to end, then they are aborted;
        3. the scheduler's loop ends, once no lane and no link is busy;
        4. the lanes' threads end, then the links';
        5. SM partitions are given back, connections closed.

        :return: False when a thread hangs (it is a daemon, so the process can still exit)
        """
        self.drain()
        self._open.wait_for_none(timeout_s)

        def last_call() -> None:
            self.instances.doom_all(ABORT)
            self.instances.closing = True

        if self._thread.is_alive():
            self.clock.post(self.runtime.slots.arrival, last_call)
            self._thread.join(min(5.0 + timeout_s, threading.TIMEOUT_MAX))
        ended = self.instances.stop() and not self._thread.is_alive()
        if ended and self.runtime.guard is not None:
            self.runtime.guard.close()
        return ended

    def _serve(self) -> None:
        try:
            self.runtime.run()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            with self._open.lock:  # whoever is not inside by now is turned away
                self.failure = error
            _log.critical("the scheduler stopped", exc_info=error)
            for request in self._open.forget():
                self.instances.last_words(request, ERROR)
            self.instances.announce(lambda observer: observer.settled())

    # -- requests ----------------------------------------------------------------------------------------------

    def _hand_in(self, request: Ticket) -> None:
        """Let ``request`` arrive.

        :raises Overloaded: all slots are taken
        :raises Unavailable: draining, closed or broken
        """
        with self._open.lock:
            self._admit(request)
            self._open.inside.add(request)
            request.handed_in = self.clock.stamp()
            # Posted under the lock: after drain() nothing follows, so close() speaks the last word.
            self.clock.post(self.runtime.slots.arrival, partial(self.instances.admit, request))

    def _admit(self, request: Ticket) -> None:
        """Raise where ``request`` is not taken, and have it booked. Under the door's lock."""
        if self.accepting and self._open.n < len(self.state.req):
            return
        reason = OVERLOADED if self.accepting else UNAVAILABLE if self.is_dead or self._accepting else DRAINING
        away = TurnedAway(request.number, request.cls, reason)
        if not self._thread.is_alive():  # nobody else books anything any more
            self.instances.refuse(away)
        else:
            self._open.refused.append(away)
            if len(self._open.refused) == 1:  # one event for all that are turned away until it is handled
                self.clock.post(self.runtime.slots.arrival, self._book_refused)
        if reason == OVERLOADED:
            raise Overloaded(f"{self._open.n} requests are open")
        raise Unavailable(self._why_not())

    def _book_refused(self) -> None:
        for away in self._open.take_refused():
            self.instances.refuse(away)

    def _why_not(self) -> str:
        if self.failure is not None:
            return "the engine failed"
        if self._accepting:
            return "every instance is lost"
        return "no new request is taken: the server is drained or shuts down"

    def abort(self, request: Ticket) -> None:
        """The caller is gone; the request's blocks are free at once, or when the step in flight has ended."""
        self.clock.post(self.runtime.slots.arrival, partial(self.instances.doom, request, ABORT))

    def abort_all(self) -> None:
        """Nobody waits any longer: every open request ends now."""
        self.clock.post(self.runtime.slots.arrival, partial(self.instances.doom_all, ABORT))

    # -- administration ------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Run ``function`` in the scheduler's thread, where the state is at rest, and return what it returns.

        :raises Unavailable: the scheduler does not run, or did not answer in time
        """
        if not self._thread.is_alive():
            raise Unavailable("the engine is not running")
        future: Future[T] = Future()

        def carry_out() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self.clock.post(self.runtime.slots.arrival, carry_out)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            raise Unavailable("the engine did not answer in time") from error

    def set_policy(self, policy: Any) -> None:
        """Let ``policy`` decide from now on, or what a guard has prepared of it."""
        self.call(lambda: self.runtime.set_policy(policy))

    def set_role(self, instance: int, role: Role) -> None:
        """Drain ``instance`` and give it ``role``; returns once the change has begun.

        :raises SlalomError: no such instance, a role that this engine has not, a change under way, or too few
            instances left for a phase
        """
        if not 0 <= instance < len(self.state.inst):
            raise SlalomError("instance", instance, f"instances go from 0 to {len(self.state.inst) - 1}")
        allowed = int(self.state.cluster[0]["roles_allowed"])
        if not (allowed >> role) & 1:
            known = ", ".join(each.name.lower() for each in Role if (allowed >> each) & 1)
            raise SlalomError("role", role.name.lower(), f"instances here may change to: {known}")
        if not self.call(lambda: bool(interrupt.request_role(self.runtime.words, instance, int(role)))):
            fix = "wait for the change under way, and leave enough instances to prefill and to decode"
            raise SlalomError("role", role.name.lower(), fix)

    def integrity_faults(self) -> list[str]:
        """What is wrong with the books of an idle engine; empty when all is well, or something is being served."""

        def check() -> list[str]:
            return faults(self.state)

        return self.call(check) if self._thread.is_alive() else check()


def target_ticks(name: str, seconds: float | None) -> int:
    """A target in ticks, 0 when there is none."""
    if seconds is None:
        return 0
    if not (math.isfinite(seconds) and 0.0 < seconds <= 86400.0):
        raise SlalomError(f"{name} target", seconds, "give a positive number of seconds, at most a day")
    return max(int(to_ticks(seconds)), 1)  # 0 would mean that of the class

"""The scheduler's side of engines of others: what it hands to whom, and how it books what was seen of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from engine.core.events import observed
from engine.core.kinds import LaneKind, RequestState
from engine.core.state import ClusterState
from engine.live.book import RequestBook
from engine.live.clock import WallClock
from engine.live.request import ABORT, ERROR, UNPLACEABLE
from engine.remote.reports import End, Report
from engine.remote.request import Leg, RemoteRequest

_log = logging.getLogger("slalom.remote")
_PREFILLING = int(RequestState.PREFILLING)
#: Times that an engine may fail a request before it ends with an error.
_MOST_FAILURES = 3

#: Requests to send, each with the number of the attempt and the engine.
Orders = list[tuple[RemoteRequest, int, int]]


class RemoteInstances(RequestBook[RemoteRequest]):
    """Instances that are engines of others. Everything belongs to the scheduler's thread.

    :param send: lets the event loop begin attempts; any thread may call it
    :ivar retried: attempts that were tried again elsewhere, by reason
    """

    def __init__(self, state: ClusterState, clock: WallClock, send: Callable[[Orders], None], *, salt: int) -> None:
        super().__init__(state, clock, salt=salt)
        self._send = send
        self._prefilled: set[RemoteRequest] = set()  # by one engine, and not yet sent to the one that goes on
        self._orders: Orders = []
        self.retried: Counter[str] = Counter()

    # -- what the runtime starts -----------------------------------------------------------------------------

    def start_lane(self, i: int, l: int) -> None:
        """Send the prompts that the core has just handed to engine ``i``."""
        for r in self._state.prefills[i, : self._state.lane[i, l]["n_prefills"]].tolist():
            request = self.requests[r]
            assert request is not None
            if request in self._prefilled:  # it could not move, for want of room, and is computed here
                self._prefilled.discard(request)
                observed.forget_tokens(self._words, r)
                request.engine = -1
            if request.engine < 0:
                self._order(request, i, Leg.PREFILL if request.apart else Leg.WHOLE)

    def _order(self, request: RemoteRequest, i: int, leg: Leg) -> None:
        request.source = request.engine if leg == Leg.DECODE and i != request.engine else -1
        request.engine, request.leg = i, leg
        request.attempt += 1
        self._orders.append((request, request.attempt, i))

    def start_link(self, link: int) -> None:
        """The engine that decodes pulls the KV by itself, when it is sent the request."""
        while observed.book_moved(self._words, link, self._clock.now):
            pass

    def _go_on(self) -> None:
        """Send the prompts that are computed to whom the policy has chosen, once there is room."""
        for request in list(self._prefilled):
            record = self._state.req[request.slot] if request.slot >= 0 else None
            if record is None or request.ended or request.doomed is not None:
                self._prefilled.discard(request)
            elif record["state"] == RequestState.RUNNING:
                self._prefilled.discard(request)
                self._order(request, int(record["inst"]), Leg.DECODE)
            elif record["state"] == RequestState.INBOUND and self._state.inst[record["dest"]]["lost"]:
                self._place_anew(request)  # nobody else could decode it: whoever computes it next goes on
                self._clock.post(self._slots.arrival, lambda: None)

    def start_switch(self, i: int) -> None:
        raise AssertionError("roles of engines of others change in the core, once they have drained")

    def lane_ends(self, i: int, l: int, outcome: Any) -> None:
        raise AssertionError("engines of others end no step here")

    def link_ends(self, link: int, outcome: Any) -> None:
        raise AssertionError("no KV moves between engines of others")

    def settled(self) -> None:
        super().settled()
        if self._prefilled:
            self._go_on()
        if self._orders:
            orders, self._orders = self._orders, []
            self._send(orders)

    def is_over(self) -> bool:
        """Closed, and nothing is left to do."""
        cluster = self._state.cluster[0]
        idle = bool((self._state.lane["kind"] == LaneKind.IDLE).all())
        return self.closing and bool(cluster["n_done"] == cluster["n_sent"]) and idle

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Nothing computes here."""
        return True

    # -- what was seen ---------------------------------------------------------------------------------------

    def hear(self, reports: list[Report]) -> None:
        """Book what the event loop saw."""
        for report in reports:
            request = report.request
            if request.slot >= 0 and not request.ended and report.attempt == request.attempt:
                self._book(request, report)

    def _book(self, request: RemoteRequest, report: Report) -> None:
        r, now = request.slot, self._clock.ticks(report.stamp)
        fresh = report.total - request.counted
        if report.end == End.PREFILLED:
            observed.book_prefilled(self._words, r, now)
            self._prefilled.add(request)
            return
        if request.leg == Leg.DECODE and not request.counted and (report.total > 0 or report.end == End.DONE):
            observed.book_delivered(self._words, r, now)
            request.counted, fresh = 1, fresh - 1
            self._tell_first(request)
        if fresh > 0:
            request.counted = report.total
            if self._state.req["state"][r] == _PREFILLING:
                observed.book_first_token(self._words, r, now)
                fresh -= 1
                self._tell_first(request)
            observed.book_tokens(self._words, r, fresh, now)
        if report.end == End.DONE:
            observed.book_end(self._words, r, max(report.total, request.counted, 1), now)
            self._tell_first(request)
        elif report.end in (End.REFUSED, End.LOST):
            self._again(request, report.end)
        elif report.end != End.NONE:
            self.doom(request, ABORT if report.end == End.REJECTED else ERROR)

    def _tell_first(self, request: RemoteRequest) -> None:
        """Its first token is out: of several attempts only one counts."""
        if not request.begun:
            request.begun = True
            self._tell_begun(request)

    def _again(self, request: RemoteRequest, why: End) -> None:
        """Place ``request`` anew: nobody has got anything of it."""
        request.engine = -1
        request.failures += why == End.LOST
        if request.leg == Leg.DECODE and not request.counted:
            request.apart &= why == End.REFUSED  # a hand-over that failed is not tried again
        observed.forget_tokens(self._words, request.slot)
        request.counted = 0
        if request.failures > _MOST_FAILURES:
            self.doom(request, ERROR)
            return
        self.retried[why.name.lower()] += 1
        observed.take_back(self._words, request.slot, self._clock.now, 1)

    def _abort(self, request: RemoteRequest) -> bool:
        observed.take_back(self._words, request.slot, self._clock.now, 0)
        return True

    # -- engines come and go -----------------------------------------------------------------------------------

    def set_away(self, i: int, away: bool) -> None:
        """Engine ``i`` takes no requests at present, or does again; what waits for it is placed anew."""
        observed.set_away(self._words, i, int(away))
        if not away:
            return
        for request in self._here(RequestState.WAITING, RequestState.INBOUND):
            record = self._state.req[request.slot]
            if record["dest" if record["state"] == RequestState.INBOUND else "inst"] == i:
                self._place_anew(request)

    def _place_anew(self, request: RemoteRequest) -> None:
        """Nobody computes ``request`` at present, and what is left of it is given up."""
        if request in self._prefilled:
            self._prefilled.discard(request)
            observed.forget_tokens(self._words, request.slot)
            request.apart = False
        request.engine = -1
        observed.take_back(self._words, request.slot, self._clock.now, 1)

    def give_up_waiting(self) -> None:
        """No engine has answered for long: whoever waits for one hears so."""
        waiting = (RequestState.PLACING, RequestState.HELD, RequestState.WAITING)
        for request in self._here(*waiting, RequestState.HANDOVER, RequestState.INBOUND):
            self.doom(request, UNPLACEABLE)

    def _here(self, *states: RequestState) -> list[RemoteRequest]:
        """Open requests in one of ``states``, in order of arrival."""
        found = [q for q in self.requests if q is not None and self._state.req["state"][q.slot] in states]
        return sorted(found, key=lambda request: request.number)

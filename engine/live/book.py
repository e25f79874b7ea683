"""The book of requests that a scheduler's loop keeps: slots, arrivals, ends from outside, and who is told what."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from engine.core import loop
from engine.core.events import interrupt
from engine.core.events.slots import slots_of
from engine.core.kinds import RequestState
from engine.core.setup import blank_requests
from engine.core.state import NEVER, ClusterState
from engine.jit.rows import addresses
from engine.live.clock import WallClock
from engine.live.door import TurnedAway
from engine.live.fate import fate_of, fate_of_refused
from engine.live.observer import Observer
from engine.live.request import ERROR, SHED, UNPLACEABLE, Delta, Ticket

_log = logging.getLogger("slalom.instance")
T = TypeVar("T", bound=Ticket)


def _nobody(delta: Delta) -> None:
    """The sink of a request that has ended."""


class RequestBook(ABC, Generic[T]):
    """What the instances of a live cluster share, wherever they compute. Everything belongs to the loop's thread.

    :param salt: of the prefix hashes
    :ivar requests: by slot
    :ivar observers: hear of everything here, in order
    :ivar lost: instances that will never compute again
    """

    def __init__(self, state: ClusterState, clock: WallClock, *, salt: int) -> None:
        self._state, self._clock = state, clock
        self._words, self._slots = addresses(state), slots_of(len(state.inst), len(state.link))
        self.observers: list[Observer] = []
        slots = len(state.req)
        self.requests: list[T | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._blank = blank_requests(1)
        self._hash_room = len(state.hashes) // slots
        self._salt, self._hash_tokens = np.uint64(salt), int(state.cluster[0]["hash_tokens"])
        self._n_done = state.cluster["n_done"].data  # reading a record takes several times as long
        self._doomed: set[T] = set()
        self.lost: set[int] = set()
        self._deltas: list[tuple[T, Delta]] = []
        self._seen_done = 0
        self.transfer_failures = 0
        self.closing = False
        self.on_gone: Callable[[Ticket], None] = lambda request: None  # it has heard its last

    # What an :class:`engine.live.runtime.Instances` does beside:

    @abstractmethod
    def start_lane(self, i: int, l: int) -> None: ...

    @abstractmethod
    def start_link(self, link: int) -> None: ...

    @abstractmethod
    def start_switch(self, i: int) -> None: ...

    @abstractmethod
    def lane_ends(self, i: int, l: int, outcome: Any) -> None: ...

    @abstractmethod
    def link_ends(self, link: int, outcome: Any) -> None: ...

    @abstractmethod
    def is_over(self) -> bool: ...

    def without_graph(self) -> Counter[str]:
        """Steps that were launched one by one where graphs were asked for, by reason; where there are any graphs."""
        return Counter()

    @abstractmethod
    def stop(self, timeout_s: float = 5.0) -> bool:
        """End what computes, after the loop has ended; False when it did not end in time."""

    # -- requests ------------------------------------------------------------------------------------------

    def arrives(self, outcome: Callable[[], Any]) -> None:
        """Carry out what another thread asked for."""
        try:
            outcome()
        except Exception:  # whoever asked may have been wrong; the others are served
            _log.exception("something asked from outside failed")

    def admit(self, request: T) -> None:
        """Give a new request a slot and let it arrive; there must be a free one."""
        r = request.slot = self._free.pop()
        try:
            self._fill_in(r, request)
        except Exception:  # something in it that no check knows: it ends alone
            _log.exception("request %s cannot be taken in", request.id)
            self.requests[r] = None
            self._state.req[r : r + 1] = self._blank
            self._free.append(r)
            self._tell_end(request, ERROR)
            self.refuse(TurnedAway(request.number, request.cls, ERROR))
            return
        loop.begin(self._words, r, max(self._clock.ticks(request.handed_in), 0))

    def _fill_in(self, r: int, request: T) -> None:
        """Write ``request`` into slot ``r``."""
        self.requests[r] = request
        self._state.req[r : r + 1] = self._blank
        record = self._state.req[r]
        record["prompt"], record["output"] = request.n_prompt, request.max_tokens
        record["cls"], record["ttft_slo"], record["tpot_slo"] = request.cls, request.ttft_slo, request.tpot_slo
        record["hash_off"], record["priority"] = r * self._hash_room, request.priority
        self._hash(request, request.n_prompt)
        request.due = request.n_prompt  # its first token is something to book

    def doom(self, request: T, reason: str) -> None:
        """End ``request`` from outside: at once, or when what is in flight with it has ended."""
        if request.ended or request.doomed is not None:
            return
        request.doomed = reason
        self._doomed.add(request)
        self._sweep()

    def doom_all(self, reason: str) -> None:
        """:meth:`doom` every request that is here."""
        for request in [r for r in self.requests if r is not None]:
            self.doom(request, reason)

    def _sweep(self) -> None:
        """End the doomed that nothing in flight holds any more."""
        for request in list(self._doomed):
            if self._abort(request):
                self._doomed.remove(request)

    def _abort(self, request: T) -> bool:
        """End ``request`` in the cluster; False while something in flight uses its blocks."""
        return bool(interrupt.abort(self._words, request.slot, self._clock.now))

    def _hash(self, request: T, tokens: int) -> None:
        """Extend the prefix hashes of ``request`` to what its first ``tokens`` tokens fill."""
        size = self._hash_tokens
        request.due = (tokens // size + 1) * size if size else NEVER
        if size and request.reuses:
            loop.chain_hashes(self._words, request.slot, request.tokens, tokens, self._salt)

    # -- what callers hear ---------------------------------------------------------------------------------

    def settled(self) -> None:
        for request, delta in self._deltas:
            if request.doomed is None:
                try:  # here and not in a function of its own: there is one for every token
                    request.sink(delta)
                except Exception:
                    self._is_deaf(request)
                    self.doom(request, ERROR)
        self._deltas.clear()
        done = self._n_done[0]
        if done != self._seen_done:
            self._seen_done = done
            self._part_with_ended()
        self.announce(lambda observer: observer.settled())

    def _part_with_ended(self) -> None:
        """Tell the callers of requests that ended, and free their slots."""
        ended = np.flatnonzero(self._state.req["state"] >= RequestState.FINISHED).tolist()
        for r in ended:
            request = self.requests[r]
            if request is not None:
                self._part_with(request, r)

    def _part_with(self, request: T, r: int) -> None:
        record = self._state.req[r]
        finish = ""  # its last token has said it
        if request.doomed is not None:
            finish = request.doomed
        elif record["state"] == RequestState.SHED:
            finish = SHED
        elif record["state"] == RequestState.FAILED:
            finish = UNPLACEABLE
        request.cached_tokens = int(record["cached"])
        fate = fate_of(record, finish)
        self.announce(lambda observer: observer.request_ended(request, record, finish, fate))
        self.requests[r] = None
        self._doomed.discard(request)
        self._free.append(r)
        self._state.req[r : r + 1] = self._blank
        self._tell_end(request, finish)

    def _tell_end(self, request: T, finish: str) -> None:
        request.ended = True
        if finish:
            self.last_words(request, finish)
        request.sink = _nobody  # whoever listens may hold the request, and need not for ever
        self.on_gone(request)

    def refuse(self, away: TurnedAway) -> None:
        """Book somebody who was not taken in."""
        fate = fate_of_refused(away.reason)
        self.announce(lambda observer: observer.request_refused(away, fate))

    def announce(self, what: Callable[[Observer], None]) -> None:
        """Tell every observer; metrics and logs are no reason to stop serving."""
        for observer in self.observers:
            try:
                what(observer)
            except Exception:
                _log.exception("%s could not take in what it was told", type(observer).__name__)

    def _tell_begun(self, request: T) -> None:
        """The first token of ``request`` is out."""
        record = self._state.req[request.slot]
        self.announce(lambda observer: observer.request_begun(request, record))

    def last_words(self, request: T, finish: str) -> None:
        """Tell the caller of ``request`` why it ended."""
        try:
            request.sink(Delta(None, "", finish))
        except Exception:
            self._is_deaf(request)

    @staticmethod
    def _is_deaf(request: T) -> None:
        """The caller of ``request`` failed (call it in the handler): it is told nothing more."""
        _log.exception("whoever listens to request %s failed", request.id)
        request.sink = _nobody

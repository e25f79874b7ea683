"""All engines of a router, in its event loop: begins attempts, watches who answers, and ejects who does not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.remote.instances import Orders
from engine.remote.lengths import Lengths
from engine.remote.reports import Report, Reports
from engine.remote.request import RemoteRequest
from engine.remote.upstream import Upstream

_log = logging.getLogger("slalom.remote")
_MOST_BACKOFF_S = 10.0


@dataclass(frozen=True)
class Patience:
    """How long the router bears with engines, seconds.

    :param period_s: between two looks at an engine; one that gave anything since the last look is well
    :param timeout_s: it may take that long to answer ``/health``; after two looks in vain it is ejected
    :param stall_s: an ejected engine's streams that have begun may be silent for that long before they end in an error
    :param outage_s: requests wait that long while no engine answers
    :param poll_s: between two looks at its ``/metrics``
    """

    period_s: float = 1.0
    timeout_s: float = 3.0
    stall_s: float = 30.0
    outage_s: float = 10.0
    poll_s: float = 5.0


@dataclass(frozen=True)
class EngineReport:
    """One engine, for metrics. ``requests``: at it now; ``reported``: by its own count, with ``disagreement``."""

    url: str
    up: bool
    requests: int
    ejections: int
    refusals: int
    reported: float | None
    disagreement: float | None


class Fleet:
    """:param engines: address of each, by instance, and whether a connection to it may be used again
    :ivar out: no engine has answered for ``outage_s``
    """

    def __init__(self, engines: Sequence[tuple[str, bool]], patience: Patience | None = None) -> None:
        self._addresses, self._patience = engines, patience or Patience()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lengths = Lengths()
        self.engines: list[Upstream] = []
        self.out = False
        self._out_since: float | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self.hear: Callable[[list[Report]], None] = lambda reports: None
        self.set_away: Callable[[int, bool], None] = lambda i, away: None
        self.give_up_waiting: Callable[[], None] = lambda: None
        self.abandon: Callable[[RemoteRequest], None] = lambda request: None

    async def open(self) -> None:
        """Begin, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        reports = Reports(lambda seen: self.hear(seen))
        self.engines = [
            Upstream(i, url, keeps, reports, self._troubled, self._busy, self.learn)
            for i, (url, keeps) in enumerate(self._addresses)
        ]
        self._watchers = [self._loop.create_task(self._watch(engine)) for engine in self.engines]

    async def close(self) -> None:
        """Hang up on everybody."""
        for watcher in self._watchers:
            watcher.cancel()
        for engine in self.engines:
            await engine.close()

    # -- from the scheduler's thread -------------------------------------------------------------------------

    def send(self, orders: Orders) -> None:
        """Begin attempts; any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin, orders)

    def tell_end(self, request: RemoteRequest, reason: str) -> None:
        """``request`` ended without an answer; any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._end, request, reason)

    def _begin(self, orders: Orders) -> None:
        for request, number, i in orders:
            if request.gone:
                self.abandon(request)
            else:
                self.engines[i].begin(request, number)

    def _end(self, request: RemoteRequest, reason: str) -> None:
        request.answer.end(failure=reason)
        if request.cancel is not None:
            request.cancel()

    def leave(self, request: RemoteRequest) -> None:
        """Nobody waits for ``request`` any more. In the event loop."""
        request.gone = True
        if request.answer.ended or request.finish is not None:
            return  # its end is on the way to the scheduler
        self.abandon(request)
        if request.cancel is not None:
            request.cancel()

    def learn(self, request: RemoteRequest, usage: dict[str, Any]) -> None:
        """An engine counted: the next guess of a prompt's length is better for it."""
        tokens = usage.get("prompt_tokens")
        if isinstance(tokens, int):
            request.n_prompt = tokens
            if request.letters > 0:
                self.lengths.learn(request.letters, tokens, chat="messages" in request.body)

    # -- who answers -----------------------------------------------------------------------------------------

    def _troubled(self, engine: Upstream, why: str) -> None:
        """A connection failed: the engine gets nothing more until it answers."""
        self._eject(engine, why)
        assert self._loop is not None
        self._watchers.append(self._loop.create_task(self._ask(engine)))

    async def _ask(self, engine: Upstream) -> None:
        self._watchers = [watcher for watcher in self._watchers if not watcher.done()]
        if engine.away and await engine.healthy(self._patience.timeout_s):
            self._readmit(engine)

    def _busy(self, engine: Upstream, after_s: float) -> None:
        """It refuses: ask it for nothing for a while."""
        assert self._loop is not None
        if not engine.away:
            after_s = min(max(0.05, after_s), _MOST_BACKOFF_S)
            engine.rest = self._loop.call_later(after_s, self._rested, engine)
            self._set_away(engine, True)

    def _rested(self, engine: Upstream) -> None:
        engine.rest = None
        self._readmit(engine)

    def _eject(self, engine: Upstream, why: str) -> None:
        if not engine.away or engine.rest is not None:
            if engine.rest is not None:
                engine.rest.cancel()
                engine.rest = None
            _log.warning("engine %d (%s) is away: %s", engine.index, engine.url, why)
            engine.ejections += 1
            self._set_away(engine, True)
        for other in self.engines:
            for attempt in list(other.attempts):  # those that wait for its KV get none either
                if (other is engine or attempt.source == engine.index) and not attempt.request.told:
                    other.give_up(attempt)

    def _readmit(self, engine: Upstream) -> None:
        if engine.away and engine.rest is None:
            _log.info("engine %d (%s) is back", engine.index, engine.url)
            self._set_away(engine, False)

    def _set_away(self, engine: Upstream, away: bool) -> None:
        engine.away = away
        self.set_away(engine.index, away)
        if not all(other.away and other.rest is None for other in self.engines):  # who refuses does answer
            self._out_since, self.out = None, False
        elif self._out_since is None:
            self._out_since = time.monotonic()

    async def _watch(self, engine: Upstream) -> None:
        in_vain, polled = 0, 0.0
        while True:
            try:
                if time.monotonic() - polled > self._patience.poll_s and not engine.away:
                    polled = time.monotonic()
                    await engine.compare(self._patience.timeout_s)
                await asyncio.sleep(self._patience.period_s)
                in_vain = await self._look(engine, in_vain)
            except Exception:  # whatever an engine answers: it is looked at again
                _log.exception("engine %d could not be looked at", engine.index)

    async def _look(self, engine: Upstream, in_vain: int) -> int:
        """Whether ``engine`` answers; returns how many looks in a row were in vain."""
        if not engine.away and time.monotonic() - engine.heard < self._patience.period_s:
            in_vain = 0
        elif await engine.healthy(self._patience.timeout_s):
            in_vain = 0
            self._readmit(engine)
        else:
            in_vain += 1
            if in_vain >= 2:
                self._eject(engine, "it does not answer")
        self._end_silent(engine)
        self._look_at_outage()
        return in_vain

    def _end_silent(self, engine: Upstream) -> None:
        """Streams of an engine that is away end when they have been silent for long."""
        for attempt in list(engine.attempts):
            if engine.away and time.monotonic() - attempt.heard > self._patience.stall_s:
                engine.give_up(attempt)

    def _look_at_outage(self) -> None:
        if self._out_since is not None and time.monotonic() - self._out_since > self._patience.outage_s:
            if not self.out:
                _log.error("no engine has answered for %g s", self._patience.outage_s)
            self.out = True
            self.give_up_waiting()

    def report(self) -> list[EngineReport]:
        """How things stand; any thread may ask."""
        return [
            EngineReport(e.url, not e.away, len(e.attempts), e.ejections, e.refusals, e.reported, e.disagreement)
            for e in self.engines
        ]

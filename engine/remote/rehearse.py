"""A rehearsal without engines, so that everything is compiled before a client waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.core.events import observed
from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.live.clock import WallClock
from engine.live.guard import Guard
from engine.remote.fleet import Fleet
from engine.remote.instances import Orders
from engine.remote.reports import End, Report
from engine.remote.request import Leg, RemoteRequest
from engine.remote.router import Router

#: Slots that a rehearsal needs.
REHEARSED = 2


class _Echo(Fleet):
    """Answers every second request at once, and leaves the others."""

    def send(self, orders: Orders) -> None:
        for request, number, _ in orders:
            if request.leg == Leg.PREFILL:
                self.hear([Report(request, number, 0, WallClock.stamp(), End.PREFILLED)])
            elif request.body["answered"]:
                self.hear([Report(request, number, n, WallClock.stamp()) for n in (1, 3)])
                self.hear([Report(request, number, 4, WallClock.stamp(), End.DONE)])

    def tell_end(self, request: RemoteRequest, reason: str) -> None:
        pass


def rehearse(state: ClusterState, policy: Policy, guard: Guard | None, timeout_s: float = 300.0) -> None:
    """Route two requests on a scratch ``state``: one is answered, one is taken back and hung up on."""
    fleet = _Echo([("", False)] * len(state.inst))
    router = Router(state, policy, fleet, guard=guard).start()

    def begin(answered: bool) -> RemoteRequest:
        options: dict[str, Any] = {"n_letters": 64, "tokens": np.arange(32), "known": True, "headers": {}}
        return router.submit("", {"answered": answered}, whole=True, strip_usage=True, **options)

    def settle(step: Callable[[], Any]) -> None:
        router.call(step, timeout_s)

    def compile_rest() -> None:
        """What may not be met below; on these it changes nothing."""
        words = router.runtime.words
        observed.book_moved(words, 0, 0)
        observed.book_prefilled(words, len(state.req) - 1, 0)
        observed.book_delivered(words, len(state.req) - 1, 0)
        observed.forget_tokens(words, len(state.req) - 1)

    try:
        settle(compile_rest)
        begin(True)
        left = begin(False)
        settle(lambda: router.instances.set_away(0, True))
        settle(lambda: router.instances.set_away(0, False))
        settle(lambda: router.instances.hear([Report(left, left.attempt, 0, WallClock.stamp(), End.REFUSED)]))
        router.abort(left)
    finally:
        router.close(timeout_s)

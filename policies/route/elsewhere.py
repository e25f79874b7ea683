"""Requests that somebody else sends to their engines: the scheduler says where, and is told what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import SlalomError
from engine.live.clock import WallClock
from engine.remote.discover import EngineFacts
from engine.remote.fleet import Fleet
from engine.remote.instances import Orders
from engine.remote.reports import End, Report
from engine.remote.request import RemoteRequest
from engine.remote.router import Router
from engine.server.routed import terms_of
from policies.route.command import Desk, Options, open_desk
from policies.route.unseen import UnseenInstances

#: Targets in a body, where no header names them (:func:`engine.server.protocol.targets_of`).
_TARGETS = {"slo_ttft_ms": "x-slo-ttft-ms", "slo_tpot_ms": "x-slo-tpot-ms"}
#: Settings of ``route`` that are about a decision; the others are about engines that it talks to itself.
_SETTINGS = (
    "policy", "profile", "order", "kv_tokens", "max_batch", "chunk_tokens", "prefix_cache", "max_requests", "ttft_ms",
    "tpot_ms", "classes", "shed", "fallback", "deadline_us", "advisory", "guard_config", "decision_log",
)  # fmt: skip


class Refused(Exception):
    """No engine will get the request; ``reason`` as in :class:`engine.remote.request.Answer`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Asked:
    """A request, and the engine that it is to be sent to once that is known."""

    def __init__(self, request: RemoteRequest) -> None:
        self.request = request
        self.place: asyncio.Future[int] = asyncio.get_running_loop().create_future()


def asked_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Mapping[str, str]]:
    """(body, headers) among the arguments of a call; None for a call that asks for no answer of a model.

    A body is a mapping, or a pydantic model, with ``prompt`` or ``messages``. Headers are an argument ``headers``, or
    the ``headers`` of an argument. Targets may stand in either, headers first.
    """
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, Any] = {}
    for name, value in [*enumerate(args), *kwargs.items()]:
        found = value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
        if isinstance(found, Mapping) and name == "headers":
            headers = found
        elif body is None and isinstance(found, Mapping) and ("prompt" in found or "messages" in found):
            body = found
        elif isinstance(getattr(value, "headers", None), Mapping):
            headers = value.headers
    given = {header: str(body[name]) for name, header in _TARGETS.items() if name in body} if body else {}
    return body, given | {str(name).lower(): value for name, value in headers.items()}


class _Elsewhere(Fleet):
    """Engines that somebody else sends requests to. In one event loop."""

    def __init__(self, n: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__([("", False)] * n)
        self._loop = loop
        self.asked: dict[RemoteRequest, Asked] = {}

    def _begin(self, orders: Orders) -> None:
        for request, _, i in orders:
            asked = self.asked.get(request)
            if asked is None:
                self.abandon(request)
            elif not asked.place.done():
                asked.place.set_result(i)

    def _end(self, request: RemoteRequest, reason: str) -> None:
        asked = self.asked.pop(request, None)
        if asked is not None and not asked.place.done():
            asked.place.set_exception(Refused(reason))


class Dispatcher:
    """Asks the scheduler for whoever sends requests. In the event loop that made it, but for :meth:`close`.

    :param desk: what decides, with an instance for every engine that may ever be there at the same time
    """

    def __init__(self, desk: Desk) -> None:
        n = len(desk.state.inst)
        self._fleet = _Elsewhere(n, asyncio.get_running_loop())
        self._classes = desk.classes
        self._names = [""] * n
        self.router = Router(desk.state, desk.policy, self._fleet, guard=desk.guard, kind=UnseenInstances).start()
        for i in range(n):
            self._fleet.set_away(i, True)

    def set_members(self, names: Sequence[str]) -> list[str]:
        """Who answers now; whoever is new takes the place of somebody who is gone. Returns those without a place."""
        for i, name in enumerate(self._names):
            if name and name not in names:
                self._names[i] = ""
                self._fleet.set_away(i, True)
        left = [name for name in names if name not in self._names]
        for i, name in enumerate(self._names):
            if left and not name:
                self._names[i] = left.pop(0)
                self._fleet.set_away(i, False)
        return left

    def submit(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
        """Let a request arrive.

        :raises SlalomError: as :func:`engine.server.routed.terms_of` and :meth:`engine.remote.router.Router.submit`
        :raises Overloaded: all slots are taken
        :raises Unavailable: the scheduler is closed or broken
        """
        terms = terms_of(body, headers, "messages" if "messages" in body else "prompt", self._classes)
        whole: dict[str, Any] = {"headers": {}, "whole": False, "strip_usage": False}
        asked = Asked(self.router.submit("", dict(body), **whole, **terms))
        self._fleet.asked[asked.request] = asked
        return asked

    async def place(self, asked: Asked) -> str:
        """The engine that the request is to be sent to, which may be a while to come.

        :raises Refused: none will have it
        """
        return self._names[await asyncio.shield(asked.place)]

    def refused(self, asked: Asked) -> None:
        """The engine did not take it: it is placed anew, and :meth:`place` says where."""
        asked.place = asyncio.get_running_loop().create_future()
        self._report(asked, 0, End.REFUSED)

    def progress(self, asked: Asked, prompt_tokens: int, tokens: int) -> None:
        """Its engine has given ``tokens`` so far; it counted the prompt, too, where ``prompt_tokens`` is not 0."""
        if prompt_tokens > 0:
            self._fleet.learn(asked.request, {"prompt_tokens": prompt_tokens})
        self._report(asked, tokens, End.NONE)

    def done(self, asked: Asked) -> None:
        """Its answer is complete."""
        self._fleet.asked.pop(asked.request, None)
        self._report(asked, 0, End.DONE)

    def leave(self, asked: Asked) -> None:
        """Nobody waits for it any more."""
        self._fleet.asked.pop(asked.request, None)
        self.router.abort(asked.request)

    def _report(self, asked: Asked, total: int, end: End) -> None:
        request = asked.request
        self._fleet.hear([Report(request, request.attempt, total, WallClock.stamp(), end)])

    def close(self, timeout_s: float = 1.0) -> None:
        """End the scheduler; any thread."""
        self.router.close(timeout_s)


def desk_for(replicas: int, given: Mapping[str, Any]) -> Desk:
    """What decides for up to ``replicas`` engines. Takes seconds, and where code is new a minute.

    :param given: settings of ``route``, by their names (``docs/remote.md``); ``profile`` must be among them
    :raises SlalomError: a setting that is none, or is wrong
    """
    unknown = sorted(set(given) - set(_SETTINGS))
    if unknown:
        raise SlalomError(f"request_router_kwargs.{unknown[0]}", given[unknown[0]], f"use {', '.join(_SETTINGS)}")
    if not given.get("profile"):
        raise SlalomError("request_router_kwargs.profile", "", "name a latency profile: nothing is timed here")
    if not 0 < replicas <= 1024:
        raise SlalomError("request_router_kwargs.replicas", replicas, "say how many replicas there may be, 1 to 1024")
    return open_desk(Options("", **given), [EngineFacts(f"replica {i}", "") for i in range(replicas)])

"""The door of the server: how many connections there may be, and how long each may take to say what it wants.

A client that sends its request byte by byte, or does not read its answer, costs a descriptor and memory for as long as
it likes; at the limit of descriptors nobody comes in any more. So every wait of a connection has an end, and their
number one that lies below what the process may open.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import SlalomError
from engine.server.protocol import error_body

_log = logging.getLogger("slalom.server")
_MOST = 4096  # connections, where nobody says and the process may open as many
_OTHER_FILES = 256  # model, logs, workers, libraries
_SAID: dict[int, tuple[str, str, list[str]]] = {
    408: ("Request Timeout", "invalid_request_error", []),
    503: ("Service Unavailable", "overloaded", ["retry-after: 1"]),
}
_LINGER_S = 5.0  # what is written last may take so long to be read
_LINGERING = 64  # connections beyond the limit that get to read why; others are cut


@dataclass(frozen=True)
class Limits:
    """What a connection may take.

    :param connections: at a time; further ones get status 503
    :param header_s: seconds for the head of a request, from its connection or its first byte; then status 408
    :param body_s: seconds for its body, from the end of the head; then status 408
    :param idle_s: seconds between an answer and the next request, and without reading what is sent
    """

    connections: int = 1024
    header_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0


def room_for(connections: int) -> int:
    """How many connections this process may hold, other files left out; its limit of descriptors is raised for them.

    :param connections: asked for; 0: as many as there is room for, up to 4096
    :raises SlalomError: the machine does not allow so many
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (connections or _MOST) + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections or _MOST
    if connections or soft < 2 * _OTHER_FILES:
        fix = f"this process may open {soft} files, {_OTHER_FILES} for other things: choose less, or raise ulimit -Hn"
        raise SlalomError("--max-connections", connections, fix)
    return soft - _OTHER_FILES


def configure(app: Any, limits: Limits, **settings: Any) -> uvicorn.Config:
    """Settings of a server with this door; ``settings`` are further ones of uvicorn's."""
    door = type("Door", (_Door,), {"limits": limits})
    return uvicorn.Config(
        app,
        http=door,
        ws="none",
        proxy_headers=False,  # a client is who connects; what a header says of it is not believed
        timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]  # it is added to a clock
        log_level="warning",
        access_log=False,
        **settings,
    )


def quiet_accepting(loop: asyncio.AbstractEventLoop, period_s: float = 10.0) -> None:
    """Say only now and then that there are no descriptors for new connections; the loop would say it 2000 times a
    second."""
    said = -period_s

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        if "accept" not in context.get("message", "") or not isinstance(context.get("exception"), OSError):
            loop.default_exception_handler(context)
        elif time.monotonic() - said >= period_s:
            said = time.monotonic()
            _log.error("no new connections for now: %s", context["exception"])

    loop.set_exception_handler(handle)


class _Door(H11Protocol):
    """One connection. ``_awaited`` is what it must send before its timer ends, ``_stalled`` runs while it reads
    nothing."""

    limits: ClassVar[Limits]
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _awaited: str | None = None
    _over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._part(503, f"the server holds {self.limits.connections} connections; come back later")
        else:
            self._await("head")

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        super().data_received(data)
        self._look()

    def _look(self) -> None:
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._await("head")
        else:
            self._await("body" if cycle.more_body else None)

    def _await(self, what: str | None) -> None:
        """Start the timer for ``what``; bytes that belong to the same thing do not start it anew."""
        if what == self._awaited:
            return
        self._awaited = what
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if what is not None:
            seconds = self.limits.header_s if what == "head" else self.limits.body_s
            self._timer = self.loop.call_later(
                seconds, self._part, 408, f"the {what} of the request took longer than {seconds:g} s"
            )

    def _part(self, status: int, why: str) -> None:
        """Say why and hang up: what the client still sends is read away, since it would not get to read this."""
        self._over = True
        phrase, kind, again = _SAID[status]
        body = json.dumps(error_body(why, kind, status))
        head = [f"HTTP/1.1 {status} {phrase}", "content-type: application/json", f"content-length: {len(body)}", *again]
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not self.transport.is_closing():
            if answering or len(self.connections) > self.limits.connections + _LINGERING:
                self.transport.abort()
                return
            self.transport.write("\r\n".join([*head, "connection: close", "", body]).encode())
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def on_response_complete(self) -> None:
        self._await(None)  # until a first byte of the next request the server's own timer runs
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(self.limits.idle_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.idle_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

"""Sizes at the door: what is too large is refused before anybody works on it, so that the event loop stays free."""

from __future__ import annotations

from collections import deque
from typing import Any

from starlette.responses import JSONResponse

from engine.server.protocol import error_body

_ROOM = 512 * 1024  # for everything but the prompt: tools, messages' frames
_BYTES_PER_TOKEN = 16
_SWALLOWED = 64 * 1024 * 1024  # of a body that is refused, so that its sender gets to read why


def most_bytes(max_tokens: int) -> int:
    """The largest body worth reading where a request has at most ``max_tokens`` tokens."""
    return _ROOM + _BYTES_PER_TOKEN * max_tokens


class BodyLimit:
    """ASGI middleware: requests whose body is larger than ``most`` bytes get status 413 and are kept nowhere."""

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection's request, as ASGI has it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        kept: deque[Any] = deque()
        n, more = 0, True
        while more and n <= _SWALLOWED:
            message = await receive()
            if message["type"] != "http.request":
                return  # it hung up
            n += len(message.get("body", b""))
            more = message.get("more_body", False)
            if n > self._most:
                kept.clear()
            else:
                kept.append(message)
        if n > self._most:
            text = f"body: got more than {self._most} bytes; no prompt that large can be served here"
            body = error_body(text, "invalid_request_error", 413)
            await JSONResponse(body, 413, headers={"connection": "close"})(scope, receive, send)
            return

        async def replay() -> Any:
            return kept.popleft() if kept else await receive()

        await self._app(scope, replay, send)

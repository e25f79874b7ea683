"""What is said of a request that ended without its answer, or before its time; and how a client hangs up."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from engine.live.request import ABORT, SHED, UNPLACEABLE
from engine.server.protocol import error_body

RETRY_AFTER = {"Retry-After": "1"}


async def hung_up(http: Request) -> None:
    """Returns when the client has closed its connection (its request was read before)."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def refusal(finish: str | None) -> JSONResponse:
    """The answer to a request that ended without one."""
    if finish == SHED:
        body = error_body("the request was shed: its targets cannot be met now", "overloaded", 429)
        return JSONResponse(body, 429, headers=RETRY_AFTER)
    if finish == UNPLACEABLE:
        body = error_body("no instance can hold this request", "unavailable", 503)
        return JSONResponse(body, 503, headers=RETRY_AFTER)
    body = failure(finish)
    return JSONResponse(body, int(body["error"]["code"]))


def failure(finish: str | None) -> dict[str, Any]:
    """What is said of a request that ended before its time."""
    if finish == ABORT:
        return error_body("the engine is shutting down", "unavailable", 503)
    return error_body("the request failed in the engine", "server_error", 500)

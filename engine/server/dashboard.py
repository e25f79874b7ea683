"""``/dashboard``: one self-contained page, and the server-sent events that keep it up to date. It only shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, StreamingResponse

from engine.live.scheduler import Scheduler
from engine.server.view import Attainment, view

_PERIOD_S = 1.0
_UNATTENDED = 10  # events
_PAGE = Path(__file__).with_name("dashboard.html")


def add_dashboard(app: FastAPI, engine: Scheduler, model: str, met: Attainment) -> None:
    """Add ``/dashboard``, ``/dashboard/state`` (JSON, once) and ``/dashboard/events`` (every second)."""
    page = _PAGE.read_text(encoding="utf-8")

    def now() -> bytes:
        found = orjson.dumps({"model": model, **view(engine, met)}, option=orjson.OPT_SERIALIZE_NUMPY)
        for end in ("\x85", "\u2028", "\u2029"):  # names may hold them, and clients split lines there
            found = found.replace(end.encode(), f"\\u{ord(end):04x}".encode())
        return found

    @app.get("/dashboard", response_class=HTMLResponse)
    def dashboard() -> str:
        return page

    @app.get("/dashboard/state")
    def state() -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(now())
        return found

    @app.get("/dashboard/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(
            _events(app, now), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


async def _events(app: FastAPI, now: Any) -> AsyncIterator[bytes]:
    """One event a period, until the client leaves or the server stops: an open page must not delay that.

    ``app.state.server`` says so; where nobody set it, the page connects anew now and then.
    """
    yield b"retry: 500\n\n"
    server = getattr(app.state, "server", None)
    sent = 0
    while not server.should_exit if server is not None else sent < _UNATTENDED:
        yield b"data: " + now() + b"\n\n"
        sent += 1
        await asyncio.sleep(_PERIOD_S)

"""A server's run: its door, its signals, its end."""

from __future__ import annotations

import signal
import sys
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from engine.server.door import Limits, configure, room_for

__all__ = ["limits_of", "run_server"]


def limits_of(options: Any) -> Limits:
    """What a connection may take, by the options of ``serve`` or ``route``.

    :raises SlalomError: the machine does not allow so many connections
    """
    seconds = options.header_timeout_s, options.body_timeout_s, options.idle_timeout_s
    return Limits(room_for(options.max_connections), *seconds)


def run_server(application: FastAPI, door: socket, drain_s: float, limits: Limits) -> None:
    """Serve ``application`` on a reserved address until somebody stops it."""
    # The server stops cleanly on SIGTERM and then raises it once more: by then it means "done", not "killed".
    signal.signal(signal.SIGTERM, _done)
    # By the end of the timeout those that are cut off have heard so.
    last = int(drain_s) + 6
    config = configure(application, limits, timeout_graceful_shutdown=last)
    server = uvicorn.Server(config)
    application.state.server = server  # open dashboards end when it does
    server.run(sockets=[door])
    if not server.started:
        sys.exit(3)  # it has said why


def _done(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)

"""A server's run: its door, its signals, its end."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from engine.jit.kernel import is_warm
from engine.jit.warm import told
from engine.live.scheduler import Scheduler
from engine.server.door import Limits, configure, room_for
from engine.server.ending import reserve
from engine.server.keys import find_key


def open_and_serve(
    options: Any, build: Callable[[], tuple[Scheduler, FastAPI]], says: Callable[[Scheduler], str]
) -> None:
    """Serve what ``build`` makes until somebody stops it; the address is reserved before that.

    :param options: those of ``serve`` or ``route``
    :param says: what is served, for standard error
    :raises SlalomError: a bad key file, an address that is taken, or more connections than the machine allows
    """
    find_key(options.api_key, options.api_key_file)  # said before anything is loaded
    limits = _limits_of(options)
    door = reserve(options.host, options.port)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    cold = not is_warm("engine.core.loop")
    with told("compiling the scheduling core for this machine, once") if cold else nullcontext():
        scheduler, application = build()
    where = f"http://{options.host}:{door.getsockname()[1]}"
    print(f"{says(scheduler)} on {where} with policy {scheduler.runtime.policy.name}", file=sys.stderr)
    _run(application, door, options.drain_s, limits)


def _limits_of(options: Any) -> Limits:
    """What a connection may take, by the options of ``serve`` or ``route``.

    :raises SlalomError: the machine does not allow so many connections
    """
    seconds = options.header_timeout_s, options.body_timeout_s, options.idle_timeout_s
    return Limits(room_for(options.max_connections), *seconds)


def _run(application: FastAPI, door: socket, drain_s: float, limits: Limits) -> None:
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

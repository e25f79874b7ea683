"""How a server begins and ends: its address is taken before the model is loaded, and its last requests hear so."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from engine.errors import SlalomError
from engine.live.scheduler import Scheduler

_log = logging.getLogger("slalom.server")
_LOOK_S = 0.05


def reserve(host: str, port: int) -> socket.socket:
    """A socket bound to the address, on which nobody listens yet.

    :raises SlalomError: no such address here, or somebody has the port
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise SlalomError("--host", host, f"no address of this machine ({error})") from error
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        fix = f"cannot listen on {host} there ({error.strerror}); choose another, or 0 for any"
        raise SlalomError("--port", port, fix) from error
    found.set_inheritable(True)
    return found


async def say_goodbye(engine: Scheduler, state: Any, drain_s: float) -> None:
    """Once the server is told to stop: no new request, and ``drain_s`` later those still open end with an answer.

    :param state: of the application; where it names no ``server`` there is nothing to watch
    """
    while not (server := getattr(state, "server", None)) or not server.should_exit:
        await asyncio.sleep(_LOOK_S)
    engine.drain()
    _log.info("stopping: %d requests have %g s to end", engine.n_open, drain_s)
    await asyncio.sleep(drain_s)
    if engine.n_open:
        _log.warning("%d requests are cut off", engine.n_open)
    engine.abort_all()

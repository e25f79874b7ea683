"""Waiting for what happens elsewhere: in another thread, or in a server of another process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for ``condition``."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.002)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def healthy(url: str) -> bool:
    """Whether a server answers at ``url``, and is well."""
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=20.0).status_code == 200
    except httpx.TransportError:
        return False

"""Mock engines in processes of their own, which tests kill, stop and start again, and a router in front of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from waiting import free_port, healthy, until

from policies.route import Options, build

ROOT = Path(__file__).resolve().parents[2]
MOCK = ROOT / "eval" / "benchmarks" / "mock_engine.py"
PROFILE = "smollm2-cpu"


class Mock:
    """A mock engine at one address."""

    def __init__(self, prefill_s: float = 0.005, token_s: float = 0.005) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._times = [f"--prefill-s={prefill_s}", f"--token-s={token_s}"]
        self.client = httpx.Client(base_url=self.url, timeout=20.0, trust_env=False)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Mock:
        self.process = subprocess.Popen([sys.executable, str(MOCK), str(self.port), *self._times])
        return self

    def wait(self) -> Mock:
        until(partial(healthy, self.url))
        return self

    def kill(self) -> None:
        """End it by its process id, whatever it does."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def set(self, **values: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.client.post("/control", json=values).json()
        return found

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.resume()
            self.kill()
        self.client.close()


@contextmanager
def mocks(n: int, **times: float) -> Iterator[list[Mock]]:
    """``n`` mock engines that answer."""
    made = [Mock(**times).start() for _ in range(n)]
    try:
        yield [mock.wait() for mock in made]
    finally:
        for mock in made:
            mock.close()


class Routed:
    """A router in a thread, and a client for it."""

    def __init__(self, engines: Sequence[str], **options: Any) -> None:
        quick = {"drain_s": 5.0, "health_s": 0.1, "health_timeout_s": 0.3, "profile": PROFILE}
        self.router, app = build(Options(",".join(engines), **(quick | options)))
        config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
        self.server = app.state.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name and labels as they are written."""
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        assert self.router.failure is None
        assert self.router.n_open == 0
        assert self.router.integrity_faults() == []


@contextmanager
def routed(engines: Sequence[Mock], **options: Any) -> Iterator[Routed]:
    """A router in front of ``engines``, whose books must balance in the end."""
    server = Routed([engine.url for engine in engines], **options)
    try:
        yield server
    finally:
        server.close()


def all_at_once(url: str, bodies: Sequence[dict[str, Any]], meanwhile: Callable[[], None] | None = None) -> list[Any]:
    """Send every body (its ``path`` and ``headers`` taken out) at the same time; statuses and texts, in order.

    :param meanwhile: called as soon as all are sent, in a thread
    """

    async def run() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False, limits=limits) as client:
            posts = [
                client.post(body.get("path", "/v1/completions"), json={k: v for k, v in body.items() if k != "path"})
                for body in bodies
            ]
            work = [asyncio.ensure_future(post) for post in posts]
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile)
            return [(answer.status_code, answer) for answer in await asyncio.gather(*work)]

    return asyncio.run(run())

"""What ``route`` costs over the engine asked directly: added time to first token and gap, and 500 streams at once.

The engine is a mock that only waits, in a process of its own, as is the router. Direct and routed runs take turns, and
all are read by the same client. Where ``SLALOM_VLLM_ROUTER`` names the program ``vllm-router``, it takes turns, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from eval.benchmarks.mock_engine import text_of

_STREAMS, _TOKENS, _TURNS, _ROUNDS = 8, 40, 3, 3
_LONG, _COST_ROUNDS = 100, 6
_MANY, _MANY_TOKENS = 500, 20
_PREFILL_S, _TOKEN_S = 0.002, 0.02
_MOCK = Path(__file__).with_name("mock_engine.py")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _process(port: int, *command: str, program: str = sys.executable) -> Iterator[tuple[str, int]]:
    """A process that listens on ``port``; its address and process id, once it answers."""
    line = [program, *command] if program else command
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/health", trust_env=False)
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[-1]} ended") from None
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.kill()
        process.wait()


async def _stream(client: httpx.AsyncClient, k: int, tokens: int) -> tuple[list[float], str]:
    """Seconds from the request to each event of a stream, and its text."""
    body = {"prompt": f"prompt {k}", "max_tokens": tokens, "stream": True}
    begin = time.perf_counter()
    stamps: list[float] = []
    text = b""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for data in response.aiter_raw():
            stamps += [time.perf_counter() - begin] * data.count(b'"choices": [{')
            text += data
    return stamps, text.decode()


async def _at_once(url: str, n: int, tokens: int) -> list[tuple[list[float], str] | BaseException]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, trust_env=False, limits=limits) as client:
        return await asyncio.gather(*(_stream(client, k, tokens) for k in range(n)), return_exceptions=True)


async def _in_turn(url: str, tokens: int) -> list[tuple[list[float], str]]:
    """``_STREAMS`` clients at once, each with one stream after the other; none begins when another does."""

    async def one(client: httpx.AsyncClient, k: int) -> list[tuple[list[float], str]]:
        await asyncio.sleep(k * _TOKEN_S * tokens / _STREAMS)
        return [await _stream(client, k, tokens + k) for _ in range(_TURNS)]

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, trust_env=False, limits=limits) as client:
        found = await asyncio.gather(*(one(client, k) for k in range(_STREAMS)))
    return [stream for streams in found for stream in streams]


def _cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cost(url: str, pid: int) -> dict[str, float]:
    """Processor time of the process per request and per token, from streams of two lengths."""
    used = []
    for tokens in (2, 2 + _LONG):
        begin = _cpu_s(pid)
        for _ in range(_COST_ROUNDS):
            asyncio.run(_at_once(url, _STREAMS, tokens))
        used.append((_cpu_s(pid) - begin) / (_COST_ROUNDS * _STREAMS))
    token = (used[1] - used[0]) / _LONG
    return {"request_ms": 1e3 * (used[0] - 2 * token), "token_us": 1e6 * token}


def _figures(rounds: list[list[Any]]) -> dict[str, list[float]]:
    stamps = [np.asarray(found[0]) for answers in rounds for found in answers]
    return {"ttft": [float(s[0]) for s in stamps], "gap": [float(g) for s in stamps for g in np.diff(s)]}


def _is_whole(found: tuple[list[float], str] | BaseException, k: int, tokens: int) -> bool:
    if isinstance(found, BaseException):
        return False
    words = text_of(f"prompt {k}", tokens).split()
    at = -1
    for word in words:  # each once, in order
        before, at = at, found[1].find(f'" {word}"', at + 1)
        if at <= before:
            return False
    return len(found[0]) == tokens and found[1].count("[DONE]") == 1


@contextmanager
def _stock(engine: str) -> Iterator[dict[str, str]]:
    """vLLM's own router in front of ``engine``, if there is one here."""
    program = os.environ.get("SLALOM_VLLM_ROUTER")
    if not program:
        yield {}
        return
    port = _free_port()
    command = [program, "--worker-urls", engine, "--policy", "round_robin", "--port", str(port)]
    with _process(port, *command, "--prometheus-port", str(_free_port()), program="") as (url, _):
        yield {"vllm_router": url}


def _added(found: dict[str, list[float]], direct: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Percentiles of one way beside those of the direct one, milliseconds."""
    return {
        f"{name}_p{q}_ms": {
            "direct": 1e3 * float(np.percentile(direct[name], q)),
            "routed": 1e3 * float(np.percentile(found[name], q)),
            "added": 1e3 * float(np.percentile(found[name], q) - np.percentile(direct[name], q)),
        }
        for name in ("ttft", "gap")
        for q in (50, 90, 99)
    }


def run() -> dict[str, Any]:
    """The figures; times in milliseconds."""
    engine_port, port = _free_port(), _free_port()
    times = [f"--prefill-s={_PREFILL_S}", f"--token-s={_TOKEN_S}"]
    command = ["-m", "policies.route", "--profile", "llama-8b-a100", "--port", str(port), "--max-requests", "1024"]
    with _process(engine_port, str(_MOCK), str(engine_port), *times) as (engine, _):
        command += ["--engines", engine, "--max-batch", "1024", "--chunk-tokens", "65536", "--deadline-us", "100000"]
        with _process(port, *command) as (router, pid), _stock(engine) as stock:
            rounds: dict[str, list[list[Any]]] = {url: [] for url in (engine, router, *stock.values())}
            for url in rounds:
                asyncio.run(_at_once(url, _STREAMS, 4))
            for _ in range(_ROUNDS):
                for url, found in rounds.items():
                    found.append(asyncio.run(_in_turn(url, _TOKENS)))
            cost = _cost(router, pid)
            direct, routed = _figures(rounds[engine]), _figures(rounds[router])
            many = asyncio.run(_at_once(router, _MANY, _MANY_TOKENS))
    whole = sum(_is_whole(found, k, _MANY_TOKENS) for k, found in enumerate(many))
    return {
        "streams": _STREAMS,
        **_added(routed, direct),
        "gap_mean_ms": {
            "direct": 1e3 * float(np.mean(direct["gap"])),
            "routed": 1e3 * float(np.mean(routed["gap"])),
        },
        **{name: _added(_figures(rounds[url]), direct) for name, url in stock.items()},
        "router_cpu": cost,
        "many_streams": _MANY,
        "many_whole": whole,
        "ok": whole == _MANY,
    }

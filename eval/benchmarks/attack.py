"""A server under attack: many innocent streams, and beside them a client that sends everything that is wrong.

The same streams run twice, without and with the attacker. Nobody innocent may fail or get another answer than alone;
how long ``/health`` takes and how much memory the server holds is told for both.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from engine.jit.sources import ROOT
from eval.benchmarks.growth import growth_of

STREAMS = 200
_ATTACKERS = 4
_PROMPTS = tuple("the gate is open " * n for n in (1, 3, 7, 15, 40, 90))
_ASKED = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}
_START_S, _ANSWER_S = 600.0, 120.0
_MOST_GROWTH_MB = 2.0  # a sample, with the attacker; caches fill in the first half
_SAMPLES = 20

_HUGE = "open the gate " * (6 * 2**20 // 14)
_TEXT = {"prompt": "x", "max_tokens": 4}
_LONG = json.dumps({**_TEXT, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
_BODIES: tuple[dict[str, Any], ...] = (
    {}, {"prompt": []}, {"prompt": None}, {"prompt": ["a", "b"]}, {"prompt": [10**9]}, {"prompt": [-1]},
    {"prompt": {"a": 1}}, {"prompt": "x" * 100_000}, {"prompt": [[1], [2]]}, {"messages": "x"},
    *({**_TEXT, **wrong} for wrong in (
        {"min_tokens": 2, "stop_token_ids": [49152]}, {"stop_token_ids": [-1]}, {"top_k": 10**400}, {"seed": 10**400},
        {"temperature": -1}, {"temperature": "hot"}, {"temperature": 1e308}, {"top_p": 0}, {"top_p": 2}, {"min_p": -1},
        {"max_tokens": 0}, {"max_tokens": -5}, {"max_tokens": 1.5}, {"n": 3}, {"best_of": 4}, {"stop": [""]},
        {"stop": ["a"] * 1000}, {"stop": ["a" * 5000]}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"1": 1e9}},
        {"logit_bias": "x"}, {"logprobs": 99}, {"logprobs": True}, {"presence_penalty": 9}, {"frequency_penalty": "x"},
        {"response_format": {"type": "xml"}}, {"guided_json": {}, "suffix": "x"}, {"model": "gpt-5"},
        {"priority": 2**70}, {"slo_class": "gold"}, {"stream_options": 3}, {"suffix": "x"}, {"top_logprobs": 2},
    )),
)  # fmt: skip
_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": []}, {"messages": [{}]}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"},
    {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}},
    {"messages": [{"role": "user", "content": "x"}] * 3000},
)  # fmt: skip
#: (path, headers, body) of requests that must be refused, and hurt nobody.
BAD: tuple[tuple[str, dict[str, str], bytes], ...] = (
    *(("/v1/completions", {}, json.dumps(body).encode()) for body in _BODIES),
    *(("/v1/chat/completions", {}, json.dumps(body).encode()) for body in _CHATS),
    *(("/v1/completions", {}, raw) for raw in (b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000)),
    *(("/v1/completions", {name: value}, json.dumps(_TEXT).encode()) for name, value in (
        ("x-slo-ttft-ms", "soon"), ("x-slo-tpot-ms", "-1"), ("x-slo-class", "gold"), ("x-slo-ttft-ms", "1e99"))),
    ("/v1/nothing", {}, b"{}"),
    ("/v1/completions", {}, b'{"prompt": "half a pair: \\ud800"}'),
    ("/v1/completions", {}, json.dumps({"prompt": _HUGE, "max_tokens": 4}).encode()),
    ("/v1/chat/completions", {}, json.dumps({"messages": [{"role": "user", "content": _HUGE}]}).encode()),
)  # fmt: skip


async def _exchange(
    port: int, path: str, body: bytes | None, headers: dict[str, str] | None = None, stop_after: int = 0
) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own.

    :param stop_after: hang up after so many bytes of the answer; 0: read all of it
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: localhost", "connection: close"]
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        raw = await (reader.read(stop_after) if stop_after else reader.read())
        return status, _unchunked(raw) if b"transfer-encoding: chunked" in head.lower() else raw
    finally:
        writer.close()


def _unchunked(raw: bytes) -> bytes:
    """The content of a chunked body; what is cut off at its end is left out."""
    found, at = b"", 0
    while (end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:end], 16)
        found += raw[end + 2 : end + 2 + size]
        at = end + 4 + size
    return found


def _text(answer: bytes) -> str:
    """What a stream said in all, if it ended as it should."""
    events = [line[6:] for line in answer.decode().split("\n\n") if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "cut off"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


async def _ask(port: int, prompt: str) -> tuple[int, str]:
    body = json.dumps({"prompt": prompt, "stream": True, **_ASKED}).encode()
    status, answer = await asyncio.wait_for(_exchange(port, "/v1/completions", body), _ANSWER_S)
    return status, _text(answer) if status == 200 else answer.decode(errors="replace")[:200]


async def _streams(port: int, seconds: float, expected: Sequence[str]) -> dict[str, Any]:
    end, counts, wrong = time.monotonic() + seconds, Counter[str](), list[str]()

    async def client(k: int) -> None:
        while time.monotonic() < end:
            which = k % len(_PROMPTS)
            k += 7
            try:
                status, text = await _ask(port, _PROMPTS[which])
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                status, text = 0, repr(error)
            good = status == 200 and text == expected[which]
            counts["served" if good else "failed"] += 1
            if not good and len(wrong) < 10:
                wrong.append(f"status {status}: {text[:120]}")

    await asyncio.gather(*(client(k) for k in range(STREAMS)))
    return {**counts, "wrong": wrong}


async def _attack(port: int, seconds: float) -> dict[str, Any]:
    end, counts, wrong = time.monotonic() + seconds, Counter[str](), list[str]()

    async def attacker(k: int) -> None:
        while time.monotonic() < end:
            path, headers, body = BAD[k % len(BAD)]
            k += _ATTACKERS
            if k % 5 == 0:  # and now and then a good one that is hung up on
                await _exchange(port, "/v1/completions", _LONG, stop_after=9)
                counts["hung up"] += 1
                continue
            try:
                status, answer = await asyncio.wait_for(_exchange(port, path, body, headers), _ANSWER_S)
            except (OSError, EOFError, TimeoutError):
                status, answer = 0, b""
            counts[str(status)] += 1
            if not 400 <= status < 500 and len(wrong) < 10:
                wrong.append(f"{path} {headers} {body[:80]!r}: status {status} {answer[:80]!r}")

    await asyncio.gather(*(attacker(k) for k in range(_ATTACKERS)))
    return {"statuses": dict(sorted(counts.items())), "wrong": wrong}


async def _watch(port: int, seconds: float) -> list[float]:
    """Seconds that ``/health`` took, ten times a second."""
    end, took = time.monotonic() + seconds, []
    while time.monotonic() < end:
        begin = time.perf_counter()
        status, _ = await _exchange(port, "/health", None)
        took.append(time.perf_counter() - begin if status == 200 else _ANSWER_S)
        await asyncio.sleep(0.1)
    return took


def _in_a_process(work: Any, results: Any, name: str, *arguments: Any) -> None:
    results.put((name, asyncio.run(work(*arguments))))


def _phase(port: int, seconds: float, expected: Sequence[str], pid: int, attacked: bool) -> dict[str, Any]:
    """Each part in a process of its own, so that none waits for another's work."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    parts: dict[str, tuple[Any, ...]] = {
        "streams": (_streams, port, seconds, expected),
        "health": (_watch, port, seconds),
    }
    if attacked:
        parts["attacker"] = (_attack, port, seconds)
    processes = [
        context.Process(target=_in_a_process, args=(work, results, name, *rest), daemon=True)
        for name, (work, *rest) in parts.items()
    ]
    for process in processes:
        process.start()
    memory = []
    for _ in range(_SAMPLES):
        time.sleep(seconds / _SAMPLES)
        memory.append(_resident_mb(pid))
    found = dict(results.get(timeout=2 * _ANSWER_S + seconds) for _ in processes)
    for process in processes:
        process.join()
    took = np.array(found.pop("health")) * 1e3
    growth = growth_of(memory[_SAMPLES // 2 :])
    return found | {
        "health_ms": {"median": float(np.median(took)), "p99": float(np.percentile(took, 99)), "n": len(took)},
        "resident_mb": {"first": memory[0], "half": memory[_SAMPLES // 2], "end": memory[-1], "growth": growth.low},
    }


def _resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as status:
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


@contextmanager
def _server(model: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of ``serve`` on two instances of ``model``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "policies.serve", "--model", model, "--instances", "2", "--port", str(port)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
    try:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and process.poll() is None:
            try:
                if asyncio.run(_exchange(port, "/health", None))[0] == 200:
                    break
            except (OSError, EOFError):
                time.sleep(0.2)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60.0)
        except subprocess.TimeoutExpired:
            process.kill()


def run(minutes: float = 3.0, model: str = "dummy:tiny") -> dict[str, Any]:
    """Half of ``minutes`` without, half with the attacker. ``ok`` is false when anybody innocent failed or got another
    answer, when something bad was not refused with a status of 400 to 499, or when memory goes on growing.
    """
    seconds = 30.0 * minutes
    with _server(model) as (port, pid):
        expected = [asyncio.run(_ask(port, prompt))[1] for prompt in _PROMPTS]
        calm = _phase(port, seconds, expected, pid, attacked=False)
        attacked = _phase(port, seconds, expected, pid, attacked=True)
    failed = calm["streams"].get("failed", 0) + attacked["streams"].get("failed", 0)
    grows = attacked["resident_mb"]["growth"] > _MOST_GROWTH_MB
    return {
        "ok": not failed and not attacked["attacker"]["wrong"] and not grows,
        "model": model,
        "streams": STREAMS,
        "bad_requests": len(BAD),
        "seconds": seconds,
        "calm": calm,
        "attacked": attacked,
    }

"""Requests of every kind, damaged in every way: 200 or 4xx in the form that clients know, and the others go on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from contract import EXAMPLES, NASTY, mutants, scrambled, within_limits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import GREEDY, JSON, PROMPT, Served
from waiting import until

from engine.server.door import Limits

PLAIN = {
    "model": None, "prompt": PROMPT, **GREEDY, "max_tokens": 4, "min_tokens": 1, "top_p": 0.9, "top_k": 5, "seed": 1,
    "min_p": 0.1, "logit_bias": {"5": -1.0}, "stop": ["zzz"], "stop_token_ids": [3], "n": 1, "stream": False,
    "stream_options": {"include_usage": True}, "priority": 0, "slo_class": "default", "user": "x", "best_of": 1,
}  # fmt: skip
CHAT = PLAIN | {
    "messages": [{"role": "user", "content": PROMPT}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_completion_tokens": 4, "tools": [{"type": "function"}], "chat_template_kwargs": {"x": 1},
    "response_format": {"type": "text"}, "tool_choice": "auto",
}  # fmt: skip
BODIES = {
    "/v1/completions": PLAIN,
    "/v1/chat/completions": {name: value for name, value in CHAT.items() if name != "prompt"},
    "/admin/role": {"instance": 0, "role": "mixed"},
    "/admin/policy": {"policy": "round_robin"},
    "/admin/mode": {"mode": "active", "restore": False},
}
HEADERS = ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-class", "content-type", "content-length", "accept", "x-request-id"]
START = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Connection: close"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(Limits(header_s=1.0, body_s=1.0, idle_s=5.0), instances=2, max_tokens=64)
    yield server
    server.close()


def check_answer(status: int, body: bytes) -> None:
    assert status == 200 or 400 <= status < 500, body[:300]
    if status == 200:
        return
    error = json.loads(body)["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1500
    assert "Traceback" not in error["message"]


def after(served: Served) -> None:
    """Nothing is left behind, and who asks properly is served."""
    until(lambda: served.engine.n_open == 0)
    answer = served.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 12
    assert served.engine.failure is None
    assert served.engine.accepting


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("path", BODIES)
def test_a_body_with_things_changed(served: Served, path: str, examples: int) -> None:
    @settings(max_examples=examples)
    @given(mutants(BODIES[path]))
    def check(mutant: Any) -> None:
        try:
            raw = json.dumps(mutant).encode()
        except ValueError:
            return  # a number of more digits than anybody writes
        with within_limits():
            answer = served.client.post(path, content=raw, headers=JSON)
        check_answer(
            answer.status_code, b'{"error": {"message": "streamed"}}' if not answer.content else answer.content
        )

    check()
    served.post("/admin/mode", {"mode": "active"})
    after(served)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_header_that_says_anything(served: Served, examples: int) -> None:
    values = [str(value) for value in NASTY if not isinstance(value, int) or abs(value) < 10**300]

    @settings(max_examples=examples)
    @given(st.sampled_from(HEADERS), st.one_of(st.sampled_from(values), st.text(max_size=40)))
    def check(name: str, value: str) -> None:
        said = (
            value.encode("utf-8", errors="replace").replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"").strip()
        )
        raw = json.dumps(PLAIN).encode()
        lines = [
            b"POST /v1/completions HTTP/1.1",
            b"Host: localhost",
            b"Connection: close",
            name.encode() + b": " + said,
        ]
        if name != "content-type":
            lines.append(b"Content-Type: application/json")
        if name != "content-length":
            lines.append(b"Content-Length: %d" % len(raw))
        talk(served, b"\r\n".join([*lines, b"", raw]))

    check()
    after(served)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_bytes_that_are_hardly_http(served: Served, examples: int) -> None:
    raw = json.dumps(PLAIN).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )

    @settings(max_examples=examples)
    @given(scrambled(head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw))
    def check(mutant: bytes) -> None:
        talk(served, mutant)

    check()
    after(served)


def talk(served: Served, raw: bytes) -> None:
    """Say ``raw``, hear until the server hangs up."""
    with within_limits(), socket.create_connection(("127.0.0.1", served.port), 30) as line:
        heard = b""
        try:
            line.sendall(raw)
            line.shutdown(socket.SHUT_WR)
            while piece := line.recv(65536):
                heard += piece
        except OSError:
            return
    if heard:
        head, _, _ = heard.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status == 200 or 400 <= status < 500, heard[:300]

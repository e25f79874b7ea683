"""Everything wrong that the attack sends is refused, and the server goes on as before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from test_server import GREEDY, PROMPT, Served

from eval.benchmarks.attack import _PROMPTS, BAD, _ask, _exchange, _unchunked


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(instances=2)
    yield server
    server.close()


def test_every_bad_request_is_refused_and_hurts_nobody(served: Served) -> None:
    before = served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()["choices"]
    for path, headers, body in BAD:
        status, answer = asyncio.run(_exchange(served.port, path, body, headers))
        assert 400 <= status < 500, (path, headers, body[:80])
        assert b'"error"' in answer
    assert served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()["choices"] == before
    assert served.engine.n_open == 0


def test_the_client_reads_a_stream_to_its_end(served: Served) -> None:
    status, text = asyncio.run(_ask(served.port, _PROMPTS[1]))
    body = {"prompt": _PROMPTS[1], **GREEDY, "max_tokens": 24}
    assert (status, text) == (200, served.post("/v1/completions", body).json()["choices"][0]["text"])
    assert _unchunked(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") == b"abcde"
    assert _unchunked(b"3\r\nabc\r\n9\r\nde") == b"abcde"

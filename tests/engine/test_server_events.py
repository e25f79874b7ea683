"""Server-sent events as the strictest client reads them: lines end at line feeds only, and each token is an event."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from test_server import GREEDY, PROMPT, Served, events

from engine.model.tokenizer import Detokenizer
from engine.server.app import _event

SEPARATORS = "\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def test_no_separator_of_lines_is_left_in_an_event() -> None:
    text = f"a{SEPARATORS}b \u4e2d\u6587 \U0001f600"
    event = _event({"text": text})
    assert event.splitlines() == [event[:-2], ""]
    assert json.loads(event.removeprefix("data: ")) == {"text": text}
    assert "\u4e2d\u6587" in event, "other characters stay as they are"


@pytest.mark.parametrize("stream", [True, False])
def test_text_with_separators_arrives_whole(served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detokenizer, "push", lambda self, token: SEPARATORS)
    body = {"prompt": PROMPT, **GREEDY, "max_tokens": 3, "stream": stream}
    if not stream:
        assert served.post("/v1/completions", body).json()["choices"][0]["text"] == SEPARATORS * 3
        return
    with served.client.stream("POST", "/v1/completions", json=body) as response:
        raw = response.read().decode()
    lines = [line for line in raw.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    found = events(httpx.Response(200, text=raw))
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == SEPARATORS * 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_token_is_an_event(served: Served, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose text waits for the rest of a character, or may begin a stop string."""
    texts = iter(["", "", "\u4e2d", "", "", "ab", "c", ""])
    monkeypatch.setattr(Detokenizer, "push", lambda self, token: next(texts))
    content = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    body = {**content, **GREEDY, "max_tokens": 8, "stream": True}
    with served.client.stream("POST", path, json=body) as response:
        found = events(response)
    assert len(found) == 8
    assert [c["choices"][0]["finish_reason"] for c in found] == [None] * 7 + ["length"]

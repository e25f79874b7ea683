"""The event loop is for events: what is too large is refused before work, and long work is done beside it."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_server import GREEDY, JSON, PROMPT, Served, until

from engine.errors import PromptTooLong
from engine.model.tokenizer import Tokenizer
from engine.server.limits import most_bytes


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(max_tokens=4000)
    yield server
    server.close()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Characters that were tokenised, call by call."""
    encode, lengths = Tokenizer.encode, []

    def counted(self: Tokenizer, text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    return lengths


PATHS = {
    "/v1/completions": lambda text: {"prompt": text, **GREEDY},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], **GREEDY},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunked", [False, True])
def test_six_megabytes_are_refused_unread(served: Served, encoded: list[int], path: str, chunked: bool) -> None:
    body = json.dumps(PATHS[path]("the gate " * 700_000)).encode()
    pieces = (body[k : k + 65536] for k in range(0, len(body), 65536))
    response = served.client.post(path, content=pieces if chunked else body, headers=JSON)
    assert response.status_code == 413
    assert "bytes" in response.json()["error"]["message"]
    assert encoded == []
    assert served.post(path, PATHS[path](PROMPT)).status_code == 200


def test_bodies_up_to_the_limit_are_read(served: Served) -> None:
    body = {"prompt": PROMPT, **GREEDY, "user": "x"}
    body["user"] = "x" * (most_bytes(served.engine.max_tokens) - len(json.dumps(body)) + 1)
    assert served.client.post("/v1/completions", content=json.dumps(body), headers=JSON).status_code == 200
    body["user"] += "x"
    assert served.client.post("/v1/completions", content=json.dumps(body), headers=JSON).status_code == 413


@pytest.mark.parametrize("path", PATHS)
def test_of_a_text_far_too_long_only_the_beginning_is_tokenised(served: Served, encoded: list[int], path: str) -> None:
    response = served.post(path, PATHS[path]("x" * 300_000))
    assert response.status_code == 400
    assert "4000 tokens" in response.json()["error"]["message"]
    assert encoded == [32_000]


@pytest.mark.parametrize("path", PATHS)
def test_while_a_long_prompt_is_tokenised_others_are_answered(
    served: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, go_on = Tokenizer.encode, threading.Event(), threading.Event()

    def slow(self: Tokenizer, text: str, **options: Any) -> list[int]:
        if len(text) > 2000:
            begun.set()
            assert go_on.wait(60)
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=served.url, timeout=60.0, trust_env=False) as client:
            answers.append(client.post(path, json=PATHS[path]("x" * 3000)))

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        assert begun.wait(60)
        assert served.client.get("/health").status_code == 200
        assert served.post(path, PATHS[path](PROMPT)).status_code == 200
        assert not answers
    finally:
        go_on.set()
        for client in clients:
            client.join(60)
    assert [answer.status_code for answer in answers] == [200] * 8
    until(lambda: served.engine.n_open == 0)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/completions", {"prompt": ["a"] * 17}, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 17}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 2049}, "messages"),
    ],
)
def test_long_lists_are_refused_by_their_length(served: Served, path: str, body: dict[str, Any], named: str) -> None:
    response = served.post(path, body)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(PromptTooLong("prompt", "9 tokens", 8)))
    assert (error.limit, str(error)) == (8, "prompt: got '9 tokens'; prompt and answer together may have 8 tokens here")

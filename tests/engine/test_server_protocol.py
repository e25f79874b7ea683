"""What is asked is done or refused by name, and every refusal has the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_server import GREEDY, JSON, PROMPT, Served

from engine.server.unserved import _NOTHING, _UNSERVED


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


PLAIN, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    PLAIN: {"prompt": PROMPT, **GREEDY},
    CHAT: {"messages": [{"role": "user", "content": "hello"}], **GREEDY},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "xml"}), ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("logprobs", 21), ("logprobs", "x"),
        ("top_logprobs", 21), ("top_logprobs", 3), ("echo", "x"), ("suffix", "end"), ("best_of", 3),
        ("presence_penalty", 2.5), ("frequency_penalty", -3), ("repetition_penalty", 1.1), ("logit_bias", {"512": 1}),
        ("logit_bias", {"-1": 1}), ("logit_bias", {"5": 101}),
        ("guided_json", {"type": "object"}), ("structured_outputs", {"grammar": "a"}), ("use_beam_search", True),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(served: Served, path: str, field: str, value: Any) -> None:
    error = error_of(served.post(path, BODIES[path] | {field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_values_that_ask_for_nothing_are_harmless(served: Served, path: str) -> None:
    for field, harmless in _UNSERVED.items():
        for value in (*_NOTHING, *harmless):
            response = served.post(path, BODIES[path] | {field: value, "max_tokens": 1})
            assert response.status_code == 200, (field, value)


@pytest.mark.parametrize("path", BODIES)
def test_a_bias_decides(served: Served, path: str) -> None:
    usual = served.post(path, BODIES[path]).json()["choices"][0]
    forced = served.post(path, BODIES[path] | {"logit_bias": {"65": 100}}).json()["choices"][0]
    text = forced["text"] if path == PLAIN else forced["message"]["content"]
    assert text == served.engine.tokenizer.decode([65]) * GREEDY["max_tokens"]
    assert forced != usual
    sure = BODIES[path] | {"temperature": 5.0, "min_p": 1.0}
    assert served.post(path, sure).json()["choices"][0] == usual, "only the likeliest is left"


@pytest.mark.parametrize("path", BODIES)
def test_another_model_is_not_found(served: Served, path: str) -> None:
    error = error_of(served.post(path, BODIES[path] | {"model": "gpt-5"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    for name in ("dummy:tiny", "", None):
        assert served.post(path, BODIES[path] | {"model": name}).status_code == 200


def test_a_model_by_its_name(served: Served) -> None:
    assert served.client.get("/v1/models/dummy:tiny").json()["id"] == "dummy:tiny"
    assert error_of(served.client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("path", BODIES)
def test_prompts_too_long_have_the_code_that_clients_look_for(served: Served, path: str) -> None:
    text = "x" * 9000
    body = BODIES[path] | ({"prompt": text} if path == PLAIN else {"messages": [{"role": "user", "content": text}]})
    error = error_of(served.post(path, body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": 1' + b"0" * 5000 + b"}", b"null", b""]
)
def test_bodies_that_are_no_json_are_refused_in_shape(served: Served, content: bytes) -> None:
    for path in BODIES:
        error_of(served.client.post(path, content=content, headers=JSON), 400)


def test_routes_and_methods_that_there_are_not(served: Served) -> None:
    assert error_of(served.client.get("/v1/nothing"), 404)["message"]
    response = served.client.get(PLAIN)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    assert served.client.head("/health").status_code == 200
    assert json.loads(served.client.get("/v1/models").text)["object"] == "list"

"""Answers of a prescribed form: a random model that would say anything says what fits, and ends by itself."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_server import PROMPT, Served, events
from test_server_protocol import BODIES, CHAT, PLAIN, error_of

from engine.model import load_tokenizer
from engine.model.forms import Form, Forms
from engine.server.forms import form_of

SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "gates": {"type": "integer", "minimum": 3, "maximum": 9}},
    "required": ["open", "gates"],
    "additionalProperties": False,
}
WANTED = {"type": "json_schema", "json_schema": {"name": "gate", "schema": SCHEMA}}
FREE: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0}


@pytest.fixture(scope="module", params=[{}, {"workers": "1"}], ids=["here", "in a worker"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    server = Served(**request.param)
    yield server
    server.close()


def text_of(served: Served, path: str, **more: Any) -> tuple[str, str]:
    body = {name: value for name, value in BODIES[path].items() if name != "ignore_eos"} | FREE
    response = served.post(path, body | more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["text"] if path == PLAIN else choice["message"]["content"], choice["finish_reason"]


@pytest.mark.parametrize("path", BODIES)
def test_json_of_a_schema(served: Served, path: str) -> None:
    pytest.importorskip("llguidance")
    for seed in range(4):
        text, why = text_of(served, path, response_format=WANTED, seed=seed)
        found = json.loads(text)
        assert set(found) == {"open", "gates"}
        assert 3 <= found["gates"] <= 9
        assert why == "stop"
    greedy, why = text_of(served, path, structured_outputs={"json": SCHEMA}, temperature=0, ignore_eos=True)
    assert json.loads(greedy).keys() == found.keys()
    assert why == "stop", "the form ends it, whatever the model's end tokens"


def test_expressions_and_choices(served: Served) -> None:
    pytest.importorskip("llguidance")
    for seed in range(3):
        text, why = text_of(served, PLAIN, structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}, seed=seed)
        assert re.fullmatch("[0-9]{3}-[a-f]{2}", text)
        assert why == "stop"
        choices = ["the gate (open)", "closed.", "a|b", "naïve €"]
        assert text_of(served, CHAT, structured_outputs={"choice": choices}, seed=seed)[0] in choices


def test_the_innocent_beside_it_say_what_they_say_alone(served: Served) -> None:
    pytest.importorskip("llguidance")
    alone = served.post(PLAIN, BODIES[PLAIN]).json()["choices"]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60.0, trust_env=False) as client:
            forms = [client.post(PLAIN, json=BODIES[PLAIN] | FREE | {"response_format": WANTED}) for _ in range(6)]
            return await asyncio.gather(*forms, *(client.post(PLAIN, json=BODIES[PLAIN]) for _ in range(6)))

    answers = [response.json()["choices"] for response in asyncio.run(together())]
    assert answers[6:] == [alone] * 6
    assert all(json.loads(choices[0]["text"]) for choices in answers[:6])


def test_a_stream_of_a_form_ends_as_it_should(served: Served) -> None:
    pytest.importorskip("llguidance")
    body = {"prompt": PROMPT, **FREE, "response_format": WANTED, "stream": True, "logprobs": 0}
    with served.client.stream("POST", PLAIN, json=body) as response:
        chunks = [chunk["choices"][0] for chunk in events(response)]
    assert json.loads("".join(chunk["text"] for chunk in chunks))
    assert [chunk["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://nowhere/x"}}}),
        ("structured_outputs", {"regex": "(a"}),
        ("structured_outputs", {"regex": 3}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"choice": ["a", ""]}),
        ("structured_outputs", {"json": "{"}),
        ("structured_outputs", {"grammar": "x"}),
        ("structured_outputs", {"regex": "a", "json": {}}),
    ],
)
def test_forms_that_are_none_are_refused_by_name(served: Served, field: str, value: Any) -> None:
    pytest.importorskip("llguidance")
    assert error_of(served.post(PLAIN, BODIES[PLAIN] | {field: value}), 400)["param"] == field


def test_what_cannot_go_together_is_refused(served: Served) -> None:
    both = {"response_format": WANTED, "structured_outputs": {"regex": "a"}}
    assert error_of(served.post(PLAIN, BODIES[PLAIN] | both), 400)["param"] == "structured_outputs"
    early = {"response_format": WANTED, "min_tokens": 3}
    assert error_of(served.post(PLAIN, BODIES[PLAIN] | early), 400)["param"] == "min_tokens"
    for nothing in ({"type": "text"}, {}, None):
        assert served.post(PLAIN, BODIES[PLAIN] | {"response_format": nothing}).status_code == 200
    assert form_of(None, {"regex": None}) is None


def test_without_the_extra_a_form_is_refused_with_its_name(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = error_of(served.post(PLAIN, BODIES[PLAIN] | {"response_format": {"type": "json_object"}}), 400)
    assert error["param"] == "response_format"
    assert "slalom[structured]" in error["message"]


def test_a_token_that_does_not_fit_ends_its_request_alone() -> None:
    pytest.importorskip("llguidance")
    progress = Forms(load_tokenizer("dummy:tiny"), 512).begin(Form("regex", "[0-9]{2}", "structured_outputs"))
    assert progress.allowed.count(0) < len(progress.allowed)
    progress.push(ord("7"))
    assert not progress.over
    with pytest.raises(RuntimeError, match="cannot go on"):
        progress.push(ord("x"))

"""Streams of engines: cut anywhere, counted, and put together to the answer that the engine would give as a whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.remote.lengths import Lengths, letters, marks, token_ids
from engine.remote.stream import Splitter, Whole, n_tokens, payload


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(end: str, size: int) -> None:
    sent = [f'data: {{"k": {k}, "text": "ä\\n"}}' for k in range(5)] + [": a comment", "data: [DONE]"]
    whole = "".join(event + end for event in sent).encode()
    splitter, found = Splitter(), list[bytes]()
    for k in range(0, len(whole), size):
        found += splitter.push(whole[k : k + size])
    assert [event.decode() for event in found] == sent
    assert [payload(event) for event in found[-2:]] == [None, b"[DONE]"]


def chunk(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": None} | choice]}


def test_tokens_are_counted_by_pieces_of_text_or_by_usage() -> None:
    assert n_tokens(chunk(text=" a"), 3) == 4
    assert n_tokens(chunk(text=""), 3) == 4  # its text waits for the next token
    assert n_tokens(chunk(text="", finish_reason="length"), 3) == 3
    assert n_tokens(chunk(delta={"role": "assistant", "content": ""}), 0) == 0
    assert n_tokens(chunk(delta={"role": "assistant", "content": None}), 0) == 0
    assert n_tokens(chunk(delta={"content": "a"}), 0) == 1
    assert n_tokens(chunk(delta={"reasoning_content": "a"}), 0) == 1
    assert n_tokens(chunk(delta={"tool_calls": [{"index": 0}]}), 0) == 1
    assert n_tokens(chunk(delta={}, finish_reason="stop"), 5) == 5
    assert n_tokens(chunk(text=" a") | {"usage": {"completion_tokens": 9}}, 3) == 9
    assert n_tokens({"choices": [], "usage": {"completion_tokens": 2}}, 3) == 3  # never fewer than were seen


def test_a_chat_with_tool_calls_and_logprobs_is_put_together() -> None:
    whole = Whole(chat=True)
    head = {"id": "x", "object": "chat.completion.chunk", "model": "m"}
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"reasoning_content": "hm"},
        {"reasoning_content": "m"},
        {"content": "a"},
        {"content": "b"},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
    ]
    for delta in deltas:
        logprobs = {"content": [{"token": delta["content"]}]} if delta.get("content") else None
        whole.push(head | {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]})
    whole.push(head | {"choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}]})
    whole.push(head | {"choices": [], "usage": {"completion_tokens": 7}})
    body = json.loads(whole.body())
    choice = body["choices"][0]
    assert (body["object"], body["id"], body["usage"]) == ("chat.completion", "x", {"completion_tokens": 7})
    assert choice["message"]["content"] == "ab"
    assert choice["message"]["reasoning_content"] == "hmm"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    ]
    assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}
    assert choice["finish_reason"] == "tool_calls"


def test_several_choices_and_the_lists_of_plain_logprobs() -> None:
    whole = Whole(chat=False)
    for index, text in ((1, "x"), (0, "a"), (1, "y"), (0, "b")):
        logprobs = {"tokens": [text], "token_logprobs": [-0.5]}
        piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        whole.push({"id": "q", "choices": [piece]})
    choices = json.loads(whole.body())["choices"]
    assert [c["text"] for c in choices] == ["ab", "xy"]
    assert choices[1]["logprobs"] == {"tokens": ["x", "y"], "token_logprobs": [-0.5, -0.5]}


def test_lengths_are_learnt_from_what_engines_count() -> None:
    lengths = Lengths()
    assert lengths.guess(400, chat=False) == 100
    for _ in range(200):
        lengths.learn(400, 200, chat=False)
    assert lengths.guess(400, chat=False) == 200
    assert lengths.guess(400, chat=True) == 100
    assert lengths.guess(0, chat=False) == 1


def test_prompts_of_token_ids_have_a_known_length() -> None:
    assert token_ids([1, 2, 3]) == token_ids([[1, 2, 3]]) == [1, 2, 3]
    assert [token_ids(x) for x in ("text", ["text"], [], [[1], [2]], [True, 2], None)] == [None] * 6
    assert letters([{"role": "user", "content": [{"type": "text", "text": "abc"}]}]) == len("user") + len("text") + 3


def test_prompts_that_begin_alike_have_equal_marks_as_far_as_that() -> None:
    chat = [{"role": "user", "content": "x" * 40}]
    longer = [*chat, {"role": "assistant", "content": "ä"}, {"role": "user", "content": "y"}]
    common = len(marks(chat))
    assert common == (len("user") + 1 + 40 + 1) // 4
    assert marks(longer)[:common].tolist() == marks(chat).tolist()
    assert marks([{"role": "user", "content": "z" + "x" * 39}])[:3].tolist() != marks(chat)[:3].tolist()
    assert len(marks("")) == 0
    assert marks("\ud800 a lone half of a pair").dtype == "int64"

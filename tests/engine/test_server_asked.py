"""What a request may ask of its answer beside text: penalties, log-probabilities, its prompt once more."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from test_server import GREEDY, PROMPT, Served, events
from test_server_protocol import BODIES, CHAT, PLAIN

from engine.kernels import Span
from engine.model import KVPool, ModelRunner, SamplingParams, load_model
from engine.model.sampling import choose_tokens, logprobs_of


@pytest.fixture(scope="module", params=[{}, {"workers": "1"}], ids=["here", "in a worker"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    server = Served(**request.param)
    yield server
    server.close()


def streamed(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with served.client.stream("POST", path, json=body | {"stream": True}) as response:
        return [chunk["choices"][0] for chunk in events(response)]


def every(prompt: list[int]) -> torch.Tensor:
    """log-probabilities of what follows each beginning of ``prompt``, by the model itself."""
    model = load_model("dummy:tiny")
    runner = ModelRunner(model, KVPool(model.config, blocks=32))
    batch = runner.batch([Span(prompt, 0, list(range(len(prompt) // 16 + 1)))])
    batch = replace(batch, sample_rows=torch.arange(len(prompt)))
    return runner.logits(batch, runner.run_layers(batch, (0, runner.n_layers))).log_softmax(-1)


def forward(prompt: list[int]) -> torch.Tensor:
    return every(prompt)[-1]


def test_logprobs_of_a_completion_are_the_model_s(served: Served) -> None:
    body = {**BODIES[PLAIN], "max_tokens": 3, "logprobs": 2}
    whole = served.post(PLAIN, body).json()["choices"][0]
    found, tokenizer = whole["logprobs"], served.engine.tokenizer
    text = [tokenizer.token_bytes(k).decode(errors="replace") for k in range(served.engine.vocab_size)]
    prompt = tokenizer.encode(PROMPT)
    for k in range(3):
        expected = forward(prompt)
        best = expected.topk(2)
        assert found["token_logprobs"][k] == pytest.approx(best.values[0].item(), abs=1e-4)
        assert found["tokens"][k] == text[best.indices[0]]
        assert found["top_logprobs"][k] == pytest.approx(
            {text[i]: v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}, abs=1e-4
        )
        prompt.append(int(best.indices[0]))
    assert "".join(found["tokens"]) == whole["text"]
    assert found["text_offset"] == [sum(map(len, found["tokens"][:k])) for k in range(3)]
    chunks = streamed(served, PLAIN, body)
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for chunk in chunks for x in chunk["logprobs"][name]] == pytest.approx(found[name])
    plain = served.post(PLAIN, {**body, "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert (plain["tokens"], plain["top_logprobs"]) == (found["tokens"], [None] * 3)
    assert served.post(PLAIN, BODIES[PLAIN]).json()["choices"][0]["logprobs"] is None


def test_logprobs_of_a_chat(served: Served) -> None:
    body = {**BODIES[CHAT], "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    whole = served.post(CHAT, body).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert len(content) == 4
    assert b"".join(bytes(x["bytes"]) for x in content).decode(errors="replace") == whole["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        logs = [other["logprob"] for other in entry["top_logprobs"]]
        assert logs == sorted(logs, reverse=True)
        assert entry["logprob"] == pytest.approx(logs[0])  # greedy
        assert sum(map(math.exp, logs)) <= 1.0 + 1e-6
    chunks = streamed(served, CHAT, body)
    assert [x["token"] for c in chunks for x in c["logprobs"]["content"]] == [x["token"] for x in content]
    none = served.post(CHAT, {**body, "top_logprobs": None}).json()["choices"][0]["logprobs"]["content"]
    assert [x["top_logprobs"] for x in none] == [[]] * 4


def test_logprobs_tell_what_the_model_thought_before_any_bias(served: Served) -> None:
    body = {**BODIES[PLAIN], "max_tokens": 2, "logprobs": 1}
    usual, forced = (served.post(PLAIN, body | more).json()["choices"][0] for more in ({}, {"logit_bias": {"65": 100}}))
    assert forced["logprobs"]["tokens"] == ["A", "A"]
    assert usual["logprobs"]["tokens"][0] in forced["logprobs"]["top_logprobs"][0]
    assert set(forced["logprobs"]["top_logprobs"][0]) == {"A", usual["logprobs"]["tokens"][0]}


@pytest.mark.parametrize("path", BODIES)
def test_penalties_keep_an_answer_from_repeating_itself(served: Served, path: str) -> None:
    """The greedy answer under a bias repeats one token; a penalty makes others come, and a negative one none."""
    body = BODIES[path] | {"logit_bias": {str(k): 50 for k in range(65, 71)}, "max_tokens": 24}

    def letters(**more: float) -> Counter[str]:
        choice = served.post(path, body | more).json()["choices"][0]
        return Counter(choice["text"] if path == PLAIN else choice["message"]["content"])

    assert set(letters()) <= set("ABCDEF")
    often = letters(frequency_penalty=2.0)
    assert set(often) == set("ABCDEF")
    assert max(often.values()) - min(often.values()) <= 2, "each use makes the next less likely"
    assert len(letters(presence_penalty=2.0)) >= len(letters())
    assert letters(frequency_penalty=-2.0, presence_penalty=-2.0).most_common(1)[0][1] >= 22
    assert letters(frequency_penalty=0.0, presence_penalty=0.0) == letters()


def test_a_prompt_is_echoed_as_text(served: Served) -> None:
    body = BODIES[PLAIN]
    answer = served.post(PLAIN, body).json()["choices"][0]["text"]
    for prompt in (PROMPT, served.engine.tokenizer.encode(PROMPT), [PROMPT]):
        asked = body | {"prompt": prompt, "echo": True}
        assert served.post(PLAIN, asked).json()["choices"][0]["text"] == PROMPT + answer
        chunks = streamed(served, PLAIN, asked)
        assert chunks[0]["text"].startswith(PROMPT)
        assert "".join(c["text"] for c in chunks) == PROMPT + answer


def check_scores(server: Served, n: int) -> None:
    """Of the prompt's tokens and of the answer's, as a harness that scores texts asks for them."""
    tokenizer = server.engine.tokenizer
    prompt = tokenizer.encode(PROMPT * 40)[:n]
    body = {"prompt": [prompt], "max_tokens": 2, "temperature": 0, "logprobs": 2, "echo": True, "ignore_eos": True}
    answers = [server.post(PLAIN, body | {"echo": False, "logprobs": 0}) for _ in range(2)]  # the prefix is cached
    said = answers[0].json()["choices"][0]["logprobs"]["tokens"]
    whole = server.post(PLAIN, body).json()
    found = whole["choices"][0]["logprobs"]
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert found["tokens"] == [tokenizer.token_bytes(k).decode(errors="replace") for k in prompt] + said
    logs = every(prompt)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert len(found["token_logprobs"]) == n + 2
    assert found["token_logprobs"][1:n] == pytest.approx(logs[range(n - 1), prompt[1:]].tolist(), abs=1e-3)
    assert max(found["top_logprobs"][n - 1].values()) == pytest.approx(logs[n - 2].max().item(), abs=1e-3)
    assert found["text_offset"][-1] == len("".join(found["tokens"][:-1]))
    chunks = streamed(server, PLAIN, body)
    assert [t for c in chunks for t in c["logprobs"]["tokens"]] == found["tokens"]
    nothing = server.post(PLAIN, body | {"max_tokens": 0}).json()
    (choice,) = nothing["choices"]
    assert (choice["text"], choice["finish_reason"]) == (tokenizer.decode(prompt), "length")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(found["token_logprobs"][:n], abs=1e-3)
    assert (nothing["usage"]["completion_tokens"], nothing["usage"]["prompt_tokens"]) == (0, n)
    (only,) = streamed(server, PLAIN, body | {"max_tokens": 0})
    assert only["logprobs"]["tokens"] == found["tokens"][:n]


@pytest.mark.parametrize("n", [40, 300])
def test_logprobs_of_an_echoed_prompt_are_the_model_s(served: Served, n: int) -> None:
    check_scores(served, n)  # 300 are more than one chunk


def test_logprobs_of_a_prompt_whose_layers_run_in_slices() -> None:
    server = Served(roles="multiplexed", chunk_tokens=64)
    try:
        check_scores(server, 150)
    finally:
        server.close()


def test_a_prompt_is_scored_alone_where_its_step_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = ModelRunner.logprobs
    failures = [RuntimeError("out of memory")]

    def fails_once(self: ModelRunner, batch: Any, *more: Any) -> Any:
        if failures and batch.n_seqs > 1:
            raise failures.pop()
        return scored(self, batch, *more)

    monkeypatch.setattr(ModelRunner, "logprobs", fails_once)
    server = Served()
    try:
        body = {"prompt": [[5, 6, 7, 8]], "max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
        expected = server.post(PLAIN, body).json()["choices"][0]["logprobs"]["token_logprobs"][1:]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                answers = list(pool.map(lambda _: server.post(PLAIN, body).json()["choices"][0], range(8)))
                for answer in answers:
                    assert answer["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
                if not failures:
                    return
        pytest.fail("no step with two prompts")
    finally:
        server.close()


def error_of(response: httpx.Response) -> str:
    assert response.status_code == 400
    return str(response.json()["error"]["param"])


def test_what_means_nothing_is_refused(served: Served) -> None:
    assert error_of(served.post(PLAIN, BODIES[PLAIN] | {"max_tokens": 0, "logprobs": 1})) == "max_tokens"
    assert error_of(served.post(PLAIN, BODIES[PLAIN] | {"logprobs": True})) == "logprobs"
    assert error_of(served.post(CHAT, BODIES[CHAT] | {"echo": True})) == "echo"
    assert error_of(served.post(CHAT, BODIES[CHAT] | {"top_logprobs": 2, "logprobs": False})) == "top_logprobs"
    assert error_of(served.post(PLAIN, BODIES[PLAIN] | {"top_logprobs": 2})) == "top_logprobs"


def test_penalties_are_taken_from_the_logits_of_what_was_said() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]])
    params = [
        SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, counts={1: 3, 3: 1}),
        SamplingParams(temperature=0.0, counts={1: 3}),
    ]
    assert choose_tokens(logits, params, [4, 3], frozenset()).tolist() == [2, 1]
    assert logits[0].tolist() == [1.0, 3.0, 2.0, 0.0], "the model's own stay as they are"
    barely = SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.16, counts={1: 3})
    assert choose_tokens(logits[:1], [barely], [3], frozenset()).tolist() == [1]
    found, none = logprobs_of(logits, torch.tensor([2, 1]), [2, None])
    assert none is None
    assert found is not None
    assert found.token == pytest.approx(logits[0].log_softmax(0)[2].item())
    assert [token for token, _ in found.top] == [1, 2]


def test_two_requests_of_one_set_of_parameters_do_not_penalise_each_other() -> None:
    from live_cases import engine_on, mixed, send

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, frequency_penalty=2.0)
    with engine_on(mixed()) as engine:
        first = send(engine, [1, 2, 3], params).wait().tokens
        callers = [send(engine, [1, 2, 3], params) for _ in range(3)]
        assert [caller.wait().tokens for caller in callers] == [first] * 3
    assert params.counts == {}
    assert GREEDY["max_tokens"] == 12

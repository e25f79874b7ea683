"""The HTTP server on the tiny random model, spoken to over loopback by clients that others wrote."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from live_cases import TOKENIZER, Ends
from prometheus_client.parser import text_string_to_metric_families
from waiting import free_port, healthy, until

from engine.core.setup import SloClass
from engine.errors import SlalomError
from engine.server.door import Limits, configure
from engine.server.protocol import targets_of
from policies.serve import Options, build, load_classes, parse_roles

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "the gate is open"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}
JSON = {"content-type": "application/json"}  # for bodies written by hand: half a surrogate pair, for example


class Served:
    """A server in a thread, and a client for it."""

    def __init__(self, limits: Limits = Limits(), **options: Any) -> None:
        self.engine, self.app = build(Options("dummy:tiny", **({"drain_s": 5.0} | options)))
        config = configure(self.app, limits, port=0)
        self.server = self.app.state.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        assert self.engine.failure is None
        assert self.engine.integrity_faults() == []


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(instances=2)
    yield server
    server.close()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end in [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- what clients get


def test_models_and_health(served: Served) -> None:
    assert served.client.get("/health").status_code == 200
    card = served.client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("dummy:tiny", served.engine.max_tokens)


def test_streamed_and_whole_answers_agree(served: Served) -> None:
    whole = served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()
    with served.client.stream(
        "POST",
        "/v1/completions",
        json={"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}, **GREEDY},
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 12
    assert whole["usage"]["prompt_tokens"] == len(TOKENIZER.encode(PROMPT))


def test_token_ids_are_prompts_too(served: Served) -> None:
    text = served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()
    for prompt in (TOKENIZER.encode(PROMPT), [TOKENIZER.encode(PROMPT)], [PROMPT]):
        assert served.post("/v1/completions", {"prompt": prompt, **GREEDY}).json()["choices"] == text["choices"]


def test_chat_follows_the_template(served: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    body = {"messages": messages, "temperature": 0, "ignore_eos": True, "max_tokens": 3, "max_completion_tokens": 7}
    whole = served.post("/v1/chat/completions", body).json()
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert whole["usage"]["completion_tokens"] == 7
    assert whole["usage"]["prompt_tokens"] == len(TOKENIZER.chat([{"role": "user", "content": "hello"}]))
    with served.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        chunks = events(response)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]


def test_seed_stop_and_cached_tokens(served: Served) -> None:
    body = {"prompt": PROMPT * 8, "temperature": 1.0, "seed": 5, "max_tokens": 10, "ignore_eos": True}
    one, two = (served.post("/v1/completions", body).json() for _ in range(2))
    assert one["choices"] == two["choices"]
    full = one["choices"][0]["text"]
    cut = served.post("/v1/completions", body | {"stop": [full[4:6]]}).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (full[: full.index(full[4:6])], "stop")
    third = served.post("/v1/completions", body).json()["usage"]
    assert third["prompt_tokens_details"]["cached_tokens"] >= 96


def test_fields_of_other_servers_are_ignored(served: Served) -> None:
    extra = {
        "echo": False,
        "no_stop_trim": 1,
        "return_hidden_states": True,
        "priority": 3,
        "n": 1,
        "user": "u",
        "top_k": -1,
    }
    assert served.post("/v1/completions", {"prompt": PROMPT, **GREEDY, **extra}).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "prompt"),
        ({"prompt": PROMPT, "n": 2}, "n"),
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "x" * 9000}, "prompt"),
        ({"prompt": PROMPT, "min_tokens": 2, "stop_token_ids": [49152]}, "stop_token_ids"),
        ({"prompt": PROMPT, "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": PROMPT, "top_k": 10**400}, "top_k"),
        ({"prompt": PROMPT, "seed": 10**400}, "seed"),
        ({"prompt": PROMPT, "stop": ["a"] * 100}, "stop"),
        ({"prompt": PROMPT, "stop": [""]}, "stop"),
        ({"prompt": "half a pair: \ud800"}, "prompt"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(served: Served, body: dict[str, Any], named: str) -> None:
    response = served.client.post("/v1/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_conversations_are_told_what_is_wrong(served: Served, more: dict[str, Any], named: str) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], **GREEDY} | more
    response = served.client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


def test_bad_target_headers_are_refused_and_good_ones_reach_the_core(served: Served) -> None:
    bad = served.post("/v1/completions", {"prompt": PROMPT}, headers={"x-slo-ttft-ms": "soon"})
    assert (bad.status_code, "x-slo-ttft-ms" in bad.text) == (400, True)
    seen: list[int] = []
    observer = Ends(lambda request, record, finish: seen.append(int(record["tpot_slo"])))
    served.engine.observers.append(observer)
    served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}, headers={"x-llm-d-slo-tpot-ms": "40"})
    served.engine.observers.remove(observer)
    assert seen == [40 * 10**9]


def test_target_headers() -> None:
    found = targets_of({"x-slo-ttft-ms": "250", "x-llm-d-slo-tpot-ms": "40"})
    assert (found.ttft_s, found.tpot_s) == (0.25, 0.04)
    assert targets_of({}).ttft_s is None
    for bad in ("0", "-1", "nan", "inf", "1e99"):
        with pytest.raises(SlalomError):
            targets_of({"x-slo-ttft-ms": bad})


def test_classes_and_priorities_of_requests_reach_the_core(served: Served, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    scenario = ROOT / "env/scenarios/classes-6xa100.yaml"
    server = Served(classes=str(scenario))
    server.engine.observers.append(
        Ends(
            lambda request, record, finish: seen.append(
                (int(record["cls"]), int(record["ttft_slo"]) // 10**9, int(record["priority"]))
            )
        )
    )
    try:
        body = {"prompt": PROMPT, **GREEDY}
        server.post("/v1/completions", body)
        server.post("/v1/completions", body | {"slo_class": "summary", "priority": -2})
        server.post("/v1/completions", body, headers={"x-slo-class": "code", "x-slo-ttft-ms": "70"})
        bad = server.post("/v1/completions", body, headers={"x-slo-class": "gold"})
        assert (bad.status_code, "chat, code, summary" in bad.text) == (400, True)
        assert server.post("/v1/completions", body | {"priority": 2**40}).status_code == 400
    finally:
        server.close()
    assert seen == [(0, 1000, 0), (2, 8000, -2), (1, 70, 0)]
    for text in ("", "classes: []", "classes: [{name: a}]", "classes: [3]", "classes: {", "- 1",
                 "classes: [{name: a, ttft_s: 1, tpot_s: 1, ttft_facto: 2}]"):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SlalomError, match="classes"):
            load_classes(str(tmp_path / "bad.yaml"), 1.0, 1.0)
    with pytest.raises(SlalomError, match="--classes"):
        load_classes("nowhere.yaml", 1.0, 1.0)
    (tmp_path / "factor.yaml").write_text("classes: [{name: a, ttft_factor: 5, tpot_s: 1}]")
    assert load_classes(str(tmp_path / "factor.yaml"), 1.0, 1.0) == {"a": SloClass(0.0, 1.0, ttft_factor=5.0)}


def test_metrics_speak_as_vllm(served: Served) -> None:
    served.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
    assert served.client.head("/metrics").status_code == 200
    text = served.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:cache_config_info",
        "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success", "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds", "slalom:instance_role",
    ):  # fmt: skip
        assert name in families, name
    counts = {s.name: s.value for s in families["vllm:inter_token_latency_seconds"].samples}
    generated = families["vllm:generation_tokens"].samples[0].value
    ended = sum(s.value for s in families["vllm:request_success"].samples if s.name.endswith("_total"))
    assert counts["vllm:inter_token_latency_seconds_count"] == generated - ended


def test_many_clients_at_once(served: Served) -> None:
    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60.0, trust_env=False) as client:
            answers = [client.post("/v1/completions", json={"prompt": PROMPT, **GREEDY}) for _ in range(24)]
            return [r.json()["choices"][0]["text"] for r in await asyncio.gather(*answers)]

    assert len(set(asyncio.run(all_of_them()))) == 1


def test_the_openai_client_understands_us(served: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
    assert client.models.list().data[0].id == "dummy:tiny"
    messages = [{"role": "user", "content": "hi"}]
    common = {"model": "dummy:tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    whole = client.chat.completions.create(**common, extra_body={"ignore_eos": True})
    chunks = list(
        client.chat.completions.create(
            **common, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 6
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="dummy:tiny", prompt=[10**6])


# -- when things go wrong


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_aborted(served: Served, stream: bool) -> None:
    body = {"prompt": PROMPT, **GREEDY, "max_tokens": 4000, "stream": stream}
    before = int(served.engine.state.cluster[0]["n_failed"])
    if stream:
        with served.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            served.post("/v1/completions", body, timeout=0.2)
    until(lambda: int(served.engine.state.cluster[0]["n_failed"]) == before + 1)
    until(lambda: served.engine.n_open == 0)
    until(lambda: bool((served.engine.state.pool["free"] == served.engine.state.pool["n_blocks"]).all()))


def test_full_shedding_and_draining_servers_say_so() -> None:
    server = Served(max_requests=1, shed=True)
    try:
        long = {"prompt": PROMPT, **GREEDY, "max_tokens": 4000, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=long) as response:
            lines = response.iter_lines()  # kept: the client hangs up when it goes
            next(lines)
            full = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        until(lambda: server.engine.n_open == 0)
        guard = server.engine.runtime.guard
        server.engine.call(lambda: setattr(guard, "choose", lambda *question: len(question[-1]) - 1))
        shed = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
        assert (shed.status_code, shed.headers["retry-after"]) == (429, "1")
        assert server.post("/admin/drain", {}).json()["accepting"] is False
        assert server.client.get("/health").status_code == 503
        assert server.post("/v1/completions", {"prompt": PROMPT}).status_code == 503
        assert server.post("/admin/undrain", {}).json()["accepting"] is True
        assert server.client.get("/health").status_code == 200
    finally:
        server.close()


# -- administration


def test_roles_and_policies_change_over_http(served: Served) -> None:
    assert served.post("/admin/policy", {"policy": "round_robin"}).json()["policy"]["name"] == "round_robin"
    assert served.post("/admin/policy", {"policy": "no_such"}).status_code == 400
    before = served.client.get("/admin/state").json()["switches"]
    assert served.post("/admin/role", {"instance": 1, "role": "decode"}).status_code == 200
    until(lambda: served.client.get("/admin/state").json()["switches"] == before + 1)
    assert served.client.get("/admin/state").json()["instances"][1]["role"] == "decode"
    assert served.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).status_code == 200
    for bad in ({"instance": 0, "role": "decode"}, {"instance": 7, "role": "mixed"}, {"instance": 0, "role": "chief"}):
        assert served.post("/admin/role", bad).status_code == 400
    assert served.post("/admin/role", {"instance": 1, "role": "mixed"}).status_code == 200


def test_administration_is_for_this_machine(served: Served) -> None:
    assert served.client.get("/admin/state", headers={"x-forwarded-for": "10.0.0.1"}).status_code == 403
    stranger = TestClient(served.app, client=("192.0.2.1", 4711))  # no lifespan: the engine is the running one
    assert stranger.get("/admin/state").status_code == 403
    assert stranger.post("/admin/drain").status_code == 403


# -- the command


@pytest.mark.parametrize(
    ("roles", "instances", "field"),
    [("prefill", 2, "--roles"), ("mixed,decode", 3, "--roles"), ("boss", 1, "--roles"), ("mixed", 0, "--instances")],
)
def test_impossible_roles_are_refused(roles: str, instances: int, field: str) -> None:
    with pytest.raises(SlalomError, match=field):
        parse_roles(roles, instances)


def test_mistakes_on_the_command_line_are_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "policies.serve", "--model", "dummy:tiny", "--roles", "boss"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("serve: --roles: got 'boss'")


@pytest.mark.slow
def test_sigterm_under_load_drains() -> None:
    command = [
        sys.executable, "-m", "policies.serve", "--model", "dummy:tiny", "--instances", "2",
        "--roles", "prefill,decode", "--port", str(port := free_port()), "--drain-s", "20",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    base = f"http://127.0.0.1:{port}"
    results: list[int] = []

    def load() -> None:
        with httpx.Client(base_url=base, timeout=60.0, trust_env=False) as client:
            body = {"prompt": PROMPT, **GREEDY, "max_tokens": 300}
            response = client.post("/v1/completions", json=body)
            results.append(response.json()["usage"]["completion_tokens"] if response.status_code == 200 else -1)

    try:
        until(partial(healthy, base), timeout_s=120.0)
        clients = [threading.Thread(target=load) for _ in range(8)]
        for client in clients:
            client.start()
        state = partial(httpx.get, f"{base}/admin/state", trust_env=False, timeout=60.0)
        until(lambda: state().json()["open_requests"] + len(results) == 8)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(60)
        assert process.wait(60) == 0
        assert results == [300] * 8
    finally:
        process.kill()
        process.wait()

"""The router in front of mock engines: answers are the engines' own, and what goes wrong there reaches nobody twice."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from audit import recount
from remote_cases import Mock, Routed, all_at_once, mocks, routed
from waiting import until

from engine.errors import SlalomError
from eval.benchmarks.mock_engine import text_of
from policies.route import Options, build

N = 12


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[list[Mock], Routed]]:
    with mocks(2) as engines, routed(engines) as router:
        yield engines, router


def body(k: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {k}", "max_tokens": N, "temperature": 0} | more


def streamed_text(answer: httpx.Response) -> tuple[str, bool]:
    """The text of a stream, and whether it ended well; it must end in [DONE] either way."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert lines.count("[DONE]") == 1
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(c["choices"][0]["text"] for c in chunks if c.get("choices"))
    return text, not any("error" in c for c in chunks)


# -- what clients get


def test_a_stream_is_the_engine_s_byte_by_byte(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    for path, prompt in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "b"}]}),
    ):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            sent = {"max_tokens": 5, "stream": True} | prompt | options
            assert router.client.post(path, json=sent).text == engines[0].client.post(path, json=sent).text


def test_a_whole_answer_says_what_the_engine_s_own_says(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    for path, prompt in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": [5, 6, 7]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "b"}]}),
    ):
        sent = {"max_tokens": 5} | prompt
        assert router.client.post(path, json=sent).json() == engines[0].client.post(path, json=sent).json()


def test_what_an_engine_refuses_is_passed_on_and_counts_as_no_miss(pair: tuple[list[Mock], Routed]) -> None:
    _, router = pair
    answer = router.client.post("/v1/completions", json=body(0, max_tokens=999))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "max_tokens: too many"
    until(lambda: router.router.n_open == 0)


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"{", "body"),
        (b"[1]", "body: got"),
        (b"{}", "prompt"),
        (b'{"prompt": ["a", "b"]}', "prompt: got '2 prompts'"),
        (b'{"prompt": "a", "priority": "x"}', "priority"),
        (b'{"prompt": "a", "priority": 4294967296}', "priority"),
        (b'{"prompt": "a", "slo_class": 3}', "slo_class"),
        (b'{"prompt": "a", "slo_class": "gold"}', "slo_class"),
        (b'{"prompt": "a", "stream_options": 3}', "stream_options"),
    ],
)
def test_bad_requests_are_refused_in_one_line(pair: tuple[list[Mock], Routed], sent: bytes, says: str) -> None:
    answer = pair[1].client.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(says)


def test_targets_of_headers_are_checked_and_book_misses(pair: tuple[list[Mock], Routed]) -> None:
    _, router = pair
    bad = router.client.post("/v1/completions", json=body(0), headers={"x-slo-ttft-ms": "soon"})
    assert bad.status_code == 400
    before = router.client.get("/dashboard/state").json()["classes"][0]["ended"]
    assert router.client.post("/v1/completions", json=body(0), headers={"x-slo-ttft-ms": "0.01"}).status_code == 200
    until(lambda: router.client.get("/dashboard/state").json()["classes"][0]["ended"] == before + 1)
    assert router.metrics()['slalom:slo_attainment_ratio{class="default",metric="ttft"}'] < 1.0


def test_the_books_follow_every_token(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    state = router.router.state
    begun = threading.Event()

    def look() -> None:
        until(lambda: int(state.inst["run_n"].sum()) >= 8)
        for _ in range(20):
            router.router.call(lambda: recount(state))
            time.sleep(0.002)
        begun.set()

    tokens = int(state.cluster[0]["tokens_out"])
    for engine in engines:
        engine.set(token_s=0.05)  # all of them run at once, however busy this machine is
    answers = all_at_once(router.url, [body(k, max_tokens=40) for k in range(16)], look)
    for engine in engines:
        engine.set(token_s=0.005)
    assert begun.is_set()
    assert [answer.json()["choices"][0]["text"] for _, answer in answers] == [
        text_of(f"prompt {k}", 40) for k in range(16)
    ]
    until(lambda: router.router.n_open == 0)
    assert int(state.cluster[0]["tokens_out"]) - tokens == 16 * 40


def test_both_engines_work_and_neither_disagrees(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    before = [engine.set()["begun"] for engine in engines]
    all_at_once(router.url, [body(k) for k in range(20)])
    assert all(engine.set()["begun"] - b >= 5 for engine, b in zip(engines, before, strict=True))
    found = router.metrics()
    assert [found[k] for k in found if k.startswith("slalom:engine_up{")] == [1.0, 1.0]


def test_connections_to_engines_are_used_again() -> None:
    with mocks(1) as engines, routed(engines, health_s=5.0) as router:
        before = engines[0].set()["connections"]
        for k in range(10):
            check_all([(200, router.client.post("/v1/completions", json=body(0, stream=k % 2 == 0)))], 1)
        assert engines[0].set()["connections"] - before <= 5  # a very slow machine may let one grow old


def test_a_client_that_hangs_up_ends_its_request_at_the_engine(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    before = sum(engine.set()["hung_up"] for engine in engines)
    with router.client.stream("POST", "/v1/completions", json=body(0, max_tokens=2000, stream=True)) as answer:
        next(answer.iter_lines())
    until(lambda: sum(engine.set()["hung_up"] for engine in engines) == before + 1)
    with pytest.raises(httpx.ReadTimeout):
        router.client.post("/v1/completions", json=body(0, max_tokens=2000), timeout=0.1)
    until(lambda: sum(engine.set()["hung_up"] for engine in engines) == before + 2)
    until(lambda: router.router.n_open == 0)


def test_a_slow_client_holds_up_neither_its_engine_nor_others(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    sent = json.dumps(body(0, max_tokens=900, stream=True)).encode()
    host, port = router.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((host, int(port)))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent)
        for engine in engines:
            engine.set(token_s=0.0001)
        until(lambda: sum(engine.set()["running"] for engine in engines) == 1)
        assert router.client.post("/v1/completions", json=body(1)).status_code == 200
        until(lambda: sum(engine.set()["running"] for engine in engines) == 0)  # though nobody has read its answer
        for engine in engines:
            engine.set(token_s=0.005)
        read = b""
        while not read.endswith(b"0\r\n\r\n"):
            read += slow.recv(65536)
    text = read.decode()
    assert text.count('"finish_reason": null') + text.count('"finish_reason": "length"') == 900
    assert text.count("[DONE]") == 1


def test_a_conversation_goes_where_its_past_is() -> None:
    with mocks(2) as engines, routed(engines, policy="predicted_ttft") as router:
        first = {"role": "user", "content": "word " * 800}
        router.client.post("/v1/chat/completions", json={"messages": [first], "max_tokens": 2})
        home = [engine.set()["begun"] for engine in engines].index(1)
        for _ in range(3):
            turn = {"messages": [first, {"role": "user", "content": "more"}], "max_tokens": 2}
            router.client.post("/v1/chat/completions", json=turn)
        assert engines[home].set()["begun"] == 4
        assert router.metrics()['vllm:prefix_cache_hits_total{engine="0",model_name="mock"}'] > 2000


def test_an_operator_changes_policy_and_mode_and_no_roles(pair: tuple[list[Mock], Routed]) -> None:
    _, router = pair
    for path, change in (("policy", {"policy": "round_robin"}), ("mode", {"mode": "advisory"})):
        assert router.client.post(f"/admin/{path}", json=change).status_code == 200
        assert router.client.post("/v1/completions", json=body(0)).status_code == 200
    assert router.client.post("/admin/role", json={"instance": 0, "role": "decode"}).status_code == 400
    state = router.client.get("/admin/state").json()
    assert (state["policy"]["name"], state["guard"]["mode"], len(state["instances"])) == ("round_robin", "advisory", 2)
    router.client.post("/admin/mode", json={"mode": "active"})
    assert len(router.client.get("/dashboard/state").json()["instances"]) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engines": ""}, "--engines"),
        ({"engines": "http://a,http://a"}, "--engines"),
        ({"engines": "localhost:8000"}, "--engines"),
        ({"engines": "http://127.0.0.1:9"}, "--engines"),
        ({"engines": "http://127.0.0.1:9", "order": "lifo"}, "--order"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SlalomError, match=says):
        build(Options(**options))


def test_engines_get_deadlines_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLALOM_ENGINE_KEY", "ours")
    with mocks(1) as engines, routed(engines, engine_deadlines=True) as router:
        begin = time.time()
        router.client.post("/v1/completions", json=body(0, priority=-3), headers={"x-slo-ttft-ms": "60000"})
        last = engines[0].set()["last"]
        assert begin + 60 <= 1e-3 * last["priority"] <= time.time() + 60
        assert last["authorization"] == "Bearer ours"
        router.client.post("/v1/completions", json=body(0), headers={"authorization": "Bearer theirs"})
        assert engines[0].set()["last"]["authorization"] == "Bearer theirs"


def test_a_key_of_the_router_stays_here() -> None:
    with mocks(1) as engines, routed(engines, api_key="a-key-of-the-router") as router:
        assert router.client.post("/v1/completions", json=body(0)).status_code == 401
        router.client.headers["authorization"] = "Bearer a-key-of-the-router"
        assert router.client.post("/v1/completions", json=body(0)).status_code == 200
        assert engines[0].set()["last"]["authorization"] == ""


def test_an_engine_that_does_not_stream_is_passed_on_whole(pair: tuple[list[Mock], Routed]) -> None:
    engines, router = pair
    for engine in engines:
        engine.set(whole=True)
    try:
        tokens = int(router.router.state.cluster[0]["tokens_out"])
        own = engines[0].client.post("/v1/completions", json=body(0)).json()
        assert router.client.post("/v1/completions", json=body(0)).json() == own
        until(lambda: router.router.n_open == 0)
        assert int(router.router.state.cluster[0]["tokens_out"]) - tokens == N
    finally:
        for engine in engines:
            engine.set(whole=False)


def test_an_open_stream_ends_well_when_the_server_is_told_to_stop() -> None:
    with mocks(1, token_s=0.01) as engines:
        router = Routed([engines[0].url])
        state = router.router.state

        def stop() -> None:
            until(lambda: int(state.inst["run_n"].sum()) == 1)
            router.server.should_exit = True

        assert check_all(all_at_once(router.url, [body(0, max_tokens=60, stream=True)], stop), 1, tokens=60) == 0
        router.close()


# -- when engines fail


def check_all(answers: list[Any], n: int, tokens: int = N) -> int:
    """Whole answers are right; streams are, or end in an error after a part of the right text. Returns the latter."""
    cut = 0
    assert len(answers) == n
    for k, (status, answer) in enumerate(answers):
        wanted = text_of(f"prompt {k}", tokens)
        assert status == 200, answer.text
        if answer.headers["content-type"] == "application/json":
            assert answer.json()["choices"][0]["text"] == wanted
            continue
        text, well = streamed_text(answer)
        assert text == wanted if well else wanted.startswith(text)
        cut += not well
    return cut


def test_an_engine_killed_under_load_loses_and_doubles_nothing() -> None:
    with mocks(2, prefill_s=0.02, token_s=0.03) as engines, routed(engines) as router:
        state = router.router.state

        def kill() -> None:
            until(lambda: int(state.inst[0]["run_n"]) >= 3)
            engines[0].kill()

        bodies = [body(k, max_tokens=30, stream=k % 4 < 2) for k in range(30)]
        cut = check_all(all_at_once(router.url, bodies, kill), 30, tokens=30)
        assert 1 <= cut < 15  # those whose clients had got a part
        router.router.call(lambda: recount(state))
        found = router.metrics()
        assert found['slalom:retries_total{reason="lost"}'] >= 1
        assert [v for k, v in found.items() if k.startswith("slalom:engine_up{")] == [0.0, 1.0]

        engines[0].start().wait()  # the same address
        until(lambda: [v for k, v in router.metrics().items() if k.startswith("slalom:engine_up{")] == [1.0, 1.0])
        check_all(all_at_once(router.url, [body(k) for k in range(20)]), 20)
        assert engines[0].set()["begun"] >= 5


def test_an_engine_that_stops_answering_is_ejected_and_comes_back() -> None:
    with mocks(2, prefill_s=0.02, token_s=0.03) as engines, routed(engines) as router:
        state = router.router.state

        def pause() -> None:
            until(lambda: int(state.inst[0]["run_n"]) >= 2)
            engines[0].pause()
            until(lambda: int(state.inst[0]["lost"]) == 2)
            until(lambda: int(state.lane[0, 0]["n_prefills"]) == 0)  # its prompts went elsewhere
            engines[0].resume()

        bodies = [body(k, max_tokens=30, stream=k % 4 < 2) for k in range(30)]
        assert check_all(all_at_once(router.url, bodies, pause), 30, tokens=30) == 0
        until(lambda: int(state.inst[0]["lost"]) == 0)
        router.router.call(lambda: recount(state))


def test_streams_of_an_engine_that_stays_silent_end_in_an_error() -> None:
    with mocks(1, token_s=0.01) as engines, routed(engines, stall_s=0.3) as router:

        def pause() -> None:
            until(lambda: int(router.router.state.inst[0]["run_n"]) == 1)
            engines[0].pause()

        answers = all_at_once(router.url, [body(0, max_tokens=100, stream=True)], pause)
        assert check_all(answers, 1, tokens=100) == 1


def test_an_engine_that_refuses_is_spared_for_a_while() -> None:
    with mocks(2) as engines, routed(engines) as router:
        engines[0].set(refuse=True)
        check_all(all_at_once(router.url, [body(k, stream=k % 4 < 2) for k in range(20)]), 20)
        seen = engines[0].set()
        assert (seen["begun"], seen["refused"] >= 1) == (0, True)
        assert seen["refused"] <= 12  # those that were on their way: it is not asked again for each

        engines[1].set(refuse=True)  # now everybody does: requests wait
        timer = threading.Timer(0.7, lambda: engines[1].set(refuse=False))
        timer.start()
        check_all(all_at_once(router.url, [body(k) for k in range(6)]), 6)
        timer.join()


def test_an_engine_that_fails_a_request_is_not_asked_for_ever() -> None:
    with mocks(1) as engines, routed(engines) as router:
        engines[0].set(refuse=True, status=500)
        answer = router.client.post("/v1/completions", json=body(0))
        assert answer.status_code == 502
        assert engines[0].set()["refused"] == 4  # once, and three times more
        engines[0].set(refuse=False)
        check_all(all_at_once(router.url, [body(0)]), 1)


def test_a_connection_that_breaks_is_tried_again_where_nobody_has_got_a_part() -> None:
    with mocks(2, prefill_s=0.02, token_s=0.03) as engines, routed(engines) as router:
        state = router.router.state

        def hang_up() -> None:
            until(lambda: int(state.inst[0]["run_n"]) >= 3)  # of three in a row one streams and was told a part
            engines[0].set(break_at=1)
            until(lambda: router.metrics().get('slalom:retries_total{reason="lost"}', 0) >= 1)
            engines[0].set(break_at=0)

        bodies = [body(k, max_tokens=40, stream=k % 4 < 2) for k in range(16)]
        assert check_all(all_at_once(router.url, bodies, hang_up), 16, tokens=40) >= 1
        until(lambda: router.router.n_open == 0)
        router.router.call(lambda: recount(state))


def test_when_no_engine_answers_clients_hear_so() -> None:
    with mocks(1) as engines, routed(engines, outage_s=0.5) as router:
        engines[0].kill()
        first = router.client.post("/v1/completions", json=body(0))
        assert first.status_code == 503
        until(lambda: router.client.get("/health").status_code == 503)
        late = router.client.post("/v1/completions", json=body(1))
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        engines[0].start().wait()
        until(lambda: router.client.get("/health").status_code == 200)
        check_all(all_at_once(router.url, [body(0)]), 1)


# -- the queue


def test_prompts_wait_here_by_priority_and_an_engine_gets_no_more_than_it_can_run() -> None:
    patient = {"health_s": 60.0, "max_batch": 3}
    with mocks(1) as engines, routed(engines, **patient) as router:
        engines[0].pause()

        def begin(k: int) -> threading.Thread:
            sent = body(k, priority=0 if k < 8 else -1)
            thread = threading.Thread(target=lambda: router.client.post("/v1/completions", json=sent))
            thread.start()
            until(lambda: router.router.n_open == k + 1)
            return thread

        threads = [begin(k) for k in range(10)]
        engines[0].resume()
        for thread in threads:
            thread.join()
        seen = engines[0].set()
        assert seen["most_running"] == 3
        assert [int(prompt.split()[1]) for prompt in seen["order"]] == [0, 1, 2, 8, 9, 3, 4, 5, 6, 7]


def test_what_cannot_be_in_time_is_refused_early_and_counted() -> None:
    with mocks(1, prefill_s=0.2) as engines, routed(engines, shed=True, policy="linear_score:shed=1") as router:
        bodies = [body(k, prompt=f"{k} " * 4000) for k in range(8)]
        answers = all_at_once(router.url, bodies)
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429}
        refused = 'vllm:request_success_total{engine="0",finished_reason="shed",model_name="mock"}'
        assert router.metrics()[refused] == statuses.count(429)
        assert engines[0].set()["begun"] == statuses.count(200)

"""Connections that say nothing, too much, or come in crowds; who carries no key; who is not on this machine."""

from __future__ import annotations

import asyncio
import base64
import logging
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_server import GREEDY, PROMPT, Served
from waiting import until

from engine.errors import SlalomError
from engine.model import ModelRunner
from engine.server.door import Limits, configure, quiet_accepting, room_for
from engine.server.keys import find_key

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
KEY = "k" * 20
PASSWORD = f"me:{KEY}".encode()


@pytest.fixture(scope="module")
def hasty() -> Iterator[Served]:
    server = Served(Limits(header_s=0.5, body_s=0.5, idle_s=0.5))
    yield server
    server.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    server = Served(api_key=KEY)
    yield server
    server.close()


def dial(server: Served, said: bytes = b"") -> socket.socket:
    line = socket.create_connection(("127.0.0.1", server.port), 60)
    line.sendall(said)
    return line


def heard(line: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    found = b""
    with line:
        while piece := line.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize("said", [b"", b"POST /v1/comp", HEAD, HEAD + b"X-A: b"])
def test_whoever_does_not_finish_the_head_of_a_request_is_hung_up_on(hasty: Served, said: bytes) -> None:
    lines = [dial(hasty, said) for _ in range(100)]
    answers = [heard(line) for line in lines]
    assert all(answer.startswith(b"HTTP/1.1 408 ") and b'"code": 408' in answer for answer in answers)
    assert hasty.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).status_code == 200
    until(lambda: len(hasty.server.server_state.connections) <= 1)


def test_drops_do_not_hold_the_door_open(hasty: Served) -> None:
    line = dial(hasty)
    line.settimeout(0.05)
    answer = b""
    for byte in HEAD * 40:  # a byte at a time, each well within the limit
        try:
            line.send(bytes([byte]))
            answer = line.recv(65536)
            break
        except TimeoutError:
            continue
        except OSError:
            break
    line.close()
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("length", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_whoever_does_not_finish_the_body_is_hung_up_on(hasty: Served, length: bytes) -> None:
    assert heard(dial(hasty, HEAD + length)).startswith(b"HTTP/1.1 408 ")
    until(lambda: hasty.engine.n_open == 0)


def test_a_connection_that_asks_nothing_more_is_closed(hasty: Served) -> None:
    line = dial(hasty, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert heard(line).startswith(b"HTTP/1.1 200 ")
    line = dial(hasty, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")  # half of a second one
    found = heard(line)
    assert found.startswith(b"HTTP/1.1 200 ")
    assert found.count(b"HTTP/1.1 200 ") == 1


def test_an_answer_that_takes_long_is_not_cut(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All limits are half a second; the answer comes after more than that."""
    run_layers = ModelRunner.run_layers

    def slow(self: ModelRunner, *args: Any) -> Any:
        threading.Event().wait(0.1)
        return run_layers(self, *args)

    monkeypatch.setattr(ModelRunner, "run_layers", slow)
    assert hasty.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).status_code == 200


def test_beyond_the_limit_of_connections_one_is_told_to_come_back() -> None:
    server = Served(Limits(connections=3))
    try:
        lines = [dial(server, HEAD) for _ in range(3)]
        until(lambda: len(server.server.server_state.connections) == 3)
        extra = heard(dial(server, HEAD))
        assert extra.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in extra
        for line in lines:
            line.close()
        until(lambda: not server.server.server_state.connections)
        assert server.client.get("/health").status_code == 200
    finally:
        server.close()


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def play() -> list[str]:
        calls: list[str] = []
        transport = SimpleNamespace(
            abort=lambda: calls.append("abort"), get_extra_info=lambda name, default=None: None,
            is_closing=lambda: False, close=lambda: calls.append("close"),
        )  # fmt: skip
        config = configure(None, Limits(idle_s=0.01))
        config.load()
        state: Any = SimpleNamespace(connections=set(), tasks=set(), total_requests=0, default_headers=[])
        door: Any = config.http_protocol_class(config=config, server_state=state, app_state={})
        door.connection_made(transport)
        for _ in range(2):  # it reads again in time; it does not
            calls.append("paused")
            door.pause_writing()
            if calls.count("paused") == 1:
                door.resume_writing()
            while calls.count("paused") == 2 and "abort" not in calls:
                await asyncio.sleep(0.005)
        door.connection_lost(None)
        return calls

    assert asyncio.run(play())[:3] == ["paused", "paused", "abort"]


@pytest.mark.parametrize(
    ("asked", "soft", "hard", "room", "raised"),
    [
        (0, 1024, 524_288, 4096, 4352), (0, 1024, 1024, 768, None), (0, 100_000, 100_000, 4096, None),
        (500, 512, 4096, 500, 756), (500, -1, -1, 500, None), (2000, 256, -1, 2000, 2256),
        (1000, 1024, 1024, "1024 files", None), (0, 256, 256, "256 files", None),
    ],
)  # fmt: skip
def test_the_limit_of_connections_lies_below_that_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, asked: int, soft: int, hard: int, room: int | str, raised: int | None
) -> None:
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.__setitem__(0, given[0]))
    if isinstance(room, str):
        with pytest.raises(SlalomError, match=f"--max-connections.*{room}"):
            room_for(asked)
        return
    assert room_for(asked) == room
    assert limits[0] == (raised or soft)


def test_out_of_descriptors_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        loop = asyncio.get_running_loop()
        quiet_accepting(loop)
        context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
        for _ in range(2048):
            loop.call_exception_handler(context)
        loop.call_exception_handler({"message": "something else"})

    with caplog.at_level(logging.ERROR):
        asyncio.run(play())
    assert [record.getMessage() for record in caplog.records] == [
        "no new connections for now: [Errno 24] Too many open files", "something else",
    ]  # fmt: skip


# -- the key


@pytest.mark.parametrize(
    "value",
    [
        None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Token {KEY}", KEY, "Basic !",
        "Basic " + base64.b64encode(f"{KEY}:".encode()).decode(), "Bearer \u00fc",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/dashboard"),
        ("GET", "/admin/state"), ("POST", "/admin/drain"), ("GET", "/no/such/path"),
    ],
)  # fmt: skip
def test_without_the_key_nothing_is_answered(locked: Served, value: str | None, method: str, path: str) -> None:
    headers = {} if value is None else {"authorization": value.encode()}
    answer = locked.client.request(method, path, content=b"{" * 10, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "Bearer" in answer.headers["www-authenticate"]


@pytest.mark.parametrize(
    "value", [f"Bearer {KEY}", f"bearer {KEY}", "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()]
)
def test_with_the_key_everything_is(locked: Served, value: str) -> None:
    headers = {"authorization": value}
    body = {"prompt": PROMPT, **GREEDY}
    assert locked.post("/v1/completions", body, headers=headers).status_code == 200
    assert locked.client.get("/admin/state", headers=headers).status_code == 200
    assert locked.client.get("/dashboard", headers=headers).status_code == 200
    assert locked.client.get("/health").status_code == 200  # for load balancers


def test_keys_come_from_a_file_or_an_option_and_are_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    assert find_key("", str(path)) == find_key(KEY, "") == KEY
    assert find_key("", "") == ""
    for given, file in (("short", ""), ("with a space in it", ""), ("ü" * 20, ""), (KEY, str(path)), ("", "/none")):
        with pytest.raises(SlalomError, match="--api-key"):
            find_key(given, file)
    path.write_text("")
    with pytest.raises(SlalomError, match="0 characters"):
        find_key("", str(path))


# -- administration

PROXIES = [
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "CF-Connecting-IP",
    "True-Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "X-Envoy-External-Address", "X-Original-Forwarded-For",
    "X-Original-Host", "Fastly-Client-IP",
]  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [
        *({name: "10.0.0.1"} for name in PROXIES),
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Host": ""}, {"Host": "127.0.0.1.evil.example"},
        {"Host": "10.0.0.1"}, {"Host": "[::2]:80"},
    ],
    ids=str,
)  # fmt: skip
def test_administration_is_not_for_proxies_or_pages_of_other_sites(hasty: Served, headers: dict[str, str]) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert hasty.client.get("/admin/state", headers=headers).status_code == 403
    assert hasty.client.post("/admin/drain", content=b"a=b", headers=headers | form).status_code == 403
    assert hasty.engine.accepting


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}", "[::1]"])
def test_administration_is_for_this_machine_by_any_of_its_names(hasty: Served, host: str) -> None:
    named = host.format(port=hasty.port)
    for more in ({}, {"Origin": f"http://{named}", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert hasty.client.get("/admin/state", headers={"Host": named} | more).status_code == 200


# -- what is looked for in the text after every token


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["x"] * 17), ("stop", "x" * 1001), ("stop", ["y", "x" * 1001]),
        ("stop_token_ids", list(range(257))), ("logit_bias", {str(k): 1.0 for k in range(1025)}),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_stops_and_biases_are_bounded(hasty: Served, field: str, value: Any) -> None:
    answer = hasty.post("/v1/completions", {"prompt": PROMPT, **GREEDY, field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field

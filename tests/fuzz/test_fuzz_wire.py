"""The connections of a worker: strangers are hung up on; a peer's bad message is answered, or the line ends.

In no case does a thread end in a traceback, and the worker goes on serving its owner.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from contract import EXAMPLES, mutants, scrambled, within_limits
from hypothesis import given, settings
from hypothesis import strategies as st
from live_cases import GREEDY
from test_runtime_distributed import InThread

from engine.model.sampling import SamplingParams
from engine.workers.wire import KEY, ask, connect, step_message

DRAWN = SamplingParams(temperature=1.0, seed=7, stop=("zzz",), logit_bias=((5, -1.5),), max_tokens=16)
MESSAGES: dict[str, dict[str, Any]] = {
    "own": {"do": "own"},
    "describe": {"do": "describe"},
    "renew": {"do": "renew"},
    "pools": {"do": "pools", "blocks": {"0": 8}, "block_tokens": 16},
    "lane": {"do": "lane", "instance": 0, "lane": 0, "pool": 0, "sizes": []},
    "step": json.loads(json.dumps(step_message(None, (0, 4), [GREEDY, DRAWN], [0, 5]) | {"partition": -1})),
    "spans": {
        "do": "step", "spans": [[1, 2, 3], [3], [0], [True], [1], [1]], "prompts": 1, "layers": [0, 4],
        "params": [json.loads(json.dumps(step_message(None, (0, 4), [GREEDY], [0])))["params"][0]], "steps": [0],
        "partition": -1,
    },
    "fetch": {
        "do": "fetch", "pipe": "wire", "sender": None, "sender_epoch": "x", "from": 0, "to": 0, "blocks": [[1, 2]],
        "timeout_s": 0.1,
    },
    "serve_pulls": {"do": "serve_pulls", "pipe": "none", "timeout_s": 0.1},
}  # fmt: skip
HANDSHAKE = b"\0\0\0\x14#WELCOME#" + b"x" * 11 + b"\0\0\0\x0c" + b'{"do":"own"}'


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "only for these tests")
        yield


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What ended threads."""
    found: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: found.append(arguments.exc_value))
    return found


def _no_huge_pools(message: Any) -> Any:
    """An owner may ask for as much KV as there is memory: that is no fault."""
    if isinstance(message, dict) and message.get("do") == "pools":
        message["blocks"] = {"0": 8} if isinstance(message.get("blocks"), dict) else message.get("blocks")
        message["block_tokens"] = 16 if type(message.get("block_tokens")) is int else message.get("block_tokens")
    return message


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", MESSAGES)
def test_a_peer_may_say_anything(name: str, examples: int, broken: list[BaseException | None]) -> None:
    worker = InThread()
    owner = connect(worker.address)
    epoch = ask(owner, {"do": "own"})["epoch"]
    for first in ("pools", "lane"):
        ask(owner, MESSAGES[first] | {"epoch": epoch})

    @settings(max_examples=examples)
    @given(mutants(MESSAGES[name] | {"epoch": epoch}), st.booleans())
    def check(mutant: Any, has_lane: bool) -> None:
        with within_limits(), connect(worker.address) as peer:
            try:
                if has_lane:
                    ask(peer, MESSAGES["lane"] | {"epoch": epoch})
                peer.send_bytes(json.dumps(_no_huge_pools(mutant)).encode())
                if peer.poll(20):
                    answer = json.loads(peer.recv_bytes())
                    assert isinstance(answer, dict)
            except (EOFError, ConnectionError):
                pass  # the line ended

    check()
    assert broken == []
    assert ask(owner, {"do": "renew", "epoch": epoch}) == {}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_peer_may_send_bytes_that_are_no_message(examples: int, broken: list[BaseException | None]) -> None:
    worker = InThread()
    owner = connect(worker.address)
    epoch = ask(owner, {"do": "own"})["epoch"]
    good = json.dumps(MESSAGES["step"] | {"epoch": epoch}).encode()

    @settings(max_examples=examples)
    @given(scrambled(good))
    def check(raw: bytes) -> None:
        with within_limits(), connect(worker.address) as peer:
            try:
                peer.send_bytes(raw)
                if peer.poll(20):
                    peer.recv_bytes()
            except (EOFError, ConnectionError):
                pass

    check()
    assert broken == []
    assert ask(owner, {"do": "renew", "epoch": epoch}) == {}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_strangers_get_nowhere(examples: int, broken: list[BaseException | None]) -> None:
    """Whatever comes before the proof of the secret ends the line, or waits for its time-out."""
    worker = InThread()

    @settings(max_examples=examples)
    @given(
        st.one_of(
            st.binary(max_size=200),
            scrambled(b"\0\0\0\x14#WELCOME#" + b"\0\0\0\x08{own: 1}"),
            st.just(b"GET / HTTP/1.1"),
        )
    )
    def check(raw: bytes) -> None:
        with within_limits(), socket.create_connection(worker.address, 20) as line:
            try:
                line.sendall(raw)
                line.shutdown(socket.SHUT_WR)
                heard = b""
                while piece := line.recv(4096):
                    heard += piece
            except OSError:
                return  # hung up on
        assert len(heard) < 200  # a challenge, and no more
        assert b"epoch" not in heard

    check()
    assert broken == []
    owner = connect(worker.address)
    assert "epoch" in ask(owner, {"do": "own"})
    assert os.environ[KEY]

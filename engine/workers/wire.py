"""Messages between the processes of one engine: JSON over authenticated connections, one answer to each question."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

import numpy as np

from engine.common.documents import json_of
from engine.errors import SlalomError
from engine.kernels import Scored, Spans
from engine.model.sampling import SamplingParams
from engine.workers.lease import Disowned

#: Environment variable with the secret that all processes of an engine share.
KEY = "SLALOM_KEY"
_LONGEST = 64 * 2**20  # bytes of a message: a step of the longest prompts takes a few


def _secret() -> bytes:
    secret = os.environ.get(KEY, "")
    if not secret:
        raise SlalomError(KEY, "", "set this environment variable to the same secret for serve and all its workers")
    return secret.encode()


def parse_address(text: str) -> tuple[str, int]:
    """``"HOST:PORT"``.

    :raises SlalomError: something else
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SlalomError("address", text, "write HOST:PORT")
    return host, int(port)


def listen(address: tuple[str, int]) -> Listener:
    """Whoever is accepted must be :func:`admit`-ted before anything else.

    :raises OSError: the address cannot be listened on
    """
    _secret()
    return Listener(address, backlog=64)


def admit(connection: Connection, timeout_s: float = 10.0) -> None:
    """Let the caller prove that it knows the secret, and prove it to the caller (in the connection's own thread).

    :raises multiprocessing.AuthenticationError: it does not
    :raises OSError: it says nothing for ``timeout_s`` seconds
    """
    _limit_reads(connection, timeout_s)
    deliver_challenge(connection, _secret())
    answer_challenge(connection, _secret())
    _limit_reads(connection, 0.0)


def _limit_reads(connection: Connection, seconds: float) -> None:
    """Let reads fail after so long; 0: never."""
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def hang_up(connection: Connection) -> None:
    """End ``connection`` under a thread that waits on it, which :meth:`Connection.close` does not wake."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:  # or it is closed already
        line.shutdown(socket.SHUT_RDWR)


def connect(address: tuple[str, int]) -> Connection:
    """:raises OSError: nobody listens there; ``multiprocessing.AuthenticationError``: another secret"""
    key = _secret()
    connection = Client(address)
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            # The end of the proof and the first message are two writes: the second would wait 40 ms for an answer.
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except BaseException:
        connection.close()
        raise
    return connection


def send(connection: Connection, message: dict[str, Any]) -> None:
    """Send one message."""
    connection.send_bytes(json.dumps(message, separators=(",", ":")).encode())


def receive(connection: Connection, timeout_s: float | None = None) -> dict[str, Any]:
    """The next message.

    :raises TimeoutError: none came in ``timeout_s`` seconds; ``EOFError`` or ``OSError``: the other side is gone, or
        sends more than any message has
    :raises SlalomError: what came is no message
    """
    if timeout_s is not None and not connection.poll(timeout_s):
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    message = json_of(connection.recv_bytes(_LONGEST), "message", constants=True)
    if not isinstance(message, dict):
        raise SlalomError("message", message, "send an object")
    return message


def pour(connection: Connection, data: memoryview, timeout_s: float) -> None:
    """Send bytes that are no message; the other side knows how many and calls :func:`fill`.

    :raises TimeoutError: they were not taken in ``timeout_s`` seconds; ``OSError``: the other side is gone
    """
    until = time.monotonic() + timeout_s
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        while len(data):
            if not _ready(line.fileno(), select.POLLOUT, until):
                raise TimeoutError(f"time-out: not all was taken within {timeout_s:g} s")
            data = data[line.send(data, socket.MSG_DONTWAIT) :]


def fill(connection: Connection, data: memoryview, timeout_s: float) -> None:
    """Fill ``data`` with what the other side pours.

    :raises TimeoutError: it did not come in ``timeout_s`` seconds; ``EOFError`` or ``OSError``: the other side is gone
    """
    until = time.monotonic() + timeout_s
    while len(data):
        if not _ready(connection.fileno(), select.POLLIN, until):
            raise TimeoutError(f"time-out: not all came within {timeout_s:g} s")
        came = os.readv(connection.fileno(), [data])
        if not came:
            raise EOFError
        data = data[came:]


def _ready(line: int, event: int, until: float) -> bool:
    """Wait for ``event`` on a descriptor until then; False when it does not come."""
    poll = select.poll()
    poll.register(line, event)
    return bool(poll.poll(max(until - time.monotonic(), 0.0) * 1e3))


def ask(connection: Connection, message: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
    """Send ``message`` and return the answer.

    :raises RuntimeError: the other side could not do it, and says why
    :raises Disowned: it works for somebody else; otherwise as :func:`receive`
    """
    send(connection, message)
    answer = receive(connection, timeout_s)
    if "disowned" in answer:
        raise Disowned(answer["disowned"])
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def step_message(
    spans: Spans | None, layers: tuple[int, int], params: Sequence[SamplingParams], steps: Sequence[int]
) -> dict[str, Any]:
    """The arguments of :meth:`engine.live.hosts.Executor.run`. Of the block tables only what is used travels."""
    columns, prompts = None, 0
    if spans is not None:
        used = spans.blocks[:, : spans.width][_used(spans.n_blocks)]
        prompts = spans.prompts
        columns = [c.tolist() for c in (spans.tokens, spans.counts, spans.starts, spans.sample, spans.n_blocks, used)]
    return {
        "do": "step",
        "spans": columns,
        "prompts": prompts,
        "scored": [] if spans is None else spans.scored,
        "layers": layers,
        "params": [asdict(p) | {"allowed": p.allowed and p.allowed.hex()} for p in params],
        "steps": list(steps),
    }


def step_from(message: dict[str, Any]) -> tuple[Spans | None, tuple[int, int], list[SamplingParams], list[int]]:
    """What :func:`step_message` was given."""
    params = [
        SamplingParams(
            **(p | {name: tuple(p[name]) for name in ("stop", "stop_token_ids")})
            | {"logit_bias": tuple((token, bias) for token, bias in p["logit_bias"])}
            | {"allowed": None if p["allowed"] is None else bytearray.fromhex(p["allowed"])}
            | {"counts": {int(token): n for token, n in p["counts"].items()}}
        )
        for p in message["params"]
    ]
    first, last = message["layers"]
    spans = None
    if message["spans"] is not None:
        *columns, used = message["spans"]
        types = (np.int64, np.int64, np.int64, np.bool_, np.int32)
        arrays: list[np.ndarray] = [np.array(c, t) for c, t in zip(columns, types, strict=True)]
        tokens, counts, starts, sample, n_blocks = arrays
        blocks = np.zeros((len(n_blocks), n_blocks.max()), np.int32)
        blocks[_used(n_blocks)] = used
        scored = [Scored(*wanted) for wanted in message["scored"]]
        spans = Spans(tokens, counts, starts, sample, n_blocks, blocks, message["prompts"], scored)
    return spans, (first, last), params, message["steps"]


def _used(n_blocks: np.ndarray) -> np.ndarray:
    """Which entries of a block table are somebody's blocks, bool (S, widest)."""
    found: np.ndarray = np.arange(n_blocks.max()) < n_blocks[:, None]
    return found

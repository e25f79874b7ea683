"""A request on its way through the router, and the answer that its client waits for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from engine.live.request import Delta, Ticket

#: The engine ends its answers, the core never does.
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class Leg(IntEnum):
    """What an engine is asked to do for a request."""

    WHOLE = 0
    PREFILL = 1  # compute the prompt and keep its KV for another engine
    DECODE = 2  # go on from there


class Answer:
    """What the client of one request gets, as it comes. Belongs to the event loop.

    :ivar ended: nothing follows
    :ivar reply: the whole answer, where there is one
    :ivar failure: why there is none: ``abort``, ``error``, ``shed`` or ``unplaceable``
    """

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._news = asyncio.Event()
        self.ended = False
        self.reply: Reply | None = None
        self.failure: str | None = None

    def put(self, part: bytes) -> None:
        """Bytes of a stream."""
        self._parts.append(part)
        self._news.set()

    def end(self, reply: Reply | None = None, failure: str | None = None) -> None:
        """Nothing follows; only the first end counts."""
        if not self.ended:
            self.ended, self.reply, self.failure = True, reply, failure
            self._news.set()

    async def next(self) -> bytes:
        """All that has come since; empty at the end."""
        while not self._parts and not self.ended:
            self._news.clear()
            await self._news.wait()
        found = b"".join(self._parts)
        self._parts.clear()
        return found


class RemoteRequest(Ticket):
    """``options`` as :class:`engine.live.request.Ticket`.

    :param n_prompt: tokens of the prompt, counted or guessed
    :param tokens: its token ids, or what tells prompts apart that begin alike, int64
    :param path: where engines take it; ``body`` as it goes there, which always asks for a stream
    :param whole: its client wants the answer in one piece
    :param strip_usage: its client did not ask for the usage that the stream will carry
    """

    def __init__(
        self,
        n_prompt: int,
        tokens: np.ndarray,
        sink: Callable[[Delta], None],
        *,
        path: str,
        body: dict[str, Any],
        headers: Mapping[str, str],
        whole: bool,
        strip_usage: bool,
        **options: int,
    ) -> None:
        super().__init__(n_prompt, _NO_LIMIT, sink, **options)
        self.tokens = tokens
        self.path, self.body, self.headers = path, body, headers
        self.whole, self.strip_usage = whole, strip_usage
        # The scheduler's:
        self.attempt = 0  # the number of the one under way; what others report does not count
        self.engine = -1  # where that runs
        self.counted = 0  # tokens booked
        self.begun = False  # its first token was booked
        self.leg = Leg.WHOLE  # what the attempt under way is to do
        self.apart = False  # its prompt may be computed by another engine than its answer
        self.source = -1  # the engine that has the KV of its prompt for another one
        self.failures = 0
        # The event loop's:
        self.answer = Answer()
        self.cancel: Callable[[], None] | None = None  # hangs up on the engine
        self.told = False  # its client has got a part of a stream, so nothing can be tried again
        self.gone = False  # nobody waits for it
        self.kv: dict[str, Any] | None = None  # where its KV is, in the words of the engine that computed it
        self.letters = 0  # of its prompt, where its tokens were guessed from them

"""From the scheduler's thread to coroutines: one wake-up for everything that a step gave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from engine.live.engine import Engine
from engine.live.observer import Observer
from engine.live.request import Delta, Request
from engine.model.forms import Progress
from engine.model.sampling import SamplingParams
from engine.server.protocol import Targets

_ENDS_WITHOUT_ANSWER = ("abort", "error", "shed", "unplaceable")


class Stream:
    """What one request gives, as it comes. Closing it early hangs up on the request."""

    def __init__(self, engine: Engine, mailroom: Mailroom) -> None:
        self._engine = engine
        self._mailroom = mailroom
        self.inbox: asyncio.Queue[Delta] = asyncio.Queue()
        self.request: Request | None = None
        self.n_tokens = 0

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        targets: Targets,
        *,
        cls: int = 0,
        priority: int = 0,
        form: Progress | None = None,
    ) -> None:
        """Hand the request in; raises as :meth:`Engine.submit`."""

        def sink(delta: Delta) -> None:
            self._mailroom.put(self, delta)

        self.request = self._engine.submit(
            prompt, params, sink, cls=cls, ttft_s=targets.ttft_s, tpot_s=targets.tpot_s, priority=priority, form=form
        )

    async def next(self) -> Delta:
        """The next delta."""
        delta = await self.inbox.get()
        self.n_tokens += delta.token is not None
        return delta

    async def rest(self, first: Delta) -> AsyncIterator[Delta]:
        """``first`` and all that follow."""
        delta = first
        while True:
            yield delta
            if delta.finish is not None:
                return
            delta = await self.next()

    def close(self) -> None:
        """Nobody listens any more."""
        if self.request is not None and not self.request.ended:
            self._engine.abort(self.request)


class Mailroom(Observer):
    """Collects the deltas of a step and delivers them to their streams in one call of the event loop."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._out: list[tuple[Stream, Delta]] = []
        engine.observers.append(self)

    def put(self, stream: Stream, delta: Delta) -> None:
        """In the scheduler's thread: something for ``stream``."""
        self._out.append((stream, delta))

    def settled(self) -> None:
        """One wake-up of the event loop for all that came."""
        if self._out:
            batch, self._out = self._out, []
            self._loop.call_soon_threadsafe(self._deliver, batch)

    @staticmethod
    def _deliver(batch: list[tuple[Stream, Delta]]) -> None:
        for stream, delta in batch:
            stream.inbox.put_nowait(delta)


def unanswered(delta: Delta) -> bool:
    """Whether the request ended without an answer, for a reason that is not the model's."""
    return delta.finish in _ENDS_WITHOUT_ANSWER

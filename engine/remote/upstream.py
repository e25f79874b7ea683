"""One engine of others, over HTTP: sends it a request and passes on what comes, in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import orjson

from engine.live.clock import WallClock
from engine.remote.handover import body_of_decode, body_of_prefill, kv_of
from engine.remote.reports import End, Report, Reports
from engine.remote.request import Leg, RemoteRequest, Reply
from engine.remote.stream import Splitter, Whole, asks_usage_only, n_tokens, payload
from engine.remote.wire import Wire

_log = logging.getLogger("slalom.remote")
_BUSY = (429, 503)
_REST_S = 0.05  # what follows the end of an answer, which is nothing, may take so long
#: Requests in the engine, running or waiting, by the names of vLLM, llama.cpp and SGLang.
_REQUESTS = re.compile(
    rb"^(?:vllm:num_requests_(?:running|waiting)|llamacpp:requests_(?:processing|deferred)"
    rb"|sglang:num_(?:running|queue)_reqs)(?:\{[^}]*\})? ([0-9.eE+]+)$",
    re.MULTILINE,
)


class Attempt:
    """A request at an engine. ``number`` tells it from others at the same request.

    :param among: those that are under way, of which it is one until it ends
    """

    def __init__(self, request: RemoteRequest, number: int, among: set[Attempt]) -> None:
        self.request, self.number, self._among = request, number, among
        self.total = 0  # tokens so far
        self.leg, self.source = request.leg, request.source
        self.heard = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin."""
        self._among.add(self)
        self._task = asyncio.get_running_loop().create_task(work)
        self.request.cancel = self.cancel

    def cancel(self) -> None:
        """Hang up on the engine; once, since a second time would disturb the first."""
        task, self._task = self._task, None
        self._among.discard(self)  # a task that has not begun would never do so itself
        if task is not None:
            task.cancel()


class Upstream:
    """:param keeps: see :class:`engine.remote.wire.Wire`
    :param troubled: hears when a connection fails; ``busy`` when the engine refuses, with its Retry-After in seconds
    :ivar attempts: under way
    :ivar away: it is given nothing at present
    :ivar rest: ends the time that it asked to be spared, where that is all that keeps it away
    :ivar heard: when anything came from the engine, seconds of ``time.monotonic``
    :ivar reported: requests that it said it has, by ``/metrics``; None where it does not say
    """

    def __init__(
        self,
        index: int,
        url: str,
        keeps: bool,
        reports: Reports,
        troubled: Callable[[Upstream, str], None],
        busy: Callable[[Upstream, float], None],
        learn: Callable[[RemoteRequest, dict[str, Any]], None],
    ) -> None:
        self.index, self.url = index, url.rstrip("/")
        self._reports, self._troubled, self._busy, self._learn = reports, troubled, busy, learn
        self._wire = Wire(self.url, keeps)
        self.attempts: set[Attempt] = set()
        self.heard = time.monotonic()
        self.away = False
        self.rest: asyncio.TimerHandle | None = None
        self.ejections = self.refusals = 0
        self._keeps_nothing = False
        self.reported: float | None = None
        self.disagreement: float | None = None

    def begin(self, request: RemoteRequest, number: int) -> None:
        """Send ``request``; what comes of it goes to its answer and into the reports."""
        attempt = Attempt(request, number, self.attempts)
        request.finish = None
        attempt.run(self._attempt(attempt))

    async def _attempt(self, attempt: Attempt) -> None:
        end, trouble = End.LOST, ""
        try:
            end = await self._relay(attempt)
        except httpx.HTTPError as error:
            end, trouble = End.BROKEN if attempt.request.told else End.LOST, repr(error)
        except Exception:  # an answer that is none: the request fails, the router goes on
            _log.exception("engine %d: request %d", self.index, attempt.request.number)
            end = End.BROKEN
        finally:
            self.attempts.discard(attempt)
        self._report(attempt, end)
        if trouble:  # by now this attempt is not among those that are given up for it
            self._troubled(self, trouble)

    def give_up(self, attempt: Attempt) -> None:
        """The engine is away: try the request elsewhere, or end it where its client has got a part."""
        attempt.cancel()
        self._report(attempt, End.BROKEN if attempt.request.told else End.LOST)

    def _report(self, attempt: Attempt, end: End = End.NONE, *, urgent: bool = True) -> None:
        report = Report(attempt.request, attempt.number, attempt.total, WallClock.stamp(), end)
        self._reports.put(report, urgent=urgent)

    async def _prefill(self, request: RemoteRequest) -> End:
        """The first leg: nobody hears of it but the scheduler."""
        content = orjson.dumps(body_of_prefill(request.body))
        async with self._wire.post(request.path, content, request.headers) as response:
            body = await response.aread()
        self.heard = time.monotonic()
        if response.status_code != 200:
            return self._refused(request, response, body)
        answer = orjson.loads(body)
        request.kv = kv_of(answer)
        if request.kv is None and not self._keeps_nothing:
            self._keeps_nothing = True
            _log.warning("%s keeps no KV for others: prompts are computed twice; see docs/remote.md", self.url)
        self._learn(request, answer.get("usage") or {})
        return End.PREFILLED

    async def _relay(self, attempt: Attempt) -> End:
        request = attempt.request
        if attempt.leg == Leg.PREFILL:
            return await self._prefill(request)
        content = orjson.dumps(body_of_decode(request.body, request.kv if attempt.source >= 0 else None))
        async with self._wire.post(request.path, content, request.headers) as response:
            self.heard = time.monotonic()
            if response.status_code != 200:
                return self._refused(request, response, await response.aread())
            if "text/event-stream" not in response.headers.get("content-type", ""):
                return self._whole(attempt, response, await response.aread())
            passed = _Passing(attempt)
            splitter = Splitter()
            coming = response.aiter_raw()
            async for data in coming:
                self.heard = attempt.heard = time.monotonic()
                before = attempt.total
                for event in splitter.push(data):
                    passed.take(event)
                passed.flush()
                if attempt.total > before and not passed.done:
                    self._report(attempt, urgent=before == 0)
                if passed.done:
                    break
            else:
                if not passed.finished:
                    raise httpx.RemoteProtocolError("the stream ended before its answer did")
            with contextlib.suppress(TimeoutError, httpx.HTTPError):  # read to its end a connection may be used again
                async with asyncio.timeout(_REST_S):
                    async for _ in coming:
                        pass
        if passed.usage:
            self._learn(request, passed.usage)
        return passed.end()

    def _whole(self, attempt: Attempt, response: httpx.Response, body: bytes) -> End:
        """It does not stream: the answer as it is, and its tokens by its own count."""
        answer = orjson.loads(body)
        usage = answer.get("usage") or {}
        attempt.total = max(int(usage.get("completion_tokens", 1)), 1)
        attempt.request.finish = (answer.get("choices") or [{}])[0].get("finish_reason") or "length"
        self._learn(attempt.request, usage)
        kind = response.headers.get("content-type", "application/json")
        attempt.request.answer.end(Reply(200, body, {"content-type": kind}))
        return End.DONE

    def _refused(self, request: RemoteRequest, response: httpx.Response, body: bytes) -> End:
        status = response.status_code
        if status in _BUSY:
            self.refusals += 1
            try:
                after = float(response.headers.get("retry-after", 0.5))
            except ValueError:  # a date
                after = 1.0
            self._busy(self, after)
            return End.REFUSED
        if status >= 500:
            _log.warning("engine %d answered %d: %s", self.index, status, body[:200])
            return End.LOST
        kind = response.headers.get("content-type", "application/json")
        request.answer.end(Reply(status, body, {"content-type": kind}))
        return End.REJECTED

    # -- what it says about itself ---------------------------------------------------------------------------

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                found = await self._wire.client.get("/health")
                if found.status_code == 404:
                    found = await self._wire.client.get("/v1/models")
                self.heard = time.monotonic()
                return found.status_code == 200
        return False

    async def compare(self, timeout_s: float) -> None:
        """Read how many requests it says it has, beside how many we know of."""
        before = len(self.attempts)
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                found = await self._wire.client.get("/metrics")
            counts = _REQUESTS.findall(found.content)
            if found.status_code == 200 and counts:
                self.reported = sum(map(float, counts))
                self.disagreement = self.reported - 0.5 * (before + len(self.attempts))

    async def close(self) -> None:
        """Hang up."""
        for attempt in list(self.attempts):
            attempt.cancel()
        await self._wire.close()


class _Passing:
    """Passes the events of one attempt on: to a stream as they are, or into a whole.

    A stream begins with the first token: until then nothing is told, and the request may go elsewhere.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt, self._request = attempt, attempt.request
        self._whole = Whole(chat="messages" in attempt.request.body) if attempt.request.whole else None
        self._parts: list[bytes] = []
        self.usage: dict[str, Any] | None = None
        self.finished = self.done = self._failed = False

    def take(self, event: bytes) -> None:
        """One event."""
        data = payload(event)
        if data is None:
            return
        if data == b"[DONE]":
            self.done = self.finished = True
            self._parts.append(b"data: [DONE]\n\n")
            return
        chunk = orjson.loads(data)
        if "error" in chunk:
            self._failed = self.finished = True
            self._parts.append(event + b"\n\n")
            return
        self._attempt.total = n_tokens(chunk, self._attempt.total)
        for choice in chunk.get("choices") or ():
            if choice.get("finish_reason"):
                self.finished, self._request.finish = True, choice["finish_reason"]
        usage = chunk.get("usage")
        self.usage = usage or self.usage
        if self._whole is not None:
            self._whole.push(chunk)
        elif usage and self._request.strip_usage:
            if not asks_usage_only(chunk):
                del chunk["usage"]
                self._parts.append(b"data: " + orjson.dumps(chunk) + b"\n\n")
        else:
            self._parts.append(event + b"\n\n")

    def flush(self) -> None:
        """Let the client have what has come, once there is a token."""
        if self._whole is not None or not self._parts or (self._failed and not self._request.told):
            return
        if self._attempt.total > 0 or self.finished:
            self._request.told = True
            self._request.answer.put(b"".join(self._parts))
            self._parts.clear()

    def end(self) -> End:
        """The answer is complete."""
        if self._failed and self._request.told:
            self._request.answer.end()  # the engine has said what is wrong
            return End.BROKEN
        if self._failed:
            return End.LOST
        if self._whole is not None:
            self._request.answer.end(Reply(200, self._whole.body(), {"content-type": "application/json"}))
        else:
            self._request.answer.end()
        return End.DONE

"""An engine of others, timed from outside: first tokens of lone prompts, and gaps of streams that join one by one.

A *ramp* lets streams join until a batch is full. Between two of them it shows decode steps of that batch size, and
when one joins, the gap in the others is a step that computes its prompt beside them. So one ramp gives a point of
either kind for every batch size. What is timed is what a router sees: HTTP and the engine's own host time are in it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import httpx
import numpy as np
import orjson

from engine.calibration.design import doubts
from engine.calibration.points import Kind, Measured, Point, arrays
from engine.errors import SlalomError
from engine.latency.fit import MIN_POINTS, DecodeSamples, PrefillSamples, fit_decode, fit_prefill
from engine.remote.discover import EngineFacts
from engine.remote.stream import Splitter, n_tokens, payload
from engine.remote.wire import Wire

_IDS = range(1000, 10_000)  # ids that any vocabulary has
_GAPS = 6  # decode steps of a point
_ENOUGH = 3 * MIN_POINTS  # points of a kind, before a small error is believed
_SIZES = 9  # prompt lengths to begin with
_REPEATS = 3
_OVERTIME = 5.0  # budgets more, where the points would be too few to fit
_STREAMS, _STREAM_TOKENS = 3, 16  # of a neighbour, while it is busy


def _answer(bs: int) -> int:
    """Tokens that the first stream of a ramp to ``bs`` needs at least."""
    return (_GAPS + 8) * (bs + 1)


@dataclass(frozen=True)
class Limits:
    """:param budget_s: time to measure
    :param error: held-out error that is small enough
    :param max_tokens: longest prompt
    :param max_batch: most sequences that decode together
    """

    budget_s: float
    error: float
    max_tokens: int
    max_batch: int

    def within(self, facts: EngineFacts) -> Limits:
        """As far as the engine goes: a ramp's streams also need room for their answers."""
        batch = min(self.max_batch, facts.max_batch or self.max_batch)
        room = min(facts.context or 2**20, (facts.kv_tokens or 2**20) // batch)
        return replace(self, max_batch=batch, max_tokens=max(min(self.max_tokens, room - _answer(batch) - 8), 16))


@dataclass
class _Stream:
    """A request under way, and when its tokens came."""

    prompt: int
    stamps: list[float] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    failure: str = ""

    @property
    def context(self) -> int:
        return self.prompt + len(self.stamps)

    async def reach(self, n: int) -> bool:
        """Wait for token ``n``; False where the answer ends before.

        :raises SlalomError: the engine refuses or fails
        """
        while len(self.stamps) < n and not self.ended:
            self.news.clear()
            await self.news.wait()
        if self.failure or (self.ended and not self.stamps):
            why = self.failure or "no tokens"
            raise SlalomError("--engine", why, "the engine must take prompts of token ids, and stream")
        return len(self.stamps) >= n


class _Engine:
    def __init__(self, facts: EngineFacts) -> None:
        self._facts, self._random = facts, random.SystemRandom()  # no prompt twice: it would be in the prefix cache
        self._wire = Wire(facts.url, facts.keeps)

    async def close(self) -> None:
        await self._wire.close()

    def begin(self, prompt: int, tokens: int) -> tuple[_Stream, asyncio.Task[None]]:
        """Send a prompt that nobody has seen; its answer has ``tokens`` tokens."""
        stream = _Stream(prompt)
        body = {
            "model": self._facts.model,
            "prompt": self._random.choices(_IDS, k=prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        if self._facts.counts:  # a token may have no text of its own
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return stream, asyncio.ensure_future(self._read(stream, body))

    async def _read(self, stream: _Stream, body: dict[str, Any]) -> None:
        splitter, total = Splitter(), 0
        try:
            async with self._wire.post("/v1/completions", orjson.dumps(body)) as response:
                if response.status_code != 200:
                    stream.failure = f"status {response.status_code}: {(await response.aread())[:200]!r}"
                    return
                async for data in response.aiter_raw():
                    now = time.perf_counter()
                    for event in splitter.push(data):
                        text = payload(event)
                        if text and text != b"[DONE]":
                            before, total = total, n_tokens(orjson.loads(text), total)
                            stream.stamps += [now] * (total - before)
                    stream.news.set()
        except (httpx.HTTPError, ValueError) as error:
            stream.failure = repr(error)
        finally:
            stream.ended = True
            stream.news.set()

    async def prefill(self, n: int) -> Measured:
        """A lone prompt: request sent to first token."""
        seconds: list[float] = []
        while len(seconds) < (_REPEATS if sum(seconds) < 2.0 else 1):
            begin = time.perf_counter()
            stream, task = self.begin(n, 1)
            await stream.reach(1)
            seconds.append(stream.stamps[0] - begin)
            await task
        wide = (max(seconds) - min(seconds)) / median(seconds)
        found = median(seconds)
        return Measured(Point("prefill", n=n, prompts=1), found, found, 0.0, wide, len(seconds))

    async def occupy(self, longest: int, share: float) -> None:
        """Keep the engine busy for this ``share`` of the time until cancelled, with prompts of every length up to
        ``longest``, some streams together.

        :raises SlalomError: the engine refuses or fails
        """
        while True:
            begin = time.perf_counter()
            drawn = np.exp([self._random.uniform(np.log(16), np.log(max(longest, 17))) for _ in range(_STREAMS)])
            begun = [self.begin(round(n), _STREAM_TOKENS) for n in drawn]
            try:
                for stream, _ in begun:
                    await stream.reach(_STREAM_TOKENS)
            finally:
                for _, task in begun:
                    task.cancel()
            await asyncio.sleep((time.perf_counter() - begin) * (1.0 / share - 1.0))

    def _room(self, prompt: int, bs: int) -> int:
        """Tokens that a stream of a ramp may give: the first ones go on while prompts of others are computed."""
        return max((self._facts.context or 2048) - prompt - 8, _answer(bs))

    async def ramp(self, bs: int, prompt: int, until: float) -> list[Measured]:
        """Streams of equal prompts join until ``bs`` decode together, or the time is ``until``."""
        found: list[Measured] = []
        begun: list[tuple[_Stream, asyncio.Task[None]]] = []
        try:
            for k in range(1, bs + 1):
                sent = time.perf_counter()
                if sent > until:
                    break
                context = sum(s.context for s, _ in begun)
                begun.append(self.begin(prompt, self._room(prompt, bs)))
                joined = begun[-1][0]
                await joined.reach(1)
                lead = begun[0][0]
                if k > 1:
                    if not await lead.reach(len(lead.stamps) + 1):
                        break
                    found.append(_fused(lead, sent, joined.stamps[0], prompt, k - 1, context))
                if not await lead.reach(len(lead.stamps) + _GAPS + 2):
                    break
                found.append(_decode(lead, k, sum(s.context for s, _ in begun)))
        finally:
            for _, task in begun:
                task.cancel()
            await asyncio.gather(*(task for _, task in begun), return_exceptions=True)
        return found


def _figure(kind: Kind, point: Point, gaps: Sequence[float], seconds: float) -> Measured:
    wide = float(np.subtract(*np.percentile(gaps, [75, 25]))) / seconds if len(gaps) > 1 else 0.0
    return Measured(point, seconds, seconds, 0.0, wide, len(gaps))


def _decode(lead: _Stream, bs: int, context: int) -> Measured:
    gaps = np.diff(lead.stamps[-_GAPS - 1 :])
    seconds = max(float(np.median(gaps)), 1e-6)
    return _figure("decode", Point("decode", bs=bs, ctx=max(context // bs, 1)), gaps.tolist(), seconds)


def _fused(lead: _Stream, sent: float, first: float, prompt: int, bs: int, context: int) -> Measured:
    """The longest gap of ``lead`` while the prompt that was sent was computed."""
    stamps = np.asarray(lead.stamps)
    gaps = np.diff(stamps)[(stamps[1:] > sent) & (stamps[:-1] <= first)]
    seconds = max(float(gaps.max()), 1e-6) if len(gaps) else 1e-6
    return _figure("fused", Point("fused", n=prompt, prompts=1, bs=bs, ctx=max(context // bs, 1)), [seconds], seconds)


def held_out(measured: Sequence[Measured], kind: Kind) -> float:
    """Held-out error of the profile's own form on the points of ``kind``; 1 while there are too few."""
    points = [m for m in measured if m.point.kind == kind]
    if len(points) < MIN_POINTS:
        return 1.0
    if kind == "prefill":
        n, seconds = map(np.asarray, arrays(points, "n", "seconds"))
        return fit_prefill(PrefillSamples(n, np.zeros_like(n), seconds)).held_out_mape
    bs, ctx, seconds = map(np.asarray, arrays(points, "bs", "ctx", "seconds"))
    return fit_decode(DecodeSamples(bs * ctx, bs, seconds)).held_out_mape


def measure(
    facts: EngineFacts,
    limits: Limits,
    say: Callable[[float, str], None] = lambda share, text: None,
    seed: int = 0,
    beside: Sequence[EngineFacts] = (),
    beside_share: float = 0.75,
) -> tuple[list[Measured], str]:
    """Time the engine within ``limits``. Nobody else should use it meanwhile.

    :param say: hears of progress: share of the budget, and what is done
    :param beside: engines on the same hardware, which compute for ``beside_share`` of the time meanwhile
    :return: the points, and why it stopped
    :raises SlalomError: the engine does not answer, or not as it should
    """
    return asyncio.run(_Campaign(facts, limits, say, seed).run(beside, beside_share))


class _Campaign:
    def __init__(self, facts: EngineFacts, limits: Limits, say: Callable[[float, str], None], seed: int) -> None:
        self._engine, self._limits, self._say = _Engine(facts), limits, say
        self._random = random.Random(seed)
        self.found: list[Measured] = []
        self._begin = time.perf_counter()

    async def run(self, beside: Sequence[EngineFacts], share: float) -> tuple[list[Measured], str]:
        others = [_Engine(facts) for facts in beside]
        busy = [asyncio.ensure_future(other.occupy(self._limits.max_tokens, share)) for other in others if share > 0]
        work = asyncio.ensure_future(self._run())
        try:
            await asyncio.wait({work, *busy}, return_when=asyncio.FIRST_COMPLETED)
            for failed in (task for task in busy if task.done()):
                failed.result()
            return self.found, await work
        finally:
            for task in (work, *busy):
                task.cancel()
            await asyncio.gather(work, *busy, return_exceptions=True)
            for engine in (self._engine, *others):
                await engine.close()

    @property
    def _left_s(self) -> float:
        return self._begin + self._limits.budget_s - time.perf_counter()

    async def _run(self) -> str:
        await self._engine.prefill(16)  # what is slow the first time only
        sizes = np.unique(np.geomspace(4, self._limits.max_tokens, _SIZES).round().astype(int)).tolist()
        for n in sizes:
            last = self.found[-1].seconds if self.found else 0.0
            if len(self.found) >= MIN_POINTS and 2.0 * last > 0.25 * self._left_s:
                break  # longer ones would take what the others need
            await self._prefill(n)
        await self._ramp(self._limits.max_batch, 16)
        while True:
            errors = {kind: held_out(self.found, kind) for kind in ("prefill", "decode")}
            few = {kind: self._n(kind) < _ENOUGH for kind in errors}
            if not any(few.values()) and max(errors.values()) <= self._limits.error:
                return "the held-out error is small enough"
            if self._left_s <= 0 and (not self._too_few or self._left_s <= -_OVERTIME * self._limits.budget_s):
                return "the time is up"
            worst = max(errors, key=lambda kind: (few[kind], errors[kind]))
            if worst == "prefill":
                await self._prefill(self._doubtful())
            else:
                await self._ramp(self._random.randint(2, self._limits.max_batch), self._context())

    def _n(self, kind: str) -> int:
        return sum(m.point.kind == kind for m in self.found)

    @property
    def _too_few(self) -> bool:
        """Whether there are not even the points that a fit needs: then the time is exceeded."""
        return min(self._n("prefill"), self._n("decode")) < MIN_POINTS

    def _tell(self, what: str) -> None:
        self._say(1.0 - self._left_s / self._limits.budget_s, what)

    async def _prefill(self, n: int) -> None:
        self._tell(f"prompt of {n} tokens")
        self.found.append(await self._engine.prefill(n))

    async def _ramp(self, bs: int, prompt: int) -> None:
        self._tell(f"{bs} streams of {prompt} tokens")
        until = time.perf_counter() + max(self._left_s, (1.0 if self._too_few else 0.1) * self._limits.budget_s)
        self.found += await self._engine.ramp(bs, prompt, until)

    def _longest(self) -> int:
        return max(m.point.n for m in self.found if m.point.kind == "prefill")

    def _context(self) -> int:
        return round(float(np.exp(self._random.uniform(np.log(8), np.log(max(self._longest() // 2, 9))))))

    def _doubtful(self) -> int:
        """The prompt length that the fit is least sure of, for the time that it takes."""
        own = [m for m in self.found if m.point.kind == "prefill"]
        drawn = np.exp(np.random.default_rng(len(own)).uniform(np.log(4), np.log(self._longest()), 64))
        candidates = [Point("prefill", n=int(n), prompts=1) for n in np.unique(drawn.round())]
        error, seconds = doubts(own, candidates, len(own))
        return candidates[int((error / np.sqrt(seconds)).argmax())].n

"""Steps of an engine, seen in the gaps between the tokens that its clients got (``itls`` of vLLM's benchmark).

All sequences that run get a token at the end of a step, so tokens that come together are one step's, and the time
since those before is what it took. Who had one tells what was computed: the sequences that decode, and a prompt where
it is somebody's first. Steps that cannot be told for certain are left out: where a request waited, where one of those
that run got nothing (who reads several tokens at once), and where more than one prompt came in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from engine.calibration.points import Measured, Point
from engine.latency.fit import MIN_POINTS, DecodeFit, DecodeSamples, PrefillSamples, fit_decode, fit_prefill

_TOGETHER = 0.25  # of a short step: tokens of one step come within that
_MOST_TOGETHER_S = 0.005
_PER_OCTAVE = 3  # groups of lengths
_LEAST_REST = 0.1  # of a fused step: where less is left for its prompt, that is the scatter of decode
_SAVINGS = 9  # that a fused step may have, tried


class _Log:
    """Requests with the stamps of their tokens.

    :ivar token_s: (T,) ascending, of all tokens; ``who`` (T,) whose, ``nth`` (T,) its how manieth
    """

    def __init__(self, start: np.ndarray, prompt: np.ndarray, stamps: list[np.ndarray]) -> None:
        self.start, self.prompt = start, prompt
        self.first = np.array([s[0] for s in stamps])
        self.last = np.array([s[-1] for s in stamps])
        token_s = np.concatenate(stamps)
        who = np.repeat(np.arange(len(stamps)), [len(s) for s in stamps])
        nth = np.concatenate([np.arange(len(s)) for s in stamps])
        order = np.argsort(token_s, kind="stable")
        self.token_s, self.who, self.nth = token_s[order], who[order], nth[order]


def _read(content: Mapping[str, Any], n: int) -> tuple[_Log, np.ndarray] | None:
    """The first ``n`` answered requests, and the spans (start, end) of those whose tokens did not come one by one."""
    columns = [content.get(k) or [] for k in ("start_times", "input_lens", "output_lens", "ttfts", "itls")]
    rows = sorted((r for r in zip(*columns, strict=False) if r[2] and r[3]), key=lambda r: r[0])[:n]
    single = [r for r in rows if len(r[4]) == r[2] - 1 and all(gap > 0 for gap in r[4])]
    if len(single) < MIN_POINTS or sum(len(r[4]) for r in single) < MIN_POINTS:
        return None
    stamps = [float(r[0]) + float(r[3]) + np.concatenate([[0.0], np.cumsum(r[4])]) for r in single]
    unclear = [(float(r[0]), float(r[0]) + float(r[3]) + float(sum(r[4]))) for r in rows if r not in single]
    start, prompt = np.array([float(r[0]) for r in single]), np.array([int(r[1]) for r in single])
    return _Log(start, prompt, stamps), np.array(unclear).reshape(-1, 2)


def _together(log: _Log) -> np.ndarray:
    """Where a step's tokens begin in ``log.token_s``, and its length."""
    own = np.concatenate([np.diff(log.token_s[log.who == r]) for r in range(len(log.start))])
    apart = min(_TOGETHER * float(np.percentile(own, 10)), _MOST_TOGETHER_S)
    return np.concatenate([[0], np.flatnonzero(np.diff(log.token_s) > apart) + 1, [len(log.token_s)]])


def _steps(log: _Log, unclear: np.ndarray, chunk_tokens: int) -> list[Measured]:
    """Decode and fused steps that followed another one without a pause."""
    edges, found, before = _together(log), [], -np.inf
    for a, b in pairwise(edges.tolist()):
        end = float(np.median(log.token_s[a:b]))
        began, before = before, end
        who, nth = log.who[a:b], log.nth[a:b]
        running = np.flatnonzero((log.first <= began + _MOST_TOGETHER_S) & (log.last > began + _MOST_TOGETHER_S))
        going_on, new = who[nth > 0], who[nth == 0]
        waiting = np.flatnonzero((log.start < began) & (log.first > began + _MOST_TOGETHER_S))
        if not len(running) or not np.array_equal(np.sort(going_on), running) or len(new) > 1:
            continue
        if not np.array_equal(waiting, new) or ((unclear[:, 0] < end) & (unclear[:, 1] > began)).any():
            continue
        bs, n = len(going_on), int(log.prompt[new[0]]) if len(new) else 0
        if n + bs > chunk_tokens:
            continue
        ctx = max(round(float((log.prompt[going_on] + nth[nth > 0]).mean())), 1)
        point = Point("fused", n=n, prompts=1, bs=bs, ctx=ctx) if n else Point("decode", bs=bs, ctx=ctx)
        found.append(Measured(point, end - began))
    return found


def averaged(steps: Iterable[Measured]) -> list[Measured]:
    """Steps of one kind and batch size and of like lengths as one: where steps scatter, means add up to latencies.

    Decode steps are alike by context, those with a prompt by its length.
    """
    groups = defaultdict[tuple[str | int, ...], list[Measured]](list)
    for m in steps:
        p = m.point
        groups[(p.kind, _octave(p.n), p.bs) if p.n else (p.kind, p.bs, _octave(p.ctx))].append(m)
    return [_mean(alike) for _, alike in sorted(groups.items())]


def _octave(tokens: int) -> int:
    return round(_PER_OCTAVE * math.log2(tokens))


def _mean(alike: list[Measured]) -> Measured:
    n, ctx = (round(float(np.mean([getattr(m.point, size) for m in alike]))) for size in ("n", "ctx"))
    return Measured(
        replace(alike[0].point, n=n, ctx=ctx), float(np.mean([m.seconds for m in alike])), repeats=len(alike)
    )


def _lone_prompts(log: _Log, unclear: np.ndarray, chunk_tokens: int) -> list[Measured]:
    """First tokens of requests that met an idle engine and had it to themselves."""
    found = []
    for r, (start, first) in enumerate(zip(log.start, log.first, strict=True)):
        others = (log.start < first) & (log.last > start)
        others[r] = False
        if not others.any() and not ((unclear[:, 0] < first) & (unclear[:, 1] > start)).any():
            if log.prompt[r] <= chunk_tokens:
                found.append(Measured(Point("prefill", n=int(log.prompt[r]), prompts=1), float(first - start)))
    return found


def with_fused(points: list[Measured]) -> list[Measured]:
    """``points`` with what the fused steps say of prompts: less the decode beside them, plus what they saved by it.

    How much that is follows from the lone prompts; without any a fused step is taken to read the weights once.
    """
    fused = [m for m in points if m.point.kind == "fused"]
    bs, ctx, seconds = (np.array(column) for column in zip(*_decodes(points), strict=True))
    decode = fit_decode(DecodeSamples(bs * ctx, bs, seconds))
    beside = [_decode_s(decode, m.point.bs, m.point.ctx) for m in fused]
    lone = [m for m in points if m.point.kind == "prefill"]
    base = float(decode.small[2])

    def derived(saved: float) -> list[Measured]:
        rests = [m.seconds - b + min(saved, b) for m, b in zip(fused, beside, strict=True)]
        return [
            Measured(Point("prefill", n=m.point.n, prompts=1), rest)
            for m, rest in zip(fused, rests, strict=True)
            if rest > _LEAST_REST * m.seconds
        ]

    def error(saved: float) -> float:
        both = [*lone, *derived(saved)]
        if len(both) < MIN_POINTS:
            return float("inf")
        n = np.array([m.point.n for m in both], float)
        return fit_prefill(PrefillSamples(n, np.zeros_like(n), np.array([m.seconds for m in both]))).held_out_mape

    saved = base
    if len(lone) >= MIN_POINTS and len(fused):
        saved = min(np.linspace(0.0, 1.5 * base, _SAVINGS).tolist(), key=error)
    return [*points, *derived(saved)]


def _decode_s(fit: DecodeFit, bs: int, ctx: int) -> float:
    a, b, c = fit.large if fit.large is not None and bs >= fit.regime_bs else fit.small
    return a * bs * ctx + b * bs + c


def _decodes(points: list[Measured]) -> list[tuple[float, float, float]]:
    return [(float(m.point.bs), float(m.point.ctx), m.seconds) for m in points if m.point.kind == "decode"]


def steps_of(content: Mapping[str, Any], n: int, chunk_tokens: int) -> list[Measured]:
    """What the first ``n`` requests of a benchmark's result say about the engine's steps; empty where it is too little.

    :param content: of ``vllm bench serve --save-detailed``
    :param chunk_tokens: tokens of the engine's largest step; longer prompts take several, and are left out
    """
    read = _read(content, n)
    if read is None:
        return []
    log, unclear = read
    steps = _steps(log, unclear, chunk_tokens)
    points = [m for m in steps if m.point.n] + averaged(m for m in steps if not m.point.n)
    points += _lone_prompts(log, unclear, chunk_tokens)
    kinds = [m.point.kind for m in points]
    if kinds.count("decode") < MIN_POINTS or kinds.count("fused") + kinds.count("prefill") < MIN_POINTS:
        return []
    found = with_fused(points)
    return found if sum(m.point.kind == "prefill" for m in found) >= MIN_POINTS else []

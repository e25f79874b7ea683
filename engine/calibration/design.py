"""Where to measure next: first a set that fills the space, then wherever the fit is least sure for its cost.

The score of a candidate is its predicted relative error: the disagreement of fits to resampled points (predictive
spread) plus the held-out error of the nearest measured point, fading with distance. What is measured is charged
by its expected time, so that ten cheap doubts are settled before a dear one of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import qmc

from engine.calibration.points import Kind, Measured, Point
from engine.latency.rough import relative_nnls

KINDS: tuple[Kind, ...] = ("prefill", "decode", "fused")
_RESAMPLES = 12
_FOLDS = 5


@dataclass(frozen=True)
class Space:
    """Bounds of what is measured.

    :param max_tokens: new tokens of one step (the chunk budget, or the longest whole prompt)
    :param max_reused: cached tokens in front of them
    :param max_batch: sequences that decode
    :param max_context: KV tokens of each
    :param kv_tokens: of all sequences of a step together
    """

    max_tokens: int
    max_reused: int
    max_batch: int
    max_context: int
    kv_tokens: int

    def fits(self, point: Point) -> bool:
        """Whether ``point`` can be run at all (blocks of 16 tokens)."""
        blocks = point.prompts * (-(-(point.n + point.r) // 16)) + point.bs * (point.ctx // 16 + 1)
        return point.prompts * point.n <= self.max_tokens and blocks * 16 <= self.kv_tokens

    def corners(self, kind: Kind) -> list[Point]:
        """The ends of every axis: what lies between them is interpolated."""
        n, r, b, c = self.max_tokens, self.max_reused, self.max_batch, self.max_context
        few, low = max(1, b // 4), min(16, c)
        wide = max(min(c, (self.kv_tokens // b // 16 - 1) * 16), low)
        found = {
            "prefill": [
                Point("prefill", n=x, r=y, prompts=1) for x, y in ((1, 0), (16, 0), (n, 0), (n // 2, r), (16, r))
            ],
            "decode": [
                Point("decode", bs=x, ctx=y)
                for x, y in ((1, low), (1, c), (2, low), (few, low), (b, low), (b, wide))
            ],
            "fused": [
                Point("fused", n=x, prompts=1, bs=y, ctx=z)
                for x, y, z in ((16, 1, low), (n // 2, 1, low), (16, few, wide), (n // 2, few, low), (n // 4, 2, low))
            ],
        }  # fmt: skip
        return [p for p in dict.fromkeys(found[kind]) if p.n + p.bs > 0 and self.fits(p)]

    def scatter(self, kind: Kind, count: int, seed: int = 0) -> list[Point]:
        """``count`` points or fewer, spread evenly over the logarithms of all sizes (Halton sequence)."""
        draws = qmc.Halton(d=5, seed=seed).random(4 * count)
        points = [self._at(kind, row) for row in draws]
        return [p for p in dict.fromkeys(points) if self.fits(p)][:count]

    def _at(self, kind: Kind, u: np.ndarray) -> Point:
        n = _log(u[0], 1, self.max_tokens)
        r = 0 if u[1] < 0.4 else _log((u[1] - 0.4) / 0.6, 16, max(self.max_reused, 16))
        bs, ctx = _log(u[2], 1, self.max_batch), _log(u[3], 8, self.max_context)
        prompts = 1 if u[4] < 0.6 else min(_log((u[4] - 0.6) / 0.4, 1, 8), max(self.max_tokens // n, 1))
        if kind == "prefill":
            return Point("prefill", n=n, r=r, prompts=prompts)
        if kind == "decode":
            return Point("decode", bs=bs, ctx=ctx)
        return Point("fused", n=min(n, max(self.max_tokens - bs, 1)), r=r, prompts=1, bs=bs, ctx=ctx)


def _log(u: float, low: int, high: int) -> int:
    return round(float(np.exp(np.log(low) + u * (np.log(max(high, low)) - np.log(low)))))


def features(points: Sequence[Point]) -> np.ndarray:
    """What every kind of step is explained by, shape (points, 11); the curve over rows bends at fixed places."""
    rows = []
    for p in points:
        t = float(p.prompts * p.n)
        decode, prompt = float(p.bs > 0), float(p.prompts > 0)
        bends = [prompt * max(0.0, t - k) for k in (16.0, 64.0, 256.0)]
        rows.append([p.prompts * float(p.n) ** 2, p.prompts * float(p.n) * p.r, t, *bends, prompt,
                     float(p.bs * p.ctx), float(p.bs), max(0.0, p.bs - 8.0), decode])  # fmt: skip
    return np.asarray(rows)


def doubts(measured: Sequence[Measured], candidates: Sequence[Point], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(expected relative error, expected seconds) of each candidate; see the module's first lines."""
    x, y = features([m.point for m in measured]), np.array([m.seconds for m in measured])
    where = features(candidates)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(y), len(y)) for _ in range(_RESAMPLES)]
    predicted = np.array([where @ relative_nnls(x[d], y[d]) for d in draws])
    mean = predicted.mean(axis=0)
    spread = predicted.std(axis=0) / np.maximum(mean, 1e-9)
    missed = np.abs(_left_out(x, y))
    place, at = np.log1p(_axes([m.point for m in measured])), np.log1p(_axes(candidates))
    distance = np.linalg.norm(at[:, None] - place[None], axis=2)
    nearest = distance.argmin(axis=1)
    gap = distance[np.arange(len(at)), nearest]
    return spread + missed[nearest] * np.minimum(gap, 1.0) + 0.01 * gap, np.maximum(mean, 1e-4)


def _axes(points: Sequence[Point]) -> np.ndarray:
    return np.array([[p.n, p.r, p.prompts, p.bs, p.ctx] for p in points], float)


def _left_out(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Relative error of every point under a fit to the other folds."""
    fold = np.arange(len(y)) % _FOLDS
    error = np.zeros(len(y))
    for k in range(_FOLDS):
        out = fold == k
        if out.any() and (~out).any():
            error[out] = (x[out] @ relative_nnls(x[~out], y[~out])) / y[out] - 1.0
    return error


def held_out_error(measured: Sequence[Measured]) -> float:
    """Mean absolute relative error of points under fits that have not seen them; 1 below ten points."""
    if len(measured) < 10:
        return 1.0
    x, y = features([m.point for m in measured]), np.array([m.seconds for m in measured])
    return float(np.abs(_left_out(x, y)).mean())


def next_points(
    space: Space, kind: Kind, measured: Sequence[Measured], known: set[Point], count: int, seed: int
) -> list[Point]:
    """The ``count`` candidates that promise most per second, no two of them neighbours.

    :param known: points not to be tried again
    """
    candidates = [p for p in space.scatter(kind, 192, seed) if p not in known]
    if not candidates or not measured:  # nothing to doubt where every point so far has failed
        return candidates[:count]
    error, seconds = doubts(measured, candidates, seed)
    score = error / np.sqrt(seconds)
    chosen: list[int] = []
    place = np.log1p(_axes(candidates))
    while len(chosen) < min(count, len(candidates)):
        best = int(score.argmax())
        chosen.append(best)
        near = np.linalg.norm(place - place[best], axis=1) < 0.5
        score[near] *= 0.1
        score[best] = -np.inf
    return [candidates[k] for k in chosen]

"""Decisions as the scoring network reads them: allowed candidates only, without gaps, normalised.

The equations are those of :meth:`policies.network.ScoringNetwork.prepare`, in float32 like there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.columns import CANDIDATE_DIMENSIONLESS, Col, Kind
from engine.core.jit import kernel
from policies.features import CLIP, LATE, N_CONTEXT_FEATURES, N_FEATURES, SLACK_MISS, STEP_MISS

__all__ = ["Constants", "Scratch", "Store", "pack", "pack_many", "widen", "widen_by"]

_C, _F, _WIDE, _KINDS = N_CONTEXT_FEATURES, N_FEATURES, CANDIDATE_DIMENSIONLESS, len(Kind)
_TTFT, _SLACK_AFTER, _STEP_WITH = int(Col.TTFT), int(Col.SLACK_AFTER), int(Col.STEP_WITH)
_LATE, _SLACK_MISS, _STEP_MISS = int(LATE), int(SLACK_MISS), int(STEP_MISS)
_CUT, _ZERO, _ONE, _HALF, _TWO = (np.float32(x) for x in (CLIP, 0.0, 1.0, 0.5, 2.0))
_FAST = {"contract", "reassoc"}

# log(1 + f) for f in [√½ - 1, √2 - 1], and log 2 in two parts (Cephes, logf)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8 = (
    np.float32(p)
    for p in (
        *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    )
)
_LOG2_LOW, _LOG2_HIGH, _ROOT = np.float32(-2.12194440e-4), np.float32(0.693359375), np.float32(1.41421356)


class Constants(NamedTuple):
    """What of a network no update changes."""

    log_context: np.ndarray  # int64: context features read on a logarithmic scale
    log_row: np.ndarray
    context_factor: np.ndarray  # float32 (C,): 1 ÷ scale
    row_factor: np.ndarray  # (F,)
    bound: np.ndarray  # (1,)
    base: np.ndarray  # (kinds, F)
    gate: np.ndarray  # (kinds, C, F)
    gated: np.ndarray  # bool (1,): whether any gate is not zero
    bonus: np.ndarray  # (kinds,)


class Store(NamedTuple):
    """Decisions; number b owns rows ``first[b]`` to ``first[b] + n_rows[b]``."""

    context: np.ndarray  # float32 (frames, C)
    first: np.ndarray  # int64 (frames,)
    n_rows: np.ndarray
    rows: np.ndarray  # float32 (R, F)
    cost: np.ndarray  # (R,): of the base
    advised: np.ndarray  # (R,): logits of the advice
    which: np.ndarray  # int64 (R,): place in the observation
    used: np.ndarray  # int64 (1,): rows in use
    greatest: np.ndarray  # float32 (F,): largest magnitude of each feature so far


class Scratch(NamedTuple):
    """Workspace of one decision; ``x_bits`` and ``mantissa_bits`` are the same memory as integers."""

    x: np.ndarray  # float32 (C + K · F,)
    x_bits: np.ndarray
    mantissa: np.ndarray
    mantissa_bits: np.ndarray
    exponent: np.ndarray  # float32
    logs: np.ndarray
    weights: np.ndarray  # (F,)


@kernel(forceinline=True)
def _cut(x):
    """``x`` cut to ±CLIP; NaN reads as +CLIP (``policies.features.cut`` in float32)."""
    x = x if x <= _CUT else _CUT
    return x if x >= -_CUT else -_CUT


@kernel(forceinline=True)
def _bounded(x, factor, bound):
    x = x * factor
    x = x if x > -bound else -bound
    return x if x < bound else bound


@kernel(forceinline=True)
def _signed(size, x):
    return size if x >= _ZERO else -size


@kernel(forceinline=True)
def _positive(x):
    return x if x > _ZERO else _ZERO


@kernel(fastmath={"contract"}, forceinline=True)
def _log(n, x_bits, mantissa, mantissa_bits, exponent, logs):
    """``logs`` = log of x, numbers of 1 or more, for the first ``n``; arithmetic only, so that it is SIMD.

    Absolute error below 2e-7 up to 1,000 (a call of the C library for each number takes ten times as long).
    """
    for i in range(n):
        bits = x_bits[i]
        exponent[i] = np.float32((bits >> 23) - 127)
        mantissa_bits[i] = (bits & 0x7FFFFF) | 0x3F800000
    for i in range(n):
        m = mantissa[i]
        high = m > _ROOT
        e = exponent[i] + (_ONE if high else _ZERO)
        f = (m * _HALF if high else m) - _ONE
        z = f * f
        p = _P0
        p = p * f + _P1
        p = p * f + _P2
        p = p * f + _P3
        p = p * f + _P4
        p = p * f + _P5
        p = p * f + _P6
        p = p * f + _P7
        p = p * f + _P8
        y = f * z * p + _LOG2_LOW * e - _HALF * z
        logs[i] = f + y + _LOG2_HIGH * e


@kernel(fastmath=_FAST, forceinline=True)
def _weigh(kind, frame, context, base, gate, gated, weights):
    """Cost weights of the decision: base + context · gate."""
    for f in range(_F):
        weights[f] = base[kind, f]
    if gated:
        for j in range(_C):
            by = context[frame, j]
            if by != _ZERO:
                for f in range(_F):
                    weights[f] += by * gate[kind, j, f]


@kernel(fastmath=_FAST, forceinline=True)
def _cost(r, rows, weights):
    total = _ZERO
    for f in range(_F):
        total += weights[f] * rows[r, f]
    return total


@kernel
def pack(observations, masks, b, frame, c, s, w):
    """Append decision ``b`` of ``observations`` (B, C + K·F [+ K]) and ``masks`` (B, K) as number ``frame``.

    :param c: Constants, ``s``: Store, ``w``: Scratch
    """
    log_context, log_row, context_factor, row_factor = c.log_context, c.log_row, c.context_factor, c.row_factor
    context, rows, which, advised, cost, greatest = s.context, s.rows, s.which, s.advised, s.cost, s.greatest
    x, logs, weights = w.x, w.logs, w.weights
    end = _C + masks.shape[1] * _WIDE
    advises = observations.shape[1] > end
    bound = c.bound[0]
    start = s.used[0]
    at = start
    n = 0
    kind = 0
    for j in range(_C):
        context[frame, j] = _cut(observations[b, j])
    for j in range(1, _KINDS):
        if context[frame, j] > context[frame, kind]:
            kind = j
    bonus = c.bonus[kind]
    for j in range(log_context.shape[0]):
        x[n] = _ONE + abs(context[frame, log_context[j]])
        n += 1
    for k in range(masks.shape[1]):
        if not masks[b, k]:
            continue
        source = _C + k * _WIDE
        for j in range(_WIDE):
            rows[at, j] = _cut(observations[b, source + j])
        rows[at, _LATE] = _positive(rows[at, _TTFT] - _ONE)
        rows[at, _SLACK_MISS] = _positive(-rows[at, _SLACK_AFTER])
        rows[at, _STEP_MISS] = _positive(rows[at, _STEP_WITH] - _ONE)
        for j in range(log_row.shape[0]):
            x[n] = _ONE + abs(rows[at, log_row[j]])
            n += 1
        which[at] = k
        advised[at] = bonus * observations[b, end + k] if advises else _ZERO
        at += 1
    _log(n, w.x_bits, w.mantissa, w.mantissa_bits, w.exponent, logs)
    for j in range(_C):
        context[frame, j] = _bounded(context[frame, j], context_factor[j], bound)
    n = 0
    for j in range(log_context.shape[0]):
        i = log_context[j]
        context[frame, i] = _bounded(_signed(logs[n], context[frame, i]), context_factor[i], bound)
        n += 1
    _weigh(kind, frame, context, c.base, c.gate, c.gated[0], weights)
    for r in range(start, at):
        cost[r] = _cost(r, rows, weights)
        for f in range(_F):
            y = rows[r, f]
            size = abs(y)
            greatest[f] = size if size > greatest[f] else greatest[f]
            rows[r, f] = _bounded(y, row_factor[f], bound)
        for j in range(log_row.shape[0]):
            i = log_row[j]
            rows[r, i] = _bounded(_signed(logs[n], rows[r, i]), row_factor[i], bound)
            n += 1
    s.first[frame], s.n_rows[frame] = start, at - start
    s.used[0] = at


@kernel
def pack_many(observations, masks, frame, c, s, w):
    """Append decisions as numbers ``frame`` and following."""
    for b in range(observations.shape[0]):
        pack(observations, masks, b, frame + b, c, s, w)


@kernel(forceinline=True)
def _stretch(seen, j, x):
    seen[0, j] = x if x < seen[0, j] else seen[0, j]
    seen[1, j] = x if x > seen[1, j] else seen[1, j]


@kernel
def widen_by(observations, b, n_context, n_features, n_rows, seen):
    """Widen ``seen`` (2, C + F), least and greatest, by observation ``b`` of (B, ·); rows of zeros are padding."""
    for j in range(n_context):
        _stretch(seen, j, observations[b, j])
    for k in range(n_rows):
        first = n_context + k * n_features
        j = 0
        while j < n_features and observations[b, first + j] == _ZERO:
            j += 1
        if j < n_features:
            for f in range(n_features):
                _stretch(seen, n_context + f, observations[b, first + f])


@kernel
def widen(observations, n_context, n_features, n_rows, seen):
    """:func:`widen_by` for all observations (B, ·)."""
    for b in range(observations.shape[0]):
        widen_by(observations, b, n_context, n_features, n_rows, seen)

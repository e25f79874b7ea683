"""Decisions as the scoring network reads them: allowed candidates only, without gaps, normalised.

The equations are those of :meth:`policies.network.scoring.ScoringNetwork.prepare`, in float32 like there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.columns import CANDIDATE_DIMENSIONLESS, Col, Kind
from engine.jit.kernel import kernel
from engine.jit.rows import make_attach
from policies.network.features import CLIP, LATE, N_CONTEXT_FEATURES, N_FEATURES, SLACK_MISS, STEP_MISS
from train.ppo.fast.simd import (
    LANES,
    choose,
    exponent,
    fma,
    least,
    load,
    magnitude,
    mantissa,
    most,
    plus,
    positive,
    save,
    signed,
    splat,
    times,
    total,
)

__all__ = [
    "CONTEXT_WIDTH",
    "ROW_WIDTH",
    "Constants",
    "Observed",
    "Scratch",
    "Store",
    "attach_bounds",
    "attach_constants",
    "attach_observed",
    "attach_scratch",
    "attach_store",
    "pack",
    "pack_many",
    "put_changes",
    "take_changes",
    "varying",
    "widen",
    "widen_by",
]

#: Features of a context and of a candidate, rounded up to whole lanes.
CONTEXT_WIDTH, ROW_WIDTH = (-(-n // LANES) * LANES for n in (N_CONTEXT_FEATURES, N_FEATURES))

_C, _F, _WIDE, _KINDS = N_CONTEXT_FEATURES, N_FEATURES, CANDIDATE_DIMENSIONLESS, len(Kind)
_PAD_C, _PAD_F, _WHOLE = CONTEXT_WIDTH, ROW_WIDTH, CANDIDATE_DIMENSIONLESS // LANES * LANES
_TTFT, _SLACK_AFTER, _STEP_WITH = int(Col.TTFT), int(Col.SLACK_AFTER), int(Col.STEP_WITH)
_LATE, _SLACK_MISS, _STEP_MISS = int(LATE), int(SLACK_MISS), int(STEP_MISS)
_CUT, _ZERO, _ONE, _HALF = (np.float32(x) for x in (CLIP, 0.0, 1.0, 0.5))

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
    """What of a network no update changes; rows of features are padded with zeros to whole lanes."""

    context_log: np.ndarray  # float32 (1, ·): 1 where a feature is read on a logarithmic scale
    row_log: np.ndarray  # (1, ·)
    context_factor: np.ndarray  # (1, ·): 1 ÷ scale
    row_factor: np.ndarray  # (1, ·)
    bound: np.ndarray  # (1,)
    base: np.ndarray  # (kinds, ·)
    gate: np.ndarray  # (kinds · C, ·)
    gated: np.ndarray  # bool (1,): whether any gate is not zero
    bonus: np.ndarray  # (kinds,)


class Store(NamedTuple):
    """Decisions; number b owns rows ``first[b]`` to ``first[b] + n_rows[b]``. Room for one row more than are used."""

    context: np.ndarray  # float32 (frames, C)
    first: np.ndarray  # int64 (frames,)
    n_rows: np.ndarray
    rows: np.ndarray  # float32 (R, F)
    cost: np.ndarray  # (R,): of the base
    advised: np.ndarray  # (R,): logits of the advice
    which: np.ndarray  # int64 (R,): place in the observation
    used: np.ndarray  # int64 (1,): rows in use
    greatest: np.ndarray  # float32 (1, ·): largest magnitude of each feature so far, padded
    columns: np.ndarray  # int64 (F + 3,): features in use so far, those with one above 0, of which there are
    n_columns: np.ndarray  # int64 (1,)


class Observed(NamedTuple):
    """B decisions as the environment gives them."""

    observations: np.ndarray  # float32 (B, C + K·F [+ K])
    masks: np.ndarray  # bool (B, K)
    size: np.ndarray  # int64 (3,): B, K, and whether there is advice

    @classmethod
    def of(cls, observations: np.ndarray, masks: np.ndarray) -> Observed:
        """The arrays in place, if they are contiguous."""
        n, k = masks.shape
        size = np.array([n, k, observations.shape[1] > _C + k * _WIDE], np.int64)
        return cls(np.ascontiguousarray(observations), np.ascontiguousarray(masks), size)


class Scratch(NamedTuple):
    """Workspace of one decision, float32, padded."""

    context: np.ndarray  # (1, ·)
    rows: np.ndarray  # (K, ·): as observed, with hinges
    weights: np.ndarray  # (1, ·): of the base's cost


_F4, _I8 = np.float32, np.int64
attach_constants = make_attach(
    "Constants",
    [
        *((name, _F4, 2) for name in ("context_log", "row_log", "context_factor", "row_factor")),
        *(("bound", _F4, 1), ("base", _F4, 2), ("gate", _F4, 2), ("gated", np.bool_, 1), ("bonus", _F4, 1)),
    ],
)
attach_store = make_attach(
    "Store",
    [
        *(("context", _F4, 2), ("first", _I8, 1), ("n_rows", _I8, 1), ("rows", _F4, 2), ("cost", _F4, 1)),
        *(("advised", _F4, 1), ("which", _I8, 1), ("used", _I8, 1), ("greatest", _F4, 2), ("columns", _I8, 1)),
        ("n_columns", _I8, 1),
    ],
)
attach_observed = make_attach("Observed", [("observations", _F4, 2), ("masks", np.bool_, 2), ("size", _I8, 1)])
attach_scratch = make_attach("Scratch", [(name, _F4, 2) for name in Scratch._fields])
#: Least and greatest of each observed column so far, see :func:`widen_by`.
attach_bounds = make_attach("Bounds", [("seen", _F4, 2)])


@kernel(forceinline=True)
def _cut(x):
    """``x`` cut to ±CLIP; NaN reads as +CLIP (``policies.network.features.cut`` in float32)."""
    x = x if x <= _CUT else _CUT
    return x if x >= -_CUT else -_CUT


@kernel(forceinline=True)
def _cut_lanes(x):
    """:func:`_cut` of many."""
    return most(least(x, splat(_CUT)), splat(-_CUT))


@kernel(forceinline=True)
def _positive(x):
    return x if x > _ZERO else _ZERO


@kernel(forceinline=True)
def _log(x):
    """log x for numbers of 1 or more; absolute error below 2e-7 up to 1,000."""
    m, e = mantissa(x), exponent(x)
    high = positive(plus(m, splat(-_ROOT)), splat(_ONE))
    e = plus(e, high)
    f = plus(fma(times(m, splat(-_HALF)), high, m), splat(-_ONE))
    z = times(f, f)
    p = splat(_P0)
    p = fma(p, f, splat(_P1))
    p = fma(p, f, splat(_P2))
    p = fma(p, f, splat(_P3))
    p = fma(p, f, splat(_P4))
    p = fma(p, f, splat(_P5))
    p = fma(p, f, splat(_P6))
    p = fma(p, f, splat(_P7))
    p = fma(p, f, splat(_P8))
    y = fma(splat(-_HALF), z, fma(splat(_LOG2_LOW), e, times(times(f, z), p)))
    return fma(splat(_LOG2_HIGH), e, plus(f, y))


@kernel(forceinline=True)
def _normal(x, log, factor, bound):
    """``policies.network.normalise`` for many: sign(x) log(1 + |x|) where ``log`` is set, else x; by the factor,
    bounded."""
    y = choose(log, signed(_log(plus(magnitude(x), splat(_ONE))), x), x)
    return most(least(times(y, factor), splat(bound)), splat(-bound))


@kernel
def _weigh(kind, context, c, weights):
    """Cost weights of the decision: base + context · gate."""
    for h in range(0, _PAD_F, LANES):
        x = load(c.base, kind, h)
        if c.gated[0]:
            for j in range(_C):
                x = fma(splat(context[0, j]), load(c.gate, kind * _C + j, h), x)
        save(weights, 0, h, x)


@kernel(forceinline=True)
def _note(greatest, columns, n_columns):
    """Bring the list of features in use up to date."""
    n = 0
    for f in range(_F):
        n += 1 if greatest[0, f] > _ZERO else 0
    if n != n_columns[0]:
        n_columns[0] = n
        n = 0
        for f in range(_F):
            if greatest[0, f] > _ZERO:
                columns[n] = f
                n += 1


@kernel
def _read(o, b, s, w, bonus):
    """Copy allowed candidates with their hinges side by side into the workspace; returns how many there are.

    In a pass of its own: numbers that were written one by one are not there yet to be read sixteen at a time.
    """
    observations, masks, rows, n = o.observations, o.masks, w.rows, 0
    end, start = _C + o.size[1] * _WIDE, s.used[0]
    for k in range(o.size[1]):
        if masks[b, k]:
            source = _C + k * _WIDE
            for j in range(0, _WHOLE, LANES):
                save(rows, n, j, load(observations, b, source + j))
            for j in range(_WHOLE, _WIDE):
                rows[n, j] = observations[b, source + j]
            rows[n, _LATE] = _positive(_cut(observations[b, source + _TTFT]) - _ONE)
            rows[n, _SLACK_MISS] = _positive(-_cut(observations[b, source + _SLACK_AFTER]))
            rows[n, _STEP_MISS] = _positive(_cut(observations[b, source + _STEP_WITH]) - _ONE)
            s.which[start + n] = k
            s.advised[start + n] = bonus * observations[b, end + k] if o.size[2] > 0 else _ZERO
            n += 1
    return n


@kernel
def pack(o, b, frame, c, s, w):
    """Append decision ``b`` as number ``frame``.

    :param o: Observed, ``c``: Constants, ``s``: Store, ``w``: Scratch, all attached
    """
    observations, bound, start, kind = o.observations, c.bound[0], s.used[0], 0
    for j in range(_C):
        w.context[0, j] = observations[b, j]
    for j in range(1, _KINDS):
        if _cut(observations[b, j]) > _cut(observations[b, kind]):
            kind = j
    n = _read(o, b, s, w, c.bonus[kind])
    for h in range(0, _PAD_C, LANES):
        x = _cut_lanes(load(w.context, 0, h))
        save(w.context, 0, h, _normal(x, load(c.context_log, 0, h), load(c.context_factor, 0, h), bound))
    _weigh(kind, w.context, c, w.weights)
    for k in range(n):
        cost = splat(_ZERO)
        for h in range(0, _PAD_F, LANES):
            x = _cut_lanes(load(w.rows, k, h))
            cost = fma(x, load(w.weights, 0, h), cost)
            save(s.greatest, 0, h, most(magnitude(x), load(s.greatest, 0, h)))
            # the last lanes reach into the next row, which is written later
            save(s.rows, start + k, h, _normal(x, load(c.row_log, 0, h), load(c.row_factor, 0, h), bound))
        s.cost[start + k] = total(cost)
    for j in range(_C):
        s.context[frame, j] = w.context[0, j]
    s.first[frame], s.n_rows[frame] = start, n
    s.used[0] = start + n
    _note(s.greatest, s.columns, s.n_columns)


@kernel
def pack_many(observed, constants, store, scratch):
    """Append all decisions of ``observed`` as numbers 0 and following; all arguments are address vectors."""
    o, c, s, w = attach_observed(observed), attach_constants(constants), attach_store(store), attach_scratch(scratch)
    for b in range(o.size[0]):
        pack(o, b, b, c, s, w)


@kernel(forceinline=True)
def _stretch(seen, at, observations, b, first, n):
    """Widen ``seen[:, at : at + n]`` by as many columns of an observation, from ``first`` on."""
    whole = n - n % LANES
    for j in range(0, whole, LANES):
        x = load(observations, b, first + j)
        save(seen, 0, at + j, least(x, load(seen, 0, at + j)))
        save(seen, 1, at + j, most(x, load(seen, 1, at + j)))
    for j in range(whole, n):
        x = observations[b, first + j]
        seen[0, at + j] = x if x < seen[0, at + j] else seen[0, at + j]
        seen[1, at + j] = x if x > seen[1, at + j] else seen[1, at + j]


@kernel
def widen_by(o, b, n_context, n_features, bounds):
    """Widen ``bounds.seen`` (2, C + F) by decision ``b`` of Observed ``o``; rows of zeros are padding."""
    observations, seen = o.observations, bounds.seen
    _stretch(seen, 0, observations, b, 0, n_context)
    for k in range(o.size[1]):
        first = n_context + k * n_features
        j = 0
        while j < n_features and observations[b, first + j] == _ZERO:
            j += 1
        if j < n_features:
            _stretch(seen, n_context, observations, b, first, n_features)


@kernel
def widen(observed, n_context, n_features, bounds):
    """:func:`widen_by` for all decisions; ``observed`` and ``bounds`` are address vectors."""
    o, seen = attach_observed(observed), attach_bounds(bounds)
    for b in range(o.size[0]):
        widen_by(o, b, n_context, n_features, seen)


@kernel
def varying(x, n, out):
    """``out[j]`` = whether column ``j`` of ``x[:n]`` holds different numbers."""
    for j in range(x.shape[1]):
        out[j] = False
    for r in range(1, n):
        for j in range(x.shape[1]):
            out[j] |= x[r, j] != x[0, j]


@kernel
def take_changes(x, n, columns, back, flags, values):
    """Of the ``columns`` of ``x[:n]``, what differs from ``back`` rows before, one after the other into ``values``.

    :param flags: uint16 (n, ⌈columns ÷ 16⌉), a bit set for each number taken; zeros at first
    :return: how many were taken
    """
    at = np.int64(0)
    for r in range(n):
        for j in range(columns.shape[0]):
            y = x[r, columns[j]]
            new = np.int64(r < back or y != x[r - back, columns[j]])
            values[at] = y
            at += new
            flags[r, j // 16] |= np.uint16(new << (j % 16))
    return at


@kernel
def put_changes(flags, values, columns, rest, back, at, out):
    """``out[at + r]`` = ``rest``, but in ``columns`` what :func:`take_changes` saw."""
    k = np.int64(0)
    for r in range(flags.shape[0]):
        for j in range(rest.shape[0]):
            out[at + r, j] = rest[j]
        for j in range(columns.shape[0]):
            new = (flags[r, j // 16] >> (j % 16)) & 1
            if new:
                out[at + r, columns[j]] = values[k]
            else:
                out[at + r, columns[j]] = out[at + r - back, columns[j]]
            k += new

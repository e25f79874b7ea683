"""Fit a latency profile to measured steps.

Least squares on *relative* error (a 5 % error matters as much on a 5 ms step as on a 500 ms one; DistServe's
fit does the same) with non-negative coefficients, so that no batch can get cheaper by growing. One point in
five is held out, drawn by seed; structure (decode regimes, piecewise-linear prefill) is added only where it
lowers the error on those points. Times are device times of a step: host overhead is a field of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from engine.common.documents import bad_input
from engine.errors import SlalomError
from engine.latency.evaluate import MAX_KNOTS
from engine.latency.profile import FitError, Profile, Share
from engine.latency.rough import relative_nnls

HELD_OUT = 0.2
MIN_POINTS = 8
#: A quadratic that misses held-out points by more than this is compared with a piecewise-linear curve.
QUADRATIC_OK = 0.05
#: A second decode regime must lower the held-out error by this fraction of it, and by a visible amount.
REGIME_GAIN, REGIME_GAIN_ABS = 0.2, 0.002
NO_REGIME = 2**30


@dataclass(frozen=True)
class PrefillSamples:
    """Measured prefill steps, arrays of one length.

    :param n: new tokens per prompt
    :param r: tokens per prompt already in the cache
    :param seconds: time of the step
    :param bs: equal prompts in the step (None: one)
    :param sms: SMs it ran on (None: all points share one)
    """

    n: np.ndarray
    r: np.ndarray
    seconds: np.ndarray
    bs: np.ndarray | None = None
    sms: np.ndarray | None = None

    def features(self) -> np.ndarray:
        """Columns Σn², Σn·r, Σn; shape (points, 3)."""
        n, r = np.asarray(self.n, float), np.asarray(self.r, float)
        bs = np.ones_like(n) if self.bs is None else np.asarray(self.bs, float)
        return np.column_stack([bs * n * n, bs * n * r, bs * n])


@dataclass(frozen=True)
class DecodeSamples:
    """Measured decode steps, arrays of one length.

    :param sum_ctx: context tokens over the batch
    :param bs: sequences
    :param seconds: time of the step
    :param sms: SMs it ran on (None: all points share one)
    """

    sum_ctx: np.ndarray
    bs: np.ndarray
    seconds: np.ndarray
    sms: np.ndarray | None = None

    def features(self) -> np.ndarray:
        """Columns Σctx, bs, 1; shape (points, 3)."""
        bs = np.asarray(self.bs, float)
        return np.column_stack([np.asarray(self.sum_ctx, float), bs, np.ones_like(bs)])


@dataclass(frozen=True)
class PrefillFit:
    """Coefficients as in :class:`engine.latency.profile.Share`, with mean absolute relative errors."""

    coefficients: tuple[float, float, float, float]
    knot_tokens: tuple[float, ...]
    knot_s: tuple[float, ...]
    mape: float
    held_out_mape: float
    n_points: int


@dataclass(frozen=True)
class DecodeFit:
    """Coefficients for batches below and from ``regime_bs`` on, with mean absolute relative errors."""

    small: tuple[float, float, float]
    large: tuple[float, float, float] | None
    regime_bs: int
    mape: float
    held_out_mape: float
    n_points: int


def fit_prefill(samples: PrefillSamples, *, knots: bool = True, seed: int = 0) -> PrefillFit:
    """Fit a·Σn² + b·Σn·r + c·Σn + d, or its piecewise-linear form where the quadratic misses.

    :param knots: False: the quadratic form only
    :raises SlalomError: fewer than eight points, unequal lengths, no tokens, non-finite or non-positive times
    """
    features, y = _checked("prefill samples", samples.features(), samples.seconds)
    if features[:, 2].min() <= 0:  # published fits may come in thousands of tokens: fractions are no fault
        raise SlalomError("prefill samples", float(features[:, 2].min()), "give steps of at least one token")
    train, test = _split(len(y), seed)
    quadratic = np.column_stack([features, np.ones(len(y))])
    x = relative_nnls(quadratic[train], y[train])
    best = PrefillFit(
        _four(x), (), (), _mape(quadratic[train] @ x, y[train]), _mape(quadratic[test] @ x, y[test]), len(y)
    )
    if best.held_out_mape <= QUADRATIC_OK or not knots:
        return best
    for n_knots in range(3, MAX_KNOTS + 1):
        at = _knots(features[train, 2], n_knots)
        if len(at) < 3:
            break
        basis = np.column_stack([features[:, :2], np.ones(len(y)), _ramps(features[:, 2], at)])
        x = relative_nnls(basis[train], y[train])
        held_out = _mape(basis[test] @ x, y[test])
        if held_out < best.held_out_mape:
            heights = x[2] + np.concatenate([[0.0, 0.0], np.cumsum(x[3:])])
            best = PrefillFit(
                (float(x[0]), float(x[1]), 0.0, 0.0),
                tuple(at.tolist()),
                tuple(heights.tolist()),
                _mape(basis[train] @ x, y[train]),
                held_out,
                len(y),
            )
    return best


def fit_decode(samples: DecodeSamples, *, regime_bs: int | None = None, seed: int = 0) -> DecodeFit:
    """Fit a·Σctx + b·bs + c, in two batch regimes where that lowers the held-out error.

    :param regime_bs: use this threshold (``2**30``: one regime) instead of searching for one
    :raises SlalomError: fewer than eight points, unequal lengths, non-finite or non-positive times
    """
    features, y = _checked("decode samples", samples.features(), samples.seconds)
    train, test = _split(len(y), seed)
    single = _fit_regimes(features, y, train, test, NO_REGIME)
    if regime_bs is not None:
        return _fit_regimes(features, y, train, test, regime_bs) if regime_bs < NO_REGIME else single
    best = single
    for threshold in np.unique(features[train, 1])[1:]:
        if _divides(features[train, 1], threshold):
            candidate = _fit_regimes(features, y, train, test, int(threshold))
            if candidate.held_out_mape < best.held_out_mape:
                best = candidate
    gain = single.held_out_mape - best.held_out_mape
    return best if gain > max(REGIME_GAIN_ABS, REGIME_GAIN * single.held_out_mape) else single


def fit_profile(
    prefill: PrefillSamples,
    decode: DecodeSamples,
    *,
    facts: Mapping[str, Any],
    share_facts: Mapping[int, Mapping[str, float]] | None = None,
    seed: int = 0,
) -> Profile:
    """Fit one profile, one share row per SM count found in the samples.

    :param facts: every other field of :class:`Profile` (name, model, roofline, kv_tokens, ...)
    :param share_facts: per SM count, measured ``fused_shared_s``, ``corun_prefill``, ``corun_decode``,
        ``guard``
    :raises SlalomError: bad samples, SM counts that differ between the phases, a fit below the roofline
    """
    total = int(facts.get("total_sms", 0))
    p_sms, d_sms = _share_of(prefill.sms, prefill.n, total), _share_of(decode.sms, decode.bs, total)
    counts = sorted(set(p_sms.tolist()))
    if counts != sorted(set(d_sms.tolist())):
        raise SlalomError("samples: sms", sorted(set(d_sms.tolist())), f"measure decode on {counts} as well")
    p_fits = {m: fit_prefill(_rows(prefill, p_sms == m), seed=seed) for m in counts}
    # The packed tables know one batch threshold: found on the whole device, kept for every share.
    whole = fit_decode(_rows(decode, d_sms == counts[-1]), seed=seed)
    d_fits = {m: fit_decode(_rows(decode, d_sms == m), regime_bs=whole.regime_bs, seed=seed) for m in counts}
    shares = tuple(
        {
            "sms": m,
            "prefill_s": p_fits[m].coefficients,
            "knot_tokens": p_fits[m].knot_tokens,
            "knot_s": p_fits[m].knot_s,
            "decode_small_s": d_fits[m].small,
            "decode_large_s": d_fits[m].large,
        }
        | dict((share_facts or {}).get(m, {}))
        for m in counts
    )
    error = FitError(
        prefill_mape=float(np.mean([fit.held_out_mape for fit in p_fits.values()])),
        decode_mape=float(np.mean([fit.held_out_mape for fit in d_fits.values()])),
        n_prefill=sum(fit.n_points for fit in p_fits.values()),
        n_decode=sum(fit.n_points for fit in d_fits.values()),
    )
    try:
        rows = tuple(Share(**share) for share in shares)
        return Profile(**(dict(facts) | {"shares": rows, "regime_bs": whole.regime_bs, "fit": error}))
    except ValidationError as fault:
        raise bad_input("fitted profile", fault) from fault


def _rows(samples: Any, keep: np.ndarray) -> Any:
    """The points of ``samples`` where ``keep`` is true."""
    arrays = {name: value for name, value in vars(samples).items() if value is not None}
    return type(samples)(**{name: np.asarray(value)[keep] for name, value in arrays.items()})


def _share_of(sms: np.ndarray | None, like: np.ndarray, total: int) -> np.ndarray:
    return np.full(len(like), total) if sms is None else np.asarray(sms).astype(int)


def _checked(field: str, features: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = np.asarray(seconds, float)
    if len(y) != len(features):
        raise SlalomError(field, (len(features), len(y)), "give arrays of one length")
    if len(y) < MIN_POINTS:
        raise SlalomError(field, len(y), f"measure at least {MIN_POINTS} points")
    if not np.isfinite(features).all() or (features < 0).any():
        raise SlalomError(field, "non-finite or negative sizes", "give token and batch counts of 0 or more")
    if not np.isfinite(y).all() or (y <= 0).any():
        raise SlalomError(field, float(np.nanmin(y)), "give positive, finite seconds")
    return features, y


def _split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n)
    held_out = max(1, round(HELD_OUT * n))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _mape(predicted: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.abs(predicted - y) / y))


def _four(x: np.ndarray) -> tuple[float, float, float, float]:
    return float(x[0]), float(x[1]), float(x[2]), float(x[3])


def _three(x: np.ndarray) -> tuple[float, float, float]:
    return float(x[0]), float(x[1]), float(x[2])


def _knots(tokens: np.ndarray, n: int) -> np.ndarray:
    """0 and ``n − 1`` measured sizes, even over the logarithm: curves bend where prompts are short."""
    sizes = np.unique(tokens)
    wanted = np.geomspace(sizes[0], sizes[-1], n - 1)
    nearest = sizes[np.abs(np.log(sizes[:, None] / wanted)).argmin(axis=0)]
    return np.concatenate([[0.0], np.unique(nearest)])


def _ramps(tokens: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """One column per segment, 0 before and 1 after it; the last goes on rising beyond the data.

    The first segment is flat: nothing smaller than the smallest measured prompt is believed to be faster.
    """
    rise = (tokens[:, None] - knots[1:-1]) / np.diff(knots[1:])
    rise[:, :-1] = rise[:, :-1].clip(0.0, 1.0)
    return np.maximum(rise, 0.0)


def _divides(batches: np.ndarray, threshold: float) -> bool:
    """Whether both sides of ``threshold`` hold enough points and batch sizes for three coefficients."""
    sides = (batches[batches < threshold], batches[batches >= threshold])
    return all(len(side) >= MIN_POINTS // 2 and len(np.unique(side)) >= 2 for side in sides)


def _fit_regimes(features: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, threshold: int) -> DecodeFit:
    large = features[:, 1] >= threshold
    predicted, found = np.empty_like(y), {}
    for regime in (False, True):
        rows = train[large[train] == regime]
        if len(rows) >= MIN_POINTS // 2:
            found[regime] = relative_nnls(features[rows], y[rows])
    if not found:
        return _fit_regimes(features, y, train, test, NO_REGIME)
    for regime in (False, True):
        x = found[regime] if regime in found else found[not regime]
        predicted[large == regime] = features[large == regime] @ x
    small = found[False] if False in found else found[True]
    two = len(found) == 2
    return DecodeFit(
        _three(small),
        _three(found[True]) if two else None,
        threshold if two else NO_REGIME,
        _mape(predicted[train], y[train]),
        _mape(predicted[test], y[test]),
        len(y),
    )

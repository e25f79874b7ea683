"""Statistics shared by the comparison: monotone smoothing, crossing rate, paired bootstrap, IQM.

Counts are arrays ``(K, S, B)``: K rates (or runs), S seeds, B blocks of consecutive requests. Resampling
draws whole seeds, then blocks within each drawn seed, and uses the *same* draw for every policy: arrivals
are common to all policies, so the noise they share cancels in differences and ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def antitonic(values: Any, weights: Any | None = None) -> Floats:
    """Best non-increasing least-squares fit along the last axis (pool-adjacent-violators, min-max form).

    :param values: ``(..., K)`` attainment at K ascending rates
    :param weights: ``(..., K)`` positive weights, e.g. requests behind each value
    :return: array of the shape of ``values``; fit_k = min over i<=k of max over j>=k of mean(i..j)
    """
    y = np.asarray(values, dtype=np.float64)
    w = np.broadcast_to(np.ones_like(y) if weights is None else np.asarray(weights, dtype=np.float64), y.shape)
    zero = np.zeros((*y.shape[:-1], 1))
    total = np.concatenate([zero, np.cumsum(y * w, axis=-1)], axis=-1)
    mass = np.concatenate([zero, np.cumsum(w, axis=-1)], axis=-1)
    k = y.shape[-1]
    first, last = np.triu_indices(k)
    mean = np.full((*y.shape[:-1], k, k), -np.inf)
    mean[..., first, last] = (total[..., last + 1] - total[..., first]) / (mass[..., last + 1] - mass[..., first])
    best_tail = np.maximum.accumulate(mean[..., ::-1], axis=-1)[..., ::-1]
    fit = np.where(np.tri(k, dtype=bool).T, best_tail, np.inf)
    return np.minimum.accumulate(fit, axis=-2)[..., np.arange(k), np.arange(k)]


def crossing(rates: Any, attainment: Any, target: float) -> Floats:
    """Largest rate at which a non-increasing attainment curve still reaches ``target``.

    Linear between neighbouring rates; 0 where even the lowest rate misses the target, and the highest
    rate where none does (the caller knows that the curve was not bracketed).

    :param rates: ``(K,)`` ascending, requests per second
    :param attainment: ``(..., K)`` non-increasing along the last axis
    """
    x = np.asarray(rates, dtype=np.float64)
    y = np.asarray(attainment, dtype=np.float64)
    reached = (y >= target).sum(axis=-1)
    low = np.clip(reached - 1, 0, len(x) - 1)
    high = np.clip(reached, 0, len(x) - 1)
    y_low = np.take_along_axis(y, low[..., None], axis=-1)[..., 0]
    y_high = np.take_along_axis(y, high[..., None], axis=-1)[..., 0]
    gap = np.where(y_low > y_high, y_low - y_high, 1.0)
    rate = x[low] + (x[high] - x[low]) * np.clip((y_low - target) / gap, 0.0, 1.0)
    return np.where(reached == 0, 0.0, rate)


def bootstrap_weights(n_seeds: int, n_blocks: int, resamples: int, seed: int) -> Floats:
    """How often each (seed, block) is drawn: ``(resamples, n_seeds, n_blocks)``, two-stage with replacement.

    With a single seed only blocks are resampled: the interval then covers noise within one run only.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, n_seeds, size=(resamples, n_seeds))
    block = rng.integers(0, n_blocks, size=(resamples, n_seeds, n_blocks))
    weights = np.zeros((resamples, n_seeds, n_blocks))
    np.add.at(weights, (np.arange(resamples)[:, None, None], drawn[:, :, None], block), 1.0)
    return weights


def bootstrap_attainment(good: Any, sent: Any, weights: Floats) -> Floats:
    """Attainment of every resample: counts ``(K, S, B)`` and weights ``(R, S, B)`` give ``(R, K)``."""
    hit = np.einsum("rsb,ksb->rk", weights, np.asarray(good, dtype=np.float64))
    total = np.einsum("rsb,ksb->rk", weights, np.asarray(sent, dtype=np.float64))
    return hit / np.maximum(total, 1.0)


def interval(samples: Any, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap samples; infinite ratios (a rival with goodput 0) stay infinite."""
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(np.asarray(samples, dtype=np.float64), [tail, 100.0 - tail], method="nearest")
    return float(low), float(high)


def iqm(values: Any, axis: int = -1) -> Any:
    """Interquartile mean: the mean without the lowest and highest quarter (Agarwal et al. 2021)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=axis)
    n = ordered.shape[axis]
    cut = n // 4
    return np.take(ordered, np.arange(cut, n - cut), axis=axis).mean(axis=axis)


def stratified_iqm(scores: Sequence[Any], resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """IQM over all runs with its 95 % interval, runs resampled within each stratum (Agarwal et al. 2021).

    :param scores: one array of run scores per stratum (per rate or cell)
    :return: (IQM, low, high)
    """
    rng = np.random.default_rng(seed)
    strata = [np.asarray(s, dtype=np.float64) for s in scores]
    drawn = [s[rng.integers(0, len(s), size=(resamples, len(s)))] for s in strata]
    low, high = interval(iqm(np.concatenate(drawn, axis=1), axis=1))
    return float(iqm(np.concatenate(strata))), low, high

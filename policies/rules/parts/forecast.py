"""One-step forecasts of short series kept in a policy's memory: last value, AR(1), or AR(p) on differences.

DOPD and Dynamo forecast load with auto-ARIMA over 50 intervals and fall back to the last value below 5.
What runs here is its autoregressive part: p of 0 to 2 lags on 0 or 1 differences, fitted by least squares,
chosen by AIC over the same points. Moving-average terms are left out: they need an iterative fit, and a
decision may not take long.
"""

from __future__ import annotations

import numpy as np

from engine.jit.kernel import kernel

WINDOW = 50
SERIES_CELLS = 1 + WINDOW
METHODS = ("last", "ar1", "ari")
_LEAST_POINTS = 5
#: First point fitted when orders are compared: with one difference and two lags, x[3] is the first.
_FIRST = 3


@kernel
def push(memory, at, value):
    """Append ``value`` to the series at ``memory[at]`` (count, then values, oldest first)."""
    n = int(memory[at])
    if n == WINDOW:
        for i in range(WINDOW - 1):
            memory[at + 1 + i] = memory[at + 2 + i]
        n -= 1
    memory[at + 1 + n] = value
    memory[at] = n + 1.0


@kernel
def _y(memory, at, d, t):
    """x[t], or x[t] − x[t−1]."""
    return memory[at + 1 + t] - (memory[at + t] if d == 1 else 0.0)


@kernel
def _autoregression(memory, at, p, d, first):
    """AR(p) with constant on the d-th difference, fitted on x[first:]: (Σ residual², forecast of x)."""
    n = int(memory[at])
    m = float(n - first)
    y0 = y1 = y2 = 0.0
    for t in range(first, n):
        y0 += _y(memory, at, d, t) / m
        y1 += _y(memory, at, d, t - 1) / m if p >= 1 else 0.0
        y2 += _y(memory, at, d, t - 2) / m if p >= 2 else 0.0
    s11 = s12 = s22 = s01 = s02 = 0.0
    for t in range(first, n):
        a = _y(memory, at, d, t) - y0
        b = _y(memory, at, d, t - 1) - y1 if p >= 1 else 0.0
        c = _y(memory, at, d, t - 2) - y2 if p >= 2 else 0.0
        s11, s12, s22, s01, s02 = s11 + b * b, s12 + b * c, s22 + c * c, s01 + a * b, s02 + a * c
    phi1 = phi2 = 0.0
    det = s11 * s22 - s12 * s12
    if p == 2 and det > 1e-9 * s11 * s22:
        phi1, phi2 = (s01 * s22 - s02 * s12) / det, (s02 * s11 - s01 * s12) / det
    elif s11 > 0.0:
        phi1 = s01 / s11
    rss = 0.0
    for t in range(first, n):
        fit = y0
        fit += phi1 * (_y(memory, at, d, t - 1) - y1) if p >= 1 else 0.0
        fit += phi2 * (_y(memory, at, d, t - 2) - y2) if p >= 2 else 0.0
        rss += (_y(memory, at, d, t) - fit) ** 2
    ahead = y0
    ahead += phi1 * (_y(memory, at, d, n - 1) - y1) if p >= 1 else 0.0
    ahead += phi2 * (_y(memory, at, d, n - 2) - y2) if p >= 2 else 0.0
    return rss, ahead + (memory[at + n] if d == 1 else 0.0)


@kernel
def _selected(memory, at):
    """Forecast of the order (p, d) of least AIC = m ln(RSS/m) + 2(p + 1), m points from _FIRST on."""
    m = memory[at] - _FIRST
    best, ahead = np.inf, memory[at + int(memory[at])]
    for d in range(2):
        for p in range(3):
            if m >= p + 3:
                rss, value = _autoregression(memory, at, p, d, _FIRST)
                aic = m * np.log(max(rss / m, 1e-12)) + 2.0 * (p + 1)
                if aic < best:
                    best, ahead = aic, value
    return ahead


@kernel
def forecast(memory, at, method):
    """Next value of the series at ``memory[at]``; ``method`` counts in METHODS. 0 for an empty series.

    Kept within half the least and twice the greatest value seen (inferred: a guard against a runaway fit).
    """
    n = int(memory[at])
    if n == 0:
        return 0.0
    low, high = np.inf, -np.inf
    for i in range(n):
        low, high = min(low, memory[at + 1 + i]), max(high, memory[at + 1 + i])
    value = memory[at + n]
    if n >= _LEAST_POINTS and method == 1:
        _, value = _autoregression(memory, at, 1, 0, 1)
    elif n >= _LEAST_POINTS and method == 2:
        value = _selected(memory, at)
    return min(max(value, 0.5 * low), 2.0 * high)

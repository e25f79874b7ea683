"""Arrival processes. Each model turns (rate, n, random stream) into ``n`` sorted times in seconds from 0.

All but ``replay`` are renewal gaps of unit mean laid on a clock: a steady clock gives the renewal process
itself; a clock that runs at lambda(t) gives a rate-modulated process. For Poisson gaps that is equal in law
to thinning an upper-bound process (Lewis and Shedler 1979), and no draw is thrown away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.optimize import brentq
from scipy.special import gammaln

from engine.errors import SlalomError
from env.workload.base import Model, Split
from env.workload.source import SourceSpec


@lru_cache(maxsize=1024)
def weibull_shape(cv: float) -> float:
    """Shape k with cv^2 = G(1 + 2/k) / G(1 + 1/k)^2 - 1, for cv in [0.05, 30] (G the gamma function)."""
    target = np.log1p(cv * cv)
    return float(brentq(lambda k: gammaln(1 + 2 / k) - 2 * gammaln(1 + 1 / k) - target, 0.05, 50.0))


def gamma_gaps(n: int, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Gamma gaps of mean 1, shape 1/cv^2 (DistServe's client); cv = 1 is exponential, cv = 0 regular."""
    if cv < 1e-3:  # as good as regular
        return np.ones(n)
    if cv == 1:
        return rng.standard_exponential(n)
    shape = 1.0 / (cv * cv)
    return rng.standard_gamma(shape, n) / shape


def weibull_gaps(n: int, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Weibull gaps of mean 1; the same cv as the Gamma process with heavier gaps (ServeGen)."""
    shape = weibull_shape(cv)
    return rng.weibull(shape, n) * np.exp(-gammaln(1 + 1 / shape))


def on_clock(ticks: np.ndarray, at_s: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Times at which the integral of a rate reaches ``ticks``.

    :param ticks: sorted, requests counted from 0
    :param at_s: f8 (k + 1,) edges in seconds, the first 0; the last piece goes on for ever
    :param rates: f8 (k,) requests per second on each piece, the last > 0
    :return: f8, seconds
    """
    counted = np.concatenate([[0.0], np.cumsum(np.diff(at_s) * rates)])
    piece = np.clip(np.searchsorted(counted, ticks, side="left") - 1, 0, len(rates) - 1)
    return at_s[piece] + (ticks - counted[piece]) / np.maximum(rates[piece], 1e-300)  # tick 0 on an idle piece


class _Arrivals(Model, ABC):
    @abstractmethod
    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        """``n`` arrival times, f8, sorted, seconds; ``rate`` is the long-run mean in requests per second."""

    def until(self, rate: float, duration_s: float, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        """The arrivals of ``[0, duration_s)``, however many they are."""
        n = int(rate * duration_s * 1.1) + 32
        while True:
            state = rng.bit_generator.state
            times = self.times(rate, n, rng, split)
            if times[-1] >= duration_s:
                return times[: np.searchsorted(times, duration_s)]
            rng.bit_generator.state = state  # draw again, longer: appending would restart the process's memory
            n *= 2


class PoissonArrivals(_Arrivals):
    """Independent exponential gaps."""

    kind: Literal["poisson"]

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        return np.cumsum(rng.standard_exponential(n)) / rate


class GammaArrivals(_Arrivals):
    """Gamma renewal process with coefficient of variation ``cv``."""

    kind: Literal["gamma"]
    cv: float = Field(ge=0, le=30)

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        return np.cumsum(gamma_gaps(n, self.cv, rng)) / rate


class WeibullArrivals(_Arrivals):
    """Weibull renewal process with coefficient of variation ``cv``."""

    kind: Literal["weibull"]
    cv: float = Field(ge=0.05, le=30)

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        return np.cumsum(weibull_gaps(n, self.cv, rng)) / rate


class OnOffArrivals(_Arrivals):
    """Two-state Markov-modulated Poisson process: bursts and silences that last (code completion traffic).

    ``on_s=60, off_s=90, cv=3.5`` at 3.12 req/s is the nearest fit found to Azure code 2023: IDC 14, 52 and
    172 at 1, 10 and 60 s against the trace's 13, 70 and 160; CV of gaps 19 against 12.7.

    :param on_s: mean seconds of a burst
    :param off_s: mean seconds of a silence
    :param off_rate: rate in silences as a share of the rate in bursts
    :param cv: of the gaps on the modulated clock; above 1 adds micro-bursts
    """

    kind: Literal["on_off"]
    on_s: float = Field(default=60.0, ge=0.01)
    off_s: float = Field(default=40.0, ge=0.01)
    off_rate: float = Field(default=0.0, ge=0, lt=1)
    cv: float = Field(default=1.0, ge=0, le=30)

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        ticks = np.cumsum(gamma_gaps(n, self.cv, rng))
        share_on = self.on_s / (self.on_s + self.off_s)
        peak = rate / (share_on + (1 - share_on) * self.off_rate)
        starts_on = int(rng.random() < share_on)  # stationary start: dwell times have no memory
        spells = 2 * (int(ticks[-1] / (peak * self.on_s)) + 8)
        edges, rates, counted = [np.zeros(1)], [], 0.0
        while counted <= ticks[-1]:
            on = (np.arange(spells) + starts_on) % 2 == 1
            dwell = rng.standard_exponential(spells) * np.where(on, self.on_s, self.off_s)
            speed = np.where(on, peak, peak * self.off_rate)
            edges.append(edges[-1][-1] + np.cumsum(dwell))
            rates.append(speed)
            counted += float(dwell @ speed)
        return on_clock(ticks, np.concatenate(edges), np.concatenate(rates))


class BinsArrivals(_Arrivals):
    """Rate given piece by piece (60-s bins of a trace, a day in hours), repeated for ever.

    :param bin_s: seconds of a piece
    :param rates: relative rates, >= 0; their mean is scaled to the asked rate
    :param cv: of the gaps on the moving clock
    :param random_phase: start at a random piece
    """

    kind: Literal["bins"]
    bin_s: float = Field(ge=0.01)
    rates: tuple[float, ...] = Field(min_length=1)
    cv: float = Field(default=1.0, ge=0, le=30)
    random_phase: bool = False

    @model_validator(mode="after")
    def _has_rate(self) -> BinsArrivals:
        if not np.isfinite(self.rates).all() or min(self.rates) < 0 or max(self.rates) <= 0:
            raise ValueError("rates must be >= 0 and not all 0")
        return self

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        ticks = np.cumsum(gamma_gaps(n, self.cv, rng))
        shape = np.array(self.rates) * (rate / np.mean(self.rates))
        if self.random_phase:
            shape = np.roll(shape, -rng.integers(len(shape)))
        rounds, ticks = np.divmod(ticks, shape.sum() * self.bin_s)
        edges = np.arange(len(shape) + 1) * self.bin_s
        last = int(np.flatnonzero(shape)[-1]) + 1
        return rounds * edges[-1] + on_clock(ticks, edges[: last + 1], shape[:last])


class SinusoidArrivals(_Arrivals):
    """lambda(t) = rate * (1 + amplitude * sin(2 pi t / period_s + phase))."""

    kind: Literal["sinusoid"]
    amplitude: float = Field(ge=0, le=1)
    period_s: float = Field(ge=0.01)
    phase: float = 0.0
    cv: float = Field(default=1.0, ge=0, le=30)

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        ticks = np.cumsum(gamma_gaps(n, self.cv, rng))
        grid = np.linspace(0, self.period_s, 513)
        angle = 2 * np.pi * grid / self.period_s + self.phase
        swing = self.amplitude * self.period_s / (2 * np.pi) * (np.cos(self.phase) - np.cos(angle))
        rounds, ticks = np.divmod(ticks, rate * self.period_s)
        return rounds * self.period_s + np.interp(ticks, rate * (grid + swing), grid)


class ReplayArrivals(_Arrivals):
    """The arrivals of a trace file, stretched to the asked rate; other bodies may ride on them."""

    kind: Literal["replay"]
    source: SourceSpec
    split_at: tuple[float, float] = (0.6, 0.8)

    def times(self, rate: float, n: int, rng: np.random.Generator, split: Split = "train") -> np.ndarray:
        trace = self.source.part(split, self.split_at)
        if trace.n_roots < n:
            raise SlalomError(f"trace {trace.name}", n, f"ask for at most {trace.n_roots} ({split} part)")
        start = int(rng.integers(trace.n_roots - n + 1))
        run = trace.arrival_s[start : start + n] - trace.arrival_s[start]
        if n > 1 and run[-1] <= 0:
            raise SlalomError(f"arrival.source {trace.name}", float(run[-1]), "give a trace whose times differ")
        return run * ((n - 1) / (rate * run[-1])) if n > 1 else run


ArrivalSpec = Annotated[
    PoissonArrivals
    | GammaArrivals
    | WeibullArrivals
    | OnOffArrivals
    | BinsArrivals
    | SinusoidArrivals
    | ReplayArrivals,
    Field(discriminator="kind"),
]

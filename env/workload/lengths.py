"""Length models: (prompt, output) tokens of independent requests. Named presets are in ``presets.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.special import ndtr, ndtri

from engine.errors import SlalomError
from env.workload.base import Model, Split
from env.workload.source import SourceSpec

Pair = tuple[np.ndarray, np.ndarray]
_Z90 = float(ndtri(0.9))
MAX_TOKENS = 2_000_000


class UniformMarginal(Model):
    """Whole numbers from ``low`` to ``high``, both included."""

    kind: Literal["uniform"]
    low: int = Field(ge=1)
    high: int = Field(ge=1, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _ordered(self) -> UniformMarginal:
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        return self

    def quantile(self, u: np.ndarray) -> np.ndarray:
        return self.low + np.floor(u * (self.high - self.low + 1))


class LognormalMarginal(Model):
    """Lognormal from its median and its mean or p90, clipped to [low, high].

    sigma = sqrt(2 ln(mean / median)) or ln(p90 / median) / z(0.9), of the unclipped law.
    """

    kind: Literal["lognormal"]
    median: float = Field(gt=0)
    mean: float | None = None
    p90: float | None = None
    low: int = Field(default=1, ge=1)
    high: int = Field(default=MAX_TOKENS, ge=1, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _one_spread(self) -> LognormalMarginal:
        if (self.mean is None) == (self.p90 is None):
            raise ValueError("give mean or p90, not both")
        if not self.median <= (self.mean or self.p90 or 0) <= 1e6 * self.median:
            raise ValueError("mean and p90 of a lognormal are at least its median, and at most a million times that")
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        return self

    def quantile(self, u: np.ndarray) -> np.ndarray:
        if self.mean is not None:
            sigma = np.sqrt(2 * np.log(self.mean / self.median))
        else:
            assert self.p90 is not None
            sigma = np.log(self.p90 / self.median) / _Z90
        return np.clip(self.median * np.exp(sigma * ndtri(u)), self.low, self.high)


class QuantileMarginal(Model):
    """Linear between measured quantiles: ``v[i]`` tokens at probability ``q[i]`` (q from 0 to 1, rising)."""

    kind: Literal["quantiles"]
    q: tuple[float, ...] = Field(min_length=2)
    v: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _rising(self) -> QuantileMarginal:
        if len(self.q) != len(self.v) or self.q[0] != 0 or self.q[-1] != 1:
            raise ValueError("q and v need equal length, q from 0 to 1")
        if (np.diff(self.q) <= 0).any() or (np.diff(self.v) < 0).any() or self.v[0] < 1 or self.v[-1] > MAX_TOKENS:
            raise ValueError(f"q must rise, v must not fall, start at 1 or more and end at {MAX_TOKENS} or less")
        return self

    def quantile(self, u: np.ndarray) -> np.ndarray:
        return np.interp(u, self.q, self.v)


Marginal = (
    Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    | Annotated[UniformMarginal | LognormalMarginal | QuantileMarginal, Field(discriminator="kind")]
)


def draw_marginal(marginal: Marginal, u: np.ndarray) -> np.ndarray:
    """Tokens i4 at probabilities ``u`` in (0, 1), rounded, at least 1."""
    if isinstance(marginal, int):
        return np.full(u.shape, marginal, np.int32)
    values = marginal.quantile(u)
    whole = values if isinstance(marginal, UniformMarginal) else np.rint(values)
    return np.maximum(whole, 1).astype(np.int32)


class Lengths(Model, ABC):
    @abstractmethod
    def draw(self, n: int, rng: np.random.Generator, split: Split = "train") -> Pair:
        """Prompt and output tokens, both i4 (n,), >= 1."""


class FixedLengths(Lengths):
    """Every request alike."""

    kind: Literal["fixed"]
    prompt: int = Field(ge=1, le=MAX_TOKENS)
    output: int = Field(ge=1, le=MAX_TOKENS)

    def draw(self, n: int, rng: np.random.Generator, split: Split = "train") -> Pair:
        return np.full(n, self.prompt, np.int32), np.full(n, self.output, np.int32)


class JointLengths(Lengths):
    """Two marginals joined by a Gaussian copula.

    Spearman's rho of a bivariate normal with correlation r is 6/pi asin(r/2), so r = 2 sin(pi rho / 6)
    (Kruskal 1958).
    """

    kind: Literal["joint"]
    prompt: Marginal
    output: Marginal
    spearman: float = Field(default=0.0, ge=-1, le=1)

    def draw(self, n: int, rng: np.random.Generator, split: Split = "train") -> Pair:
        if self.spearman == 0:
            return draw_marginal(self.prompt, rng.random(n)), draw_marginal(self.output, rng.random(n))
        r = 2 * np.sin(np.pi * self.spearman / 6)
        first = rng.standard_normal(n)
        second = r * first + np.sqrt(1 - r * r) * rng.standard_normal(n)
        return draw_marginal(self.prompt, ndtr(first)), draw_marginal(self.output, ndtr(second))


class EmpiricalLengths(Lengths):
    """Bootstrap from a trace file in contiguous runs of ``run`` rows, so that neighbours stay alike."""

    kind: Literal["empirical"]
    source: SourceSpec
    run: int = Field(default=64, ge=1)
    split_at: tuple[float, float] = (0.6, 0.8)

    def draw(self, n: int, rng: np.random.Generator, split: Split = "train") -> Pair:
        trace = self.source.part(split, self.split_at)
        if not trace.n:
            raise SlalomError(f"lengths.source {trace.name}", 0, f"the {split} part is empty; move split_at")
        run = min(self.run, trace.n)
        starts = rng.integers(trace.n - run + 1, size=-(-n // run))
        rows = (starts[:, None] + np.arange(run)).ravel()[:n]
        return trace.prompt[rows], trace.output[rows]

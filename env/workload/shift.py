"""``kind: shift``: within one episode the rate and the prompt:output mix move, in steps or ramps.

An episode lasts ``duration_s`` seconds, whatever the length of a run: a longer run meets one episode after the other
(given phases again, random ones drawn anew), a shorter one ends in the middle and says so (``meta["unfinished"]``, and
:meth:`ShiftSpec.unfinished` before it is run). Files without ``duration_s`` are older: their episode is the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from engine.errors import SlalomError
from env.workload.arrivals import gamma_gaps, on_clock
from env.workload.base import Model, Split, WorkloadBase, check_request, stream
from env.workload.presets import LengthsSpec, draw_parts
from env.workload.trace import Trace

_RAMP_STEPS = 32
_MOST_EPISODES = 10_000
_WHOLE = 0.05  # of an episode: arrivals spread by about that much around the asked length of a run


class Phase(Model):
    """A stretch of the episode.

    :param duration: share of the episode (shares are normalised); seconds, where they add up to its ``duration_s``
    :param rate: factor on the episode's rate (normalised, so that the mean stays the asked one)
    :param weights: of each lengths model of the spec
    :param ramp: move linearly from the phase before instead of jumping
    """

    duration: float = Field(gt=0)
    rate: float = Field(gt=0)
    weights: tuple[float, ...] = Field(min_length=1)
    ramp: bool = False

    @model_validator(mode="after")
    def _has_weight(self) -> Phase:
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError("weights must be >= 0 and not all 0")
        return self


class RandomPhases(Model):
    """Phases drawn per seed, for training.

    :param phases: fewest and most phases
    :param rate: smallest and largest factor, drawn log-uniformly
    :param ramp_share: probability that a phase is reached by a ramp
    :param sharpness: 1 draws any mix of the lengths models, smaller ones come close to a single model
    """

    phases: tuple[int, int] = (2, 6)
    rate: tuple[float, float] = (0.5, 2.0)
    ramp_share: float = Field(default=0.5, ge=0, le=1)
    sharpness: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> RandomPhases:
        if not (1 <= self.phases[0] <= self.phases[1] <= 1000 and 0 < self.rate[0] <= self.rate[1]):
            raise ValueError("give phases and rate as [low, high], 1 to 1000 phases and rates above 0")
        return self

    def draw(self, models: int, rng: np.random.Generator) -> tuple[Phase, ...]:
        """Phases for ``models`` lengths models."""
        count = int(rng.integers(self.phases[0], self.phases[1] + 1))
        durations = rng.dirichlet(np.full(count, 2.0)) + 0.02
        rates = np.exp(rng.uniform(np.log(self.rate[0]), np.log(self.rate[1]), count))
        weights = rng.dirichlet(np.full(models, self.sharpness), count) + 1e-6
        ramps = rng.random(count) < self.ramp_share
        return tuple(
            Phase(duration=d, rate=r, weights=tuple(w), ramp=bool(k))
            for d, r, w, k in zip(durations.tolist(), rates.tolist(), weights.tolist(), ramps, strict=True)
        )


class ShiftSpec(WorkloadBase):
    """Phases over two or more lengths models.

    :param duration_s: natural length of an episode, 1 s or more; None: all of a run, ``n / rate`` seconds
    """

    kind: Literal["shift"]
    lengths: tuple[LengthsSpec, ...] = Field(min_length=1)
    phases: tuple[Phase, ...] | None = Field(default=None, min_length=1)
    random: RandomPhases | None = None
    duration_s: float | None = Field(default=None, ge=1)
    cv: float = Field(default=1.0, ge=0, le=30)
    max_context: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> ShiftSpec:
        if (self.phases is None) == (self.random is None):
            raise ValueError("give phases or random, not both")
        for phase in self.phases or ():
            if len(phase.weights) != len(self.lengths):
                raise ValueError(f"give {len(self.lengths)} weights per phase, one per lengths model")
        return self

    @property
    def natural_s(self) -> float:
        return self.duration_s or 0.0

    def unfinished(self, rate: float, n: int) -> str:
        lasts = n / rate
        if self.duration_s is None or abs(lasts / self.duration_s - round(lasts / self.duration_s)) < _WHOLE:
            return ""
        done, natural = int(lasts // self.duration_s), self.duration_s
        return (
            f"a run of {lasts:.0f} s ends in the middle of an episode of {natural:g} s, {lasts - done * natural:.0f} s "
            f"after it began ({done} complete)"
        )

    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        check_request(rate, n)
        rng = stream(seed, split)
        phases = self.phases
        if phases is None:
            assert self.random is not None
            phases = self.random.draw(len(self.lengths), rng)
        natural = self.duration_s or n / rate
        if n / rate > _MOST_EPISODES * natural:
            fix = f"a run has at most {_MOST_EPISODES} episodes: make them longer, or the run shorter"
            raise SlalomError("workload.duration_s", natural, fix)
        again = rng.spawn(1)[0]  # its own stream: a longer run begins as a shorter one does
        phases, episodes = _stretched(phases, natural), 1
        # one episode more than the mean run needs: arrivals spread, and the clock must not run out
        while self.duration_s and episodes < n / rate / natural + 1:
            more = self.phases or (self.random and self.random.draw(len(self.lengths), again)) or ()
            phases, episodes = phases + _stretched(more, natural), episodes + 1
        edges, speed, weights = _pieces(phases, episodes * natural)
        speed *= rate / _means(edges, speed, episodes)
        arrival_s = on_clock(np.cumsum(gamma_gaps(n, self.cv, rng)), edges, speed)
        piece = np.minimum(np.searchsorted(edges, arrival_s, side="right") - 1, len(speed) - 1)
        which = (rng.random(n)[:, None] >= weights.cumsum(axis=1)[piece, :-1]).sum(axis=1)
        prompt, output = draw_parts(list(self.lengths), which, rng, split)
        meta = {
            "source": "shift",
            "seed": seed,
            "split": split,
            "phases": [phase.model_dump() for phase in phases],
        }
        if self.duration_s and (told := self.unfinished(rate, n)):
            meta["unfinished"] = told
        trace = Trace.make(arrival_s, prompt, output, name="shift", meta=meta)
        if self.max_context is None:
            return trace
        fits = prompt.astype(np.int64) + output <= self.max_context
        meta["dropped"] = {"over max_context": int((~fits).sum())}
        return trace.rows(fits)


def _stretched(phases: tuple[Phase, ...], duration_s: float) -> tuple[Phase, ...]:
    """The phases of one episode with their durations in seconds."""
    total = sum(phase.duration for phase in phases)
    return tuple(p.model_copy(update={"duration": p.duration * duration_s / total}) for p in phases)


def _means(edges: np.ndarray, speed: np.ndarray, episodes: int) -> np.ndarray:
    """Mean speed of the episode that each piece belongs to, f8 (k,): every episode has the asked rate."""
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    episode = np.minimum((middle / (edges[-1] / episodes)).astype(int), episodes - 1)
    mean = np.bincount(episode, speed * width) / np.bincount(episode, width)
    return np.asarray(mean[episode])


def _pieces(phases: tuple[Phase, ...], duration_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Piecewise-constant form: edges (k + 1,) seconds, rates (k,), weights (k, models), all f8."""
    lengths, rates, weights = [], [], []
    before = phases[0]
    for phase in phases:
        steps = _RAMP_STEPS if phase.ramp and phase is not before else 1
        along = ((np.arange(steps) + 0.5) / steps)[:, None] if steps > 1 else np.ones((1, 1))
        old, new = (np.array(p.weights) / sum(p.weights) for p in (before, phase))
        lengths.append(np.full(steps, phase.duration / steps))
        rates.append((before.rate + along * (phase.rate - before.rate)).ravel())
        weights.append(old + along * (new - old))
        before = phase
    durations = np.concatenate(lengths)
    edges = np.concatenate([[0.0], durations.cumsum()]) * (duration_s / durations.sum())
    return edges, np.concatenate(rates), np.vstack(weights)

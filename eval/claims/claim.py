"""What a reproduced result is made of, and how rates and shares of it are measured on the surrogate.

A figure is read three ways: in runs as long as the original's; at *steady state*, by the same test in runs as long as
sustained goodput asks (``env.measure.sustained``: at least 20 simulated minutes, 20,000 requests and 50 times what a
lone request takes, after a warm-up); and, where goodputs are compared, as *sustained* goodput, by all of its clauses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import SlalomError
from engine.latency import Profile
from engine.latency.profile import Share
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator, lone_time
from env.measure.goodput import largest_rate
from env.measure.level import run_settings
from env.measure.metrics import outcomes
from env.measure.sustained_search import Search, measure_sustained
from env.scenario import Scenario
from env.surrogate.simulate import RunResult, simulate

ORIGINAL, STEADY, SUSTAINED = "the original's run length", "steady state", "sustained goodput"


@dataclass(frozen=True)
class Curve:
    """Points of one system. ``published`` ones are drawn as markers, ours as a line over them.

    :param x: numbers, or names where the axis has none
    """

    label: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    published: bool = False


@dataclass(frozen=True)
class Reading:
    """The figure of a claim once more, read in another way or with one assumption changed.

    :param label: which way, or which assumption of the original and what it is changed to
    :param value: the figure, in the claim's unit
    :param extra: whether what the band does not cover came out too
    """

    label: str
    value: float
    extra: bool = True


@dataclass(frozen=True)
class Claim:
    """One published result and ours.

    :param name: S1, S2, ...
    :param unit: of ``value`` and ``band``
    :param published: the figure as published
    :param value: ours, in runs as long as the original's
    :param length: how long these are, and who says so
    :param lasting: the figure at steady state and, where goodputs are compared, of sustained goodput
    :param causes: assumptions of the original that ours does not share, changed alone or as the label says; read as
        the label says
    :param band: pass band of ``value``
    :param extra: whether what the band does not cover (a choice, an order) came out too
    :param note: one honest sentence
    :param rows: what was measured on the way, ablations included: (label, figure, unit)
    :param interval: least and greatest of ``value`` over single seeds
    :param curves: what the page draws over axes named ``axes``
    """

    name: str
    title: str
    source: str
    unit: str
    published: str
    value: float
    band: tuple[float, float]
    note: str
    length: str = ""
    extra: bool = True
    lasting: tuple[Reading, ...] = ()
    causes: tuple[Reading, ...] = ()
    rows: tuple[tuple[str, float, str], ...] = field(default=())
    interval: tuple[float, float] | None = None
    curves: tuple[Curve, ...] = ()
    axes: tuple[str, str] = ("", "")

    @property
    def holds(self) -> bool:
        """Whether ours lies in the band, and the rest came out."""
        return self.within(Reading(ORIGINAL, self.value, self.extra))

    def within(self, reading: Reading) -> bool:
        """Whether a reading lies in the band, and the rest came out."""
        return reading.extra and self.band[0] <= reading.value <= self.band[1]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The figure every way it was read, the original's run length first."""
        return (Reading(ORIGINAL, self.value, self.extra), *self.lasting)

    @property
    def matches(self) -> tuple[str, ...]:
        """The ways of reading under which ours agrees with the published figure."""
        return tuple(reading.label for reading in self.readings if self.within(reading))

    @property
    def explained(self) -> tuple[str, ...]:
        """The assumptions of the original that move ours into the band."""
        return tuple(cause.label for cause in self.causes if self.within(cause))


# -- measuring -------------------------------------------------------------------------------------------------


Passes = Callable[[RunResult, float], float]  # of a run, and the share of its arrivals left out at the start
_SETTINGS = PointSettings(warmup=0.05)


def share_at(
    scenario: Scenario, passes: Passes, policy: str, rate: float, n: int | None, seeds: Sequence[int],
    lone_s: float = 0.0,
) -> float:  # fmt: skip
    """Mean of ``passes`` over ``seeds`` at one rate.

    :param n: requests of a run; None: runs as long as sustained goodput asks
    :param lone_s: see :func:`lone`, for those
    """
    warmup = _SETTINGS.warmup
    if n is None:
        settings = run_settings(_SETTINGS, rate, lone_s, natural_s=scenario.workload.natural_s)
        n, warmup = settings.n_requests, settings.warmup
    runs = (simulate(scenario, policy, rate=rate, n_requests=n, seed=seed) for seed in seeds)
    return float(np.mean([passes(run, warmup) for run in runs]))


def lone(scenario: Scenario, policy: str) -> float:
    """:func:`env.measure.evaluator.lone_time` on the test windows."""
    with Evaluator(scenario, _SETTINGS) as evaluator:
        return lone_time(evaluator, Contender(policy))


def search(
    scenario: Scenario, passes: Passes, policy: str, goal: float, n: int | None, seeds: Sequence[int] = (0, 1)
) -> float:
    """Largest rate at which ``passes`` (a share, mean over ``seeds``) reaches ``goal``.

    :param n: requests of a run; None: runs as long as sustained goodput asks
    """
    lone_s = 0.0 if n else lone(scenario, policy)

    def share(rate: float) -> float:
        return share_at(scenario, passes, policy, rate, n, seeds, lone_s)

    return largest_rate(share, scenario.reference_rate, goal)


class Lasting(NamedTuple):
    """What one system holds for good at 90 % of the requests sent, requests per second.

    :param steady: by clause (a) alone, over runs of the definition's length
    :param sustained: by all clauses
    """

    steady: float
    sustained: float

    def __truediv__(self, gpus: float) -> Lasting:
        return Lasting(self.steady / gpus, self.sustained / gpus)


def _search_lasting(scenario: Scenario, policy: str, classic: tuple[float, ...]) -> Search | None:
    """None where nothing is held at any rate that sends 20,000 requests in 49 days, the longest run there is."""
    with Evaluator(scenario, PointSettings(), measure=measure_sustained, label="surrogate, sustained") as evaluator:
        try:
            return Search(evaluator, Contender(policy), (0, 1), targets=(0.9,), classic=classic)
        except SlalomError as error:
            if error.field != "rate":
                raise
            return None


def lasting(scenario: Scenario, policy: str) -> Lasting:
    """Steady and sustained goodput at 90 %, two seeds, see ``env.measure.sustained_search``."""
    found = _search_lasting(scenario, policy, (0.9,))
    return Lasting(found.classic[0].rate, found.found[0].rate) if found else Lasting(0.0, 0.0)


def sustained(scenario: Scenario, policy: str) -> float:
    """Sustained goodput at 90 % alone, where the claim's own test is another one than attainment."""
    found = _search_lasting(scenario, policy, ())
    return found.found[0].rate if found else 0.0


def ratios(ours: Lasting, theirs: Lasting) -> tuple[Reading, ...]:
    """Ours by theirs, as the readings of a claim."""
    return tuple(Reading(label, ratio(a, b)) for label, a, b in zip((STEADY, SUSTAINED), ours, theirs, strict=True))


def ratio(ours: float, theirs: float) -> float:
    """Infinite where theirs reaches the goal at no rate."""
    return ours / theirs if theirs > 0.0 else math.inf


def ratio_interval(
    ours: tuple[Scenario, str],
    theirs: tuple[Scenario, str],
    passes: Passes,
    goal: float,
    n: int | tuple[int, int],
) -> tuple[float, float]:
    """Least and greatest ratio of the two rates over single seeds.

    :param n: requests of a run, of both or of each
    """
    found = []
    lengths = (n, n) if isinstance(n, int) else n
    for seed in range(3):
        top, bottom = (
            search(scenario, passes, policy, goal, requests, (seed,))
            for (scenario, policy), requests in zip((ours, theirs), lengths, strict=True)
        )
        found.append(ratio(top, bottom))
    return min(found), max(found)


def joint(run: RunResult, warmup: float) -> float:
    """Share of the requests sent that meets both targets."""
    return float(outcomes(run, warmup=warmup).good.mean())


def changed_profile(profile: Profile, folder: Path, name: str, **changes: Any) -> str:
    """A profile with fields of it, or with seconds of all its shares, changed; the file's path.

    :param changes: fields of the profile; ``share`` turns each share into another
    """
    turn = changes.pop("share", lambda share: share)
    shares = [turn(share) for share in profile.shares]
    path = folder / f"{name}.json"
    path.write_text(profile.model_copy(update={**changes, "shares": tuple(shares), "name": name}).model_dump_json())
    return str(path)


def slower(share: Share, factor: float) -> Share:
    """Every step takes ``factor`` times as long."""
    fields = ("prefill_s", "knot_s", "decode_small_s", "decode_large_s")
    changed = {key: tuple(factor * x for x in getattr(share, key)) for key in fields if getattr(share, key)}
    return share.model_copy(update=changed)

"""The level of a run: the greatest target at which it would hold the clauses of sustained goodput that one run shows.

Searches need one number that rises whenever a policy comes nearer to holding its rate for good, and that nobody can
raise by starving somebody. Of the definition in ``env.measure.sustained`` a run shows clause (a), the share in time;
clause (d), the worst class and the worst fifth of the prompts by length, which may stay below by 10 points; and clause
(b), waits. Too long a wait, a request left unserved or refused late fails the rate at any target; here it costs the
more the worse it is, so that a search sees which way is out. Of clause (c) a run shows two things: refusals carry a
rate over the stability limit, so that more than a hundredth of them costs; and a backlog that grows by more than a
hundredth of what arrives costs long before anybody waits too long, or a search could not tell capacities apart.

Runs must last for starvation to show: at least four times the longest wait that the scenario allows, and a whole
episode where the workload has one (:func:`run_length`). With sessions, two thirds of a run go by before it is measured,
at least the time in which their load settles (:func:`level_settings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from engine.latency.evaluate import TICKS_PER_S
from env.measure.contender import Contender, Point, PointSettings, Split
from env.measure.evaluator import Evaluator, arranged, simulated
from env.measure.metrics import Outcomes, on_one_clock, outcomes, refusals, waits
from env.measure.sustained import DEFINITION, QUANTILES, Definition, backlog_of
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from env.workload.steady import Settling, check_settles, most_of, sample, settling

_NEAR = 0.8  # of the longest wait allowed: from here on waits cost, since a longer run would show longer ones
_DOUBLING = 0.1  # what each doubling of the longest wait costs from there
_REFUSED = 3.0  # what each request costs that is refused beyond the margin of the stability limit, beside being missed
_GROWTH = 2.0  # what each request costs by which the backlog grows beyond that margin
_UNSERVED = 0.05  # what the first request costs that nobody serves, or that is refused late
_WAITS = 4.0  # a run lasts so many times the longest wait allowed
LASTS = 1.5  # times as long as sessions need to settle lasts a run with them, at least;
WARM = 2 / 3  # of it is left out
_PROBED = 200  # requests that tell the TTFT targets
_ALIKE = 1.25  # lengths of runs are powers of this: most neighbouring rates then share one trace, only stretched
_LONGEST = 100_000  # requests of a run, at most


def level_of(run: Any, *, tail_factor: float, warmup: float = 0.05, settled: bool = False) -> float:
    """See the module's text; at most 1, below 0 where much is wrong.

    :param run: a ``RunResult``
    :param tail_factor: longest wait allowed, in TTFT targets
    :param warmup: share of arrivals left out at the start
    :param settled: of the time in which sessions begin, see ``env.measure.metrics.outcomes``
    """
    return _level(run, outcomes(run, warmup=warmup, settled=settled), tail_factor)


def _level(run: Any, found: Outcomes, tail_factor: float) -> float:
    r, good = run.req[found.rows], found.good
    level = min(float(good.mean()), _worst_group(r, good) + DEFINITION.slack)
    return level - _cost_of_waits(r, found, tail_factor) - _cost_of_growth(on_one_clock(run)[0], found.rows)


def _worst_group(r: np.ndarray, good: np.ndarray) -> float:
    """Share in time of the class, or fifth of the prompts by length, that is worst off."""
    fifth = np.searchsorted(np.quantile(r["prompt"], np.arange(1, QUANTILES) / QUANTILES), r["prompt"], side="left")
    shares = []
    for group in (r["cls"], fifth):
        sent, hit = np.bincount(group), np.bincount(group[good], minlength=int(group.max()) + 1)
        shares.append(float((hit[sent > 0] / sent[sent > 0]).min()))
    return min(shares)


def _cost_of_growth(req: np.ndarray, rows: np.ndarray) -> float:
    """The last quarter's backlog against that of the second, which lie half the measured arrivals apart."""
    backlog = backlog_of(req, *(int(req["arrival"][rows[k]]) for k in (0, -1)))
    quarter = len(backlog) // 4
    growth = float(backlog[-quarter:].mean() - backlog[quarter : 2 * quarter].mean()) / (len(rows) / 2)
    return _GROWTH * max(growth - DEFINITION.limit_margin, 0.0)


def _cost_of_waits(r: np.ndarray, found: Outcomes, tail_factor: float) -> float:
    refused, late = refusals(r)
    wrong = int(late.sum()) + int((~found.finished & ~refused).sum())
    cost = _UNSERVED + wrong / len(r) if wrong else 0.0
    cost += _REFUSED * max(float(refused.mean()) - DEFINITION.limit_margin, 0.0)
    tail = float((waits(r) / np.maximum(r["ttft_slo"], 1)).max())
    return cost + _DOUBLING * math.log2(max(tail / (_NEAR * tail_factor), 1.0))


def measure_level(scenario: Any, contender: Contender, rate: float, seed: int, settings: PointSettings) -> Point:
    """A point that knows its level and nothing else beside what was sent and in time: searches measure thousands."""
    run = simulated(scenario, contender, rate, seed, settings)
    found = outcomes(run, warmup=settings.warmup, settled=settings.sessions == "settled")
    level = _level(run, found, scenario.tail_factor)
    return Point(rate, seed, {"level": level}, [len(found.rows)], [int(found.good.sum())])


def mean_level(
    evaluator: Evaluator, contender: Contender, rate: float, seeds: Sequence[int],
    length: Callable[..., int] | None = None,
) -> float:  # fmt: skip
    """Mean level over seeds of runs long enough for it.

    :param evaluator: must measure with :func:`measure_level`
    :param length: says how long instead of :func:`run_length`, with its arguments
    """
    settings = evaluator.settings
    n = (length or run_length)(arranged(evaluator.scenario, contender), rate, settings.n_requests, settings.split)
    points = evaluator.points(contender, rate, seeds, level_settings(settings, evaluator.scenario, n))
    return sum(float(p.metrics["level"]) for p in points) / len(points)


def run_length(scenario: Any, rate: float, n: int, split: Split = "train", *, waits: bool = True) -> int:
    """Requests of a run at ``rate`` in which starvation would show: at least ``n``, where the workload has so many.

    :param waits: False: a first look, long enough for whole episodes, not for waits
    """
    key = _key(scenario)
    seconds, load = _least(key), _load(key)
    if not waits:
        seconds = scenario.workload.natural_s
    seconds = max(seconds, LASTS * load.settle_s)
    return min(max(n, math.ceil(rate * load.turns * seconds)), _most(key, split))


def level_settings(base: PointSettings, scenario: Any, n: int) -> PointSettings:
    """Settings of a run of ``n`` requests, as :func:`run_length` gives them, that tells a level."""
    made = replace(base, n_requests=n)
    return replace(made, sessions="settled", warmup=WARM) if has_sessions(scenario) else made


def has_sessions(scenario: Any) -> bool:
    """Whether turns of the scenario's workload wait for earlier ones."""
    if getattr(scenario, "workload", None) is None:  # a curve that stands for one
        return False
    return _load(_key(scenario)).turns > 1.0


def rate_unit(scenario: Any) -> str:
    """What a rate of the scenario counts: ``sessions/s`` where later turns come of one arrival, else ``requests/s``."""
    return "sessions/s" if has_sessions(scenario) else "requests/s"


def run_settings(
    base: PointSettings, rate: float, lone_s: float, *, part: int = 1, turns: float = 1.0, settle_s: float = 0.0,
    natural_s: float = 0.0,
    definition: Definition = DEFINITION,
) -> PointSettings:  # fmt: skip
    """Settings of a run of the definition's length at ``rate``, or of a ``part``-th of it (the warm-up stays whole).

    Lengths are rounded up to a coarse grid: at neighbouring rates a seed then draws the same requests and the same
    gaps, only shorter, and attainment falls with the rate instead of jumping.

    :param turns: requests that come of one arrival
    :param settle_s: until the load of sessions has settled, see :class:`env.workload.steady.Settling`
    :param natural_s: length of an episode: a run is a whole number of them, so that it ends in no transient
    :raises SlalomError: sessions last too long for any run
    """
    warm, span = max(definition.warmup(lone_s), settle_s), definition.span(rate * turns, lone_s) / part
    n = max(rate * turns * (warm + span), base.n_blocks)
    if natural_s:
        n = rate * turns * natural_s * math.ceil((warm + span) / natural_s - 1e-9)
    else:
        n = math.ceil(_ALIKE ** math.ceil(math.log(n) / math.log(_ALIKE)))
    if settle_s:
        check_settles(settle_s, n)
    made = replace(base, n_requests=math.ceil(n), warmup=warm * rate * turns / n, drain=0.0, detailed=False)
    return made if turns == 1.0 else replace(made, sessions="settled")


_KNOWN: dict[str, Any] = {}  # scenarios by their hash, for the caches


def _key(scenario: Any) -> str:
    key = str(scenario.hash())
    _KNOWN.setdefault(key, scenario)
    return key


@lru_cache(maxsize=64)
def _load(key: str) -> Settling:
    return settling_of(_KNOWN[key])


@lru_cache(maxsize=64)
def _least(key: str) -> float:
    """Seconds that a run must last for waits to show."""
    scenario = _KNOWN[key]
    run = simulate(scenario, "least_tokens", rate=scenario.reference_rate, n_requests=_PROBED, split="train")
    longest = scenario.tail_factor * float(np.quantile(run.req["ttft_slo"], 0.9)) / TICKS_PER_S
    return max(min(_WAITS * longest, DEFINITION.seconds), float(scenario.workload.natural_s))


@lru_cache(maxsize=64)
def _most(key: str, split: Split) -> int:
    """The longest run that the workload gives, in requests; a recorded trace ends."""
    return longest_run(_KNOWN[key], _KNOWN[key].reference_rate, _LONGEST, (0,), split)


def settling_of(scenario: Any, turn_s: float = 0.0) -> Settling:
    """How the load of the scenario's workload rises.

    :param turn_s: that a turn takes to be answered
    """
    return settling(sample(lambda n: build_trace(scenario, scenario.reference_rate, n, 0, "train")), turn_s)


def longest_run(scenario: Any, rate: float, n: int, seeds: Sequence[int], split: Split, least: int = 1) -> int:
    """The longest run, at most ``n`` requests, that the workload gives every seed; a recorded trace ends.

    :raises SlalomError: the workload is refused for something else than its length
    """
    return most_of(lambda n: [build_trace(scenario, rate, n, seed, split) for seed in seeds], n, least)

"""Sustained goodput: the one definition of a rate that a policy holds for good, not only through a burst.

A rate is held at a target (99, 95 or 90 %) when, after a warm-up, over at least 20 simulated minutes, 20,000 requests
and 50 times the P90 of a lone request's time in the system, in every seed's run,

* (a) that share of the requests *sent* meets TTFT and TPOT;
* (b) nobody waits for the first token longer than ``tail_factor`` times their TTFT target, nobody is left unserved,
  and whoever is refused hears so within the TTFT target (a refusal counts as missed in a and d);
* (c) the backlog has no trend, and the rate is below the stability limit;
* (d) every SLO class and every fifth of the prompts by length reaches the target less 10 points.

Sustained goodput is the largest such rate; where single waits alone fail rates above it, four in a row must fail (the
grid has steps of one percent), since a wait may spoil a rate and none above it. Clause (a) alone, over runs as long,
gives the *classic* goodput.

Of sessions the warm-up lasts at least until the load has settled (``env.workload.steady``), and what arrives from then
until the last session begins is measured.

The test of trend: requests in the system, averaged over 24 blocks of each run; Mann and Kendall's count of rising
pairs of blocks, with Hamed and Rao's correction of its variance for correlation (of order one, like an AR(1)), added up
over the seeds, one-sided at 1 %. The growth it finds must matter as well: more than a fifth of the mean backlog between
the first and the last block (Theil and Sen's slope).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, theilslopes

from engine.core.kinds import RequestState
from engine.latency.evaluate import TICKS_PER_S
from env.measure.metrics import Outcomes, block_counts, on_one_clock, outcomes, refusals, sessions_begin, waits

Floats = NDArray[np.float64]
BLOCKS = 24
QUANTILES = 5


@dataclass(frozen=True)
class Definition:
    """The constants of the definition.

    :param seconds: of arrivals measured, at least
    :param requests: measured, at least
    :param lone_times: measured at least this many times the P90 of a lone request's time in the system
    :param warmup_s: arrivals left out at the start, at least
    :param warmup_lone_times: and at least this many times that P90
    :param slack: by which a class or a length may stay below the target
    :param trend_level: one-sided level of the test of trend
    :param trend_growth: growth over a run, as a share of the mean backlog, that is let pass in any case
    :param limit_margin: noise of the stability limit: a rate above the limit by less is not held against it
    """

    seconds: float = 1200.0
    requests: int = 20_000
    lone_times: float = 50.0
    warmup_s: float = 120.0
    warmup_lone_times: float = 10.0
    slack: float = 0.10
    trend_level: float = 0.01
    trend_growth: float = 0.2
    limit_margin: float = 0.01

    def warmup(self, lone_s: float) -> float:
        """Seconds of arrivals that are left out."""
        return max(self.warmup_s, self.warmup_lone_times * lone_s)

    def span(self, rate: float, lone_s: float) -> float:
        """Seconds of arrivals that are measured at ``rate`` [requests/s]."""
        return max(self.seconds, self.requests / rate, self.lone_times * lone_s)


DEFINITION = Definition()


@dataclass(frozen=True)
class Sample:
    """What the clauses need to know of one run (JSON-ready).

    :param span_s: from the first to the last measured arrival
    :param sent: requests measured; ``good``: those that met both targets; per block of arrivals as well
    :param tail: longest wait for a first token, in TTFT targets of the one who waited; ``over``: waits too long
    :param refused: shed, or failed before a first token; ``refused_late``: later than the TTFT target
    :param unserved: neither finished nor refused
    :param classes: good and sent per class; ``lengths``: per fifth of the prompts by length
    :param backlog: requests in the system, averaged over ``BLOCKS`` stretches of the span
    :param offered: requests per second that arrived; ``served``: the rate whose work was done in the span
    :param due: requests per second that arrive in the long run if every turn of every session is sent
    :param simulated: requests of the whole run
    """

    rate: float
    seed: int
    span_s: float
    sent: int
    good: int
    block_sent: list[int]
    block_good: list[int]
    tail: float
    over: int
    longest_wait_s: float
    p99_ttft_s: float | None
    refused: int
    refused_late: int
    unserved: int
    classes: dict[str, list[int]]
    lengths: list[list[int]]
    length_edges: list[float]
    backlog: list[float]
    offered: float
    served: float
    due: float
    simulated: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_of(run: Any, *, warmup: float, settled: bool = False, tail_factor: float = math.inf) -> Sample:
    """The facts of a finished run.

    :param run: a ``RunResult``
    :param warmup: share of arrivals left out at the start
    :param settled: of the time in which sessions begin, see ``env.measure.metrics.outcomes``
    :param tail_factor: longest wait that the scenario allows, in TTFT targets
    """
    found = outcomes(run, warmup=warmup, settled=settled)
    r = run.req[found.rows]
    req, per_s = on_one_clock(run)
    first, last = (int(req["arrival"][found.rows[k]]) for k in (0, -1))
    refused, late = refusals(r)
    wait = waits(r)
    targets = wait / np.maximum(r["ttft_slo"], 1)
    block_sent, block_good = block_counts(found, 20)
    lengths, edges = _by_length(r["prompt"], found.good)
    span_s = (last - first) / per_s
    offered = len(r) / max(span_s, 1e-9)
    return Sample(
        rate=float(run.rate),
        seed=int(run.seed),
        span_s=span_s,
        sent=len(r),
        good=int(found.good.sum()),
        block_sent=block_sent,
        block_good=block_good,
        tail=float(targets.max()),
        over=int((targets > tail_factor).sum()),
        longest_wait_s=float(wait.max()) / TICKS_PER_S,
        p99_ttft_s=float(np.nanpercentile(found.ttft_s, 99)) if (r["first_token"] >= 0).any() else None,
        refused=int(refused.sum()),
        refused_late=int(late.sum()),
        unserved=int((~found.finished & ~refused).sum()),
        classes=_by_class(run, found),
        lengths=lengths,
        length_edges=edges,
        backlog=backlog_of(req, first, last).tolist(),
        offered=offered,
        served=offered * _work_done(req, first, last),
        due=_due(run) if settled else offered,
        simulated=found.sent_total,
    )


def _due(run: Any) -> float:
    """Requests of all sessions over the time in which they began."""
    first, last = sessions_begin(run)
    return len(run.req) / max(last - first, 1e-9)


def _by_class(run: Any, found: Outcomes) -> dict[str, list[int]]:
    cls = run.req["cls"][found.rows]
    n = len(run.class_names)
    sent, good = np.bincount(cls, minlength=n), np.bincount(cls[found.good], minlength=n)
    return {name: [int(good[i]), int(sent[i])] for i, name in enumerate(run.class_names)}


def _by_length(prompt: NDArray[Any], good: NDArray[np.bool_]) -> tuple[list[list[int]], list[float]]:
    """Good and sent per fifth; where many prompts are alike some fifths are empty, and left out when judged."""
    edges = np.quantile(prompt, np.arange(1, QUANTILES) / QUANTILES)
    fifth = np.searchsorted(edges, prompt, side="left")
    sent, hit = np.bincount(fifth, minlength=QUANTILES), np.bincount(fifth[good], minlength=QUANTILES)
    return [[int(h), int(s)] for h, s in zip(hit, sent, strict=True)], edges.tolist()


def backlog_of(req: NDArray[Any], first: int, last: int) -> Floats:
    """Requests in the system, averaged over each of ``BLOCKS`` equal stretches from ``first`` to ``last``."""
    here = req[req["arrival"] >= 0]
    open_until = np.where(here["finished"] >= 0, here["finished"], np.iinfo(np.int64).max)
    edges = np.linspace(first, last, BLOCKS + 1)

    def passed(stamps: NDArray[Any]) -> Floats:
        """Integral over time of how many stamps lie in the past, at each edge."""
        order = np.sort(stamps).astype(np.float64)
        total = np.concatenate([[0.0], np.cumsum(order - first)])
        k = np.searchsorted(order, edges)
        return k * (edges - first) - total[k]

    area = passed(here["arrival"]) - passed(open_until[open_until <= last])
    return np.asarray(np.diff(area) / np.maximum(np.diff(edges), 1.0))


def _work_done(req: NDArray[Any], first: int, last: int) -> float:
    """Work done between ``first`` and ``last`` as a share of the work that arrived: the scarcer of prompt and output.

    Prompts count when their first token comes, output when the request ends; requests that nobody serves are work
    that arrived.
    """
    came = (req["arrival"] >= first) & (req["arrival"] <= last)
    begun = (req["first_token"] >= first) & (req["first_token"] <= last)
    ended = (req["state"] == RequestState.FINISHED) & (req["finished"] >= first) & (req["finished"] <= last)
    prompt = req["prompt"][begun].sum() / max(req["prompt"][came].sum(), 1)
    output = req["output"][ended].sum() / max(req["output"][came].sum(), 1)
    return float(min(prompt, output))


@dataclass(frozen=True)
class Trend:
    """Of the backlog: chance of so much rise without a trend, and growth over the run in mean backlogs."""

    p: float
    growth: float

    def found(self, definition: Definition = DEFINITION) -> bool:
        return self.p < definition.trend_level and self.growth > definition.trend_growth


def backlog_trend(backlogs: Sequence[Sequence[float]]) -> Trend:
    """Whether the backlog rises, over the runs of several seeds together (see the module's text).

    :param backlogs: per run, its averages over consecutive blocks of equal length
    """
    rising = variance = 0.0
    growths = []
    for backlog in backlogs:
        x = np.asarray(backlog, dtype=np.float64)
        n = len(x)
        i, j = np.triu_indices(n, 1)
        rising += float(np.sign(x[j] - x[i]).sum())
        slope = float(theilslopes(x, np.arange(n))[0])
        rest = x - slope * np.arange(n)
        rest = rest - rest.mean()
        rho = float((rest[1:] * rest[:-1]).sum() / max((rest**2).sum(), 1e-12))
        rho = min(max(rho + (1.0 + 4.0 * rho) / n, 0.0), 0.95)  # the estimate is biased towards 0 by that much
        variance += n * (n - 1) * (2 * n + 5) / 18.0 * (1.0 + rho) / (1.0 - rho)
        growths.append(slope * (n - 1) / max(float(x.mean()), 1e-9))
    z = (rising - math.copysign(1.0, rising)) / math.sqrt(variance) if rising else 0.0
    return Trend(float(norm.sf(z)), float(np.mean(growths)))


@dataclass(frozen=True)
class Clause:
    """One clause for one rate.

    :param letter: a, b, c or d
    :param name: what it asks
    :param value: measured; ``bound``: what it must reach or stay below
    :param told: how many requests are behind the value, in words
    """

    letter: str
    name: str
    value: float
    bound: float
    met: bool
    told: str = ""

    def __str__(self) -> str:
        return f"({self.letter}) {self.name}: {self.value:.4g}, bound {self.bound:.4g}{self.told}"


@dataclass(frozen=True)
class Verdict:
    """Whether a rate is held at a target, and by which clauses.

    :param target: share of requests sent
    :param clauses: all of them; those not met say why a rate fails
    :param runs: runs judged; ``requests``: simulated for them; ``seconds``: the shortest span measured
    :param missing: what the definition asks for and these runs do not have, in sentences; empty where nothing lacks
    :param early: the runs are shorter or fewer than the definition's: decided by the margin alone
    """

    rate: float
    target: float
    clauses: tuple[Clause, ...]
    runs: int
    requests: int
    seconds: float
    missing: tuple[str, ...] = ()
    early: bool = False

    @property
    def met(self) -> bool:
        return all(clause.met for clause in self.clauses)

    @property
    def failed(self) -> str:
        """The clauses that failed, in words; empty when the rate is held."""
        return "; ".join(str(clause) for clause in self.clauses if not clause.met)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met, "failed": self.failed}


def judge(
    samples: Sequence[Sample],
    target: float,
    *,
    tail_factor: float,
    limit: float,
    lone_s: float,
    definition: Definition = DEFINITION,
    early: bool = False,
) -> Verdict:
    """Hold the runs of all seeds at one rate against the definition.

    :param samples: one per seed
    :param tail_factor: longest wait allowed, in TTFT targets
    :param limit: stability limit as far as known, requests per second
    :param lone_s: P90 of a lone request's time in the system
    """
    sent, good = sum(s.sent for s in samples), sum(s.good for s in samples)
    trend = backlog_trend([s.backlog for s in samples])
    offered, served = (float(np.mean([getattr(s, key) for s in samples])) for key in ("offered", "served"))
    bound = max(limit, served) * (1.0 + definition.limit_margin)
    tail, late = max(s.tail for s in samples), sum(s.refused_late for s in samples)
    unserved, over = sum(s.unserved for s in samples), f" ({sum(s.over for s in samples):,} of {sent:,} requests)"
    growing = f"growth of the backlog over a run, in mean backlogs (p = {trend.p:.2g})"
    floor = target - definition.slack
    clauses = [
        Clause("a", "share of requests sent that meets both targets", good / sent, target, good >= target * sent),
        Clause("b", "longest wait for a first token, in TTFT targets", tail, tail_factor, tail <= tail_factor, over),
        Clause("b", "requests left unserved", unserved, 0, unserved == 0),
        Clause("b", "requests refused later than their TTFT target", late, 0, late == 0),
        Clause("c", growing, trend.growth, definition.trend_growth, not trend.found(definition)),
        Clause("c", "rate, against the stability limit", offered, bound, offered <= bound),
    ]
    groups = _groups(samples)
    clauses += [Clause("d", f"share of {name}", hit / n, floor, hit >= floor * n) for name, hit, n in groups if n]
    missing = () if early else _missing(samples, groups, lone_s, definition)
    return Verdict(
        rate=samples[0].rate, target=target, clauses=tuple(clauses), runs=len(samples),
        requests=sum(s.simulated for s in samples), seconds=min(s.span_s for s in samples), missing=missing,
        early=early,
    )  # fmt: skip


def _groups(samples: Sequence[Sample]) -> list[tuple[str, int, int]]:
    """(name, good, sent) of every class and every fifth of the prompts, all seeds together."""
    found = []
    for name in samples[0].classes:
        good, sent = (sum(s.classes[name][k] for s in samples) for k in (0, 1))
        found.append((f"class {name}", good, sent))
    for k in range(QUANTILES):
        good, sent = (sum(s.lengths[k][i] for s in samples) for i in (0, 1))
        if sent:
            found.append((f"prompts, {_ORDINAL[k]} fifth by length", good, sent))
    return found


_ORDINAL = ("shortest", "second", "third", "fourth", "longest")


def _missing(
    samples: Sequence[Sample], groups: Sequence[tuple[str, int, int]], lone_s: float, definition: Definition
) -> tuple[str, ...]:
    """What these runs lack for the definition."""
    said = []
    fewest, shortest = min(s.sent for s in samples), min(s.span_s for s in samples)
    # a Poisson process spreads: the last of n arrivals may come a few percent early
    needed = 0.95 * max(definition.seconds, definition.lone_times * lone_s)
    if fewest < definition.requests:
        said.append(f"{fewest:,} requests were measured; the definition asks for {definition.requests:,}")
    if shortest < needed:
        said.append(f"{shortest / 60:.3g} minutes were measured; the definition asks for {needed / 57:.3g}")
    said += [f"{name} had no request; the others were measured" for name, _, sent in groups if not sent]
    return tuple(said)


def worst_of(samples: Sequence[Sample]) -> Mapping[str, Any]:
    """The figures of a rate that a table shows: tail, refusals, and the worst class and length."""
    shares = [(name, good / sent) for name, good, sent in _groups(samples) if sent]
    by_class = [entry for entry in shares if entry[0].startswith("class ")]
    by_length = [entry for entry in shares if entry[0].startswith("prompts")]
    p99 = [s.p99_ttft_s for s in samples if s.p99_ttft_s is not None]
    return {
        "attainment": sum(s.good for s in samples) / sum(s.sent for s in samples),
        "p99_ttft_s": max(p99, default=None),
        "longest_wait_s": max(s.longest_wait_s for s in samples),
        "longest_wait_targets": max(s.tail for s in samples),
        "refused": sum(s.refused for s in samples),
        "unserved": sum(s.unserved for s in samples),
        "worst_class": min(by_class, key=lambda entry: entry[1]) if by_class else None,
        "worst_length": min(by_length, key=lambda entry: entry[1]) if by_length else None,
    }

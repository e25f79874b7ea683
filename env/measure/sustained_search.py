"""The search of sustained goodput: few runs, most of them short, the same arrivals for every policy.

Rates lie on a grid of powers of ``1 + tolerance``, so that a bisection of any kind gives the same answer when its
verdicts agree. (What is asked has a verdict of several clauses, each with a cost of its own; ``goodput.largest_rate``
smooths one share.) Policies share arrivals (common random numbers), as do most neighbouring rates, stretched in time.
Where to ask next is read off how far the verdicts at both ends of the bracket are from turning. A rate is asked in
three steps and the search goes on at the first that decides:

1. one run of an eighth of the length. It fails a rate when the attainment of five batches of it lies below the target
   (t-test, 0.5 %), or when a wait is too long or someone unserved: were a share p of such runs to show that, the
   24 such runs of a full verdict (three seeds) would all be clean with (1 - p)^24, so that at most max p (1 - p)^24 =
   1.5 % of rates are failed in error. It passes a rate, for the bracket only, far from every bound: attainment above
   the target (same test), a third of the wait allowed, three quarters of the stability limit;
2. one full run of the first seed. A wait too long fails the verdict of all seeds as well, without error; attainment
   fails it, or passes it as in step 1, by ten batches (same test);
   in both steps a class or a length six standard errors below or above its bound counts likewise;
3. full runs of all seeds: the definition itself. The rate that is answered has always come this far.

The bracket starts below the stability limit of the policy's arrangement: the work done per second in a short run that
sends more than is served, or keeps up, by the policy itself or by least predicted TTFT on the same instances, whichever
does more.

With sessions every run first lasts until the load has settled, which may be hours. Step 1 is then left out: it would
cost nearly as much as step 2, and batches so short hang together, since the same sessions fill them. The limit is
found on turns of a settled stretch, sent as open-loop requests: no short run of sessions has the mix of the long run.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.errors import SlalomError
from env.measure.contender import Contender, Point, PointSettings
from env.measure.evaluator import Evaluator, arranged, bound, lone_time, measure
from env.measure.goodput import TARGETS
from env.measure.level import LASTS, WARM, longest_run, run_settings, settling_of
from env.measure.sustained import DEFINITION, Definition, Sample, Verdict, judge, sample_of, worst_of
from env.measure.sustained_stop import cut_short, easy, hopeless, margin, unsteady
from env.workload.steady import check_settles

SHORT = 8  # a short run is this part of a full one
_FIRST, _LOWEST = 0.85, 0.01  # of the stability limit: the rate that is asked first, and the least
_DOWN = (0.92, 0.85, 0.7, 0.5, 0.3)  # factors from one rate that fails to the next
_UP = 1.06
_PLAIN = "predicted_ttft"  # the rule that tells what an arrangement can do
_ABOVE = 4  # rates that must fail in a row where only waits fail them
_SATURATED = 0.97  # who does less than this part of the work that arrives is saturated


def measure_sustained(scenario: Any, contender: Contender, rate: float, seed: int, settings: PointSettings) -> Point:
    """As :func:`env.measure.evaluator.measure`, with the facts of ``env.measure.sustained`` under ``sustained``."""
    kept: list[Any] = []
    point = measure(scenario, contender, rate, seed, settings, watch=kept.append)
    sample = sample_of(
        kept[0], warmup=settings.warmup, settled=settings.sessions == "settled", tail_factor=scenario.tail_factor
    )
    return replace(point, metrics=point.metrics | {"sustained": sample.as_dict()})


@dataclass(frozen=True)
class Found:
    """Sustained goodput of one policy at one target.

    :param rate: requests per second, 0 where no rate is held
    :param verdict: of ``rate``: full runs of all seeds; None where no rate is held
    :param above: of the rate above it, which fails: why it is no more
    """

    target: float
    rate: float
    verdict: Verdict | None
    above: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "target": self.target,
            "verdict": self.verdict.as_dict() if self.verdict else None,
            "above": self.above.as_dict() if self.above else None,
            "fails_above": self.above.failed if self.above else "",
        }


class Goal(NamedTuple):
    """What is searched: the largest rate that meets all clauses at a target, or clause (a) alone."""

    target: float
    sustained: bool = True


@dataclass
class _Runs:
    """The runs of one rate."""

    short: Sample | None = None
    full: list[Sample] = field(default_factory=list)


class Search:
    """One policy's sustained goodput on one scenario.

    :param evaluator: must measure with :func:`measure_sustained`
    :param classic: targets at which the classic goodput is searched as well; the runs of one help the other
    :param mode: "plain" judges every rate by full runs of all seeds, as a check on "sequential"
    :raises SlalomError: the policy serves nobody, or the workload cannot give a run at all
    """

    def __init__(
        self,
        evaluator: Evaluator,
        contender: Contender,
        seeds: Sequence[int],
        *,
        targets: Sequence[float] = TARGETS,
        tolerance: float = 0.01,
        definition: Definition = DEFINITION,
        mode: Literal["sequential", "plain"] = "sequential",
        classic: Sequence[float] = (),
    ) -> None:
        self.evaluator, self.contender, self.seeds = evaluator, contender, tuple(seeds)
        self.targets, self.definition, self.mode = tuple(sorted(targets)), definition, mode
        self._step = math.log1p(tolerance)
        self._tail = float(evaluator.scenario.tail_factor)
        self._runs: dict[int, _Runs] = {}
        self._verdicts: dict[tuple[int, Goal], Verdict] = {}
        self._most: int | None = None
        self._trusting = mode == "sequential"
        begin, before = time.perf_counter(), evaluator.simulated_requests
        self.lone_s = lone_time(evaluator, contender, self.seeds[0])
        self.load = settling_of(evaluator.scenario, self.lone_s)
        natural_s = evaluator.scenario.workload.natural_s
        self._length: dict[str, Any] = {
            "turns": self.load.turns, "settle_s": self.load.settle_s, "natural_s": natural_s, "definition": definition,
        }  # fmt: skip
        self.limit = self._limit()
        self.found = tuple(self._find(Goal(target)) for target in self.targets)
        #: clause (a) alone, over runs of the same length
        self.classic = tuple(self._find(Goal(target, sustained=False)) for target in classic)
        self.simulated_requests = evaluator.simulated_requests - before
        self.wall_s = time.perf_counter() - begin

    # -- runs ------------------------------------------------------------------------------------------

    def _samples(self, rate: float, seeds: Sequence[int], settings: PointSettings, who: Any = None) -> list[Sample]:
        settings = cut_short(settings, self._most)
        try:
            points = self.evaluator.points(who or self.contender, rate, seeds, settings)
        except SlalomError as error:
            if self._most is not None or not error.field.startswith("trace"):
                raise
            scenario, given = self.evaluator.scenario, self.evaluator.settings
            self._most = longest_run(scenario, rate, settings.n_requests, self.seeds, given.split, given.n_blocks)
            return self._samples(rate, seeds, settings, who)
        return [Sample(**p.metrics["sustained"]) for p in points]

    def _limit(self) -> float:
        """Where stability ends on the arrangement of this policy: as it decides, or by least predicted TTFT if that
        serves more. A policy that refuses, or lets some wait, does less work in overload than its instances could."""
        own = self.contender
        plans = bound(arranged(self.evaluator.scenario, own), own).arrangement or ()
        plain = Contender(_PLAIN, cluster=own.cluster, plans=tuple(asdict(plan) for plan in plans))
        return max(self._limit_of(contender) for contender in (own, plain))

    @property
    def stability_limit(self) -> float:
        """The limit, or what full runs have served where that is more."""
        served = ([s.served for s in runs.full] for runs in self._runs.values() if len(runs.full) == len(self.seeds))
        return max([self.limit, *(float(np.mean(found)) / self.load.turns for found in served)])

    def _limit_of(self, contender: Contender) -> float:
        """The most work that is done per second when more is sent, or under a load that is kept up with.

        Whether a run keeps up is told by what arrived in it: bursty arrivals are off their rate by some percent.
        """
        rate, kept, beyond = 2.0 * self.evaluator.scenario.reference_rate, 0.0, False
        for _ in range(16):
            sample = self._overloaded(contender, rate, *((300.0, 10.0) if beyond else (120.0, 5.0)))
            served = sample.served / self.load.turns
            if sample.served >= _SATURATED * sample.offered:
                kept, rate = max(kept, served), rate * (1.25 if beyond else 2.0)
            elif beyond:
                break
            else:
                beyond, rate = True, 1.25 * max(kept, served)
        return max(kept, served)

    def _overloaded(self, contender: Contender, rate: float, seconds: float, lone_times: float) -> Sample:
        seconds = max(seconds, lone_times * self.lone_s, LASTS * self.load.settle_s)
        n = max(math.ceil(rate * self.load.turns * seconds), 2_000)
        settings = replace(self.evaluator.settings, n_requests=n, warmup=1 / 3, drain=0.0, detailed=False)
        if self.load.settle_s:
            check_settles(self.load.settle_s, n)
            settings = replace(settings, warmup=WARM, sessions="stream")
        return self._samples(rate, self.seeds[:1], settings, contender)[0]

    # -- one rate --------------------------------------------------------------------------------------

    def _index(self, rate: float) -> int:
        return math.floor(math.log(rate) / self._step)

    def rate_of(self, index: int) -> float:
        """Requests per second at a place of the grid."""
        return float(np.round(math.exp(index * self._step), 9))

    def verdict(self, index: int, goal: Goal, final: bool = False) -> Verdict:
        """Whether the rate at ``index`` is held; ``final``: by all full runs unless it fails before."""
        rate, runs = self.rate_of(index), self._runs.setdefault(index, _Runs())
        while (known := self._known(runs, goal, final)) is None:
            settings = partial(run_settings, self.evaluator.settings, rate, self.lone_s, **self._length)
            if self.mode == "sequential" and runs.short is None and not self.load.settle_s:
                runs.short = self._samples(rate, self.seeds[:1], settings(part=SHORT))[0]
            else:
                begun = len(runs.full)
                until = 1 if self.mode == "sequential" and not begun else len(self.seeds)
                runs.full += self._samples(rate, self.seeds[begun:until], settings())
        self._verdicts[index, goal] = known
        return known

    def _known(self, runs: _Runs, goal: Goal, final: bool) -> Verdict | None:
        """What the runs so far decide; None: more are needed."""
        if len(runs.full) == len(self.seeds):
            return self._judge(runs.full, goal)
        floor = goal.target - self.definition.slack if goal.sustained else None
        looks = ((runs.full[:1], 10, 0.005), ([runs.short] if runs.short else [], 5, 0.005))
        for samples, batches, level in looks if self.mode == "sequential" else ():
            if not samples:
                continue
            verdict = self._judge(samples, goal, early=True)
            if hopeless(verdict, samples[0], batches, level, floor):
                return verdict
            if self._trusting and not final and easy(verdict, samples[0], batches, level, floor):
                return verdict
        return None

    def _judge(self, samples: Sequence[Sample], goal: Goal, early: bool = False) -> Verdict:
        verdict = judge(
            samples, goal.target, tail_factor=self._tail, limit=self.limit * self.load.turns, lone_s=self.lone_s,
            definition=self.definition, early=early,
        )  # fmt: skip
        return verdict if goal.sustained else replace(verdict, clauses=verdict.clauses[:1])

    # -- all targets -----------------------------------------------------------------------------------

    def _find(self, goal: Goal) -> Found:
        """The largest rate on the grid that is held and whose neighbour above fails, as far as was asked."""
        for index in sorted(self._runs):  # what was asked for another target often decides this one
            known = self._known(self._runs[index], goal, False)
            if known is not None:
                self._verdicts[index, goal] = known
        misses = 0
        self._trusting = self.mode == "sequential"
        while True:
            held, lost = (
                [k for (k, g), v in self._verdicts.items() if g == goal and v.met == wanted] for wanted in (True, False)
            )
            low = max(held, default=None)
            high = min((k for k in lost if low is None or k > low), default=None)
            if low is None and high is None:
                self.verdict(self._index(self._first()), goal)
            elif low is None:
                assert high is not None
                if self.rate_of(high) < _LOWEST * self.limit:
                    return Found(goal.target, 0.0, None, self._verdicts[high, goal])
                self.verdict(high + round(math.log(_DOWN[min(misses, len(_DOWN) - 1)]) / self._step), goal)
                misses += 1
            elif high is None or high - low > 1:
                self.verdict(self._between(low, high, goal), goal)
            elif self.verdict(low, goal, final=True).met:
                if (beyond := self._beyond(high, goal)) is not None:
                    self.verdict(beyond, goal, final=True)
                    continue
                return Found(goal.target, self.rate_of(low), self._verdicts[low, goal], self._verdicts[high, goal])
            else:  # one run had passed what all runs fail: rates below are not taken for held on such a word again
                self._trusting = False
                self._verdicts = {at: v for at, v in self._verdicts.items() if not (v.met and v.early)}

    def _beyond(self, high: int, goal: Goal) -> int | None:
        """A rate above the failing ``high`` that has to be asked as well; None: there is none.

        Attainment falls as the rate rises; a single wait may fail a rate and none above it. So that the answer does
        not depend on where the search came from, ``_ABOVE`` in a row must fail above it, or one by more than a wait.
        """
        for index in range(high, high + _ABOVE):
            known = self._verdicts.get((index, goal))
            if known is None:
                return index
            if any(clause.letter != "b" for clause in known.clauses if not clause.met):
                return None
        return None

    def _first(self) -> float:
        """The first rate asked; a plain bisection knows no more than the scenario's bracket."""
        if self.mode == "plain":
            return float(self.evaluator.scenario.rates.low)
        return max(_FIRST * self.limit, math.exp(self._step * -2_000))

    def _between(self, low: int, high: int | None, goal: Goal) -> int:
        """The next place to ask: the middle, or where the margins of both ends say that the answer lies."""
        if high is None and self.mode == "plain":
            return max(self._index(self.evaluator.scenario.rates.high), low + 1)
        if high is None:
            return low + max(1, round(math.log(_UP) / self._step))
        middle = (low + high) // 2
        if self.mode == "plain":
            return middle
        over, under = (margin(self._verdicts[k, goal]) for k in (low, high))
        if over is None or under is None or over - under < 1e-9:
            return middle
        guess = low + (high - low) * over / (over - under)
        return min(max(round(guess), low + 1), high - 1)

    def by_seed(self, target: float, rate: float) -> list[float]:
        """The sustained goodput of each seed alone: what the interval of the common one rests on.

        Every seed's run is as long as the definition asks.

        :param rate: the answer of all seeds together, where the search starts
        """
        return [self._of_seed(place, target, self._nearest(rate)) for place in range(len(self.seeds))]

    def _of_seed(self, place: int, target: float, start: int) -> float:
        known: dict[int, bool] = {}

        def held(index: int) -> bool:
            if index not in known:
                full = self._runs[index].full[place : place + 1] if index in self._runs else []
                if not full:
                    rate = self.rate_of(index)
                    given = run_settings(self.evaluator.settings, rate, self.lone_s, **self._length)
                    full = self._samples(rate, self.seeds[place : place + 1], given)
                known[index] = self._judge(full, Goal(target)).met
            return known[index]

        step, at, upwards = 1, start, held(start)
        while held(at) == upwards and step < 256:
            step, at = 2 * step, at + (step if upwards else -step)
        low = max((k for k, v in known.items() if v), default=None)
        high = min((k for k, v in known.items() if not v), default=None)
        if low is None or high is None:
            return self.rate_of(low) if low is not None else 0.0
        return self.rate_of(low + bisect_left(range(low + 1, high), True, key=lambda index: not held(index)))

    # -- the whole -------------------------------------------------------------------------------------

    def samples_at(self, rate: float) -> list[Sample]:
        """The full runs of a rate that was answered."""
        return self._runs[self._nearest(rate)].full

    def _nearest(self, rate: float) -> int:
        return round(math.log(rate) / self._step)

    def _unsteady(self) -> list[str]:
        """What keeps the runs of the answers from being a steady state, in sentences."""
        if not self.load.settle_s:
            return []
        told = []
        for rate in (f.rate for f in self.found if f.rate):
            asked = run_settings(self.evaluator.settings, rate, self.lone_s, **self._length)
            played = cut_short(asked, self._most)
            lasts_s = played.n_requests / (rate * self.load.turns)
            told += unsteady(self.samples_at(rate), lasts_s, played.warmup * lasts_s, self.load.settle_s)
        return told

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; targets as keys, e.g. ``0.9``."""
        n_gpus = arranged(self.evaluator.scenario, self.contender).n_gpus()
        entries, classic = (
            {
                f"{f.target:g}": f.as_dict()
                | {"per_gpu": f.rate / n_gpus, "at": worst_of(self.samples_at(f.rate)) if f.rate else None}
                for f in found
            }
            for found in (self.found, self.classic)
        )
        missing = (m for f in self.found for v in (f.verdict, f.above) if v for m in v.missing)
        return {
            "goodput": entries,
            "classic": classic,
            "stability_limit": self.stability_limit,
            "lone_p90_s": self.lone_s,
            "turns": self.load.turns,
            "settle_s": self.load.settle_s,
            "natural_s": self._length["natural_s"],
            "tail_factor": self._tail,
            "warmup_s": max(self.definition.warmup(self.lone_s), self.load.settle_s),
            "missing": list(dict.fromkeys([*self._unsteady(), *missing])),
            "simulated_requests": self.simulated_requests,
            "seconds": self.wall_s,
        }

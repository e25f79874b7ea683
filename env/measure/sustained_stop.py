"""When one run is enough for a verdict, how far a verdict lies from turning, and what stops short of a steady state.

Attainment is judged by Student's t over batches of consecutive arrivals, long enough to be nearly independent. Classes
and lengths are judged by the standard error of a share; since late requests come in clumps, six of them are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import t as student

from env.measure.contender import PointSettings
from env.measure.sustained import Sample, Verdict

_FAR = 6.0
_STEADY = 0.9  # of the requests that sessions bring in the long run: fewer, and the runs are no steady state
_WARM = 0.8  # of a run that is too short for sessions to settle: left out, not more, so that something is measured
_BLOCKS = 20  # of a sample


def hopeless(verdict: Verdict, sample: Sample, batches: int, level: float, floor: float | None) -> bool:
    """Whether one run is enough to fail the rate.

    :param batches: into which the run is cut; a divisor of 20
    :param level: of the t-test
    :param floor: what classes and lengths must reach; None: they do not count
    """
    if any(clause.letter == "b" and not clause.met for clause in verdict.clauses):
        return True
    if distance(sample, verdict.target, batches) < student.ppf(level, batches - 1):
        return True
    return floor is not None and _of_groups(sample, floor) < -_FAR


def easy(verdict: Verdict, sample: Sample, batches: int, level: float, floor: float | None) -> bool:
    """Whether one run is enough to take the rate for held while the bracket is wide."""
    if not verdict.met or distance(sample, verdict.target, batches) <= student.ppf(1.0 - level, batches - 1):
        return False
    return floor is None or (_far_inside(verdict) and _of_groups(sample, floor) > _FAR)


def _far_inside(verdict: Verdict) -> bool:
    """At most a third of the wait allowed and three quarters of the stability limit."""
    wait = next(c for c in verdict.clauses if c.letter == "b" and c.bound > 0)
    rate = next(c for c in verdict.clauses if "stability" in c.name)
    return wait.value <= wait.bound / 3.0 and rate.value <= 0.75 * rate.bound


def distance(sample: Sample, target: float, batches: int) -> float:
    """Student's t of the attainment of ``batches`` runs of consecutive arrivals against ``target``."""
    cuts = np.arange(0, _BLOCKS, _BLOCKS // batches)
    good, sent = (np.add.reduceat(np.array(x), cuts) for x in (sample.block_good, sample.block_sent))
    share = good / np.maximum(sent, 1)
    error = share.std(ddof=1) / math.sqrt(batches)
    gap = float(share.mean()) - target
    if error > 1e-9:
        return gap / float(error)
    return math.copysign(math.inf, gap) if gap else 0.0


def _of_groups(sample: Sample, floor: float) -> float:
    """The class or length that is worst off, against what it must reach, in standard errors of its share."""
    counts = [*sample.classes.values(), *sample.lengths]
    gaps = [(good / n - floor) / math.sqrt(max(good / n * (1 - good / n), 1.0 / n) / n) for good, n in counts if n]
    return min(gaps)


def margin(verdict: Verdict) -> float | None:
    """By how much the attainment that is worst off passes or misses; None where another clause fails."""
    margins = []
    for clause in verdict.clauses:
        if clause.letter in "ad":
            margins.append(clause.value - clause.bound)
        elif not clause.met:
            return None
    return min(margins)


def cut_short(settings: PointSettings, most: int | None) -> PointSettings:
    """Settings of a run that the workload can give; a recorded trace ends.

    Of sessions the warm-up stays as long as it was, if that leaves a fifth of the run to be measured: the load has to
    settle. Of open-loop requests it keeps its share.

    :param most: requests there are; None: enough
    """
    if most is None or settings.n_requests <= most:
        return settings
    warmup = settings.warmup
    if settings.sessions == "settled":
        warmup = min(warmup * settings.n_requests / most, max(_WARM, warmup))
    return replace(settings, n_requests=most, warmup=warmup)


def unsteady(samples: Sequence[Sample], lasts_s: float, warm_s: float, settle_s: float) -> list[str]:
    """What keeps runs with sessions from being a steady state, in sentences.

    :param samples: runs of one rate, of ``lasts_s`` seconds with a warm-up of ``warm_s``
    :param settle_s: after which the load has settled
    """
    told = []
    if warm_s < 0.99 * settle_s:
        told.append(
            f"the load of the sessions settles after {settle_s / 60:.3g} minutes, and the trace ends after "
            f"{lasts_s / 60:.3g}: from {warm_s / 60:.3g} minutes on was measured, under a load that still rose"
        )
    came, due = (float(np.mean([getattr(s, key) for s in samples])) for key in ("offered", "due"))
    if came < _STEADY * due:
        told.append(f"sessions outlast the runs: {came:.3g} requests/s came, not {due:.3g} as in the long run")
    return told

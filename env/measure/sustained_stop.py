"""When one run is enough for a verdict, and how far a verdict lies from turning: the stops of the sustained search.

Attainment is judged by Student's t over batches of consecutive arrivals, long enough to be nearly independent. Classes
and lengths are judged by the standard error of a share; since late requests come in clumps, six of them are asked for.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import t as student

from env.measure.sustained import Sample, Verdict

_FAR = 6.0
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

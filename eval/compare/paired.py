"""Paired comparison of policies: same arrivals, same seeds, bootstrap 95 % intervals over seeds and blocks.

Every contender answers the same (rate, seed) pairs, or runs its own goodput search with the same seeds. The
bootstrap draws seeds and blocks of consecutive arrivals once and applies the draw to all contenders, so
differences and ratios are intervals of *pairs*. Points are kept by the evaluator; nothing here is random
beyond the bootstrap's own seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import SlalomError
from env.measure.contender import Contender, Point, PointSettings
from env.measure.digest import policy_sha256
from env.measure.evaluator import Evaluator
from env.measure.goodput import TARGETS, find_goodput, goodput_of_curve
from env.measure.stats import antitonic, bootstrap_attainment, bootstrap_weights, crossing, interval, stratified_iqm
from eval.compare.result import Comparison

Floats = NDArray[np.float64]
_POOLED = ("p90_ttft_ms", "p99_ttft_ms", "p90_tpot_ms", "p99_tpot_ms", "p90_itl_ms", "p99_itl_ms", "p90_e2el_ms")
_MEANS = ("request_goodput", "goodput_per_gpu", "token_goodput", "output_throughput", "prefix_hit_rate")
_COUNTS = ("shed", "failed", "unfinished", "preemptions", "migrations", "role_switches")


@dataclass
class Curve:
    """All points of one contender: rate -> one point per seed, in the order of the seeds."""

    contender: Contender
    points: dict[float, list[Point]] = field(default_factory=dict)
    meeting: dict[float, list[Point]] = field(default_factory=dict)  # longer runs, shown but not part of the curve

    @property
    def rates(self) -> list[float]:
        return sorted(self.points)

    def counts(self, rates: Sequence[float]) -> tuple[Floats, Floats]:
        """(good, sent) requests, each (K rates, S seeds, B blocks)."""
        good = np.array([[p.good for p in self.points[r]] for r in rates], dtype=np.float64)
        sent = np.array([[p.sent for p in self.points[r]] for r in rates], dtype=np.float64)
        return good, sent

    def attainment(self, rates: Sequence[float]) -> Floats:
        """(K,) attainment over the requests of all seeds."""
        good, sent = self.counts(rates)
        return good.sum(axis=(1, 2)) / np.maximum(sent.sum(axis=(1, 2)), 1.0)


def compare(
    evaluator: Evaluator,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    *,
    rates: Sequence[float] | None = None,
    start: float = 1.0,
    targets: Sequence[float] = TARGETS,
    tolerance: float = 0.01,
    resamples: int = 2000,
    on_policy: Callable[[str], None] | None = None,
    parallel: int = 1,
    meetings: Mapping[float, PointSettings] | None = None,
) -> Comparison:
    """Measure every contender and compare each with each.

    :param rates: requests per second asked of all contenders; None searches each one's goodput
    :param start: first rate of the search
    :param resamples: bootstrap resamples
    :param on_policy: called with a contender's name before its points
    :param parallel: contenders measured at the same time, for evaluators whose points run elsewhere
    :param meetings: rates at which all are put side by side after a search, and runs to do it with, instead of the
        rates that this search finds best
    :raises SlalomError: no contender, names not unique, or whatever the evaluator raises
    """
    labels = [c.name for c in contenders]
    if not contenders or len(set(labels)) != len(labels):
        raise SlalomError("policies", labels, "name at least one policy, each with its own label")
    if not seeds or len(set(seeds)) != len(seeds):
        raise SlalomError("seeds", list(seeds), "give at least one seed, each once")

    def curve(contender: Contender) -> Curve:
        if on_policy is not None:
            on_policy(contender.name)
        return _curve(evaluator, contender, seeds, rates, start, targets, tolerance)

    if parallel > 1:
        with ThreadPoolExecutor(parallel) as threads:
            curves = list(threads.map(curve, contenders))
    else:
        curves = [curve(contender) for contender in contenders]
    common: list[float] = []
    if rates is None and meetings is not None:
        common = sorted(meetings, reverse=True)
        for rate, found in product(common, curves):
            found.meeting[rate] = evaluator.points(found.contender, rate, seeds, meetings[rate])
    elif rates is None:
        common = sorted({rate for found in curves if (rate := _goodput(found, targets[0])) > 0.0}, reverse=True)[:2]
        for rate, found in product(common, curves):
            if rate not in found.points:
                found.points[rate] = evaluator.points(found.contender, rate, seeds)
    weights = bootstrap_weights(len(seeds), evaluator.settings.n_blocks, resamples, seed=0)
    resampled = [_Resampled(found, weights, targets) for found in curves]
    return Comparison.from_json({
        "mode": "goodput" if rates is None else "rates",
        "targets": list(targets),
        "at_rate": common[0] if common else None,
        "second_rate": common[1] if len(common) > 1 else None,
        "simulated_requests": evaluator.simulated_requests,
        "policies": [r.as_dict(rates) for r in resampled],
        "pairs": [_pair(a, b, rates) for a, b in combinations(resampled, 2)],
    })  # fmt: skip


def _curve(
    evaluator: Evaluator,
    contender: Contender,
    seeds: Sequence[int],
    rates: Sequence[float] | None,
    start: float,
    targets: Sequence[float],
    tolerance: float,
) -> Curve:
    curve = Curve(contender)

    def attainment(rate: float) -> float:
        curve.points[rate] = evaluator.points(contender, rate, seeds)
        return float(curve.attainment([rate])[0])

    if rates is None:
        find_goodput(attainment, start, targets=targets, tolerance=tolerance)
    else:
        for rate in sorted(set(rates)):
            attainment(rate)
    return curve


def _goodput(curve: Curve, target: float) -> float:
    return goodput_of_curve(curve.rates, curve.attainment(curve.rates).tolist(), target).rate


class _Resampled:
    """A curve with its bootstrap: attainment (R, K) and goodput (R,) per target, on the common draw."""

    def __init__(self, curve: Curve, weights: Floats, targets: Sequence[float]) -> None:
        self.curve, self.rates, self._weights = curve, curve.rates, weights
        good, sent = curve.counts(self.rates)
        self.measured = curve.attainment(self.rates)
        self.samples = bootstrap_attainment(good, sent, weights)
        smooth = antitonic(self.samples)
        self.goodput = {t: goodput_of_curve(self.rates, self.measured.tolist(), t) for t in targets}
        self.goodput_samples = {t: crossing(self.rates, smooth, t) for t in targets}

    def column(self, rate: float) -> int:
        return self.rates.index(rate)

    def as_dict(self, rates: Sequence[float] | None) -> dict[str, Any]:
        contender = self.curve.contender
        n_gpus = self.curve.points[self.rates[0]][0].metrics["n_gpus"]
        goodput = {}
        for target, found in self.goodput.items():
            low, high = interval(self.goodput_samples[target])
            goodput[f"{target:g}"] = {
                "rate": found.rate,
                "low": low,
                "high": high,
                "per_gpu": found.rate / n_gpus,
                "bracket": [found.low, found.high],
                "bracketed": found.low > 0.0 and found.high is not None,
            }
        summary: dict[str, Any] = {
            "label": contender.name,
            "policy_id": contender.policy,
            "policy_sha256": policy_sha256(contender),
            "values": dict(contender.values),
            "tuned": contender.tuned,
            "cluster": [dict(group) for group in contender.cluster],
            "plans": [dict(plan) for plan in contender.plans],
            "goodput": goodput,
            "points": self._points(),
        }
        if rates is not None:
            runs = [[p.attainment for p in self.curve.points[r]] for r in self.rates]
            value, low, high = stratified_iqm(runs)
            summary["iqm_attainment"] = {"value": value, "low": low, "high": high}
        return summary

    def _points(self) -> list[dict[str, Any]]:
        """Every rate of the curve, and those where all policies meet in longer runs, in ascending order."""
        shown = [self._point(rate, self.curve.points[rate], k) for k, rate in enumerate(self.rates)]
        if self.curve.meeting:
            shown = [point for point in shown if point["rate"] not in self.curve.meeting]
            beside = _Resampled(Curve(self.curve.contender, self.curve.meeting), self._weights, ())
            shown += [beside._point(rate, self.curve.meeting[rate], k) for k, rate in enumerate(beside.rates)]
        return sorted(shown, key=lambda point: float(point["rate"]))

    def _point(self, rate: float, points: Sequence[Point], k: int) -> dict[str, Any]:
        runs = [p.metrics for p in points]
        low, high = interval(self.samples[:, k])
        return {
            "rate": rate,
            "slo_attainment": float(self.measured[k]),
            "low": low,
            "high": high,
            "slo_attainment_by_metric": _mean_tables([m["slo_attainment_by_metric"] for m in runs]),
            "slo_attainment_by_class": _mean_classes([m["slo_attainment_by_class"] for m in runs]),
            **{name: _mean([m[name] for m in runs]) for name in (*_POOLED, *_MEANS)},
            **{f"{name}_range": _range([m[name] for m in runs]) for name in _POOLED},
            **{name: sum(m[name] for m in runs) for name in _COUNTS},
            "worst_wait_s": max((m["worst_wait_s"] for m in runs if m["worst_wait_s"] is not None), default=None),
            "runs": runs,
        }


def _pair(a: _Resampled, b: _Resampled, rates: Sequence[float] | None) -> dict[str, Any]:
    """How ``a`` stands to ``b``: goodput ratio a ÷ b, attainment difference a − b at each common rate."""
    goodput = {}
    for target in a.goodput:
        ours, theirs = a.goodput_samples[target], b.goodput_samples[target]
        goodput[f"{target:g}"] = {
            "ratio": _ratio(a.goodput[target].rate, b.goodput[target].rate, ours, theirs),
            "difference": _difference(a.goodput[target].rate - b.goodput[target].rate, ours - theirs),
        }
    common = sorted(set(a.rates) & set(b.rates))
    left, right = [a.column(r) for r in common], [b.column(r) for r in common]
    gap = a.measured[left] - b.measured[right]
    samples = a.samples[:, left] - b.samples[:, right]
    result: dict[str, Any] = {
        "a": a.curve.contender.name,
        "b": b.curve.contender.name,
        "goodput": goodput,
        "attainment": [{"rate": rate, **_difference(float(gap[k]), samples[:, k])} for k, rate in enumerate(common)],
    }
    if rates is not None:
        result["mean_attainment"] = _difference(float(gap.mean()), samples.mean(axis=1))
    return result


def _difference(value: float, samples: Floats) -> dict[str, float]:
    low, high = interval(samples)
    better = float((samples > 0).mean() + 0.5 * (samples == 0).mean())
    return {"value": float(value), "low": low, "high": high, "p_better": better}


def _ratio(ours: float, theirs: float, a: Floats, b: Floats) -> dict[str, float | None]:
    """Ratio with its interval; None where the rival's goodput is 0 and the ratio has no value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = np.where(b > 0, a / b, np.where(a > 0, np.inf, 1.0))
    low, high = interval(samples)
    return {
        "value": ours / theirs if theirs > 0 else None,
        "low": low if np.isfinite(low) else None,
        "high": high if np.isfinite(high) else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _range(values: Sequence[float | None]) -> list[float] | None:
    known = [v for v in values if v is not None]
    return [min(known), max(known)] if known else None


def _mean_tables(tables: Sequence[dict[str, float]]) -> dict[str, float | None]:
    return {key: _mean([t.get(key) for t in tables]) for key in dict.fromkeys(k for t in tables for k in t)}


def _mean_classes(tables: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: _mean_tables([t[name] for t in tables if name in t]) for name in names}

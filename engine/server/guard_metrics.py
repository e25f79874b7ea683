"""The guard's numbers for Prometheus, read from its report when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from engine.live.guard import GuardReport

_MODES = ("active", "advisory", "frozen")


def guard_metrics(report: GuardReport) -> Iterator[Metric]:
    """Every family; the names are those of ``docs/serving.md``."""
    decisions = CounterMetricFamily("slalom:policy_answers", "Decisions by what answered them.", labels=["reason"])
    for reason, count in report.reasons.items():
        decisions.add_metric([reason], count)
    yield decisions
    yield _latency(report)
    breaker = GaugeMetricFamily("slalom:policy_breaker_state", "0 closed, 1 half-open, 2 open.")
    breaker.add_metric([], report.breaker_code)
    yield breaker
    yield _counter("slalom:policy_breaker_trips", "Times the circuit breaker opened.", report.breaker_trips)
    yield _counter("slalom:policy_swaps", "Policies taken over while serving.", report.generation)
    yield _counter("slalom:policy_advised", "Answers that were only advice.", report.advised)
    yield _counter("slalom:policy_advised_agreed", "... and equal to what was done.", report.agreed)
    mode = GaugeMetricFamily("slalom:policy_mode", "1 for the mode in force.", labels=["mode"])
    for name in _MODES:
        mode.add_metric([name], float(name == report.mode))
    yield mode
    yield from _drift(report)
    yield from _roles(report)
    if report.records_written is not None and report.records_dropped is not None:
        records = CounterMetricFamily("slalom:decision_log_records", "Records of the log.", labels=["result"])
        records.add_metric(["written"], report.records_written)
        records.add_metric(["dropped"], report.records_dropped)
        yield records


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _latency(report: GuardReport) -> Metric:
    below = np.cumsum(report.latency_counts).tolist()
    edges = [*map(str, report.latency_edges_s), "+Inf"]
    family = HistogramMetricFamily("slalom:policy_decision_seconds", "Time of a decision, guard included.")
    family.add_metric([], [(edge, float(n)) for edge, n in zip(edges, below, strict=True)], report.latency_sum_s)
    return family


def _drift(report: GuardReport) -> Iterator[Metric]:
    ratio = GaugeMetricFamily("slalom:drift_ratio", "Typical actual over predicted.", labels=["metric"])
    alarm = GaugeMetricFamily("slalom:drift_alarm", "1 while they have parted.", labels=["metric"])
    for drift in report.drift:
        if drift.requests:  # before that nothing is known
            ratio.add_metric([drift.metric], drift.ratio)
        alarm.add_metric([drift.metric], float(drift.alarm))
    yield from (ratio, alarm)


def _roles(report: GuardReport) -> Iterator[Metric]:
    changes = CounterMetricFamily(
        "slalom:policy_role_changes", "Role changes that a policy asked for.", labels=["from", "to", "result"]
    )
    for labels, count in report.role_results.items():
        changes.add_metric(list(labels), count)
    halted = GaugeMetricFamily("slalom:role_changes_halted", "1 after a change that could not be verified.")
    halted.add_metric([], float(report.role_changes_halted))
    drain = _counter("slalom:role_switch_drain_seconds", "Seconds that verified changes took.", report.role_drain_s)
    yield from (changes, halted, drain)

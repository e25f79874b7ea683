"""The engines of a router for Prometheus: who is up, who was ejected, and whether their count agrees with ours."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.remote.router import Router


class EngineMetrics(Collector):
    """Reads a router's report when somebody scrapes."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def describe(self) -> list[Metric]:
        """Nothing to check at registration (part of the collector's contract)."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family; the names are those of ``docs/serving.md``."""
        labels = ["engine", "url"]
        up = GaugeMetricFamily("slalom:engine_up", "1 while the engine is given requests.", labels=labels)
        at = GaugeMetricFamily("slalom:engine_requests", "Requests at the engine, by our count.", labels=labels)
        said = GaugeMetricFamily("slalom:engine_reported_requests", "... by its own count.", labels=labels)
        apart = GaugeMetricFamily("slalom:engine_disagreement", "Its count minus ours.", labels=labels)
        ejected = CounterMetricFamily("slalom:engine_ejections", "Times it was ejected.", labels=labels)
        refused = CounterMetricFamily("slalom:engine_refusals", "Requests that it refused (429, 503).", labels=labels)
        for i, engine in enumerate(self._router.fleet.report()):
            who = [str(i), engine.url]
            up.add_metric(who, float(engine.up))
            at.add_metric(who, engine.requests)
            if engine.reported is not None and engine.disagreement is not None:
                said.add_metric(who, engine.reported)
                apart.add_metric(who, engine.disagreement)
            ejected.add_metric(who, engine.ejections)
            refused.add_metric(who, engine.refusals)
        retried = CounterMetricFamily("slalom:retries", "Requests that were tried again elsewhere.", labels=["reason"])
        for reason, count in list(self._router.instances.retried.items()):
            retried.add_metric([reason], count)
        yield from (up, at, said, apart, ejected, refused, retried)

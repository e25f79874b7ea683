"""Prometheus metrics: the engine's in vLLM's names, so that dashboards and autoscalers work; ours as ``slalom:``.

Gauges and counters are read from the cluster's records when somebody scrapes, so serving pays nothing for them. What is
of one request is booked when it happens: its prompt and waits at its first token, the rest at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from engine.core.kinds import RequestState, Role
from engine.core.lists import HANDOVER, HELD, PLACING, queue_of
from engine.core.slo import itl_edges_s
from engine.kernels import compilations
from engine.latency.evaluate import TICKS_PER_S
from engine.live.door import TurnedAway
from engine.live.fate import DRAINING, OVERLOADED, UNAVAILABLE, Fate
from engine.live.observer import Observer
from engine.live.request import ABORT, ERROR, SHED, UNPLACEABLE, Ticket
from engine.live.scheduler import Scheduler
from engine.model.stopping import Finish
from engine.server.guard_metrics import guard_metrics
from engine.server.view import STATES, Attainment, sm_shares, state_of

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_E2E = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics(Observer):
    """The registry of one server.

    :param model: value of the label ``model_name``
    :param classes: names of the SLO classes
    """

    def __init__(self, engine: Scheduler, model: str, classes: Sequence[str]) -> None:
        self._engine, self._model = engine, model
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.met = Attainment(classes)
        self._compiled = compilations.count()  # in the warm-up
        self._ends = dict.fromkeys((*map(str, Finish), ABORT, ERROR, SHED, UNPLACEABLE), 0)
        self._refused = {(name, reason): 0 for name in classes for reason in (OVERLOADED, DRAINING, UNAVAILABLE)}
        self._prompt_tokens = self._tokens = 0
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", _TTFT)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token of a request.", _ITL
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Request latency.", _E2E)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to first step.", _E2E)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "First step to first token.", _E2E)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", _E2E)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Generated tokens.", _TOKENS)
        engine.observers.append(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        family = Histogram(name, text, ["model_name", "engine"], buckets=buckets, registry=self.registry)
        return family.labels(self._model, "0")

    def request_begun(self, request: Ticket, record: np.void) -> None:
        """See :class:`engine.live.observer.Observer`."""
        arrival, first, started = (int(record[name]) for name in ("arrival", "first_token", "prefill_start"))
        self._prompt_tokens += request.n_prompt
        self._prompt.observe(request.n_prompt)
        self._ttft.observe((first - arrival) / TICKS_PER_S)
        self._queue.observe((started - arrival) / TICKS_PER_S)
        self._prefill.observe((first - started) / TICKS_PER_S)

    def request_ended(self, request: Ticket, record: np.void, finish: str, fate: Fate) -> None:
        """See :class:`engine.live.observer.Observer`. What was cut off has a length, but no latency of an answer."""
        reason = finish or request.finish or str(Finish.LENGTH)
        self._ends[reason] = self._ends.get(reason, 0) + 1
        self.met.observe(int(record["cls"]), fate)
        generated = int(record["generated"])
        if generated > 0:
            self._generated.observe(generated)
        if record["state"] != RequestState.FINISHED:
            return
        arrival, first, last = int(record["arrival"]), int(record["first_token"]), int(record["last_token"])
        if generated > 1:
            self._tpot.observe((last - first) / TICKS_PER_S / (generated - 1))
        self._e2e.observe((int(record["finished"]) - arrival) / TICKS_PER_S)
        self._decode.observe((last - first) / TICKS_PER_S)

    def request_refused(self, away: TurnedAway, fate: Fate) -> None:
        """See :class:`engine.live.observer.Observer`."""
        key = (self.met.classes[away.cls], away.reason)
        self._refused[key] = self._refused.get(key, 0) + 1
        self.met.observe_refused(away.cls, fate)

    def describe(self) -> list[Metric]:
        """Nothing to check at registration (part of the collector's contract)."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What the cluster's records say now. They are read while the engine runs: each number is right by itself."""
        yield from self._totals()
        yield from self._instances()
        yield self._token_gaps()
        yield from self._policy()

    def _total(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", "engine"])
        family.add_metric([self._model, "0"], value)
        return family

    def _totals(self) -> Iterator[Metric]:
        cluster = self._engine.state.cluster[0]
        yield self._total("vllm:prompt_tokens", "Prompt tokens of requests with a first token.", self._prompt_tokens)
        self._tokens = max(self._tokens, int(cluster["tokens_out"]))  # nobody got some: a counter never falls
        yield self._total("vllm:generation_tokens", "Generated tokens.", self._tokens)
        yield self._total("vllm:num_preemptions", "Preempted requests.", float(cluster["n_preempted"]))
        yield self._total("vllm:prefix_cache_queries", "Prompt tokens looked up.", float(cluster["looked_up_tokens"]))
        yield self._total("vllm:prefix_cache_hits", "Prompt tokens found.", float(cluster["cached_tokens"]))
        ends = CounterMetricFamily(
            "vllm:request_success", "Ended requests.", labels=["model_name", "engine", "finished_reason"]
        )
        for reason, count in list(self._ends.items()):
            ends.add_metric([self._model, "0", reason], count)
        yield ends
        refused = CounterMetricFamily("slalom:requests_refused", "Requests not taken in.", labels=["class", "reason"])
        for labels, count in list(self._refused.items()):
            refused.add_metric(list(labels), count)
        yield refused
        accepting = GaugeMetricFamily("slalom:accepting_requests", "1 while new requests are taken.")
        accepting.add_metric([], float(self._engine.accepting))
        yield accepting
        yield self._total("slalom:migrations", "KV transfers.", float(cluster["n_migrated"]))
        yield self._total("slalom:migrated_tokens", "Tokens whose KV moved.", float(cluster["migrated_tokens"]))
        failures = self._engine.instances.transfer_failures
        yield self._total("slalom:migration_failures", "KV transfers that failed.", failures)
        yield self._total("slalom:role_switches", "Role changes done.", float(cluster["n_switches"]))
        late = compilations.count() - self._compiled
        graphless = CounterMetricFamily("slalom:steps_without_graph", "Steps launched one by one.", labels=["reason"])
        for reason, count in self._engine.instances.without_graph().items():
            graphless.add_metric([reason], count)
        yield graphless
        yield self._total("slalom:kernel_compilations", "Triton kernels compiled since serving began.", late)
        yield self._attainment()

    def _attainment(self) -> Metric:
        """Per class: both targets, and each by itself. A class of which nothing ended has none."""
        family = GaugeMetricFamily(
            "slalom:slo_attainment_ratio", "Share of requests that met their target.", labels=["class", "metric"]
        )
        for c in range(len(self._engine.state.cls)):
            for metric, share in self.met.total(c).items():
                family.add_metric([self.met.classes[c], metric], share)
        return family

    def _instances(self) -> Iterator[Metric]:
        """Per instance, label ``engine`` its index; what waits for a decision counts to instance 0."""
        state = self._engine.state
        labels = ["model_name", "engine"]
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests in decode.", labels=labels)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests before their first token.", labels=labels)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Referenced KV blocks, 0 to 1.", labels=labels)
        states = GaugeMetricFamily("slalom:instance_state", "1 for the state it is in.", labels=["instance", "state"])
        role = GaugeMetricFamily("slalom:instance_role", "1 for the role in force.", labels=["instance", "role"])
        share = GaugeMetricFamily("slalom:sm_share", "Share of SMs for decode beside prefill.", labels=["instance"])
        blocks = InfoMetricFamily("vllm:cache_config", "KV blocks.", labels=labels)
        undecided = int(state.lists[[PLACING, HANDOVER, HELD], 2].sum())
        for i, instance in enumerate(state.inst):
            pool, who = state.pool[instance["pool"]], [self._model, str(i)]
            running.add_metric(who, float(instance["run_n"]))
            waiting.add_metric(who, float(state.lists[queue_of(i), 2]) + (undecided if i == 0 else 0))
            usage.add_metric(who, 1.0 - float(pool["free"]) / float(pool["n_blocks"]))
            now = state_of(state, i)
            for name in STATES:
                states.add_metric([str(i), name], float(name == now))
            for r in Role:  # a lost one has none
                role.add_metric([str(i), r.name.lower()], float(instance["role"] == r and now != "lost"))
            share.add_metric([str(i)], sm_shares(state, i)[1])
            size = str(int(state.cluster[0]["block_tokens"]))
            blocks.add_metric(who, {"block_size": size, "num_gpu_blocks": str(int(pool["n_blocks"]))})
        yield from (running, waiting, usage, states, role, share, blocks)

    def _token_gaps(self) -> Metric:
        """The core counts every gap between two tokens in 2 % bins; here in vLLM's coarser ones."""
        counts, edges = self._engine.state.itl.copy(), itl_edges_s()
        below = np.concatenate([[0], np.cumsum(counts)])
        buckets = [(str(float(b)), float(below[np.searchsorted(edges, b)])) for b in _ITL]
        buckets.append(("+Inf", float(below[-1])))
        middles = 0.5 * (edges[1:] + edges[:-1])
        family = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Time between two tokens.", labels=["model_name", "engine"]
        )
        family.add_metric([self._model, "0"], buckets, float((counts * middles).sum()))
        return family

    def _policy(self) -> Iterator[Metric]:
        runtime = self._engine.runtime
        decisions = CounterMetricFamily("slalom:policy_decisions", "Decisions.", labels=["kind"])
        for kind, count in list(runtime.decisions.items()):
            decisions.add_metric([kind], count)
        fallbacks = CounterMetricFamily("slalom:policy_fallback", "Answers in its place.", labels=["reason"])
        for reason, count in list(runtime.fallbacks.items()):
            fallbacks.add_metric([reason], count)
        policy = InfoMetricFamily("slalom:policy", "The policy in force.", labels=["id"])
        policy.add_metric([runtime.policy.name], {})
        yield from (decisions, fallbacks, policy)
        if runtime.guard is not None:
            yield from guard_metrics(runtime.guard.report())

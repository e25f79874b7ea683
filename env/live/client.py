"""The client of a run in real time: sends requests at their times, whether or not others were answered."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.calibration.probe import StepTrace
from engine.core.kinds import RequestState
from engine.core.origin import STAMPS
from engine.core.setup import blank_requests
from engine.latency.evaluate import TICKS_PER_S
from engine.live.fate import Fate
from engine.live.observer import Observer
from engine.live.request import ABORT, Ticket
from engine.live.scheduler import Scheduler
from env.scenario import Scenario
from env.surrogate.arena import requests_of
from env.surrogate.simulate import RunResult, abandon
from env.workload import Trace

#: Seconds that requests still open at the last arrival are given, unless the caller says otherwise.
DRAIN_S = 60.0
_LEAD_S = 0.02
Send = Callable[[int, list[int]], Ticket]


@dataclass(frozen=True, eq=False)
class EngineRun(RunResult):
    """A run on the engine, or on engines of others.

    :param device: what it ran on, model and precision included
    :param lag_s: float64 (R,), how late the client sent each request; nan for those never sent
    :param steps: every step of every lane; none where engines of others ran them
    :param transfers: (blocks, seconds) of every KV transfer
    """

    device: str
    lag_s: np.ndarray
    steps: tuple[StepTrace, ...]
    transfers: tuple[tuple[int, float], ...]


class Client(Observer):
    """Sends the requests of a trace at their times and keeps the record of each that ended.

    :param vocabulary: prompts are made of token ids below it
    :param salt: see :func:`prompt_of`
    """

    def __init__(self, trace: Trace, vocabulary: int, salt: int = 0) -> None:
        self._trace = trace
        self.records = blank_requests(trace.n)
        self._template = requests_of(trace)
        for name in ("prompt", "output", "cls", "ttft_slo", "tpot_slo"):
            self.records[name] = self._template[name]
        self.lag_s = np.full(trace.n, np.nan)
        self._row: dict[int, int] = {}  # request number -> row
        self._turns: list[tuple[int, int]] = []  # follow-up turns by due time, ns of the clock on the wall
        self._changed = threading.Condition()
        self._open = 0
        self._prompts = [prompt_of(trace, r, vocabulary, salt) for r in range(trace.n)]

    def request_ended(self, request: Ticket, record: np.void, finish: str, fate: Fate) -> None:
        """See :class:`engine.live.observer.Observer`."""
        now = time.perf_counter_ns()
        with self._changed:
            row = self._row.pop(request.number)
            self.records[row] = record
            if finish == ABORT:
                self.records[row]["state"] = RequestState.RUNNING  # it was still open when the run ended
            elif record["state"] == RequestState.FINISHED and self._trace.next_turn[row] >= 0:
                think = int(self._trace.think_s[row] * 1e9)
                heapq.heappush(self._turns, (now + think, int(self._trace.next_turn[row])))
            self._open -= 1
            self._changed.notify()

    def send_all(self, send: Send, drain_s: float) -> None:
        """Send everything in time and wait for the answers, at most ``drain_s`` after the last arrival.

        :param send: hands in the request of a row with a prompt; its end must come to :meth:`request_ended`
        """
        begin = time.perf_counter_ns() + int(_LEAD_S * 1e9)
        roots = [(begin + int(s * 1e9), r) for r, s in enumerate(self._trace.arrival_s[: self._trace.n_roots])]
        sent, give_up = 0, roots[-1][0] + int(drain_s * 1e9)
        while True:
            with self._changed:
                due = [roots[sent]] if sent < len(roots) else []
                if self._turns:
                    due.append(self._turns[0])
                if (not due and self._open == 0) or time.perf_counter_ns() > give_up:
                    return
                when, row = min(due, default=(give_up, -1))
                wait_s = (when - time.perf_counter_ns()) * 1e-9
                if wait_s > 0:
                    self._changed.wait(min(wait_s, 0.5))
                    continue
                if self._turns and self._turns[0] == (when, row):
                    heapq.heappop(self._turns)
                else:
                    sent += 1
            self._send(send, row, when)

    def sealed(self, zero: int) -> np.ndarray:
        """The records, REQUEST (R,), with stamps from ``zero`` on and sessions as the surrogate's have them."""
        for name in ("next_turn", "think"):  # a scheduler knows of no sessions
            self.records[name] = self._template[name]
        for name in STAMPS:
            happened = self.records[name] >= 0
            self.records[name][happened] -= zero
        abandon(self.records)
        return self.records

    def _send(self, send: Send, row: int, when_ns: int) -> None:
        with self._changed:  # ``request_ended`` waits until the request's row is known
            request = send(row, self._prompts[row])
            self.lag_s[row] = (time.perf_counter_ns() - when_ns) * 1e-9
            self._row[request.number] = row
            self._open += 1


def prompt_of(trace: Trace, row: int, vocabulary: int, salt: int) -> list[int]:
    """A prompt of the right length whose blocks agree with those of other rows where the trace says so.

    :param salt: prompts of another salt have nothing in common with these
    """
    n, size = int(trace.prompt[row]), trace.hash_tokens
    tokens = np.random.default_rng([salt, 0, row]).integers(1, vocabulary, n)
    if size:
        start = int(trace.hash_start[row])
        for k in range(min(int(trace.hash_n[row]), n // size)):
            seed = int(trace.hashes[start + k])
            tokens[k * size : (k + 1) * size] = np.random.default_rng([salt, 1, seed]).integers(1, vocabulary, size)
    return [int(t) for t in tokens]


def play(scheduler: Scheduler, client: Client, send: Send, drain_s: float, **said: Any) -> EngineRun:
    """Let ``client`` send its trace to ``scheduler``, which is started and closed here.

    :param said: the other fields of :class:`EngineRun`, but for what the records and the clock say
    :raises RuntimeError: the scheduler failed meanwhile
    """
    scheduler.observers.append(client)
    begin, zero = time.perf_counter(), scheduler.clock.read()
    try:
        scheduler.start()
        client.send_all(send, drain_s)
        with suppress(Exception):
            scheduler.call(lambda: scheduler.instances.doom_all(ABORT))
    finally:
        scheduler.close(timeout_s=10.0)
    if scheduler.failure is not None:
        raise RuntimeError("the scheduler failed while it replayed the scenario") from scheduler.failure
    state = scheduler.state
    return EngineRun(
        req=client.sealed(zero), cluster=state.cluster[0], inst=state.inst, cls=state.cls, itl=state.itl,
        duration_s=(scheduler.clock.read() - zero) / TICKS_PER_S, wall_s=time.perf_counter() - begin,
        decisions=sum(scheduler.runtime.decisions.values()), policy=scheduler.runtime.policy.name,
        events=int(state.cluster[0]["tokens_out"]), lag_s=client.lag_s, steps=(), transfers=(), **said,
    )  # fmt: skip


def said_of(scenario: Scenario, rate: float, seed: int) -> dict[str, Any]:
    """Fields of :class:`EngineRun` that say what was asked for."""
    names = tuple(c.name for c in scenario.classes)
    return {"class_names": names, "n_gpus": scenario.n_gpus(), "rate": rate, "seed": seed, "scenario": scenario.name}


def targets_of(trace: Trace, row: int) -> dict[str, Any]:
    """The request's own targets, seconds; None for those of its class."""
    ttft, tpot = trace.ttft_s[row], trace.tpot_s[row]
    return {
        "ttft_s": float(ttft) if np.isfinite(ttft) else None,
        "tpot_s": float(tpot) if np.isfinite(tpot) else None,
    }

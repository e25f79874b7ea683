"""Engines whose answers pass somebody else: what they do is foretold, and put right by what is heard now and then.

A scheduler in front of such engines sees a request go and hears that it ended. Between the two it books what the
latency profile says: a step of an engine computes the prompts that it was handed and gives each of its answers a token.
Whoever hears of real progress tells it by a :class:`engine.remote.reports.Report`, as a router that sees every token.
What was foretold too early is not taken back; then nothing more is foretold until the truth has caught up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.core import loop
from engine.core.kinds import LaneKind, RequestState
from engine.core.state import ClusterState
from engine.jit.rows import addresses
from engine.latency.evaluate import TICKS_PER_S
from engine.live.clock import WallClock
from engine.remote.instances import RemoteInstances
from engine.remote.reports import Report
from engine.remote.request import RemoteRequest

#: Decode steps are booked together for so long: one by one they would keep the scheduler from its decisions.
_TOGETHER = TICKS_PER_S // 50


@dataclass
class _Step:
    """What an engine is thought to do: ``prompts`` in one step, or decode steps of ``each`` ticks, since ``begun``,
    which is counted from the clock's beginning."""

    begun: int
    each: int
    prompts: list[RemoteRequest]


class UnseenInstances(RemoteInstances):
    """Parameters as :class:`engine.remote.instances.RemoteInstances`."""

    def __init__(self, state: ClusterState, clock: WallClock, send: Any, *, salt: int) -> None:
        super().__init__(state, clock, send, salt=salt)
        rows = state.inst["profile"]
        self._tables = state.profile[rows], state.share[rows]
        self._truth = addresses(self._tables)
        self._steps: list[_Step | None] = [None] * len(state.inst)
        self._foretold: dict[RemoteRequest, int] = {}  # tokens that each has by now, as far as anybody can tell

    def start_lane(self, i: int, l: int) -> None:
        super().start_lane(i, l)
        step = self._steps[i]
        if step is None or not step.prompts:  # else they are part of the step after this one
            self._foretell(i)
            self._begin(i)

    def lane_ends(self, i: int, l: int, outcome: Any) -> None:
        self._foretell(i)
        self._begin(i)

    def _begin(self, i: int) -> None:
        """Engine ``i`` begins its next step, if it has anything to do."""
        lane = self._state.lane[i, 0]
        self._steps[i] = None
        if lane["kind"] == LaneKind.IDLE:
            return
        each = int(loop.step_ticks(self._words, self._truth, i, 0))
        slots = self._state.prefills[i, : lane["n_prefills"]].tolist()
        prompts = [request for r in slots if (request := self.requests[r]) is not None]
        self._steps[i] = _Step(self._clock.now + self._clock.origin, each, prompts)
        steps = 1 if prompts else max(_TOGETHER // each, 1)
        self._clock.at(2 * i, self._clock.now + steps * each)

    def _foretell(self, i: int) -> None:
        """Book what engine ``i`` has done by now."""
        step, stamp = self._steps[i], WallClock.stamp()
        if step is None:
            return
        n = (self._clock.now + self._clock.origin - step.begun) // step.each
        if step.prompts:
            n = min(n, 1)
        if n == 0:
            return
        slots = self._state.run[i, : self._state.inst[i]["run_n"]].tolist()
        running = [request for r in slots if (request := self.requests[r]) is not None]
        begun = [q for q in step.prompts if q.engine == i and self._is_prefilling(q)]
        told = []
        for request, more in [(q, n) for q in running] + [(q, 1) for q in begun]:
            total = self._foretold[request] = self._foretold.get(request, 0) + more
            told.append(Report(request, request.attempt, total, stamp))
        super().hear(told)

    def _is_prefilling(self, request: RemoteRequest) -> bool:
        return request.slot >= 0 and self._state.req["state"][request.slot] == RequestState.PREFILLING

    def hear(self, reports: list[Report]) -> None:
        """Book what was seen; what is foretold goes on from there."""
        for report in reports:
            if not report.request.ended and report.attempt == report.request.attempt:
                self._foretold[report.request] = report.total
        super().hear(reports)

    def _again(self, request: RemoteRequest, why: Any) -> None:
        self._foretold.pop(request, None)
        super()._again(request, why)

    def _tell_end(self, request: RemoteRequest, finish: str) -> None:
        self._foretold.pop(request, None)
        super()._tell_end(request, finish)

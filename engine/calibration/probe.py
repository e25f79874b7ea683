"""Look at an engine's steps from outside: what each was, how long its lane computed, how long it took in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.core.state import LANE
from engine.live.engine import Engine

__all__ = ["StepProbe", "StepTrace"]


@dataclass(slots=True)
class StepTrace:
    """One step of one lane; seconds.

    :param lane: its LANE record as planned (kind, batch, token sums)
    :param run_s: from the lane's thread beginning it to its result; ``cpu_s`` of that thread meanwhile
    :param total_s: from being planned to being booked, as the scheduler and so every request sees it
    """

    instance: int
    lane: np.void
    run_s: float = 0.0
    cpu_s: float = 0.0
    total_s: float = 0.0

    @property
    def host_s(self) -> float:
        """Planning, describing, waking threads and booking: all but the computing."""
        return self.total_s - self.run_s


class StepProbe:
    """Writes down every step and transfer of ``engine`` from now on; attach before :meth:`Engine.start`.

    :param keep: most steps kept, the first ones
    """

    def __init__(self, engine: Engine, *, keep: int = 200_000) -> None:
        self.steps: list[StepTrace] = []
        self.transfers: list[tuple[int, float]] = []  # (blocks, seconds)
        self._engine, self._keep = engine, keep
        self._open: dict[tuple[int, int], StepTrace] = {}
        self._link: dict[int, tuple[int, int]] = {}
        instances = engine.instances
        self._start, self._end = instances.start_lane, instances.lane_ends
        self._start_link, self._link_ends = instances.start_link, instances.link_ends
        for name in ("start_lane", "lane_ends", "start_link", "link_ends"):
            setattr(instances, name, getattr(self, f"_on_{name}"))
        for k, lane in enumerate(instances._lanes):
            lane.runner.run = self._timed(lane.runner.run, divmod(k, 2))  # type: ignore[assignment]

    def _timed(self, run: Callable[[Any], Any], place: tuple[int, int]) -> Callable[[Any], Any]:
        def timed(step: Any) -> Any:
            begin, thread = time.perf_counter(), time.thread_time()
            result = run(step)
            trace = self._open.get(place)
            if trace is not None:
                trace.run_s = time.perf_counter() - begin
                trace.cpu_s = time.thread_time() - thread
            return result

        return timed

    def _on_start_lane(self, i: int, l: int) -> None:
        if len(self.steps) < self._keep:
            row = np.zeros(1, LANE)
            row[0] = self._engine.state.lane[i, l]
            self._open[i, l] = StepTrace(i, row[0])
        self._start(i, l)

    def _on_lane_ends(self, i: int, l: int, outcome: Any) -> None:
        trace = self._open.pop((i, l), None)
        if trace is not None:
            trace.total_s = (self._engine.clock.now - int(trace.lane["start"])) * 1e-12
            self.steps.append(trace)
        self._end(i, l, outcome)

    def _on_start_link(self, link: int) -> None:
        self._start_link(link)
        moving = self._engine.instances._moving.get(link)
        self._link[link] = (self._engine.clock.now, len(moving[0].blocks) if moving else 0)

    def _on_link_ends(self, link: int, outcome: Any) -> None:
        begun = self._link.get(link)
        if begun is not None and outcome is not None:
            self.transfers.append((begun[1], (self._engine.clock.now - begun[0]) * 1e-12))
        self._link_ends(link, outcome)

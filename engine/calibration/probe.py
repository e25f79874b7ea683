"""Look at an engine's steps from outside: what each was, how long its lane computed, how long it took in all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.live.engine import Engine
from engine.live.observer import Observer


@dataclass(slots=True)
class StepTrace:
    """One step of one lane; seconds.

    :param lane: its LANE record as planned (kind, batch, token sums)
    :param run_s: from the lane's thread beginning it to its result; ``cpu_s`` of that thread meanwhile
    :param total_s: from being planned to being booked, as the scheduler and so every request sees it
    """

    instance: int
    lane: np.void
    run_s: float
    cpu_s: float
    total_s: float

    @property
    def host_s(self) -> float:
        """Planning, describing, waking threads and booking: all but the computing."""
        return self.total_s - self.run_s


class StepProbe(Observer):
    """Writes down every step and transfer of ``engine`` from now on; attach before :meth:`Engine.start`.

    :param keep: most steps kept, the first ones
    """

    def __init__(self, engine: Engine, *, keep: int = 200_000) -> None:
        self.steps: list[StepTrace] = []
        self.transfers: list[tuple[int, float]] = []  # (blocks, seconds)
        # Not the engine itself: in a cycle its KV pools would stay until a full garbage collection.
        self._clock, self._state, self._keep = engine.clock, engine.state, keep
        self._open: dict[tuple[int, int], np.void] = {}
        self._link: dict[int, tuple[int, int]] = {}
        engine.observers.append(self)

    def step_started(self, i: int, l: int) -> None:
        """See :class:`engine.live.observer.Observer`; likewise the others."""
        if len(self.steps) < self._keep:
            self._open[i, l] = self._state.lane[i, l].copy()

    def step_ended(self, i: int, l: int, run_s: float, cpu_s: float) -> None:
        lane = self._open.pop((i, l), None)
        if lane is not None:
            total_s = (self._clock.now - int(lane["start"])) * 1e-12
            self.steps.append(StepTrace(i, lane, run_s, cpu_s, total_s))

    def link_started(self, link: int, blocks: int) -> None:
        self._link[link] = (self._clock.now, blocks)

    def link_ended(self, link: int) -> None:
        begun, blocks = self._link.pop(link)
        self.transfers.append((blocks, (self._clock.now - begun) * 1e-12))

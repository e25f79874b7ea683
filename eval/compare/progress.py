"""What ``eval-policy`` shows while it compares: what runs, points done, simulated requests per second."""

from __future__ import annotations

import time

from engine.common.progress import Display
from env.measure.contender import Point
from eval.compare.session import Watcher


class Bar(Watcher):
    """Shows a comparison; what follows ``": "`` in the name of a phase changes within it."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._stage, self._points, self._requests, self._since = "", 0, 0, 0.0

    def phase(self, name: str, points: int | None) -> None:
        stage, _, note = name.partition(": ")
        if stage != self._stage:
            self._display.phase(stage, points)
            self._stage, self._points, self._requests, self._since = stage, 0, 0, time.perf_counter()
        self._display.update(self._points, note)

    def point(self, point: Point) -> None:
        self._points += 1
        self._requests += point.metrics["num_prompts"]
        speed = self._requests / max(time.perf_counter() - self._since, 1e-9)
        self._display.update(self._points, f"{speed:,.0f} requests/s")

    def note(self, text: str) -> None:
        self._display.say(text)

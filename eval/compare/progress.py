"""The progress bar of ``eval-policy``: what runs, points done, simulated requests per second, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from env.measure.contender import Point
from eval.compare.session import Watcher

__all__ = ["Bar", "CellBar"]


class Bar(Watcher):
    """A bar on a terminal; elsewhere one line per policy."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("start", total=None, speed="")
        self._requests, self._since = 0, time.perf_counter()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, points: int | None) -> None:
        self._progress.reset(self._task, description=escape(name), total=points, speed="")
        self._requests, self._since = 0, time.perf_counter()
        if points is not None and not self._console.is_terminal:
            self._console.print(escape(name), highlight=False)

    def point(self, point: Point) -> None:
        self._requests += point.metrics["num_prompts"]
        speed = self._requests / max(time.perf_counter() - self._since, 1e-9)
        self._progress.update(self._task, advance=1, speed=f"{speed:,.0f} requests/s")

    def note(self, text: str) -> None:
        self._console.print(escape(text), highlight=False)


class CellBar:
    """A bar over the cells of a table on a terminal, with the time left; elsewhere one line per cell."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = TimeRemainingColumn(elapsed_when_finished=False)
        # the estimate looks back over everything so far: cells of one scenario differ less than scenarios do
        self._progress = Progress(*columns, left, console=console, transient=True, speed_estimate_period=1e9)
        self._task = self._progress.add_task("knees", total=None)
        self._since, self._done, self._total = time.perf_counter(), 0, 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def start(self, cells: int) -> None:
        """``cells`` are to be measured or read back."""
        self._total = cells
        self._progress.update(self._task, total=cells)

    def cell(self, cell: dict[str, Any]) -> None:
        """One is finished."""
        self._done += 1
        title = f"{cell['scenario']}: {cell['label']}"
        self._progress.update(self._task, advance=1, description=escape(title))
        if not self._console.is_terminal:
            spent = time.perf_counter() - self._since
            left = spent / self._done * (self._total - self._done)
            line = f"{self._done}/{self._total} {title} ({spent:.0f} s, about {left:.0f} s left)"
            self._console.print(escape(line), highlight=False)

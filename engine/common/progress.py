"""A bar for long work on a terminal, plain lines elsewhere: how far, how good, how long still."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Display"]


class Display:
    """A rich progress bar on a terminal, plain lines elsewhere (at most one every ``quiet_s`` seconds)."""

    def __init__(self, *, quiet_s: float = 10.0) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._quiet_s, self._printed = quiet_s, -quiet_s
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        """Begin a stage of the run with a bar of its own."""
        self._name = name
        self._printed = -self._quiet_s
        self._task = self._progress.add_task(name, total=1.0, note="")

    def update(self, done: float, note: str) -> None:
        """:param done: share of this stage, 0 to 1"""
        assert self._task is not None
        if self._live:
            self._progress.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= self._quiet_s or done >= 1.0:
            self._printed = now
            print(f"{self._name}: {100 * done:3.0f} %  {note}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._live:
            self._progress.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

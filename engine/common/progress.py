"""The one display of long work: a bar on a terminal, plain lines elsewhere. How far, how good, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from threading import Event, RLock, Thread
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_FOREVER = 1e9


class Display:
    """A bar on a terminal; elsewhere a line when a stage begins and ends, and one every ``quiet_s`` seconds between.

    The line comes even when nobody reports anything (a kernel compiles, a long simulation): a log that stands still
    cannot be told from a process that hangs.

    :param quiet_s: longest silence on a standard error that is no terminal
    :param keep: the bar of a finished stage stays on the terminal
    :param clock: seconds
    """

    def __init__(
        self, *, quiet_s: float = 9.0, keep: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        console = Console(stderr=True)
        self._live, self._keep, self._quiet_s, self._clock = console.is_terminal, keep, quiet_s, clock
        columns = ("{task.description:<8}", "{task.fields[count]}", "{task.fields[note]}")
        name, count, note = (TextColumn(column, markup=False) for column in columns)
        self._progress = Progress(
            name,
            BarColumn(bar_width=20),
            count,
            note,
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
            transient=not keep,
            speed_estimate_period=_FOREVER,  # pieces of work differ: the estimate looks back over the whole stage
        )
        self._task: TaskID | None = None
        self._name, self._done, self._note = "start", 0.0, ""
        self._total: float | None = None
        self._since = self._said = clock()
        self._lock, self._over = RLock(), Event()

    def __enter__(self) -> Self:
        self._progress.start()
        if not self._live:
            Thread(target=self._speak, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._progress.stop()

    def phase(self, name: str, total: float | None = 1.0) -> None:
        """Begin a stage.

        :param total: of what :meth:`update` reports: 1 for shares, more for pieces; None: nobody knows
        """
        with self._lock:
            self._name, self._total, self._done, self._note = name, total, 0.0, ""
            self._since = self._clock()
            self._said = self._since - self._quiet_s  # the first word of a stage is heard at once
            if self._live and (self._task is None or self._keep):
                self._task = self._progress.add_task(name, total=total, count="", note="")
            elif self._task is not None:
                self._progress.reset(self._task, description=name, total=total, count="", note="")

    def update(self, done: float, note: str = "", total: float | None = None) -> None:
        """:param done: of the stage's total; ``total``: that, where it was not known when the stage began"""
        with self._lock:
            total = self._total if total is None else total
            ends = total is not None and self._done < total <= done
            self._total = total if total is None else max(total, done)  # an estimate may have been too low
            self._done, self._note = done, note
            if self._task is not None:
                self._progress.update(self._task, completed=done, total=self._total, count=self._count(), note=note)
            elif ends:
                self._print()
            else:
                self.beat()

    def report(self, stage: str, done: float, note: str = "") -> None:
        """:meth:`update` of ``stage``, which begins where another was under way."""
        if stage != self._name:
            self.phase(stage)
        self.update(done, note)

    def beat(self) -> None:
        """Say where things stand if the last word is ``quiet_s`` seconds old."""
        with self._lock:
            if not self._live and self._clock() - self._said >= self._quiet_s:
                self._print()

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._live:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _speak(self) -> None:
        while not self._over.wait(max(self._said + self._quiet_s - self._clock(), 0.05)):
            self.beat()

    def _count(self) -> str:
        if self._total is None:
            return ""
        return f"{100 * self._done:.0f} %" if self._total == 1.0 else f"{self._done:g}/{self._total:g}"

    def _print(self) -> None:
        now = self._clock()
        self._said, spent = now, now - self._since
        left = ""
        if spent >= 1.0 and self._total and 0.0 < self._done < self._total:
            left = f", about {spent * (self._total / self._done - 1):.0f} s left"
        said = "  ".join(filter(None, (self._count(), self._note)))
        self.say(f"{self._name}: {said}".rstrip(" :") + f"  ({spent:.0f} s{left})")

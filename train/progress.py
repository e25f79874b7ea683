"""One live line on stderr: how far, how fast, how good, and where the time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback

from train.ppo import DispatchPPO

__all__ = ["Display", "ProgressCallback"]


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


class ProgressCallback(BaseCallback):
    """Shows frames, frames per second, score against the base rule and the time split after each update."""

    model: DispatchPPO

    def __init__(self, display: Display, score: Callable[[], str]) -> None:
        super().__init__()
        self._display, self._score = display, score
        self._frames, self._since = 0, time.perf_counter()

    def _on_training_start(self) -> None:
        self._frames, self._since = self.model.num_timesteps, time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        frames = self.model.num_timesteps
        rate = (frames - self._frames) / max(time.perf_counter() - self._since, 1e-9)
        split = " ".join(f"{name} {100 * share:.0f}%" for name, share in self.model.split.shares().items())
        note = f"{frames / 1e6:.2f}M frames {rate / 1e3:.0f}k/s  {self._score()}  [{split}]"
        self._display.update(1.0 - self.model._current_progress_remaining, note)

"""One live line on stderr: how far, how fast, how good, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable

from stable_baselines3.common.callbacks import BaseCallback

from engine.progress import Display
from train.ppo import DispatchPPO

__all__ = ["ProgressCallback"]


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

"""What happens beside learning: evaluation, best checkpoint, training checkpoints, progress, Ctrl-C.

All act in ``on_rollout_start``, the one moment at which a model is between updates, see
``DispatchPPO.learn``.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from engine.common.appends import append_line, heal
from engine.common.files import write_bytes
from engine.common.progress import Display
from env.measure.contender import Contender
from train.ppo.judge import Judge, Verdict
from train.ppo.learner import DispatchPPO
from train.ppo.state import save_state


class JsonLog:
    """``log.jsonl``: one JSON object a line, appended and flushed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        heal(path)
        self._path, self._start = path, time.time()

    def write(self, event: str, **facts: Any) -> None:
        """Append one event with the seconds since the log was opened."""
        line = json.dumps({"event": event, "t": round(time.time() - self._start, 3), **facts})
        append_line(self._path, line.encode())


def replace_folder(source: Path, target: Path) -> None:
    """Make ``target`` a copy of ``source``; a crash leaves the old or the new folder, here or beside it."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Evaluation:
    """One judged snapshot of the network.

    :param name: folder of the snapshot below ``snapshots/``
    :param levels: (rates, seeds), see ``env.measure.level``
    """

    name: str
    frames: int
    trained_s: float
    score: float
    levels: tuple[tuple[float, ...], ...]


class Between(BaseCallback):
    """A callback that acts between updates only."""

    model: DispatchPPO

    def _on_step(self) -> bool:
        return True


class EvaluationCallback(Between):
    """Exports a deployable snapshot now and then, has it judged, keeps the best as ``best/``.

    :param export: writes the current network as a checkpoint folder
    :param judge: scores a folder, perhaps in the background
    :param seeds: validation windows, the same for every snapshot
    :param base_score: score of the base rule on these windows; ``best/`` must beat it
    :param every_s: wall seconds of training between snapshots
    :param every_frames: frames between snapshots instead; then every snapshot is waited for, so a run is
        reproducible
    """

    def __init__(
        self,
        out: Path,
        export: Callable[[Path], None],
        judge: Judge,
        seeds: Sequence[int],
        base_score: float,
        log: JsonLog,
        *,
        every_s: float,
        every_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.out, self.base_score = out, base_score
        self.done: list[Evaluation] = []
        self._export, self._judge, self._seeds, self._log = export, judge, tuple(seeds), log
        self._every_s, self._every_frames = every_s, every_frames
        self._pending: tuple[str, int, float, Future[Verdict]] | None = None
        self._last_s, self._last_frames = 0.0, 0

    # -- state of a resumed run

    def state(self) -> dict[str, Any]:
        """JSON-ready; a snapshot still being judged is judged again after a resume."""
        pending = self._pending
        return {
            "done": [asdict(evaluation) for evaluation in self.done],
            "pending": list(pending[:3]) if pending else None,
            "last": [self._last_s, self._last_frames],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.done = [
            Evaluation(**{**entry, "levels": tuple(tuple(row) for row in entry["levels"])}) for entry in state["done"]
        ]
        self._last_s, self._last_frames = state["last"]
        if state["pending"] and (self.out / "snapshots" / state["pending"][0]).is_dir():
            name, frames, trained_s = state["pending"]
            self._start(name, int(frames), float(trained_s))

    # -- SB3

    def _on_rollout_start(self) -> None:
        self._collect(wait=False)
        if self._due() and self._pending is None:
            self.snapshot()
            if self._every_frames is not None:
                self._collect(wait=True)

    def _due(self) -> bool:
        if self.model._n_updates <= self.model.config.critic_warmup:
            return False  # still the base rule
        if self._every_frames is not None:
            return self.model.num_timesteps - self._last_frames >= self._every_frames
        return self.model.trained_s - self._last_s >= self._every_s

    def snapshot(self) -> None:
        """Export the network as it is and hand it to the judge."""
        frames = self.model.num_timesteps
        self._last_s, self._last_frames = self.model.trained_s, frames
        with self.model.split.phase("eval"):
            name = f"{frames:012d}"
            self._export(self.out / "snapshots" / name)
            self._start(name, frames, self.model.trained_s)

    def finish(self) -> None:
        """Judge what the network is now and wait for every verdict."""
        self._collect(wait=True)
        if self.model.num_timesteps > self._last_frames:
            self.snapshot()
            self._collect(wait=True)

    def _start(self, name: str, frames: int, trained_s: float) -> None:
        future = self._judge.submit(Contender(str(self.out / "snapshots" / name)), self._seeds)
        self._pending = (name, frames, trained_s, future)

    def _collect(self, *, wait: bool) -> None:
        if self._pending is None or not (wait or self._pending[3].done()):
            return
        name, frames, trained_s, future = self._pending
        verdict = future.result()
        self._pending = None
        evaluation = Evaluation(name, frames, trained_s, verdict.score, verdict.levels)
        best = max([self.base_score, *(e.score for e in self.done)])
        self.done.append(evaluation)
        if evaluation.score > best:
            replace_folder(self.out / "snapshots" / name, self.out / "best")
        self._record(evaluation)

    def _record(self, evaluation: Evaluation) -> None:
        self.logger.record("eval/level", evaluation.score)
        self.logger.record("eval/gain_over_base", evaluation.score - self.base_score)
        self.logger.dump(step=evaluation.frames)
        self._log.write("evaluation", **asdict(evaluation), base=self.base_score)
        table = io.BytesIO()
        np.savez(  # the RL zoo's layout: timesteps (n,), results (n, windows)
            table,
            timesteps=np.array([e.frames for e in self.done]),
            results=np.array([np.ravel(e.levels) for e in self.done]),
            base=np.array(self.base_score),
        )
        write_bytes(self.out / "evaluations.npz", table.getvalue())


class StateCallback(Between):
    """Writes the training state every ``every_s`` wall seconds and at the end.

    :param extra: JSON-ready state of other callbacks, saved along
    """

    def __init__(self, path: Path, every_s: float, extra: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._path, self._every_s, self._extra = path, every_s, extra
        self._last = time.monotonic()

    def _on_rollout_start(self) -> None:
        if self.model.stop or time.monotonic() - self._last >= self._every_s:
            self._save()

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        with self.model.split.phase("save"):
            save_state(self._path, self.model, self._extra())
        self._last = time.monotonic()


class InterruptCallback(Between):
    """Ctrl-C or SIGTERM ends the training after the current update; a second one at once."""

    signal_number: int = 0

    def _on_training_start(self) -> None:
        self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number

    def _on_rollout_start(self) -> None:
        if self.signal_number:
            self.model.stop = True

    def _on_training_end(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class ProgressCallback(Between):
    """Shows frames, frames per second, score against the base rule and the time split after each update."""

    def __init__(self, display: Display, score: Callable[[], str]) -> None:
        super().__init__()
        self._display, self._score = display, score
        self._frames, self._since = 0, time.perf_counter()

    def _on_training_start(self) -> None:
        self._frames, self._since = self.model.num_timesteps, time.perf_counter()

    def _on_rollout_start(self) -> None:
        frames = self.model.num_timesteps
        rate = (frames - self._frames) / max(time.perf_counter() - self._since, 1e-9)
        split = " ".join(f"{name} {100 * share:.0f}%" for name, share in self.model.split.shares().items())
        note = f"{frames / 1e6:.2f}M frames {rate / 1e3:.0f}k/s  {self._score()}  [{split}]"
        self._display.update(1.0 - self.model._current_progress_remaining, note)

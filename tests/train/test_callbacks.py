"""Evaluation picks the best snapshot; interrupts end between updates; a lost evaluation is made up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from env.measure.contender import Contender
from train.ppo.callbacks import EvaluationCallback, InterruptCallback, JsonLog, StateCallback, replace_folder
from train.ppo.judge import Verdict
from train.ppo.learner import DispatchPPO
from train.ppo.state import load_state

Make = Callable[..., DispatchPPO]


class ScriptedJudge:
    """Hands out the given scores in order."""

    def __init__(self, scores: Sequence[float], *, slow: bool = False) -> None:
        self.scores, self.slow = list(scores), slow
        self.asked: list[str] = []

    def submit(self, contender: Contender, seeds: Sequence[int]) -> Future[Verdict]:
        self.asked.append(Path(contender.policy).name)
        future: Future[Verdict] = Future()
        if not self.slow:
            future.set_result(Verdict(((self.scores.pop(0),) * len(seeds),)))
        return future

    def close(self) -> None: ...


def build(
    model: DispatchPPO, out: Path, judge: ScriptedJudge, every: int = 1024, base: float = 0.5
) -> EvaluationCallback:
    def export(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "frames").write_text(str(model.num_timesteps))

    return EvaluationCallback(
        out, export, judge, [1, 2], base, JsonLog(out / "log.jsonl"), every_s=1e9, every_frames=every
    )


def test_best_is_the_best_judged_snapshot(make_model: Make, tmp_path: Path) -> None:
    model = make_model(critic_warmup=0)
    judge = ScriptedJudge([0.6, 0.9, 0.7, 0.8, 0.1])
    callback = build(model, tmp_path, judge)
    model.learn(512 * 9, callback)
    frames = [e.frames for e in callback.done]
    assert frames == [1024, 2048, 3072, 4096]
    assert (tmp_path / "best" / "frames").read_text() == "2048"
    table = np.load(tmp_path / "evaluations.npz")
    np.testing.assert_array_equal(table["timesteps"], frames)
    np.testing.assert_allclose(table["results"][:, 0], [0.6, 0.9, 0.7, 0.8])
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["score"] for e in events] == [0.6, 0.9, 0.7, 0.8]


def test_snapshots_below_the_base_rule_are_not_kept_as_best(make_model: Make, tmp_path: Path) -> None:
    model = make_model(critic_warmup=0)
    callback = build(model, tmp_path, ScriptedJudge([0.3, 0.5, 0.2]), base=0.5)
    model.learn(512 * 5, callback)
    assert len(callback.done) >= 2
    assert not (tmp_path / "best").exists()


def test_evaluation_in_progress_is_repeated_after_a_resume(make_model: Make, tmp_path: Path) -> None:
    model = make_model(critic_warmup=0)
    callback = build(model, tmp_path, ScriptedJudge([], slow=True))
    callback.init_callback(model)
    model.num_timesteps = 77
    callback.snapshot()
    state = json.loads(json.dumps(callback.state()))
    judge = ScriptedJudge([0.8])
    resumed = build(model, tmp_path, judge)
    resumed.init_callback(model)
    resumed.restore(state)
    resumed.finish()
    assert judge.asked == ["000000000077"]
    assert [(e.frames, e.score) for e in resumed.done] == [(77, 0.8)]


def test_failure_of_the_judge_is_not_swallowed(make_model: Make, tmp_path: Path) -> None:
    class Failing(ScriptedJudge):
        def submit(self, contender: Contender, seeds: Sequence[int]) -> Future[Verdict]:
            future: Future[Verdict] = Future()
            future.set_exception(RuntimeError("simulator broke"))
            return future

    model = make_model(critic_warmup=0)
    with pytest.raises(RuntimeError, match="simulator broke"):
        model.learn(512 * 5, build(model, tmp_path, Failing([])))


class Strike(BaseCallback):
    """Sends a signal to this process in the middle of the third rollout."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def _on_step(self) -> bool:
        if self.num_timesteps == 512 * 2 + 16 * 5:
            os.kill(os.getpid(), self.number)
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_update_saves_and_restores_handlers(
    make_model: Make, tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    model, interrupt = make_model(), InterruptCallback()
    state = StateCallback(tmp_path / "s", 1e9, lambda: {})
    model.learn(10**9, CallbackList([Strike(number), interrupt, state]))
    assert interrupt.signal_number == number
    assert model.num_timesteps == 512 * 3
    assert signal.getsignal(number) is before
    resumed = make_model()
    load_state(tmp_path / "s", resumed)
    assert (resumed.num_timesteps, resumed._n_updates) == (512 * 3, 3)


def test_replace_folder_drops_old_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_folder(tmp_path / "a", tmp_path / "b")
    contents: list[Any] = sorted(p.name for p in tmp_path.rglob("*"))
    assert contents == ["a", "a", "a", "b"]

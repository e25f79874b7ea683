"""The stage in which PPO learns: environment, model and everything that runs beside it."""

from __future__ import annotations

import time
from typing import Any

from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv

from engine.common.progress import Display
from train.collect.learner import RemotePPO
from train.collect.workers import RayCollector
from train.config import TrainConfig
from train.export import Publisher
from train.folder import RunFolder
from train.ppo.callbacks import (
    Evaluation,
    EvaluationCallback,
    InterruptCallback,
    JsonLog,
    ProgressCallback,
    StateCallback,
)
from train.ppo.judge import Judge
from train.ppo.learner import DispatchPPO
from train.ppo.state import load_state

_FIRST_SEED = 2_000  # windows watched during training start here, those of the selection elsewhere
_UNLIMITED = 10**15


class _Learning:
    """Model and callbacks of one run, wired."""

    def __init__(
        self,
        env: VecEnv,
        publisher: Publisher,
        config: TrainConfig,
        folder: RunFolder,
        judge: Judge,
        log: JsonLog,
        display: Display,
        base_score: float,
    ) -> None:
        self.model = model_class(env)(env, publisher.new_network, config, seed=publisher.seed)
        self.model.set_logger(configure(str(folder.root / "tb"), ["tensorboard"]))
        self.evaluation = EvaluationCallback(
            folder.root,
            lambda path: publisher.network(path, self.model),
            judge,
            monitor_seeds(config),
            base_score,
            log,
            every_s=config.eval_every_s,
            every_frames=config.eval_every_frames,
        )
        self.interrupt = InterruptCallback()
        state = StateCallback(folder.state, config.save_every_s, self.evaluation.state)
        progress = ProgressCallback(display, self.score)
        self.callbacks = CallbackList([self.interrupt, self.evaluation, state, progress])

    def score(self) -> str:
        """The best snapshot against the base rule, for the progress line."""
        base = self.evaluation.base_score
        if not self.evaluation.done:
            return f"base {100 * base:.2f} %"
        best = max(evaluation.score for evaluation in self.evaluation.done)
        return f"best {100 * best:.2f} % (base {100 * base:.2f} %)"


def learn(
    env: VecEnv,
    publisher: Publisher,
    config: TrainConfig,
    folder: RunFolder,
    judge: Judge,
    log: JsonLog,
    display: Display,
    *,
    base_score: float,
    frames: int | None,
    seconds: float,
    resume: bool,
) -> tuple[list[Evaluation], dict[str, Any], int]:
    """Train until ``frames`` decisions or ``seconds`` of learning, counted over all resumed parts.

    :param base_score: score of the base rule on the monitored windows
    :returns: judged snapshots, facts of the training, and the number of the signal that stopped it (0: none)
    """
    run = _Learning(env, publisher, config, folder, judge, log, display, base_score)
    model = run.model
    if resume and folder.state.exists():
        run.evaluation.init_callback(model)
        run.evaluation.restore(load_state(folder.state, model))
        log.write("resumed", frames=model.num_timesteps)
    display.phase("learn")
    left = (frames or _UNLIMITED) - model.num_timesteps
    start = time.monotonic()
    if left > 0:
        model.learn(left, run.callbacks, reset_num_timesteps=model.num_timesteps == 0, time_limit_s=seconds)
    number = run.interrupt.signal_number
    if not number:
        run.evaluation.init_callback(model)
        run.evaluation.finish()
    facts = {
        "frames": model.num_timesteps,
        "updates": model._n_updates,
        "learn_s": round(model.trained_s, 2),
        "frames_per_s": round(model.num_timesteps / max(model.trained_s, 1e-9)),
        "time_split": {name: round(share, 3) for name, share in model.split.shares().items()},
    }
    log.write("learned", wall_s=time.monotonic() - start, **facts)
    return run.evaluation.done, facts, number


def model_class(env: VecEnv) -> type[DispatchPPO]:
    """PPO for environments that step here, or for those of a cluster."""
    return RemotePPO if isinstance(env, RayCollector) else DispatchPPO


def monitor_seeds(config: TrainConfig) -> range:
    """Validation windows watched during training."""
    return range(_FIRST_SEED, _FIRST_SEED + config.eval_seeds)

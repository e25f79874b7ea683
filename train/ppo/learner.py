"""PPO on dispatch decisions: a masked, semi-Markov, residual variant of sb3-contrib's MaskablePPO.

It differs from the parent in three ways: the network scores candidates instead of a flat observation; time
between decisions discounts (``train.ppo.buffer``), also where a time limit cuts an episode; and value targets are put
on a unit scale once, measured on the first rollout and then frozen, so the objective does not move with the load.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from train.config import TrainConfig
from train.ppo.buffer import SMDPRolloutBuffer
from train.ppo.objective import Objective, differentiate
from train.ppo.policy import ScoringPolicy


class TimeSplit:
    """Where wall time goes, in seconds per phase (``env``, ``forward``, ``copy``, ``update``, ...)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Share of each phase in the time measured so far, summing to 1."""
        total = sum(self.seconds.values())
        return {name: value / total for name, value in self.seconds.items()} if total > 0 else {}


class DispatchPPO(MaskablePPO):
    """MaskablePPO for :class:`env.gym.vector_env.SlalomVecEnv`.

    The environment is a ``VecEnv`` with flat observations ``[context | candidates]``, ``action_masks()`` of
    shape (N, K), and after each step ``elapsed_s`` (N,) seconds to the next decision; ``beta`` (1/s) is its
    discount rate and ``trace`` (N,) names the arrival sequence each environment is on.

    :param make_network: builds the scoring network (see :class:`train.ppo.policy.ScoringPolicy`)
    """

    policy: ScoringPolicy
    rollout_buffer: SMDPRolloutBuffer

    def __init__(
        self,
        env: VecEnv,
        make_network: Callable[[], nn.Module],
        config: TrainConfig,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.config = config
        first, last = config.learning_rate, config.learning_rate_final
        super().__init__(
            ScoringPolicy,
            env,
            learning_rate=lambda remaining: last + (first - last) * remaining,
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            n_epochs=config.n_epochs,
            gamma=1.0,  # unused: the buffer discounts by elapsed time
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=config.ent_coef,
            vf_coef=config.vf_coef,
            max_grad_norm=config.max_grad_norm,
            target_kl=config.target_kl,
            rollout_buffer_class=SMDPRolloutBuffer,
            rollout_buffer_kwargs={"beta": float(env.beta), "slice_s": config.baseline_slice_s},  # type: ignore[attr-defined]
            policy_kwargs={
                "make_network": make_network,
                "n_context": int(env.n_context),  # type: ignore[attr-defined]
                "n_features": int(env.n_features),  # type: ignore[attr-defined]
                "seed": seed,
            },
            stats_window_size=256,
            seed=seed,
            device=device,
            verbose=0,
        )
        self.set_logger(Logger(None, []))  # the parent's own leaves a folder in the machine's temporary files
        self.split = TimeSplit()
        self.trained_s = 0.0  # wall seconds of learning, over all resumed parts
        self.clock_s = np.zeros(self.n_envs)

    # -- one training -------------------------------------------------------------------------------------

    def learn(  # type: ignore[override]
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "ppo",
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
        *,
        time_limit_s: float = float("inf"),
    ) -> DispatchPPO:
        """As in the parent, ending also when ``trained_s`` reaches ``time_limit_s``.

        Schedules follow whichever limit is nearer. ``on_rollout_start`` is the one moment at which the model
        is between updates; callbacks that save act there, and end the run by setting ``stop``.
        """
        total, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self.stop = False
        callback.on_training_start(locals(), globals())
        iteration = self._n_updates
        while self.num_timesteps < total and self.trained_s < time_limit_s:
            start = time.perf_counter()
            if not self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps, use_masking):  # type: ignore[arg-type]
                break
            used = max(self.num_timesteps / total, self.trained_s / time_limit_s)
            self._current_progress_remaining = max(0.0, 1.0 - used)
            self.train()
            self.trained_s += time.perf_counter() - start
            iteration += 1
            if log_interval and iteration % log_interval == 0:
                self.dump_logs(iteration)
        callback.on_training_end()
        return self

    def dump_logs(self, iteration: int = 0) -> None:
        """SB3's tags, plus the time split and the attainment of finished episodes."""
        for name, share in self.split.shares().items():
            self.logger.record(f"time/{name}_share", share)
        found = np.array([info.get("attainment", np.nan) for info in self.ep_info_buffer or ()])
        if np.isfinite(found).any():  # an episode in which nothing was sealed has none
            self.logger.record("rollout/attainment_mean", float(np.nanmean(found)))
        super().dump_logs(iteration)

    # -- rollouts -----------------------------------------------------------------------------------------

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool = True,
    ) -> bool:
        """Fill the buffer in place; see the parent for the parameters."""
        callback.on_rollout_start()
        if self.stop:
            return False
        assert isinstance(rollout_buffer, SMDPRolloutBuffer)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        with th.inference_mode():
            last = self._fill(env, callback, rollout_buffer, n_rollout_steps, use_masking)
        if last is None:
            return False
        with self.split.phase("copy"):
            rollout_buffer.compute_returns_and_advantage(last, self._last_episode_starts)  # type: ignore[arg-type]
            self.policy.note_seen(rollout_buffer.flat("observations").numpy())
        callback.on_rollout_end()
        return True

    def _fill(
        self, env: VecEnv, callback: BaseCallback, buffer: SMDPRolloutBuffer, n_steps: int, use_masking: bool
    ) -> th.Tensor | None:
        """Rows 0 to ``n_steps`` of the buffer; the values (N,) after them, or None if a callback ended the run."""
        for step in range(n_steps):
            self._step(env, buffer, step)
            callback.update_locals({"infos": self._infos, "dones": self._last_episode_starts})
            if not callback.on_step():
                return None
        buffer.pos, buffer.full = n_steps, True
        if self._n_updates == 0:
            self._fit_value_scale(buffer)
        with self.split.phase("forward"):
            masks = self._masks(env, use_masking)
            return self.policy.predict_values(th.from_numpy(self._last_obs), masks)  # type: ignore[arg-type]

    @staticmethod
    def _masks(env: VecEnv, use_masking: bool = True) -> NDArray[np.bool_] | None:
        return env.action_masks() if use_masking else None  # type: ignore[attr-defined]

    def _step(self, env: VecEnv, buffer: SMDPRolloutBuffer, step: int) -> None:
        """One decision in every environment, written to row ``step``."""
        with self.split.phase("copy"):
            buffer.observations[step] = self._last_obs
            buffer.action_masks[step] = env.action_masks()  # type: ignore[attr-defined]
            buffer.episode_starts[step] = self._last_episode_starts
            buffer.clock_s[step] = self.clock_s
            buffer.trace[step] = env.trace  # type: ignore[attr-defined]
        with self.split.phase("forward"):
            self._act(buffer, step)
        with self.split.phase("env"):
            self._last_obs, rewards, dones, self._infos = env.step(buffer.actions[step])  # type: ignore[assignment]
        with self.split.phase("copy"):
            buffer.rewards[step] = rewards
            buffer.elapsed_s[step] = env.elapsed_s  # type: ignore[attr-defined]
            self.clock_s += buffer.elapsed_s[step]
            self.clock_s[dones] = 0.0
            self._last_episode_starts = dones
            self.num_timesteps += env.num_envs
            ended = np.flatnonzero(dones)
        if ended.size:
            with self.split.phase("forward"):
                buffer.bootstrap(step, {int(i): self._infos[i] for i in ended}, self.policy.predict_values)
            self._update_info_buffer([self._infos[i] for i in ended], dones[ended])

    def _act(self, buffer: SMDPRolloutBuffer, step: int) -> None:
        """Draw actions for row ``step`` of the buffer."""
        observations, masks = buffer.observations[step], buffer.action_masks[step]
        drawn = self.policy.forward(th.from_numpy(observations), action_masks=th.from_numpy(masks))
        for array, tensor in zip((buffer.actions, buffer.values, buffer.log_probs), drawn, strict=True):
            array[step] = tensor.numpy()

    def _fit_value_scale(self, buffer: SMDPRolloutBuffer) -> None:
        """Freeze shift and scale of the value from the first rollout.

        In a steady state the value is (reward rate) / beta. That is the shift, and the value at the rollout's
        end; the scale is the spread of the Monte-Carlo returns built on it. Stored values are moved along.
        """
        shift = float(buffer.rewards.sum() / (buffer.beta * max(buffer.elapsed_s.sum(), 1e-9)))
        discount = buffer.discount()
        returns = np.empty_like(buffer.rewards)
        after = np.full(buffer.n_envs, shift, np.float32)
        for step in range(buffer.buffer_size - 1, -1, -1):
            after = buffer.rewards[step] + discount[step] * after
            returns[step] = after
        self.policy.set_value_scale(shift, max(float(returns.std()), 1e-3))
        buffer.values *= float(self.policy.value_scale)
        buffer.values += shift

    # -- update -------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Clipped PPO on the filled buffer; the first ``critic_warmup`` updates fit the value only."""
        with self.split.phase("update"):
            self.policy.set_training_mode(True)
            self._update_learning_rate(self.policy.optimizer)
            stats: dict[str, list[float]] = defaultdict(list)
            advantages = self.rollout_buffer.advantages
            advantages -= advantages.mean()
            advantages /= advantages.std() + 1e-8
            for _ in range(self.n_epochs):
                if not self._epoch(stats):
                    break
            self._n_updates += 1
        for name, values in stats.items():
            self.logger.record(f"train/{name}", float(np.mean(values)))
        buffer = self.rollout_buffer
        self.logger.record(
            "train/explained_variance", explained_variance(buffer.values.ravel(), buffer.returns.ravel())
        )
        self.logger.record("train/ent_coef", self.entropy_coefficient())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def entropy_coefficient(self) -> float:
        """Linear from ``ent_coef`` to ``ent_coef_final`` over the budget."""
        first, last = self.config.ent_coef, self.config.ent_coef_final
        return last + (first - last) * self._current_progress_remaining

    def _epoch(self, stats: dict[str, list[float]]) -> bool:
        """One pass over the rollout; False when the policy moved past 1.5 target_kl."""
        assert self.batch_size is not None
        goal = Objective(
            clip=self.config.clip_range,
            entropy_weight=self.entropy_coefficient(),
            value_weight=self.vf_coef,
            shift=float(self.policy.value_shift),
            scale=float(self.policy.value_scale),
            actor=self._n_updates >= self.config.critic_warmup,
        )
        for frames in self.rollout_buffer.minibatches(self.batch_size, self.policy.generator):
            losses = differentiate(self.policy, self.rollout_buffer.batch(frames), goal)
            stats["value_loss"].append(losses.value)
            if goal.actor:
                stats["approx_kl"].append(losses.kl)
                if self.target_kl is not None and losses.kl > 1.5 * self.target_kl:
                    return False
                stats["policy_gradient_loss"].append(losses.policy)
                stats["entropy_loss"].append(-losses.entropy)
                stats["clip_fraction"].append(losses.clipped)
            stats["loss"].append(losses.total(goal))
            th.nn.utils.clip_grad_norm_(self.policy.trainable, self.max_grad_norm)
            self.policy.optimizer.step()
        return True

    # -- everything a resumed run needs (see train.ppo.state) -------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """Plain numbers of the run, JSON-ready."""
        return {
            "num_timesteps": self.num_timesteps,
            "n_updates": self._n_updates,
            "trained_s": self.trained_s,
            "progress_remaining": self._current_progress_remaining,
            "episodes": list(self.ep_info_buffer or ()),
            "split": dict(self.split.seconds),
        }

    def set_counters(self, counters: dict[str, Any]) -> None:
        """Inverse of :meth:`counters`."""
        self.num_timesteps = int(counters["num_timesteps"])
        self._n_updates = int(counters["n_updates"])
        self.trained_s = float(counters["trained_s"])
        self._current_progress_remaining = float(counters["progress_remaining"])
        self.ep_info_buffer = deque(counters["episodes"], maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        self.split.seconds.update(counters["split"])

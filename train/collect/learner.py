"""PPO whose rollouts come from a cluster, one rollout ahead of the update.

While the learner updates on rollout n, the workers collect n + 1 with the weights from before that update. The
stored probabilities are those of the policy that acted, so the ratio of PPO's objective stays exact; the lag is one
update, fixed, and therefore as reproducible as no lag.
"""

from __future__ import annotations

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from train.collect.workers import RayCollector, Rollout, Weights
from train.ppo.buffer import SMDPRolloutBuffer
from train.ppo.learner import DispatchPPO


class RemotePPO(DispatchPPO):
    """:class:`train.ppo.learner.DispatchPPO` on a :class:`train.collect.workers.RayCollector`."""

    def _fill(
        self, env: VecEnv, callback: BaseCallback, buffer: SMDPRolloutBuffer, n_steps: int, use_masking: bool
    ) -> th.Tensor | None:
        assert isinstance(env, RayCollector)
        number = self.num_timesteps // (n_steps * self.n_envs)
        if not env.busy:
            env.begin(self._weights(), number)
        with self.split.phase("wait"):
            parts = env.take()
        with self.split.phase("copy"):
            self._store(parts, buffer)
        buffer.pos, buffer.full = n_steps, True
        self.num_timesteps += n_steps * self.n_envs
        if not callback.on_step():
            return None
        last = np.concatenate([part.values for part in parts])
        if self._n_updates == 0:
            self._fit_value_scale(buffer)
            last = last * float(self.policy.value_scale) + float(self.policy.value_shift)
        env.begin(self._weights(), number + 1)
        return th.from_numpy(last)

    def _weights(self) -> Weights:
        return {name: value.detach().numpy().copy() for name, value in self.policy.state_dict().items()}

    def _store(self, parts: list[Rollout], buffer: SMDPRolloutBuffer) -> None:
        """Put every worker's columns side by side."""
        first = 0
        for part in parts:
            width = len(part.values)
            for name, column in part.columns.items():
                getattr(buffer, name)[:, first : first + width] = column
            self._update_info_buffer(part.infos)
            first += width
        self._last_obs = np.concatenate([part.observations for part in parts])
        self._last_episode_starts = np.concatenate([part.starts for part in parts])
        self.clock_s = np.concatenate([part.clock_s for part in parts])

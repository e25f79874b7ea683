"""A small vectorised dispatch problem with the interface of the real one, and a network for it.

K servers with queues; each step one job arrives, the action is the server. The reward is +1 when the
job's wait stays below a limit. Arrivals come from a stream shared by the environments of a group.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from policies.network.scoring import MASKED, Scores

C, F = 3, 4


class StubEnv(VecEnv):
    """Complete state in :meth:`env_state`, so that a resumed run can be compared bit for bit."""

    render_mode = None

    def __init__(
        self,
        n_envs: int = 16,
        *,
        seed: int = 0,
        k: int = 4,
        groups: int = 4,
        episode: int = 50,
        c: int = C,
        f: int = F,
    ) -> None:
        self.n_candidates, self.n_context, self.n_features = k, c, f
        self.beta, self.episode = 0.2, episode
        super().__init__(
            n_envs,
            spaces.Box(-np.inf, np.inf, (c + k * f,), np.float32),
            spaces.Discrete(k),
        )
        self.group = np.arange(n_envs) % groups
        self.groups, self.seed_value = groups, seed
        self.round = np.zeros(n_envs, np.int64)
        self.step_no = np.zeros(n_envs, np.int64)
        self.queue = np.zeros((n_envs, k))
        self.total = np.zeros(n_envs)
        self.elapsed_s = np.zeros(n_envs)
        self.speed = np.linspace(0.5, 1.5, k)
        self.obs = np.zeros((n_envs, c + k * f), np.float32)
        # arrivals of every (group, round, step), drawn once: (gap, size, closed server)
        rng = np.random.default_rng(seed)
        self.gaps = rng.exponential(0.3, (groups, 64, episode))
        self.sizes = rng.exponential(1.0, (groups, 64, episode))
        self.closed = rng.integers(0, k, (groups, 64, episode))
        self.step_no[:] = np.arange(n_envs) * episode // n_envs  # staggered ends

    @property
    def trace(self) -> NDArray[np.int64]:
        return self.group * 1_000_000 + self.round

    def _at(self, table: NDArray[Any]) -> NDArray[Any]:
        return table[self.group, self.round % 64, self.step_no]  # type: ignore[no-any-return]

    def _observe(self) -> NDArray[np.float32]:
        c, k, f = self.n_context, self.n_candidates, self.n_features
        self.obs[:, 0] = self._at(self.sizes)
        self.obs[:, 1] = 1.0
        self.obs[:, 2] = self.queue.mean(1)
        rows = self.obs[:, c:].reshape(self.num_envs, k, f)
        rows[..., 0] = 1.0
        rows[..., 1] = self.queue / self.speed
        rows[..., 2] = self._at(self.sizes)[:, None] / self.speed
        rows[..., 3] = self.speed
        return self.obs.copy()

    def action_masks(self) -> NDArray[np.bool_]:
        masks = np.ones((self.num_envs, self.n_candidates), bool)
        masks[np.arange(self.num_envs), self._at(self.closed)] = False
        return masks

    def reset(self) -> NDArray[np.float32]:
        return self._observe()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        rows = np.arange(self.num_envs)
        assert self.action_masks()[rows, self.actions].all(), "a masked server was chosen"
        wait = (self.queue[rows, self.actions] + self._at(self.sizes)) / self.speed[self.actions]
        rewards = (wait < 1.5).astype(np.float32) - 0.5
        self.queue[rows, self.actions] += self._at(self.sizes)
        gap = self._at(self.gaps)
        np.maximum(self.queue - gap[:, None] * self.speed, 0.0, out=self.queue)
        self.elapsed_s[:] = gap
        self.total += rewards
        self.step_no += 1
        dones = self.step_no == self.episode
        infos: list[dict[str, Any]] = [{}] * self.num_envs
        if dones.any():
            self.step_no[dones] = self.episode - 1
            last = self._observe()
            for i in np.flatnonzero(dones):
                infos[i] = {
                    "terminal_observation": last[i],
                    "TimeLimit.truncated": True,
                    "episode": {"r": float(self.total[i]), "l": self.episode, "t": 0.0},
                    "attainment": float(self.total[i] / self.episode + 0.5),
                }
            self.step_no[dones], self.queue[dones], self.total[dones] = 0, 0.0, 0.0
            self.round[dones] += 1
        return self._observe(), rewards, dones, infos

    def env_state(self) -> bytes:
        return json.dumps({n: getattr(self, n).tolist() for n in ("round", "step_no", "queue", "total")}).encode()

    def set_env_state(self, state: bytes) -> None:
        for name, value in json.loads(state).items():
            getattr(self, name)[:] = value

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class StubNetwork(nn.Module):
    """Frozen base score (shortest wait) plus a residual that starts at zero."""

    def __init__(self, hidden: int = 16, c: int = C, f: int = F) -> None:
        super().__init__()
        self.c, self.f = c, f
        self.base = nn.Parameter(th.zeros(f), requires_grad=False)
        self.base[1] = -4.0
        self.base[2] = -4.0
        self.encode = nn.Linear(c + f, hidden)
        self.score = nn.Linear(hidden, 1)
        self.value = nn.Linear(hidden + c, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, observations: th.Tensor, mask: th.Tensor) -> Scores:
        batch, k = mask.shape
        context = observations[:, : self.c]
        candidates = observations[:, self.c :].reshape(batch, k, self.f)
        x = th.cat([context.unsqueeze(1).expand(-1, k, -1), candidates], -1)
        hidden = self.encode(x).relu()
        live = mask.unsqueeze(-1)
        pooled = (hidden * live).sum(1) / live.sum(1).clamp(min=1)
        value = self.value(th.cat([pooled, context], -1)).squeeze(-1)
        logits = candidates @ self.base + self.score(hidden).squeeze(-1)
        return Scores(logits.masked_fill(~mask, MASKED), value)

"""The rollout buffer of a semi-Markov decision process, preallocated and time-major.

Decisions come at irregular times, so the discount between two of them is exp(-beta x elapsed seconds) and
not a constant per step (Bradtke & Duff 1995, semi-MDP; GAE as in Schulman et al. 2016, eq. 16, with that
discount).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer

from train.ppo.objective import Batch


class SMDPRolloutBuffer(MaskableRolloutBuffer):
    """Rollouts of ``buffer_size`` (T) steps of ``n_envs`` (N) environments, discounted by elapsed time.

    Arrays are allocated once and are (T, N) or (T, N, width); a collector writes row ``pos`` in place.
    ``elapsed_s[t]`` is the simulated time from decision t to decision t + 1. ``trace`` names the arrival
    sequence an environment was on and ``clock_s`` its simulated time since the episode began.

    :param beta: discount rate in 1/s
    :param slice_s: width in seconds of the time slices of the input-driven baseline; 0 turns it off
    """

    actions: NDArray[np.int64]
    action_masks: NDArray[np.bool_]
    elapsed_s: NDArray[np.float64]
    clock_s: NDArray[np.float64]
    trace: NDArray[np.int64]

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        device: th.device | str = "cpu",
        gae_lambda: float = 0.95,
        gamma: float = 1.0,
        n_envs: int = 1,
        *,
        beta: float,
        slice_s: float = 0.0,
    ) -> None:
        self.beta, self.slice_s = beta, slice_s
        self.mask_dims = int(action_space.n)
        self._allocated = False
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Rewind; memory is kept."""
        self.pos, self.full, self.generator_ready = 0, False, True
        if self._allocated:
            return
        shape = (self.buffer_size, self.n_envs)
        assert self.observation_space.shape is not None
        self.observations = np.zeros((*shape, *self.observation_space.shape), np.float32)
        self.action_masks = np.zeros((*shape, self.mask_dims), np.bool_)
        self.actions = np.zeros(shape, np.int64)
        self.trace = np.zeros(shape, np.int64)
        for name in ("rewards", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(self, name, np.zeros(shape, np.float32))
        self.elapsed_s, self.clock_s = np.zeros(shape), np.zeros(shape)
        self._allocated = True

    def discount(self) -> NDArray[np.float32]:
        """Discount from each decision to the next, (T, N), in (0, 1]."""
        return np.exp(-self.beta * self.elapsed_s).astype(np.float32)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: NDArray[np.bool_]) -> None:
        """Fill ``advantages`` (GAE) and ``returns``.

        delta_t = r_t + g_t V_{t+1} - V_t and A_t = delta_t + g_t lambda A_{t+1}, g_t = exp(-beta elapsed_t);
        nothing flows back over the start of an episode.

        :param last_values: (N,) value of the observation after the last step
        :param dones: (N,) whether the last step ended an episode
        """
        next_values = last_values.detach().cpu().numpy().reshape(-1)
        alive = 1.0 - dones.astype(np.float32)
        discount = self.discount()
        advantage = np.zeros(self.n_envs, np.float32)
        for step in range(self.buffer_size - 1, -1, -1):
            carry = discount[step] * alive
            advantage = (
                self.rewards[step] + carry * next_values - self.values[step] + carry * self.gae_lambda * advantage
            )
            self.advantages[step] = advantage
            next_values = self.values[step]
            alive = 1.0 - self.episode_starts[step]
        np.add(self.advantages, self.values, out=self.returns)
        if self.slice_s > 0.0:
            self.advantages -= arrival_baseline(self.advantages, self.trace, self.clock_s, self.slice_s)

    def bootstrap(
        self, step: int, ended: Mapping[int, dict[str, Any]], values: Callable[[th.Tensor], th.Tensor]
    ) -> None:
        """A time limit is no end of the world: add the discounted value of where an episode was cut after ``step``.

        :param ended: by environment, what SB3's contract says of its end
        :param values: of observations (B, D)
        """
        cut = [i for i, info in ended.items() if info.get("TimeLimit.truncated", False)]
        if cut:
            terminal = np.stack([ended[i]["terminal_observation"] for i in cut])
            later = values(th.from_numpy(terminal)).numpy()
            self.rewards[step, cut] += np.exp(-self.beta * self.elapsed_s[step, cut]) * later

    def flat(self, name: str) -> th.Tensor:
        """One of the arrays as a tensor of T x N frames; shares memory."""
        array = getattr(self, name)
        return th.from_numpy(array.reshape(-1, *array.shape[2:]))

    def minibatches(self, size: int, generator: th.Generator) -> Iterator[th.Tensor]:
        """A random permutation of all T x N frames in parts of ``size``; the last one may be smaller."""
        yield from th.randperm(self.buffer_size * self.n_envs, generator=generator).split(size)

    def batch(self, frames: th.Tensor) -> Batch:
        """The frames of these numbers."""
        names = ("observations", "action_masks", "actions", "log_probs", "advantages", "returns")
        return Batch(*(self.flat(name)[frames] for name in names))


def arrival_baseline(
    advantages: NDArray[np.float32],
    trace: NDArray[np.int64],
    clock_s: NDArray[np.float64],
    slice_s: float,
) -> NDArray[np.float32]:
    """What the arrivals alone explain: the mean advantage of *other* environments on the same arrivals.

    Input-driven baseline (Mao et al. 2018, arXiv 1807.02264, section 4): frames are put in cells of the same
    arrival sequence and the same slice of simulated time, and an environment's own frames are left out of its
    mean so that the policy gradient stays unbiased. A cell with one environment has baseline 0.

    :param advantages: (T, N)
    :param trace: (T, N) identity of the arrival sequence
    :param clock_s: (T, N) seconds since the episode began
    :returns: (T, N) baseline to subtract
    """
    n_envs = advantages.shape[1]
    slices = (clock_s / slice_s).astype(np.int64).ravel()
    _, trace_index = np.unique(trace.ravel(), return_inverse=True)
    keys = trace_index * (int(slices.max()) + 1) + slices
    _, cell = np.unique(keys, return_inverse=True)
    env = np.broadcast_to(np.arange(n_envs), advantages.shape).ravel()
    own = cell * n_envs + env
    flat = advantages.ravel().astype(np.float64)
    total, count = np.bincount(cell, flat), np.bincount(cell)
    own_total, own_count = np.bincount(own, flat), np.bincount(own)
    others = count[cell] - own_count[own]
    mean = (total[cell] - own_total[own]) / np.maximum(others, 1)
    return np.where(others > 0, mean, 0.0).reshape(advantages.shape).astype(np.float32)

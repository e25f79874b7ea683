"""The semi-Markov buffer against stable-baselines3's own GAE, and the input-driven baseline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

from train.ppo.buffer import SMDPRolloutBuffer, arrival_baseline

OBS, ACT = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)


def fill(buffer: RolloutBuffer, seed: int) -> tuple[th.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (buffer.buffer_size, buffer.n_envs)
    buffer.rewards[:] = rng.normal(size=shape)
    buffer.values[:] = rng.normal(size=shape)
    buffer.episode_starts[:] = rng.random(shape) < 0.2
    return th.from_numpy(rng.normal(size=shape[1]).astype(np.float32)), rng.random(shape[1]) < 0.3


@given(st.integers(0, 10_000), st.floats(0.01, 3.0), st.floats(0.05, 2.0), st.floats(0.0, 1.0))
def test_constant_intervals_give_sb3s_advantages(seed: int, dt: float, beta: float, lam: float) -> None:
    gamma = math.exp(-beta * dt)
    theirs = RolloutBuffer(12, OBS, ACT, "cpu", gae_lambda=lam, gamma=gamma, n_envs=5)
    ours = SMDPRolloutBuffer(12, OBS, ACT, "cpu", gae_lambda=lam, n_envs=5, beta=beta)
    last, dones = fill(theirs, seed)
    fill(ours, seed)
    ours.elapsed_s[:] = dt
    theirs.compute_returns_and_advantage(last, dones)
    ours.compute_returns_and_advantage(last, dones)
    np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-4, atol=1e-4)


def test_irregular_intervals_discount_by_elapsed_time() -> None:
    """With lambda 1 the return is the sum of rewards discounted by exp(-beta t)."""
    buffer = SMDPRolloutBuffer(4, OBS, ACT, gae_lambda=1.0, n_envs=1, beta=0.5)
    buffer.rewards[:, 0] = [1.0, 2.0, 3.0, 4.0]
    buffer.elapsed_s[:, 0] = [0.1, 2.0, 0.0, 0.7]
    buffer.compute_returns_and_advantage(th.tensor([10.0]), np.array([False]))
    times = np.array([0.0, 0.1, 2.1, 2.1, 2.8])
    expected = (np.array([1, 2, 3, 4, 10.0]) * np.exp(-0.5 * times)).sum()
    assert buffer.returns[0, 0] == pytest.approx(expected, rel=1e-5)


def test_batches_hold_every_frame_once() -> None:
    buffer = SMDPRolloutBuffer(6, OBS, ACT, n_envs=5, beta=0.1)
    buffer.actions[:] = np.arange(30).reshape(6, 5)
    buffer.observations[..., 0] = buffer.actions
    seen = []
    for frames in buffer.minibatches(7, th.Generator().manual_seed(1)):
        batch = buffer.batch(frames)
        assert (batch.observations[:, 0] == batch.actions).all()
        seen += batch.actions.tolist()
    assert sorted(seen) == list(range(30))


def test_memory_is_reused() -> None:
    buffer = SMDPRolloutBuffer(6, OBS, ACT, n_envs=5, beta=0.1)
    before = buffer.observations
    buffer.reset()
    assert buffer.observations is before


def test_arrival_baseline_is_the_mean_of_the_others() -> None:
    advantages = np.array([[1.0, 3.0, 8.0], [5.0, 7.0, 9.0]], np.float32)
    trace = np.array([[0, 0, 1], [0, 0, 1]])
    clock = np.array([[0.0, 0.1, 0.0], [0.9, 1.2, 0.5]])
    got = arrival_baseline(advantages, trace, clock, 1.0)
    # cell (0, slice 0): env 0 twice (1, 5) and env 1 once (3); env 1's second frame is alone in slice 1
    np.testing.assert_allclose(got, [[3.0, 3.0, 0.0], [3.0, 0.0, 0.0]])


def test_arrival_baseline_removes_what_arrivals_explain() -> None:
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(0, 10, (50, 1)), 16, axis=1)
    own = rng.normal(0, 1, (50, 16))
    advantages = (shared + own).astype(np.float32)
    clock = np.repeat(np.arange(50.0)[:, None], 16, axis=1)
    centred = advantages - arrival_baseline(advantages, np.zeros((50, 16), int), clock, 1.0)
    assert centred.std() < 0.15 * advantages.std()

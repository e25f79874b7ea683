"""Environments in processes behave as the same environments in this process."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from dispatch_stub import StubEnv, StubNetwork

from train.collector import ProcessVecEnv
from train.config import TrainConfig
from train.ppo import DispatchPPO


def make(worker: int, n_envs: int = 8) -> StubEnv:
    return StubEnv(n_envs, seed=100 + worker)


def first_allowed(masks: np.ndarray) -> np.ndarray:
    return masks.argmax(1)


def test_steps_equal_those_of_the_same_environments_here() -> None:
    here = [make(0), make(1)]
    there = ProcessVecEnv(make, 2)
    try:
        np.testing.assert_array_equal(there.reset(), np.concatenate([env.reset() for env in here]))
        for _ in range(60):  # longer than an episode
            masks = np.concatenate([env.action_masks() for env in here])
            np.testing.assert_array_equal(there.action_masks(), masks)
            np.testing.assert_array_equal(there.trace, np.concatenate([env.trace for env in here]))
            actions = first_allowed(masks)
            obs, rewards, dones, infos = there.step(actions)
            parts = [env.step(part) for env, part in zip(here, np.split(actions, 2), strict=True)]
            for got, index in ((obs, 0), (rewards, 1), (dones, 2)):
                np.testing.assert_array_equal(got, np.concatenate([part[index] for part in parts]))
            np.testing.assert_array_equal(there.elapsed_s, np.concatenate([env.elapsed_s for env in here]))
            expected = [info for part in parts for info in part[3]]
            assert [info.get("episode") for info in infos] == [info.get("episode") for info in expected]
    finally:
        there.close()


def test_state_travels_and_learning_is_deterministic() -> None:
    config = TrainConfig(n_envs=8, groups=4, n_steps=16, batch_size=64)
    results = []
    for _ in range(2):
        env = ProcessVecEnv(partial(make, n_envs=4), 2)
        try:
            model = DispatchPPO(env, StubNetwork, config, seed=1)
            model.learn(8 * 16 * 4)
            results.append(np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()]))
            state, before = env.env_state(), env.trace.copy()
            env.step(first_allowed(env.action_masks()))
            env.set_env_state(state)
            np.testing.assert_array_equal(env.trace, before)
            with pytest.raises(ValueError, match="processes"):
                env.set_env_state(state[: 8 + int.from_bytes(state[:8], "little")])
        finally:
            env.close()
    np.testing.assert_array_equal(results[0], results[1])


def test_close_ends_the_processes() -> None:
    env = ProcessVecEnv(make, 1)
    process = env._processes[0]
    env.close()
    assert not process.is_alive()
    env.close()  # twice is harmless

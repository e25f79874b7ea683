"""Environments in processes behave as the same environments in this process."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from dispatch_stub import StubEnv, StubNetwork

from env.scenario import Scenario
from train.collector import ProcessVecEnv, own_traces
from train.config import TrainConfig
from train.ppo import DispatchPPO
from train.run import _environments
from train.search.rule import SearchResult


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
            traces = [own_traces(env.trace, worker) for worker, env in enumerate(here)]
            np.testing.assert_array_equal(there.trace, np.concatenate(traces))
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


def test_processes_play_the_real_environment_as_it_plays_here() -> None:
    scenario = Scenario.load("tiny-4xa100")
    base = SearchResult("linear_score", {}, scenario.reference_rate, 0.0, 0.0, 0, 0, 0.0, "none")
    settings = {"n_envs": 4, "groups": 2, "n_requests": 40, "rates": (50.0, 100.0), "beta": 0.1, "seed": 1}
    build = partial(_environments, base=base, scenario=scenario, **settings)
    here, there = [build(0), build(1)], ProcessVecEnv(build, 2)
    try:
        np.testing.assert_array_equal(there.reset(), np.concatenate([env.reset() for env in here]))
        ended = 0
        for _ in range(60):  # longer than an episode
            masks = there.action_masks().copy()
            np.testing.assert_array_equal(masks, np.concatenate([env.action_masks() for env in here]))
            actions = first_allowed(masks)
            obs, rewards, dones, infos = there.step(actions)
            parts = [env.step(part) for env, part in zip(here, np.split(actions, 2), strict=True)]
            for got, index in ((obs, 0), (rewards, 1), (dones, 2)):
                np.testing.assert_array_equal(got, np.concatenate([part[index] for part in parts]))
            np.testing.assert_array_equal(there.elapsed_s, np.concatenate([env.elapsed_s for env in here]))
            assert [info.get("episode") for info in infos] == [i.get("episode") for part in parts for i in part[3]]
            ended += int(dones.sum())
        assert ended >= 8
        assert len(np.unique(there.trace)) == 4  # two groups in each process, none shared between them
    finally:
        there.close()

"""``slalom/Dispatch-v0`` keeps gymnasium's and stable-baselines3's contracts and can be learned on."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import env  # noqa: F401  (registers the environment)
from engine.core.columns import Kind
from env.gym.dispatch_env import DispatchEnv

SCENARIOS = ["azure-conv-4xa100", "azure-code-mux-4xa100", "classes-6xa100", "mooncake-pd-8xh100", "tiny-4xa100"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gymnasium_and_stable_baselines3_accept_the_environment(scenario: str) -> None:
    made = gym.make("slalom/Dispatch-v0", scenario=scenario, n_requests=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The observation space is wide on purpose: columns are clipped ratios, not pixels in [0, 255].
        warnings.filterwarnings("ignore", message=".*render.*")
        gymnasium_check(made.unwrapped, skip_render_check=True)
    sb3_check(made.unwrapped, warn=False, skip_render_check=True)


def _play(dispatch: DispatchEnv, seed: int, steps: int = 60) -> tuple[np.ndarray, list[float]]:
    rng = np.random.default_rng(0)
    observation, info = dispatch.reset(seed=seed)
    seen, rewards = [observation], []
    for _ in range(steps):
        assert info["action_mask"].any()
        np.testing.assert_array_equal(info["action_mask"], dispatch.action_masks())
        action = int(rng.choice(np.flatnonzero(info["action_mask"])))
        observation, reward, terminated, truncated, info = dispatch.step(action)
        assert not terminated
        assert dispatch.observation_space.contains(observation)
        assert reward <= 0.0
        assert info["elapsed_s"] >= 0.0
        seen.append(observation)
        rewards.append(reward)
        if truncated:
            assert 0.0 <= info["attainment"] <= 1.0
            break
    return np.stack(seen), rewards


def test_a_seed_fixes_the_whole_episode_and_another_seed_changes_it() -> None:
    dispatch = DispatchEnv("azure-conv-4xa100", n_requests=50)
    a, rewards_a = _play(dispatch, seed=7)
    b, rewards_b = _play(dispatch, seed=7)
    c, _ = _play(dispatch, seed=8)
    np.testing.assert_array_equal(a, b)
    assert rewards_a == rewards_b
    assert a.shape != c.shape or not np.array_equal(a, c)


def test_every_kind_of_decision_comes_up_where_the_scenario_has_it() -> None:
    for scenario, kinds in (
        ("classes-6xa100", {Kind.PLACE_PREFILL, Kind.PLACE_DECODE, Kind.REALLOCATE}),
        ("azure-code-mux-4xa100", {Kind.PLACE_PREFILL, Kind.TUNE}),
    ):
        observations, _ = _play(DispatchEnv(scenario, n_requests=80), seed=1, steps=400)
        assert {Kind(int(k)) for k in observations[:, :4].argmax(axis=1)} == kinds
        np.testing.assert_array_equal(observations[:, :4].sum(axis=1), 1.0)


@pytest.mark.slow
def test_maskable_ppo_of_sb3_contrib_trains_on_it() -> None:
    import torch
    from sb3_contrib import MaskablePPO
    from stable_baselines3.common.logger import Logger

    torch.set_num_threads(1)
    dispatch = gym.make("slalom/Dispatch-v0", scenario="classes-6xa100", n_requests=50)
    model = MaskablePPO("MlpPolicy", dispatch, n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu")
    model.set_logger(Logger(None, []))  # its own leaves a folder behind
    model.learn(192)
    observation, info = dispatch.reset(seed=3)
    action, _ = model.predict(observation, action_masks=info["action_mask"], deterministic=True)
    assert info["action_mask"][int(action)]

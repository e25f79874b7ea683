"""The environment of a planner's network: it is the planner's own day, seen and answered as the network would."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env

import env  # noqa: F401 - registers the environments
from engine.errors import SlalomError
from env.gym.control_env import ControlVecEnv
from env.scenario import Scenario
from env.surrogate.simulate import bind_policy, simulate
from policies.rules.parts.shift import SHIFTS, pack
from policies.rules.planner import shifted
from train.control.shifting import ShiftNetwork


@pytest.fixture(scope="module")
def brief() -> Scenario:
    """Half-hour days of six instances."""
    return Scenario.load("daynight-70b-30min").with_overrides({"workload.duration_s": 1800.0})


def test_gymnasium_finds_nothing_wrong(brief: Scenario) -> None:
    made = gymnasium.make("slalom/Control-v0", scenario=brief, rate=3.0)
    check_env(made.unwrapped, skip_render_check=True)
    _, info = made.reset(seed=1)
    assert info["action_mask"].shape == (len(SHIFTS),)
    _, _, terminated, truncated, info = made.step(0)
    assert (terminated, truncated) == (False, False)
    assert info["elapsed_s"] == pytest.approx(10.0, abs=1.5)


def lived(world: ControlVecEnv, act: Any) -> np.ndarray:
    """Requests of the first day as they stand at its last step."""
    seen, requests = world.reset(), world.episodes.states[0].req.copy()
    while True:
        seen, _, done, _ = world.step(np.array([act(seen, world.action_masks())]))
        if done[0]:
            return requests
        requests = world.episodes.states[0].req.copy()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_what_is_learned_on_is_what_is_served(brief: Scenario, seed: int | None) -> None:
    """The network in torch on the environment's observations does what the rule does with its weights, to the tick."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed or 0)
        network = ShiftNetwork()
        for weights in network.out.parameters() if seed is not None else ():
            th.nn.init.normal_(weights, std=3.0)
    world = ControlVecEnv(brief, 1, rate=4.0, seed=3)
    trace = world.episodes.requests(0)
    chosen = []

    def act(seen: np.ndarray, mask: np.ndarray) -> int:
        with th.no_grad():
            chosen.append(int(network(th.from_numpy(seen), th.from_numpy(mask)).logits.argmax()))
        return chosen[-1]

    practised = lived(world, act)
    served = simulate(brief, shifted(bind_policy("planner", brief), pack(network.arrays())), rate=4.0, trace=trace).req
    for stamp in ("first_token", "finished"):
        known = practised[stamp] >= 0
        assert known.mean() > 0.9
        np.testing.assert_array_equal(practised[stamp][known], served[stamp][known])
    assert (set(chosen) == {0}) == (seed is None)


def test_rewards_are_misses_and_each_counts_once(brief: Scenario) -> None:
    world = ControlVecEnv(brief, 1, rate=5.0, seed=0, horizon_s=1e12)
    world.reset()
    total, steps = 0.0, 0
    while True:
        _, reward, done, _ = world.step(np.array([0]))
        if done[0]:
            break
        total, steps = total - float(reward[0]), steps + 1
        assert total >= world.buffers.missed[0] - 1e-3  # what has waited too long counts again
        if steps == 40:
            assert total == pytest.approx(world.buffers.missed[0], abs=1e-3)
    assert 170 <= steps <= 190
    assert total > 100.0


def test_shifts_that_leave_a_phase_to_nobody_are_masked_and_come_to_nothing() -> None:
    apart = Scenario.load("daynight-70b-30min").with_overrides(
        {"cluster.0.count": 1, "cluster.1.count": 2, "decisions.roles": ["prefill", "decode"]}
    )
    world = ControlVecEnv(apart, 1, rate=1.5, seed=0)
    world.reset()
    mask = dict(zip(SHIFTS, world.action_masks()[0].tolist(), strict=True))
    assert mask[0]
    assert not (mask[-2] and mask[2])
    first = world.step(np.array([int(np.flatnonzero(~world.action_masks()[0])[0])]))[0]
    world.reset()
    np.testing.assert_array_equal(first, world.step(np.array([0]))[0])


def test_what_it_cannot_do_is_said(brief: Scenario) -> None:
    with pytest.raises(SlalomError, match="length of an episode"):
        ControlVecEnv(Scenario.load("azure-conv-4xa100"), 1)
    with pytest.raises(SlalomError, match="a planner of roles is one"):
        ControlVecEnv(brief.with_overrides({"routers": 2}), 1)
    with pytest.raises(SlalomError, match=r"decisions\.reallocate"):
        ControlVecEnv(brief.with_overrides({"decisions": {}}), 1)

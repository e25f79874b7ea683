"""``SlalomVecEnv``: the VecEnv contract, masks, rewards, time, groups and resuming."""

from __future__ import annotations

import numpy as np
import pytest

from env.gym.vector_env import SlalomVecEnv
from env.scenario import Scenario
from env.surrogate import episodes
from env.surrogate.arena import build_trace

TINY_BETA = 1e-12


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario.load("classes-6xa100")


def make(scenario: Scenario, n: int = 4, **changes: object) -> SlalomVecEnv:
    options: dict = {"n_requests": 40, "seed": 3, "groups": 2, "rates": (20.0, 24.0)} | changes
    return SlalomVecEnv(scenario, n, **options)


def first_allowed(masks: np.ndarray) -> np.ndarray:
    return masks.argmax(axis=1)


def some_allowed(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.choice(np.flatnonzero(m)) for m in masks])


def test_shapes_types_and_masks_are_those_of_the_contract(scenario: Scenario) -> None:
    venv, rng = make(scenario), np.random.default_rng(0)
    observations = venv.reset()
    n_actions = venv.action_space.n
    ended = 0
    for _ in range(200):
        assert observations.shape == (4, *venv.observation_space.shape)
        assert observations.dtype == np.float32
        assert np.isfinite(observations).all()
        assert all(venv.observation_space.contains(x) for x in observations)
        masks = venv.action_masks()
        assert masks.shape == (4, n_actions)
        assert masks.dtype == np.bool_
        assert masks.any(axis=1).all()
        before = observations.copy()
        observations, rewards, dones, infos = venv.step(some_allowed(masks, rng))
        assert rewards.shape == dones.shape == (4,)
        assert rewards.dtype == np.float32
        assert dones.dtype == np.bool_
        assert len(infos) == 4
        assert not np.shares_memory(before, observations)
        for done, info, observation in zip(dones, infos, observations, strict=True):
            assert done == ("terminal_observation" in info)
            if done:
                ended += 1
                assert info["terminal_observation"].shape == observation.shape
                assert info["episode"]["l"] > 0
                assert isinstance(info["TimeLimit.truncated"], bool)
    assert ended > 0


def test_time_between_decisions_adds_up_to_simulated_time(scenario: Scenario) -> None:
    venv, rng = make(scenario, n=3, groups=3), np.random.default_rng(1)
    venv.reset()
    start = np.array([q.sim[0]["now"] for q in venv.episodes.sims]) * 1e-12
    total = np.zeros(3)
    running = np.ones(3, bool)
    while running.any():
        _, _, dones, infos = venv.step(some_allowed(venv.action_masks(), rng))
        total += np.where(running, venv.elapsed_s, 0.0)
        for i in np.flatnonzero(dones & running):
            assert start[i] + total[i] == pytest.approx(infos[i]["episode"]["t"], abs=1e-9)
        running &= ~dones


def test_without_discount_rewards_are_the_sealed_misses(scenario: Scenario) -> None:
    venv, rng = make(scenario, beta=TINY_BETA, rates=(200.0, 240.0), n_requests=400), np.random.default_rng(2)
    venv.reset()
    paid = np.zeros(4)
    running = np.ones(4, bool)
    missed = np.zeros(4)
    while running.any():
        _, rewards, dones, infos = venv.step(some_allowed(venv.action_masks(), rng))
        paid += np.where(running, rewards, 0.0)
        for i in np.flatnonzero(dones & running):
            assert infos[i]["episode"]["r"] == pytest.approx(paid[i], rel=1e-5)
        running &= ~dones
        missed = np.where(running, venv.buffers.missed, missed)
    assert (paid < 0).all(), "a cluster that loaded misses"
    # ``missed`` was read one step before the end, so the last step's misses are still to come.
    assert (-paid >= missed - 1e-3).all()


def test_clusters_of_a_group_share_their_arrivals_and_groups_differ(scenario: Scenario) -> None:
    venv = make(scenario)
    arrivals = [s.req["arrival"][: s.cluster[0]["n_requests"]] for s in venv.episodes.states]
    np.testing.assert_array_equal(venv.trace[[0, 2]], venv.trace[[1, 3]])
    assert venv.trace[0] != venv.trace[2]
    np.testing.assert_array_equal(arrivals[0], arrivals[1])
    np.testing.assert_array_equal(arrivals[2], arrivals[3])
    assert not np.array_equal(arrivals[0], arrivals[2])
    np.testing.assert_array_equal(venv.episodes.sims[0].true_share, venv.episodes.sims[1].true_share)
    observations = venv.reset()
    np.testing.assert_array_equal(observations[0], observations[1])
    for _ in range(30):
        observations, rewards, _, _ = venv.step(first_allowed(venv.action_masks()))
        np.testing.assert_array_equal(observations[0], observations[1])
        assert rewards[0] == rewards[1]


def _record(venv: SlalomVecEnv, steps: int = 120) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    seen = [venv.reset()]
    for _ in range(steps):
        observations, rewards, dones, _ = venv.step(some_allowed(venv.action_masks(), rng))
        seen += [observations, rewards, dones]
    return seen


def test_a_seed_fixes_everything_over_several_episodes(scenario: Scenario) -> None:
    a, b, c = (_record(make(scenario, seed=s, n_requests=20)) for s in (3, 3, 4))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(not np.array_equal(left, right) for left, right in zip(a, c, strict=True))


def test_an_episode_after_a_reset_in_the_middle_is_the_one_a_fresh_environment_plays(scenario: Scenario) -> None:
    used = make(scenario)
    used.reset()
    for _ in range(37):
        used.step(first_allowed(used.action_masks()))
    for left, right in zip(_record(used), _record(make(scenario)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_cluster_that_was_used_before_is_as_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of as many requests as the former one of the same cluster, but not as those of the others."""
    lengths = iter([40, 70, 70])
    monkeypatch.setattr(
        episodes,
        "build_trace",
        lambda scenario, rate, n, seed, split: build_trace(scenario, rate, next(lengths), seed, split),
    )
    ordered = Scenario.load("classes-6xa100").with_overrides({"cluster.0.order": "on_time"})
    venv = make(ordered, n=2, n_requests=70, rates=(200.0, 240.0))
    venv.reset()
    for _ in range(30):
        venv.step(first_allowed(venv.action_masks()))
    venv.episodes.next(1)
    used, new = venv.episodes.states[1], venv.episodes._fresh(1)[0]
    for name in ("cluster", "inst", "lane", "req", "pool", "link", "lists", "cls", "due", "watch", "itl"):
        np.testing.assert_array_equal(getattr(used, name), getattr(new, name), err_msg=name)


def test_a_masked_action_is_replaced_by_the_first_allowed_one(scenario: Scenario) -> None:
    free, forced = make(scenario), make(scenario)
    free.reset()
    forced.reset()
    replaced = 0
    for _ in range(60):
        masks = free.action_masks().copy()
        wrong = np.where(masks.all(axis=1), 0, (~masks).argmax(axis=1))
        replaced += int((~masks).any())
        a = free.step(first_allowed(masks))
        b = forced.step(np.where(masks.all(axis=1), first_allowed(masks), wrong))
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
    assert replaced > 0


def test_resuming_goes_on_with_the_next_episodes(scenario: Scenario) -> None:
    first = make(scenario, n_requests=15)
    first.reset()
    for _ in range(150):
        first.step(first_allowed(first.action_masks()))
    numbers = first.episodes.number.copy()
    assert (numbers > 0).all()
    second = make(scenario, n_requests=15)
    second.set_env_state(first.env_state())
    observations = second.reset()
    np.testing.assert_array_equal(second.episodes.number, numbers + 1)
    for b in range(4):
        first.episodes.next(b)
    np.testing.assert_array_equal(first.episodes.trace_id, second.episodes.trace_id)
    np.testing.assert_array_equal(observations, first.reset())


def test_a_seed_takes_effect_at_the_next_reset(scenario: Scenario) -> None:
    used, fresh = make(scenario, n_requests=15), make(scenario, n_requests=15, seed=77)
    before = used.reset()
    for _ in range(60):
        used.step(first_allowed(used.action_masks()))
    assert used.seed(77) == [77, 78, 79, 80]
    np.testing.assert_array_equal(used.reset(), fresh.reset())
    for left, right in zip(_record(used), _record(fresh), strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(fresh.reset(), before)
    state = used.env_state()
    used.seed(5)
    used.set_env_state(state)  # a resumed sequence wins
    used.reset()
    assert used.episodes.seed == 77
    assert (used.episodes.number > 0).all()


def test_counting_blocks_instead_of_naming_them_changes_nothing() -> None:
    """Small pools under load, so that requests wait for blocks and are preempted."""
    scenario = Scenario.load("tiny-4xa100").with_overrides({f"cluster.{k}.kv_tokens": 6000 for k in range(1)})
    counted, named = (SlalomVecEnv(scenario, 4, n_requests=120, rates=(30.0, 40.0), seed=5) for _ in range(2))
    for state in (*named.episodes.states, named.episodes._blank(named.episodes._episode(0)[0])):
        assert state.cluster["counted"] == 1
        state.cluster["counted"] = 0
    seen = [env.reset() for env in (counted, named)]
    rng = np.random.default_rng(0)
    for _ in range(300):  # two episodes
        np.testing.assert_array_equal(*seen)
        actions = rng.integers(0, counted.n_candidates, 4)
        (first, *rest), (second, *others) = counted.step(actions), named.step(actions)
        seen = [first, second]
        for a, b in zip(rest[:2], others[:2], strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(state.block["ref"].any() for state in named.episodes.states)
    assert not any(state.block["ref"].any() for state in counted.episodes.states)

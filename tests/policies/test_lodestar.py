"""The online predictor: what it learns from queues that drain, what it then chooses, and that it forgets."""

from __future__ import annotations

import numpy as np
import pytest
from decisions import choose, instances, setting
from published import place

from policies import registry
from policies.rule import BoundPolicy
from policies.rules import lodestar


def bound(n: int = 2, kinds: tuple[int, ...] = (0, 0), **values: float) -> BoundPolicy:
    free = {"epsilon": 0.0, "forgetting": 1.0, "ridge": 1e-3, "warm_up": 8}
    return registry.get("lodestar").bind(free | values, setting(n, profile_of=kinds))


def predicted(policy: BoundPolicy, prompt: float, queue: float, model: int = 0) -> float:
    x = np.zeros(8)
    row = instances({"QUEUE_TOKENS": queue, "QUEUE_N": queue / 1000})
    lodestar._features(place(PROMPT=prompt), row, 0, x)
    return float(lodestar._predict(policy.memory, 1 + model * lodestar._MODEL, x))


def feed(policy: BoundPolicy, rounds: int, rate: tuple[float, float], seed: int = 0) -> list[int]:
    """Serve prompts one by one on two instances that compute ``rate`` tokens per second, and return the choices."""
    rng = np.random.default_rng(seed)
    now, work, chosen = 0.0, np.zeros(2), []
    for _ in range(rounds):
        step = rng.exponential(0.05)
        now, work = now + step, np.maximum(work - step * np.array(rate), 0.0)
        rows = instances(
            *({"QUEUE_TOKENS": w, "QUEUE_N": w / 1000, "OUTSTANDING": w, "PROFILE": k} for k, w in enumerate(work))
        )
        prompt = float(rng.integers(200, 3000))
        chosen.append(choose(policy, place(PROMPT=prompt, NOW_S=now), rows))
        work[chosen[-1]] += prompt
    return chosen


def test_before_it_has_learned_the_fewest_tokens_win() -> None:
    rows = instances({"OUTSTANDING": 50.0}, {"OUTSTANDING": 20.0})
    assert [choose(bound(), place(NOW_S=t), rows) for t in (0.0, 1.0)] == [1, 1]


def test_the_time_to_work_off_a_queue_is_learned_from_watching_it() -> None:
    policy = bound()
    feed(policy, 600, (20_000.0, 20_000.0))
    for prompt, queue in ((1000.0, 0.0), (2000.0, 3000.0), (500.0, 6000.0)):
        truth = (prompt + queue) / 20_000.0
        # an answer is only seen at the next decision, 50 ms later on average
        assert predicted(policy, prompt, queue) == pytest.approx(truth + 0.03, abs=0.05)


def test_the_faster_device_gets_the_longer_queue() -> None:
    policy = bound(kinds=(0, 1))
    chosen = feed(policy, 800, (40_000.0, 10_000.0))
    assert np.mean(np.array(chosen[400:]) == 0) > 0.65
    assert predicted(policy, 2000.0, 2000.0, 1) > 1.8 * predicted(policy, 2000.0, 2000.0, 0)
    rows = instances({"QUEUE_TOKENS": 3000, "QUEUE_N": 3}, {"QUEUE_TOKENS": 1000, "QUEUE_N": 1, "PROFILE": 1})
    assert choose(policy, place(PROMPT=1500, NOW_S=1e4), rows) == 0


def test_forgetting_follows_a_device_that_slows_down() -> None:
    policies = [bound(forgetting=forgetting) for forgetting in (0.99, 1.0)]
    for policy in policies:
        feed(policy, 600, (40_000.0, 40_000.0))
        policy.memory[1 + lodestar._MODEL :] = 0.0  # the queues start anew, what was learned stays
        feed(policy, 300, (15_000.0, 15_000.0), seed=1)
    quick, never = (predicted(policy, 2000.0, 2000.0) for policy in policies)
    truth = 4000 / 15_000 + 0.03  # seen at the next decision
    assert abs(quick - truth) < abs(never - truth)


def test_exploration_reaches_every_instance() -> None:
    policy = bound(epsilon=0.2)
    policy.memory[1] = 1e3  # trained, on nothing: all predictions equal
    rows = instances({}, {})
    chosen = [choose(policy, place(NOW_S=float(t)), rows) for t in range(2000)]
    assert 0.05 < np.mean(chosen) < 0.15  # ties go to row 0, half of the explored to row 1

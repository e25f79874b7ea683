"""A policy that hears a rule: it is the rule under a large bonus, the score alone under none."""

from __future__ import annotations

import numpy as np
import pytest
from decisions import network, random_decision, setting
from hypothesis import given
from hypothesis import strategies as st

from engine.core.columns import Kind
from engine.core.kinds import Role
from engine.core.policy import InstancePlan
from policies import registry
from policies.arrangement import resized
from policies.network import compiled, guided
from policies.network.normalise import default_normalisation


@pytest.mark.parametrize("name", ["round_robin", "tropical_code", "least_tokens"])
def test_a_large_bonus_makes_it_the_rule_and_none_the_score(name: str) -> None:
    rule = registry.get(name).bind({}, setting(4))
    net, rows = network(16, 3), 8
    scores = compiled.pack(net.arrays(), default_normalisation(), rows)
    cells = compiled.memory_cells(net.hidden, rows)
    follow, alone = (guided.pack(rule, np.full(4, bonus), scores) for bonus in (1e9, 0.0))
    memory, own = np.zeros(len(rule.memory) + cells), rule.memory.copy()
    rng = np.random.default_rng(1)
    for trial in range(80):
        ctx, table = random_decision(rng, Kind(trial % 2), 6)
        mask = (rng.random(6) < 0.7).astype(np.uint8)
        mask[rng.integers(6)] = 1
        want = rule.decide(ctx, table, mask, rule.params, own)
        assert guided.decide(ctx, table, mask, follow, memory) == want
        np.testing.assert_array_equal(memory[: len(own)], own)
        score = compiled.decide(ctx, table, mask, scores, np.zeros(cells))
        assert guided.decide(ctx, table, mask, alone, memory.copy()) == score


ROLES = st.lists(st.sampled_from(list(Role)), min_size=1, max_size=12)


@given(ROLES, st.integers(1, 70))
def test_a_resized_arrangement_keeps_its_shares_and_both_phases(roles: list[Role], n: int) -> None:
    plans = [InstancePlan(role=role) for role in roles]
    found = resized(plans, n)
    assert len(found) == n
    if n % len(plans) == 0:
        assert found == [plan for plan in plans for _ in range(n // len(plans))]
    for unable in (Role.PREFILL, Role.DECODE):
        if n > 1 and any(role != unable for role in roles):
            assert any(plan.role != unable for plan in found)

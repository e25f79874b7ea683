"""What a scenario says of roles binds everybody: rules, checkpoints, searches and plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.core.kinds import Role
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.surrogate.simulate import bind_policy, simulate
from eval.placement.placement import arrangements
from train.search.arrange import composed, random_plans
from train.search.space import Design

_APART = {"decisions.start_roles": []}


@pytest.fixture(scope="module")
def apart() -> Scenario:
    return Scenario.load("shift-pd-8xa100").with_overrides(_APART)


def test_what_other_roles_need_is_refused_by_name(apart: Scenario) -> None:
    for policy in ("muxwise", "chunked", "checkpoints/policies/shift-pd-8xa100"):
        with pytest.raises(SlalomError, match=r"role.*allows prefill, decode; add it to decisions\.start_roles"):
            bind_policy(policy, apart)
    assert bind_policy("arrow", apart).name == "arrow"
    mixed = replace(bind_policy("arrow", apart), arrangement=[InstancePlan(role=Role.MIXED)] * 8)
    with pytest.raises(SlalomError, match="mixed"):
        simulate(apart, mixed, rate=5.0, n_requests=20)
    designed = Design("arrow", plans=(InstancePlan(role=Role.MIXED),) * 8).bind(arena_of(apart).setting)
    with pytest.raises(SlalomError, match="mixed"):
        simulate(apart, designed, rate=5.0, n_requests=20)


def test_roles_of_the_cluster_may_be_kept(apart: Scenario) -> None:
    mixed = apart.with_overrides({"cluster.0.role": "mixed"})
    assert mixed.usable_roles() == {"prefill", "decode", "mixed"}
    assert bind_policy("chunked", mixed).name == "chunked"


def test_searches_and_plans_draw_from_the_roles_that_are_allowed(apart: Scenario) -> None:
    setting, rng = arena_of(apart).setting, np.random.default_rng(0)
    drawn = [plans for plans in (random_plans(setting, rng) for _ in range(60)) if plans is not None]
    used = {plan.role for plans in (*drawn, *composed(setting)) for plan in plans}
    assert used == {Role.PREFILL, Role.DECODE}
    assert {a.family for a in arrangements(apart, 8)} == {"disaggregated"}
    free = Scenario.load("shift-pd-8xa100")
    assert {a.family for a in arrangements(free, 8)} == {"mixed", "multiplexed", "hybrid", "disaggregated"}


def test_where_instances_differ_it_matters_which_of_them_does_what() -> None:
    def splits(name: str) -> set[tuple[int | None, ...]]:
        found = [tuple(plan.role for plan in plans) for plans in composed(arena_of(Scenario.load(name)).setting)]
        return {roles for roles in found if set(roles) == {Role.PREFILL, Role.DECODE} and roles.count(Role.DECODE) == 2}

    there, back = (Role.PREFILL,) * 2 + (Role.DECODE,) * 2, (Role.DECODE,) * 2 + (Role.PREFILL,) * 2
    one_of_each = (Role.PREFILL, Role.DECODE) * 2
    assert splits("fleet-2xa100-2xh100") == {there, back, one_of_each}
    assert splits("azure-conv-4xa100") == {there}


def test_each_kind_of_instance_gets_the_chunk_that_it_computes_in_time() -> None:
    slow, _, _, fast = next(
        plans
        for plans in composed(arena_of(Scenario.load("fleet-2xa100-2xh100")).setting)
        if [plan.role for plan in plans] == [Role.MIXED, Role.MIXED, Role.PREFILL, Role.MIXED]
    )
    assert fast.chunk_tokens > 2 * slow.chunk_tokens


def test_levers_of_role_changes_reach_the_core_and_older_hashes_stand() -> None:
    shift = Scenario.load("shift-pd-8xa100")
    both = shift.with_overrides({"decisions.at_once": 3, "decisions.drain": "hand_over"})
    cluster = arena_of(both).cluster(None, None).cluster[0]
    assert (cluster["at_once"], cluster["hand_over"]) == (3, 1)
    assert shift.hash() != both.hash()
    assert shift.hash() == both.with_overrides({"decisions.at_once": 1, "decisions.drain": "wait"}).hash()
    for change in ({"decisions.at_once": 2}, {"decisions.drain": "hand_over"}, {"decisions.start_roles": ["mixed"]}):
        with pytest.raises(SlalomError, match="nothing without reallocate"):
            Scenario.load("azure-conv-4xa100").with_overrides(change)
    with pytest.raises(SlalomError, match="no SM shares"):
        Scenario.load("distserve-13b-3xa100").with_overrides(
            {"decisions.reallocate": True, "decisions.roles": ["prefill", "multiplexed"]}
        )

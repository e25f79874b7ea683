"""Plans of fleets whose instances differ: each keeps its profile, its memory and its GPUs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from engine.errors import SlalomError
from engine.latency import Profile
from env.measure.contender import PointSettings
from env.measure.goodput import largest_rate
from env.scenario import Scenario
from eval.compare.static import _probes, _screened, search_static
from eval.placement.disaggregation import algorithm_1, algorithm_2, shares_met
from eval.placement.fleet import is_tradable, layouts
from eval.placement.placement import Arrangement, Effort, arrangements, measure, plan, variants

FLEET, OPT = "fleet-2xa100-2xh100", "distserve-13b-3xa100"
A100, H100 = "llama-8b-a100", "llama-8b-h100"
BUDGETS = {"chunk_tokens": 1, "prefill_tokens": 1, "batching": None, "split": "auto", "headroom": 1.0}


def fleet(**overrides: object) -> Scenario:
    return Scenario.load(FLEET).with_overrides(overrides)


def group(count: int, profile: str, **more: Any) -> dict[str, Any]:
    return {"count": count, "role": "mixed", "profile": profile} | more


def instances(scenario: Scenario) -> list[tuple[str | None, int | None, int, int]]:
    """What every instance is, whatever it does: profile, KV tokens, first GPU, pool; in order."""
    places = scenario.placements()
    return [(scenario.profile_names()[p.profile], p.group.kv_tokens, p.gpu, p.pool) for p in places]


@pytest.mark.parametrize(
    "cluster",
    [
        [group(2, A100), group(2, H100)],
        [group(1, H100), group(2, A100), group(1, H100)],
        [group(1, A100, kv_tokens=50_000), group(1, A100), group(1, H100, max_batch=64)],
        [group(2, "llama-70b-a100-tp8"), group(1, A100)],
    ],
)
def test_no_plan_uses_an_instance_that_the_fleet_lacks(cluster: list[dict[str, Any]]) -> None:
    scenario = fleet(cluster=cluster)
    listed = list(arrangements(scenario, scenario.n_gpus()))
    assert len({a.label for a in listed}) == len(listed)
    assert {"mixed", "hybrid", "disaggregated"} <= {a.family for a in listed}
    profiles = {name: Profile.load(name) for name in scenario.profile_names()}
    for a in listed:
        made = list(variants(a, profiles))
        assert len({v.label for v in made}) == len(made) > 0
        assert instances(a.applied(scenario)) == instances(scenario)
        for v in made:
            for old, new in zip(a.groups, v.groups, strict=True):
                assert new.model_copy(update=BUDGETS) == old.model_copy(update=BUDGETS)


def test_every_composition_is_there_once_and_each_can_serve() -> None:
    listed = [tuple((g.count, g.role, g.profile) for g in groups) for groups in layouts(fleet())]
    assert len(listed) == len(set(listed)) == 5 * 5 - 1 + 3 * 3 - 2
    assert listed[0] == ((2, "mixed", A100), (2, "mixed", H100))
    assert ((2, "mixed", A100), (1, "prefill", H100), (1, "multiplexed", H100)) in listed
    assert ((2, "decode", A100), (2, "prefill", H100)) in listed
    for groups in listed:
        roles = {role for _, role, _ in groups}
        assert roles != {"prefill"}
        assert roles == {"prefill", "decode"} or "decode" not in roles


def test_roles_that_the_scenario_does_not_allow_are_left_out() -> None:
    apart = {"reallocate": True, "roles": ["prefill", "decode"]}
    both = {"cluster.0.role": "prefill", "cluster.1.role": "decode", "decisions": apart}
    scenario = fleet(**both)
    assert {a.family for a in arrangements(scenario, 4)} == {"disaggregated"}


def test_large_fleets_are_split_in_coarser_steps() -> None:
    for cluster in (
        [group(16, A100), group(24, H100)],
        [group(8, A100), group(8, H100), group(8, A100, kv_tokens=9999)],
    ):
        scenario = fleet(cluster=cluster)
        listed = list(layouts(scenario))
        assert 20 < len(listed) <= 128
        for groups in listed:
            assert Counter(g.profile for g in groups for _ in range(g.count)) == Counter(
                g["profile"] for g in cluster for _ in range(g["count"])
            )


def test_budgets_may_differ_by_profile() -> None:
    profiles = {name: Profile.load(name) for name in (A100, H100)}

    def chunks(a: Arrangement) -> tuple[int, ...]:
        return tuple(g.chunk_tokens for g in a.groups if g.batching is None)

    first = next(iter(arrangements(fleet(), 4)))
    once = [v for v in variants(first, profiles) if chunks(v) == (256, 512)]
    assert (256, 2048) in {chunks(v) for v in variants(once[0], profiles)}
    multiplexed = next(a for a in arrangements(fleet(), 4) if a.family == "multiplexed")
    split = [tuple(g.split for g in v.groups) for v in variants(multiplexed, profiles)]
    own = [{share.sms for share in profiles[name].shares} | {"auto"} for name in (A100, H100)]
    assert all(a in own[0] and b in own[1] for a, b in split)


def test_plans_with_decode_apart_are_dispatched_by_role() -> None:
    for a in arrangements(fleet(), 4):
        apart = "decode" in {g.role for g in a.groups}
        assert a.policy[0] == ("distserve" if apart else "predicted_ttft")


def test_a_plan_of_a_fleet_holds_what_the_surrogate_says_and_no_less_than_all_mixed() -> None:
    scenario = fleet(**{"cluster.0.count": 1})
    result = plan(scenario, n_requests=120, seeds=1)
    best = result["best"]
    assert best["gpus"] == result["gpus"] == 3
    assert result["distserve"] is None
    own = fleet(cluster=best["cluster"], decisions={})
    assert instances(own) == [(name, None, place, place) for place, name in enumerate((A100, H100, H100))]
    dispatch = Arrangement(best["family"], own.cluster).policy
    again = largest_rate(
        lambda rate: shares_met(own, dispatch, rate, 120, (0,), "test")[0], own.reference_rate, 0.9, tolerance=0.01
    )
    assert best["goodput"] == again > 0.0
    mixed = next(iter(arrangements(scenario, 3)))
    assert best["goodput"] >= measure(scenario, mixed, 0.9, Effort(120, (0,), 0.01, "test")).rate


def test_a_static_plan_of_a_fleet_is_no_worse_than_all_mixed_on_a_small_budget() -> None:
    scenario, settings = fleet(), PointSettings(n_requests=200)
    found = search_static(
        scenario, 12, knee=40.0, factors=(1.0, 1.3), settings=settings, seeds=(0,), valid_seeds=1, finalists=12
    )
    profiles = [str(g["profile"]) for g in found.contender.cluster for _ in range(int(g["count"]))]
    assert profiles == [A100, A100, H100, H100]
    mixed = next(iter(arrangements(scenario, 4)))
    looked_at = {entry["arrangement"]: entry["final"] for entry in found.ranking}
    assert found.score >= looked_at[mixed.label]


def test_what_would_trade_instances_is_refused() -> None:
    scenario = fleet()
    with pytest.raises(SlalomError, match=r"gpus: got 6; .*keeps them: leave it out, or change its cluster"):
        plan(scenario, gpus=6)
    for algorithm in (algorithm_1, algorithm_2):
        with pytest.raises(SlalomError, match=r"cluster: .*plan such a fleet as it stands"):
            algorithm(scenario, 5.0)
    shared = fleet(cluster=[group(2, A100, share_gpu=True), group(2, H100)])
    with pytest.raises(SlalomError, match=r"cluster\.0\.share_gpu"):
        list(arrangements(shared, shared.n_gpus()))


def test_only_tensor_parallelism_can_be_traded() -> None:
    assert is_tradable(Scenario.load(OPT))
    assert not is_tradable(fleet())
    four = Scenario.load("azure-conv-4xa100")
    assert is_tradable(four)
    full = Profile.load(A100).kv_tokens
    same, less = [group(2, A100), group(2, A100, kv_tokens=full)], [group(2, A100), group(2, A100, kv_tokens=full // 2)]
    assert is_tradable(four.with_overrides({"cluster": same}))
    assert not is_tradable(four.with_overrides({"cluster": less}))


def test_the_objective_of_a_fleet_is_set_by_whoever_is_screened() -> None:
    """Neighbours in a fleet's list hold very different rates: the middle of a family says little of the others."""
    scenario, four = fleet(), Scenario.load("azure-conv-4xa100")
    listed = list(arrangements(scenario, 4))
    assert _screened(scenario, listed, 1000) == _probes(scenario, listed, 1000) == listed
    few = _screened(scenario, listed, 40)
    assert few == _probes(scenario, listed, 40)
    assert (few[0], len(few)) == (listed[0], 20)
    assert {a.family for a in few} == {a.family for a in listed}
    uniform = list(arrangements(four, 4))
    assert [a.family for a in _probes(four, uniform, 40)] == list(dict.fromkeys(a.family for a in uniform))

"""``engine: vllm`` and ``engine: llama_cpp``: a scenario with the levers of a router in front of such engines."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import yaml

from engine.core.columns import Kind
from engine.core.kinds import Batching, Order, RequestState, Role
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from env.live.replay import engine_state
from env.scenario import Scenario, scenarios_dir
from env.surrogate.arena import arena_of
from env.surrogate.simulate import bind_policy, simulate

PARTED = {"place_decode": True, "reallocate": True, "roles": ["prefill", "decode", "mixed"]}
GROUP = {"count": 2, "role": "mixed", "max_batch": 16, "kv_tokens": 4096}


def content(engine: str | None = "vllm", **changes: Any) -> dict[str, Any]:
    """A small scenario that leaves out all it can."""
    found: dict[str, Any] = yaml.safe_load((scenarios_dir() / "smollm2-2xcpu.yaml").read_text())
    del found["decisions"]
    found |= {"cluster": [dict(GROUP)], **changes}
    return found if engine is None else found | {"engine": engine}


def test_what_is_left_out_is_as_such_engines_have_it_and_what_is_said_stays() -> None:
    plain = Scenario.parse(content())
    assert (plain.decisions.hold, plain.observation_delay_s, plain.cluster[0].chunk_tokens) == (True, 0.005, 2048)
    said = content(decisions={"hold": False}, observation_delay_s=0.5, cluster=[GROUP | {"chunk_tokens": 512}])
    said_so = Scenario.parse(said)
    assert (said_so.decisions.hold, said_so.observation_delay_s, said_so.cluster[0].chunk_tokens) == (False, 0.5, 512)
    assert Scenario.parse(yaml.safe_load(plain.to_yaml())) == plain
    spec = arena_of(plain).specs[0]
    assert (spec.watermark, spec.whole_prompt, spec.pause_preempt) == (0.0, True, True)


def test_own_engines_are_what_they_were() -> None:
    without, own = Scenario.parse(content(None)), Scenario.parse(content("own"))
    assert without == own
    assert without.hash() == own.hash() != Scenario.parse(content("vllm")).hash()
    assert (own.decisions.hold, own.observation_delay_s, own.cluster[0].chunk_tokens) == (False, 0.0, 512)
    assert arena_of(own).specs[0].watermark > 0.0


@pytest.mark.parametrize(
    ("engine", "changes", "field"),
    [
        ("vllm", {"cluster": [GROUP | {"role": "prefill"}, GROUP]}, "cluster.0.role"),
        ("llama_cpp", {"cluster": [GROUP, GROUP | {"role": "decode"}]}, "cluster.1.role"),
        ("vllm", {"cluster": [GROUP | {"share_gpu": True}]}, "cluster.0.share_gpu"),
        ("vllm", {"cluster": [GROUP | {"batching": "prefill_first"}]}, "cluster.0.batching"),
        ("llama_cpp", {"cluster": [GROUP | {"order": "srf_preemptive"}]}, "cluster.0.order"),
        ("vllm", {"decisions": {"tune": True}}, "decisions.tune"),
        ("llama_cpp", {"decisions": {"place_decode": True}}, "decisions.place_decode"),
        ("llama_cpp", {"decisions": {"reallocate": True, "roles": ["prefill", "mixed"]}}, "decisions.reallocate"),
        ("vllm", {"decisions": {"reallocate": True, "roles": ["prefill", "mixed"]}}, "decisions.reallocate"),
        ("vllm", {"decisions": PARTED | {"drain": "hand_over"}}, "decisions.drain"),
    ],
)
def test_levers_that_a_router_has_not_are_refused_by_name(engine: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SlalomError) as refused:
        Scenario.parse(content(engine, **changes))
    assert refused.value.field.endswith(field)


def test_multiplexed_engines_are_refused_where_the_profile_would_do() -> None:
    changes = {"engine": "vllm", "decisions.place_decode": True}
    with pytest.raises(SlalomError, match=r"cluster\.0\.role.*multiplexed"):
        Scenario.load("azure-code-mux-4xa100").with_overrides(changes)
    shift = {"engine": "vllm", "decisions.start_roles": ["prefill", "multiplexed"]}
    with pytest.raises(SlalomError, match=r"decisions\.start_roles.*multiplexed"):
        Scenario.load("shift-pd-8xa100").with_overrides(shift)


def test_roles_are_for_engines_that_hand_kv_over_and_a_change_costs_the_drain_alone() -> None:
    parted = Scenario.parse(content(profile="llama-8b-a100", decisions=PARTED))
    assert parted.load_profiles()[0].switch_s > 0.0
    assert arena_of(parted).profile["switch_s"].tolist() == [0.0]
    assert arena_of(parted).setting.kinds == {Kind.PLACE_PREFILL, Kind.PLACE_DECODE, Kind.REALLOCATE}
    mixed = arena_of(Scenario.parse(content())).setting
    assert not {Kind.REALLOCATE, Kind.TUNE} & mixed.kinds
    assert mixed.usable_roles == {Role.MIXED}
    with pytest.raises(SlalomError, match="role"):
        bind_policy("static_split", Scenario.parse(content()))


def test_a_policy_arranges_what_a_router_can() -> None:
    plan = InstancePlan(
        role=Role.MIXED, order=Order.SHORTEST_PREEMPTIVE, chunk_tokens=64, batching=Batching.PREFILL_FIRST
    )
    arena = arena_of(Scenario.parse(content()))
    before, after = arena.specs[0], arena.arranged([plan] * 2)[0]
    changed = {f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)}
    assert (changed, after.order) == ({"order"}, Order.SHORTEST)


def test_requests_are_served_under_it_and_our_own_engine_refuses_it() -> None:
    scenario = Scenario.parse(content(decisions=PARTED | {"shed": True}))
    run = simulate(scenario, "planner", rate=8.0, n_requests=60)
    assert (run.req["state"] == RequestState.FINISHED).all()
    with pytest.raises(SlalomError, match="--env remote"):
        engine_state(scenario, arena_of(scenario).specs, 8, False)

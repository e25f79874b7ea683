"""MuxWise, SGLang's table and DuetServe: arrangement, dispatch, the split that they ask for, and whole runs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from decisions import choose, instances, setting
from published import place

from engine.core.columns import Kind
from engine.core.kinds import Batching, RequestState, Role, Split
from engine.errors import SlalomError
from engine.latency import Profile, pack
from env.scenario import Scenario
from env.surrogate.simulate import RunResult, simulate
from policies import registry
from policies.rules.pdmux_table import TABLES, share_rows
from policies.setting import Setting

MUX = float(Role.MULTIPLEXED)
SCENARIO = "muxwise-70b-2x8xa100"


def shared(n: int = 2) -> Setting:
    profile, share = pack((Profile.load("llama-8b-h100"),))
    return setting(n, profile=profile, share=share)


@pytest.mark.parametrize("name", ["muxwise", "pdmux_table", "duetserve"])
def test_a_profile_without_shares_is_refused_with_the_instance(name: str) -> None:
    profile, share = pack((Profile.load("llama-8b-h100"), Profile.load("opt-13b-a100-tp1")))
    mixed = setting(2, profile=profile, share=share, profile_of=(0, 1), kinds=frozenset(Kind))
    with pytest.raises(SlalomError, match=r"instance.*1.*SM shares"):
        registry.get(name).bind({}, mixed)


def test_every_instance_is_multiplexed_in_layers_and_split_by_the_predictor() -> None:
    plan = registry.get("muxwise").bind({"headroom": 0.8}, shared(3)).arrangement
    assert plan is not None
    assert len(plan) == 3
    for one in plan:
        assert (one.role, one.batching, one.split, one.headroom) == (Role.MULTIPLEXED, Batching.LAYERED, -1, 0.8)


@pytest.mark.parametrize("name", ["muxwise", "pdmux_table", "duetserve"])
def test_dispatch_by_time_or_by_tokens(name: str) -> None:
    rows = instances({"ROLE": MUX, "TTFT_S": 0.9, "OUTSTANDING": 10}, {"ROLE": MUX, "TTFT_S": 0.2, "OUTSTANDING": 5000})
    by_time, by_tokens = (registry.get(name).bind({"router": r}, shared()) for r in ("ttft", "tokens"))
    assert choose(by_time, place(), rows) == 1
    assert choose(by_tokens, place(), rows) == 0
    assert choose(by_time, place(), rows, 0, 1) == 2  # nobody may: HOLD


def test_preemption_is_off_unless_asked_for() -> None:
    plans = [registry.get("muxwise").bind(values, shared()).arrangement for values in ({}, {"preempt": "on"})]
    assert [[one.stand_aside for one in plan or ()] for plan in plans] == [[False, False], [True, True]]


def test_short_prompts_that_preempt_long_ones_are_in_time_more_often() -> None:
    """MuxWise, its preemption: chat and long documents half and half, where prompts wait behind documents."""
    lengths = [{"kind": "fixed", "prompt": n, "output": out} for n, out in ((200, 200), (12_000, 20))]
    mixture = {
        "workload": {"kind": "shift", "lengths": lengths, "phases": [{"duration": 1, "rate": 1, "weights": [1, 1]}]},
        "classes": [{"name": "any", "ttft_s": 1.0, "ttft_factor": 5.0, "tpot_s": 0.1}],
    }
    scenario = Scenario.load(SCENARIO).with_overrides(mixture)
    off, on = (simulate(scenario, f"muxwise:preempt={p}", rate=1.5, n_requests=400) for p in ("off", "on"))
    assert off.inst["stood_aside"].sum() == 0 < on.inst["stood_aside"].sum()
    short = on.req["prompt"] == 200
    assert (on.req["ttft_ok"][short] == 1).mean() > (off.req["ttft_ok"][short] == 1).mean() + 0.1
    assert (on.req["ttft_ok"][~short] == 1).mean() > (off.req["ttft_ok"][~short] == 1).mean() - 0.02


def test_shares_are_the_smallest_that_hold_the_scaled_sms() -> None:
    """On 132 SMs nothing is scaled; 20 is no share of this profile, 24 is."""
    rows = share_rows(shared(), "default", 0)
    profile = Profile.load("llama-8b-h100")
    sms = [profile.shares[row].sms for row in rows]
    for got, (want, _) in zip(sms, TABLES["default"], strict=True):
        smaller = [s.sms for s in profile.shares if s.sms < got]
        assert got >= want > max(smaller, default=0)
    assert max(sms) < profile.total_sms


def test_default_thresholds_are_those_of_the_clamped_index() -> None:
    for bs in range(1, 80):
        index = min(max(bs * 6 // 36, 1), 6)
        assert sum(low <= bs for _, low in TABLES["default"]) == index


def test_the_table_of_an_instance_holds_thresholds_and_share_rows() -> None:
    plan = registry.get("pdmux_table").bind({"table": "general"}, shared()).arrangement
    assert plan is not None
    assert (plan[0].split, plan[0].batching, plan[0].layer_tokens) == (Split.TABLE, Batching.LAYERED, 65536)
    assert plan[0].table == tuple(zip((1, 5, 10, 15, 20, 25), share_rows(shared(), "general", 0), strict=True))


def test_duetserve_is_chunked_and_splits_on_demand() -> None:
    plan = registry.get("duetserve").bind({"chunk_tokens": 1024}, shared()).arrangement
    assert plan is not None
    assert (plan[0].split, plan[0].batching, plan[0].chunk_tokens) == (Split.ON_DEMAND, Batching.CHUNKED, 1024)


@cache
def run(policy: str) -> RunResult:
    scenario = Scenario.load(SCENARIO)
    return simulate(scenario, policy, rate=scenario.reference_rate, n_requests=400)


def attainment(result: RunResult) -> float:
    good = (result.req["ttft_ok"] == 1) & (result.req["tpot_ok"] == 1)
    return float(np.mean(good & (result.req["state"] == RequestState.FINISHED)))


@pytest.mark.parametrize(
    "policy",
    ["muxwise", "muxwise:router=tokens", "muxwise:preempt=on", "pdmux_table", "pdmux_table:table=loogle", "duetserve"],
)
def test_whole_runs_lose_nobody(policy: str) -> None:
    result = run(policy)
    assert (result.req["state"] == RequestState.FINISHED).all()
    assert (result.inst["role"] == Role.MULTIPLEXED).all()


def test_the_predictor_holds_the_token_target_and_beats_a_small_chunk_budget() -> None:
    """The claim of MuxWise: whole prompts beside decode, where chunked prefill must cut them small."""
    mux, chunked = run("muxwise"), run("chunked:chunk_tokens=256")
    assert (mux.req["tpot_ok"] == 1).mean() > 0.98
    assert attainment(mux) > attainment(chunked)


def test_duetserve_holds_the_token_target_where_the_same_chunks_fused_do_not() -> None:
    """2,048 prompt tokens make a fused step of the 70B model late; beside decode on its own SMs they do not."""
    duet, fused = run("duetserve"), run("chunked:chunk_tokens=2048")
    assert (duet.req["tpot_ok"] == 1).mean() > (fused.req["tpot_ok"] == 1).mean() + 0.2


def test_duetserve_that_never_predicts_a_violation_is_chunked_prefill() -> None:
    easy = Scenario.load(SCENARIO).with_overrides({"classes": [{"name": "any", "ttft_s": 60.0, "tpot_s": 60.0}]})
    router = "router=ttft,chunk_tokens=2048"
    duet, fused = (simulate(easy, f"{rule}:{router}", rate=1.0, n_requests=60) for rule in ("duetserve", "chunked"))
    np.testing.assert_array_equal(duet.req["last_token"], fused.req["last_token"])


def test_the_split_follows_the_table() -> None:
    runs = [run(f"pdmux_table:table={name}") for name in ("default", "loogle")]
    assert (runs[0].req["last_token"] != runs[1].req["last_token"]).any()

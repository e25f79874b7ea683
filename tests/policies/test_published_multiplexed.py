"""MuxWise and SGLang's table: arrangement, dispatch, the split that the table asks for, and whole runs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from decisions import choose, context, instances, setting
from published import place

from engine.core.columns import Col, Kind
from engine.core.state import Batching, RequestState, Role
from engine.errors import SlalomError
from engine.latency import Profile, pack
from env.scenario import Scenario
from env.simulate import RunResult, simulate
from policies import registry
from policies.pdmux_table import TABLES, share_rows
from policies.setting import Setting

MUX = float(Role.MULTIPLEXED)
SCENARIO = "muxwise-70b-2x8xa100"


def shared(n: int = 2, *, tune: bool = True) -> Setting:
    profile, share = pack((Profile.load("llama-8b-h100"),))
    kinds = {Kind.PLACE_PREFILL, Kind.PLACE_DECODE} | ({Kind.TUNE} if tune else set())
    return setting(n, profile=profile, share=share, kinds=frozenset(kinds))


@pytest.mark.parametrize("name", ["muxwise", "pdmux_table"])
def test_a_profile_without_shares_is_refused_with_the_instance(name: str) -> None:
    profile, share = pack((Profile.load("llama-8b-h100"), Profile.load("opt-13b-a100-tp1")))
    mixed = setting(2, profile=profile, share=share, profile_of=(0, 1), kinds=frozenset(Kind))
    with pytest.raises(SlalomError, match=r"instance.*1.*SM shares"):
        registry.get(name).bind({}, mixed)


def test_the_table_needs_tune() -> None:
    with pytest.raises(SlalomError, match="tune"):
        registry.get("pdmux_table").bind({}, shared(tune=False))


def test_every_instance_is_multiplexed_in_layers_and_split_by_the_predictor() -> None:
    plan = registry.get("muxwise").bind({"headroom": 0.8}, shared(3)).arrangement
    assert plan is not None
    assert len(plan) == 3
    for one in plan:
        assert (one.role, one.batching, one.split, one.headroom) == (Role.MULTIPLEXED, Batching.LAYERED, -1, 0.8)


@pytest.mark.parametrize("name", ["muxwise", "pdmux_table"])
def test_dispatch_by_time_or_by_tokens(name: str) -> None:
    rows = instances({"ROLE": MUX, "TTFT_S": 0.9, "OUTSTANDING": 10}, {"ROLE": MUX, "TTFT_S": 0.2, "OUTSTANDING": 5000})
    by_time, by_tokens = (registry.get(name).bind({"router": r}, shared()) for r in ("ttft", "tokens"))
    assert choose(by_time, place(), rows) == 1
    assert choose(by_tokens, place(), rows) == 0
    assert choose(by_time, place(), rows, 0, 1) == 2  # nobody may: HOLD


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


def tune_table(running: float, split: float) -> np.ndarray:
    row = {"ROLE": MUX, "RUN_N": running, "SPLIT": split}
    table = instances(row, row, row, row, last=Col.IS_KEEP)
    table = np.vstack([table[-1:], table[:-1]])
    table[1:, Col.INSTANCE] = 0
    table[1, Col.SPLIT_DELTA], table[2, Col.SPLIT_DELTA] = -1.0, 1.0
    table[3, Col.CHUNK_DELTA], table[4, Col.CHUNK_DELTA] = -1.0, 1.0
    return table


@pytest.mark.parametrize(("running", "table_row"), [(0, 0), (11, 0), (12, 1), (36, 5), (200, 5)])
def test_tune_moves_the_split_towards_the_row_of_the_batch_size(running: int, table_row: int) -> None:
    policy = registry.get("pdmux_table").bind({}, shared())
    want = share_rows(shared(), "default", 0)[table_row]
    ctx = context(Kind.TUNE, SOURCE=0.0)
    assert choose(policy, ctx, tune_table(running, want)) == 0
    assert choose(policy, ctx, tune_table(running, want + 1)) == 1
    assert choose(policy, ctx, tune_table(running, want - 1)) == 2
    assert choose(policy, ctx, tune_table(running, want - 1), 2) == 0  # not allowed to move: KEEP


@cache
def run(policy: str) -> RunResult:
    scenario = Scenario.load(SCENARIO)
    return simulate(scenario, policy, rate=scenario.reference_rate, n_requests=400)


def attainment(result: RunResult) -> float:
    good = (result.req["ttft_ok"] == 1) & (result.req["tpot_ok"] == 1)
    return float(np.mean(good & (result.req["state"] == RequestState.FINISHED)))


@pytest.mark.parametrize("policy", ["muxwise", "muxwise:router=tokens", "pdmux_table", "pdmux_table:table=loogle"])
def test_whole_runs_lose_nobody(policy: str) -> None:
    result = run(policy)
    assert (result.req["state"] == RequestState.FINISHED).all()
    assert (result.inst["role"] == Role.MULTIPLEXED).all()


def test_the_predictor_holds_the_token_target_and_beats_a_small_chunk_budget() -> None:
    """The claim of MuxWise: whole prompts beside decode, where chunked prefill must cut them small."""
    mux, chunked = run("muxwise"), run("chunked:chunk_tokens=256")
    assert (mux.req["tpot_ok"] == 1).mean() > 0.98
    assert attainment(mux) > attainment(chunked)


def test_the_table_moves_the_split_during_a_run() -> None:
    """Against the same table in a scenario whose control interval never ends."""
    moving = Scenario.load(SCENARIO)
    frozen = moving.with_overrides({"control_interval_s": 1e5})
    runs = [simulate(s, "pdmux_table:table=general", rate=2.0, n_requests=300) for s in (moving, frozen)]
    assert (runs[0].req["last_token"] != runs[1].req["last_token"]).any()

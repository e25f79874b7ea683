"""Single features on cases small enough to be computed by hand: 1 ms a prompt token, 10 ms a decode step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audit import check_end
from drive import Driver
from strategies import Case, ProfileSpec, RequestSpec, ShareSpec

from engine.core.kinds import Batching, Order, RequestState, Role, Split
from engine.core.policy import POLICY_SIGNATURE
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass
from engine.core.state import ClusterState
from engine.jit.kernel import kernel

MS = 10**9  # ticks
MIXED, PREFILL, DECODE, MULTIPLEXED = Role.MIXED, Role.PREFILL, Role.DECODE, Role.MULTIPLEXED


@kernel(POLICY_SIGNATURE)
def scripted(context, candidates, mask, params, memory):
    """The next row of ``params`` where it is allowed, else the first allowed row."""
    at = int(memory[0])
    memory[0] += 1.0
    if at < params.shape[0] and params[at] >= 0.0 and mask[int(params[at])] != 0:
        return int(params[at])
    for k in range(mask.shape[0]):
        if mask[k] != 0:
            return k
    return -1


def serve(case: Case, *answers: int, horizon_s: float | None = None) -> ClusterState:
    """``case`` with the given answers to its decisions, jumping and stepping; both must agree."""
    stamps = []
    for jump in (False, True):
        state, sim = case.build(fast_forward=jump, **({} if horizon_s is None else {"horizon_s": horizon_s}))
        driver = Driver(case, state, sim, decide=scripted)
        driver.params = np.array([*answers, -1.0], np.float64)
        driver.finish()
        if horizon_s is None:
            check_end(state, sim)
        stamps.append(state.req["finished"].copy())
    np.testing.assert_array_equal(*stamps)
    return state


def one(role: Role = MIXED, kv_tokens: int = 16_000, pool: int = 0, **changes: Any) -> InstanceSpec:
    return InstanceSpec(role, pool, kv_tokens, **changes)


def ms(state: ClusterState, name: str) -> list[float]:
    """A stamp of every request, milliseconds."""
    return (state.req[name] / MS).round(6).tolist()


def test_chunked_prefill_shares_its_token_budget_with_decode() -> None:
    requests = (RequestSpec(16, 5), RequestSpec(60, 2, gap_s=0.020))
    s = serve(Case((one(chunk_tokens=32),), requests))
    # A: 0-16, decode to 26; then steps of 31 + 1 and 29 + 1 tokens: 41 ms and 39 ms.
    assert ms(s, "first_token") == [16, 106]
    assert ms(s, "finished") == [116, 116]


def test_a_long_prompt_alone_is_cut_into_chunks_of_the_budget() -> None:
    s = serve(Case((one(chunk_tokens=32),), (RequestSpec(80, 2),)))
    assert ms(s, "first_token") == [80]
    assert ms(s, "finished") == [90]
    assert s.inst[0]["steps"] == 4


def test_prefill_first_lets_decode_wait_for_the_whole_prompt() -> None:
    requests = (RequestSpec(16, 4), RequestSpec(60, 2, gap_s=0.020))
    s = serve(Case((one(batching=Batching.PREFILL_FIRST),), requests))
    assert ms(s, "first_token") == [16, 86]
    assert ms(s, "finished") == [106, 96]


def test_whole_prompts_are_batched_up_to_the_token_budget() -> None:
    requests = tuple(RequestSpec(n, 1) for n in (60, 30, 50, 30))
    s = serve(Case((one(batching=Batching.PREFILL_FIRST, prefill_tokens=100),), requests))
    assert ms(s, "first_token") == [60, 140, 140, 170]


def test_shortest_remaining_first_overtakes_what_has_not_started() -> None:
    requests = tuple(RequestSpec(n, 1) for n in (60, 50, 20))
    s = serve(Case((one(batching=Batching.PREFILL_FIRST, prefill_tokens=1, order=1),), requests))
    assert ms(s, "first_token") == [60, 130, 80]


def test_layered_prefill_runs_beside_decode_at_their_shares_and_co_run_factors() -> None:
    half = ShareSpec(50, (0, 0, 2e-3, 0), (0, 0, 2e-2), (0, 0, 2e-2), corun_prefill=1.1, corun_decode=1.5)
    profile = ProfileSpec((half, ShareSpec(100)), n_layers=4)
    requests = (RequestSpec(16, 6), RequestSpec(40, 2, gap_s=0.020))
    s = serve(Case((one(MULTIPLEXED, batching=Batching.LAYERED, split=0),), requests, (profile,)))
    # Prefill: four slices of one layer, 80 ms / 4 · 1.1 = 22 ms each from 20 on.
    # Decode: 16, 26 alone; 56, 86, 116 beside (20 · 1.5); 126 alone again, both requests in it.
    assert ms(s, "first_token") == [16, 108]
    assert ms(s, "finished") == [126, 126]


def test_the_predictor_rule_takes_the_smallest_share_that_keeps_the_target() -> None:
    def row(sms: int, decode_s: float) -> ShareSpec:
        return ShareSpec(sms, (0, 0, 1e-3 * 100 / sms, 0), (0, 0, decode_s), (0, 0, decode_s), guard=1.2)

    profile = ProfileSpec((row(20, 0.05), row(40, 0.025), row(60, 0.015), row(100, 0.01)), n_layers=1)
    requests = (RequestSpec(10, 30), RequestSpec(60, 1, gap_s=0.015))
    found = []
    for tpot_s in (0.061, 0.031, 0.019, 0.001):
        case = Case((one(MULTIPLEXED, batching=Batching.LAYERED),), requests, (profile,), (SloClass(9, tpot_s),))
        found.append(ms(serve(case), "first_token")[1])
    # Decode on 20, 40, 60 SMs (and 60 where none will do) leaves 60, 60, 40 SMs to prefill (rows at hand).
    assert found == [115, 115, 165, 165]


def test_a_prompt_on_a_decode_instance_stalls_its_decode_once() -> None:
    requests = (RequestSpec(16, 5), RequestSpec(30, 1, gap_s=0.020))
    s = serve(Case((one(DECODE),), requests))
    assert ms(s, "first_token") == [16, 56]
    assert ms(s, "finished") == [86, 56]


def test_the_newest_is_preempted_and_recomputed() -> None:
    requests = (RequestSpec(30, 6), RequestSpec(30, 5))
    s = serve(Case((one(kv_tokens=80, batching=Batching.PREFILL_FIRST),), requests))
    # Five blocks. At 80 ms both need a third one; B gives way until A ends at 110, then 33 tokens again.
    assert s.req["n_preempt"].tolist() == [0, 1]
    assert ms(s, "first_token") == [30, 60]
    assert ms(s, "finished") == [110, 153]
    assert s.itl.sum() == 5 + 4


def test_shorter_prompts_do_not_go_before_one_that_has_answered_and_is_computed_anew() -> None:
    requests = (RequestSpec(30, 6), RequestSpec(30, 5), RequestSpec(16, 1, gap_s=0.085))
    s = serve(Case((one(kv_tokens=80, batching=Batching.PREFILL_FIRST, order=Order.SHORTEST),), requests))
    # As above; the third comes while the second waits for the first to end, and is shorter.
    assert s.req["n_preempt"].tolist() == [0, 1, 0]
    assert ms(s, "prefill_start")[2] >= 110
    assert ms(s, "finished")[:2] == [110, 153 + 16]


def test_a_full_receiver_stalls_the_senders_prefill() -> None:
    requests = (RequestSpec(32, 10), RequestSpec(32, 2), RequestSpec(32, 1))
    s = serve(Case((one(PREFILL, 48), one(DECODE, 48, pool=1)), requests), 0, 0, 0)
    # The first decodes until 122; until then the second waits at the source, and the third has no blocks.
    assert ms(s, "first_token") == [32, 64, 154]
    assert ms(s, "prefill_start") == [0, 32, 122]
    assert ms(s, "finished") == [122, 132, 154]


@pytest.mark.parametrize(("links", "expected"), [(1, [80, 100]), (2, [80, 80])])
def test_transfers_over_one_link_follow_each_other(links: int, expected: list[int]) -> None:
    instances = (one(PREFILL), one(DECODE, pool=1), one(DECODE, pool=2, link=links - 1))
    requests = (RequestSpec(10, 1), RequestSpec(20, 2), RequestSpec(20, 2))
    case = Case(instances, requests, links=(LinkSpec(bytes_per_s=1e6),) * links)
    s = serve(case, 0, 0, 0, 1, 2)
    assert ms(s, "first_token") == [10, 50, 50]
    assert ms(s, "finished")[1:] == expected
    assert s.cluster[0]["migrated_tokens"] == 40


def test_on_a_shared_pool_the_hand_over_is_free() -> None:
    case = Case((one(PREFILL), one(DECODE)), (RequestSpec(20, 3),), links=(LinkSpec(1e3, 0.5),))
    s = serve(case, 0, 1)
    assert ms(s, "finished") == [40]
    assert s.cluster[0]["n_migrated"] == 0


@pytest.mark.parametrize(("full", "role_at_1100", "cached"), [(1, MIXED, 0), (0, DECODE, 8)])
def test_a_role_change_drains_pays_and_loses_the_cache_where_the_engine_would(
    full: int, role_at_1100: Role, cached: int
) -> None:
    profile = ProfileSpec(switch_s=0.05, switch_full=full)
    options = ClusterOptions(hash_tokens=16, reallocate=True, roles=(MIXED, DECODE))
    # 128 prompt tokens, decode from 128 ms to 1328 ms.
    requests = (RequestSpec(128, 121, hashed=8, shared=8), RequestSpec(10, 1, gap_s=1.4))
    case = Case((one(), one(pool=1)), requests, (profile,), options=options)
    to_decode = 2
    s = serve(case, 0, to_decode, horizon_s=1.1)
    assert s.inst[0]["role"] == role_at_1100
    s = serve(case, 0, to_decode, horizon_s=1.39)
    assert s.inst[0]["role"] == DECODE
    assert s.pool[0]["cached"] == cached
    assert s.cluster[0]["n_switches"] == 1
    # Without a full drain the switch pauses decode at a step boundary: 1008 + 50 ms.
    assert ms(s, "finished")[0] == (1328 if full else 1378)


def test_a_held_request_is_asked_for_again_after_the_hold_time() -> None:
    requests = (RequestSpec(300, 1), RequestSpec(20, 1, gap_s=0.010))
    case = Case((one(),), requests, options=ClusterOptions(hold=True, hold_s=0.05))
    hold = 1
    assert ms(serve(case, 0, hold, hold, 0), "placed") == [0, 110]
    assert ms(serve(case, 0, hold, 0), "first_token") == [300, 320]


def test_a_shed_request_counts_as_missed() -> None:
    requests = (RequestSpec(300, 1), RequestSpec(20, 1, gap_s=0.01, ttft_slo_s=0.2))
    s = serve(Case((one(),), requests, options=ClusterOptions(shed=True)), 0, 2)
    assert s.req["state"].tolist() == [RequestState.FINISHED, RequestState.SHED]
    assert (s.cls[0]["sent"], s.cls[0]["good"]) == (2, 1)
    assert s.cluster[0]["miss_weight"] == 1.0


def test_what_fits_nowhere_fails_at_once_and_what_outgrows_the_pool_fails_there() -> None:
    s = serve(Case((one(kv_tokens=64),), (RequestSpec(64, 1), RequestSpec(60, 30), RequestSpec(8, 1))))
    assert s.req["state"].tolist() == [RequestState.FAILED, RequestState.FAILED, RequestState.FINISHED]
    assert s.req["generated"].tolist() == [0, 5, 1]


def test_a_prompt_that_no_decode_pool_can_hold_fails_after_its_prefill() -> None:
    s = serve(Case((one(PREFILL, 640), one(DECODE, 64, pool=1)), (RequestSpec(100, 3), RequestSpec(20, 2))), 0)
    assert s.req["state"].tolist() == [RequestState.FAILED, RequestState.FINISHED]


def test_a_follow_up_turn_comes_after_the_think_time_and_never_after_a_refusal() -> None:
    requests = (RequestSpec(20, 1), RequestSpec(30, 1, follows=0, think_s=0.5))
    options = ClusterOptions(shed=True)
    s = serve(Case((one(),), requests, options=options))
    assert ms(s, "arrival") == [0, 520]
    assert ms(s, "first_token") == [20, 550]
    requests = (RequestSpec(300, 1), RequestSpec(20, 1, ttft_slo_s=0.2), RequestSpec(30, 1, follows=1, think_s=0.5))
    s = serve(Case((one(),), requests, options=options), 0, 2)
    assert s.req["state"].tolist() == [RequestState.FINISHED, RequestState.SHED, RequestState.NEW]
    assert s.cluster[0]["n_sent"] == 2


def test_a_request_may_bring_its_own_targets() -> None:
    hurried = RequestSpec(20, 2, gap_s=1, ttft_slo_s=0.019), RequestSpec(20, 2, gap_s=1, tpot_slo_s=0.009)
    requests = (RequestSpec(20, 2), *hurried)
    s = serve(Case((one(),), requests, classes=(SloClass(0.02, 0.01),)))
    assert s.req["ttft_ok"].tolist() == [1, 0, 1]
    assert s.req["tpot_ok"].tolist() == [1, 1, 0]
    assert s.cls[0]["good"] == 1


def test_a_relative_target_is_a_multiple_of_the_isolated_prefill() -> None:
    s = serve(Case((one(),), (RequestSpec(20, 1), RequestSpec(40, 1)), classes=(SloClass(0.03, 1, ttft_factor=2.0),)))
    assert (s.req["ttft_slo"] / MS).tolist() == [40, 80]


def test_a_cached_prefix_is_not_computed_again() -> None:
    requests = (RequestSpec(64, 1, hashed=4, shared=4), RequestSpec(64, 1, gap_s=1.0, hashed=4, shared=2))
    s = serve(Case((one(),), requests, options=ClusterOptions(hash_tokens=16)))
    assert s.req["cached"].tolist() == [0, 32]
    assert ms(s, "first_token") == [64, 1032]


# -- who shares the SMs, and when --------------------------------------------------------------------------


def two_halves(**of_half: Any) -> ProfileSpec:
    """Four layers; half of the SMs prefill at 2 ms a token and decode in 20 ms."""
    half = ShareSpec(50, (0, 0, 2e-3, 0), (0, 0, 2e-2), (0, 0, 2e-2), **of_half)
    return ProfileSpec((half, ShareSpec(100)), n_layers=4)


@pytest.mark.parametrize(
    ("tpot_s", "first_token", "finished"),
    [
        # A: 0-16, decode to 26. One fused step of 31 + 1 tokens, 31 + 10 ms, and both decode from 67 on.
        (0.045, [16, 67], [107, 77]),
        # 41 ms would be late: B's 31 tokens take 62 ms on half of the SMs, beside it A decodes in the three steps
        # of 20 ms that end before 88, then both on the whole device.
        (0.030, [16, 88], [108, 98]),
    ],
)
def test_on_demand_splits_only_the_step_that_would_miss_the_target(
    tpot_s: float, first_token: list[float], finished: list[float]
) -> None:
    requests = (RequestSpec(16, 7), RequestSpec(31, 2, gap_s=0.020))
    instance = one(MULTIPLEXED, batching=Batching.CHUNKED, chunk_tokens=32, split=Split.ON_DEMAND)
    s = serve(Case((instance,), requests, (two_halves(),), (SloClass(9, tpot_s),)))
    assert ms(s, "first_token") == first_token
    assert ms(s, "finished") == finished


def test_an_answer_that_ends_on_demand_waits_for_the_fused_step() -> None:
    """TUNE fixes the split while lane 0 runs a fused step with the decodes: lane 1 must not run them as well."""
    requests = (RequestSpec(16, 40), RequestSpec(300, 20, gap_s=0.020))
    instance = one(MULTIPLEXED, batching=Batching.CHUNKED, chunk_tokens=64, split=Split.ON_DEMAND)
    options = ClusterOptions(tune=True, control_s=0.05)
    s = serve(Case((instance,), requests, (two_halves(),), (SloClass(9, 1.0),), options=options), 0, 0, 2)
    assert s.inst[0]["split"] == 0
    assert (s.req["state"] == RequestState.FINISHED).all()


def test_the_table_row_is_that_of_the_decode_batch_when_the_prefill_starts() -> None:
    def row(sms: int, slower: float) -> ShareSpec:
        return ShareSpec(sms, (0, 0, 1e-3 * slower, 0), (0, 0, 1e-2 * slower), (0, 0, 1e-2 * slower))

    profile = ProfileSpec((row(25, 4), row(50, 2), row(75, 1.5), row(100, 1)), n_layers=1)
    found = []
    for n in (1, 2):
        table = ((1, 0), (2, 2))
        requests = (*[RequestSpec(10, 30)] * n, RequestSpec(60, 1, gap_s=0.100))
        instance = one(MULTIPLEXED, batching=Batching.LAYERED, split=Split.TABLE, table=table)
        found.append(ms(serve(Case((instance,), requests, (profile,))), "first_token")[n])
    # One sequence decodes on 25 SMs and leaves 75 (1.5 ms a token), two on 75 and leave 25 (4 ms).
    assert found == [100 + 90, 100 + 240]


def test_slices_hold_as_many_layers_as_the_token_budget_allows() -> None:
    for layer_tokens, slices in ((0, 4), (40, 4), (80, 2), (1000, 1)):
        requests = (RequestSpec(16, 30), RequestSpec(40, 1, gap_s=0.020))
        instance = one(MULTIPLEXED, batching=Batching.LAYERED, split=0, layer_tokens=layer_tokens)
        case = Case((instance,), requests, (two_halves(),))
        state, sim = case.build(fast_forward=False)
        Driver(case, state, sim).finish()
        decode_steps = 29
        assert state.inst[0]["steps"] == 1 + slices + decode_steps, layer_tokens


def test_a_shorter_prompt_preempts_between_chunks() -> None:
    requests = (RequestSpec(60, 1), RequestSpec(20, 1, gap_s=0.005), RequestSpec(35, 1))
    found = {}
    for order in (Order.SHORTEST, Order.SHORTEST_PREEMPTIVE):
        prefill = one(PREFILL, chunk_tokens=20, prefill_tokens=1, order=order)
        found[order] = ms(serve(Case((prefill, one(DECODE, pool=1)), requests)), "first_token")
    assert found[Order.SHORTEST] == [60, 80, 115]
    # 20 of A; then B whole; then C (35 left against A's 40) with 5 of A at its end; then the rest of A.
    assert found[Order.SHORTEST_PREEMPTIVE] == [115, 40, 80]

"""Published placement rules on made-up decisions: DistServe, Tropical, TaiChi, Splitwise, Mooncake, Arrow."""

from __future__ import annotations

from typing import Any

import pytest
from decisions import choose, context, instances, setting
from published import PLACE, D, M, P, bound, place, roles_table, with_shed

from engine.core.columns import Kind
from engine.core.kinds import Order
from policies import registry

# -- DistServe ---------------------------------------------------------------------------------------------


def test_distserve_prefers_few_requests_then_few_tokens_and_never_a_decode_instance() -> None:
    rows = instances(
        {"ROLE": D},
        {"ROLE": P, "QUEUE_N": 2, "QUEUE_TOKENS": 100},
        {"ROLE": P, "QUEUE_N": 1, "QUEUE_TOKENS": 9000},
        {"ROLE": P, "QUEUE_N": 1, "QUEUE_TOKENS": 8000},
    )
    assert choose(bound("distserve"), place(), rows) == 3
    assert choose(bound("distserve", queue="tokens"), place(), rows) == 1


def test_distserve_hands_over_to_the_shortest_decode_step() -> None:
    rows = instances({"ROLE": P}, {"ROLE": D, "STEP_WITH_S": 0.05}, {"ROLE": D, "STEP_WITH_S": 0.04})
    assert choose(bound("distserve", 3), context(Kind.PLACE_DECODE, SOURCE=0), rows, 0) == 2


def test_a_split_keeps_the_scenarios_roles_and_overrides_them_on_request() -> None:
    own = setting(4, roles=(int(P), int(P), int(P), int(D)))
    rule = registry.get("distserve")

    def roles(**values: Any) -> list[int | None]:
        plan = rule.bind(values, own).arrangement
        assert plan is not None
        return [p.role for p in plan]

    assert roles() == [P, P, P, D]
    assert roles(layout="split", prefill_fraction=0.25) == [P, D, D, D]
    mixed = rule.bind({}, setting(4)).arrangement
    assert mixed is not None
    assert [p.role for p in mixed] == [P, P, D, D]


# -- Tropical ----------------------------------------------------------------------------------------------

BUSY_P = {"ROLE": P, "BUSY": 1, "PREFILLING": 1, "QUEUE_N": 1, "TTFT_S": 3.0, "WAIT_S": 2.5, "PREFILL_S": 0.5}
BUSY_P |= {"AHEAD_S": 2.5, "QUEUE_SLACK_S": 1000.0}
#: prefill 0.5 s, TPOT 0.1 s: the slack needed is 0.6 s
SLACK_M = {"ROLE": D, "BUSY": 1, "MIN_SLACK_S": 0.61, "PREFILL_S": 0.5, "TTFT_S": 0.55, "RUN_CTX": 5000}


def test_tropical_takes_an_idle_prefill_worker_first() -> None:
    assert choose(bound("tropical"), place(), instances(SLACK_M, BUSY_P, {"ROLE": P})) == 2


def test_tropical_queues_one_prompt_where_it_is_still_in_time() -> None:
    in_time = BUSY_P | {"TTFT_S": 0.9}
    assert choose(bound("tropical"), place(), instances(SLACK_M, in_time)) == 1
    assert choose(bound("tropical"), place(), instances(SLACK_M, in_time | {"QUEUE_N": 2})) == 0


@pytest.mark.parametrize("name", ["tropical", "tropical_code"])
@pytest.mark.parametrize(("slack", "row"), [(0.61, 1), (0.59, 2)])
def test_tropical_needs_slack_for_the_whole_prefill_and_one_tpot(name: str, slack: float, row: int) -> None:
    rows = instances(BUSY_P, SLACK_M | {"MIN_SLACK_S": slack})
    assert choose(bound(name), place(), rows) == row


def test_tropical_readme_margin_of_zero() -> None:
    rows = instances(BUSY_P, SLACK_M | {"MIN_SLACK_S": 0.55})
    assert choose(bound("tropical", margin=0.0), place(), rows) == 1


@pytest.mark.parametrize("name", ["tropical", "tropical_code"])
def test_tropical_chooses_the_fewest_decode_tokens_and_skips_a_worker_that_prefills(name: str) -> None:
    rows = instances(
        SLACK_M,
        SLACK_M | {"RUN_CTX": 100, "QUEUE_N": 1},
        SLACK_M | {"RUN_CTX": 4000},
        SLACK_M | {"RUN_CTX": 3000, "INBOUND_TOKENS": 2000},
    )
    assert choose(bound(name), place(), rows) == 2


def test_tropical_respects_the_watermark() -> None:
    full = SLACK_M | {"TOTAL_BLOCKS": 100, "FREE_BLOCKS": 5}
    assert choose(bound("tropical"), place(), instances(BUSY_P, full)) == 2
    assert choose(bound("tropical", watermark=0.96), place(), instances(BUSY_P, full)) == 1


def test_tropical_code_asks_decode_workers_first_and_gates_long_prompts() -> None:
    idle = {"ROLE": P, "PREFILL_S": 0.5, "TTFT_S": 0.5}
    rows = instances(idle, SLACK_M)
    assert choose(bound("tropical_code"), place(), rows) == 1
    assert choose(bound("tropical"), place(), rows) == 0
    assert choose(bound("tropical_code"), place(PROMPT=8192), rows) == 0
    assert choose(bound("tropical_code"), place(), instances(idle, SLACK_M | {"STEP_S": 0.86})) == 0


def test_tropical_code_lets_predicted_work_be_two_percent_longer() -> None:
    def answer(work: float) -> int:
        row = BUSY_P | {"AHEAD_S": work - 0.5, "PREFILL_S": 0.5, "QUEUE_N": 3}
        return choose(bound("tropical_code"), place(), instances(row))

    assert answer(0.98) == 0  # 1.02 · 0.98 < 1 s
    assert answer(0.985) == 1


def test_tropical_code_spares_prompts_that_would_be_overtaken() -> None:
    row = BUSY_P | {"AHEAD_S": 0.1, "PREFILL_S": 0.1, "QUEUE_N": 3}
    assert choose(bound("tropical_code"), place(), instances(row)) == 0
    assert choose(bound("tropical_code"), place(), instances(row | {"QUEUE_SLACK_S": -0.01})) == 1


@pytest.mark.parametrize("name", ["tropical", "tropical_code"])
def test_tropical_preempts_in_chunks_when_asked(name: str) -> None:
    plain, chunked = bound(name).arrangement, bound(name, preemption="chunked", chunk_tokens=512).arrangement
    assert plain is not None
    assert chunked is not None
    assert {(p.order, p.chunk_tokens) for p in plain} == {(Order.SHORTEST, None)}
    assert {(p.order, p.chunk_tokens) for p in chunked} == {(Order.SHORTEST_PREEMPTIVE, 512)}


def test_tropical_lets_nobody_overtake_the_head_of_the_queue() -> None:
    policy, busy, free = bound("tropical"), instances(BUSY_P), instances({"ROLE": P})
    older, younger = place(HELD_N=1, ARRIVAL_S=4.0), place(HELD_N=1, ARRIVAL_S=4.5)
    assert choose(policy, older, busy) == 1
    assert choose(policy, younger, free) == 1
    assert choose(policy, older, free) == 0
    assert choose(policy, younger, free) == 0


def test_tropical_forgets_a_head_that_somebody_else_placed() -> None:
    policy, free = bound("tropical"), instances({"ROLE": P})
    assert choose(policy, place(HELD_N=1, ARRIVAL_S=4.0), instances(BUSY_P)) == 1
    assert choose(policy, place(HELD_N=1, ARRIVAL_S=4.5, NOW_S=6.5), free) == 0


def test_tropical_without_hold_takes_the_least_loaded_prefill_worker() -> None:
    rows = instances(BUSY_P, BUSY_P | {"WAIT_S": 2.0}, SLACK_M | {"MIN_SLACK_S": 0.0})
    assert choose(bound("tropical"), place(), rows) == 3
    assert choose(bound("tropical"), place(), rows, 3) == 1


def test_tropical_rejects_after_its_timeout_only_when_told() -> None:
    rows, late = with_shed(instances(BUSY_P)), place(ARRIVAL_S=-6.0)
    assert choose(bound("tropical"), late, rows) == 1
    assert choose(bound("tropical", reject_s=10), late, rows) == 2
    assert choose(bound("tropical", reject_s=10), place(), rows) == 1


# -- TaiChi ------------------------------------------------------------------------------------------------

P_HEAVY, D_HEAVY = {"ROLE": M, "CHUNK_TOKENS": 1024}, {"ROLE": M, "CHUNK_TOKENS": 256}


def test_taichi_arranges_large_and_small_chunks() -> None:
    plan = bound("taichi", r_pd=0.25, s_p=2048, s_d=128).arrangement
    assert plan is not None
    assert [p.chunk_tokens for p in plan] == [2048, 128, 128, 128]


def test_taichi_sends_short_prompts_to_feasible_d_heavy_instances() -> None:
    rows = instances(P_HEAVY | {"TTFT_S": 0.2}, D_HEAVY | {"TTFT_S": 0.9})
    assert choose(bound("taichi"), place(MEAN_PROMPT=1500), rows) == 1
    assert choose(bound("taichi"), place(MEAN_PROMPT=500), rows) == 0
    late = instances(P_HEAVY | {"TTFT_S": 0.2}, D_HEAVY | {"TTFT_S": 1.1})
    assert choose(bound("taichi"), place(MEAN_PROMPT=1500), late) == 0


def test_taichi_best_effort_is_the_least_estimate() -> None:
    rows = instances(P_HEAVY | {"TTFT_S": 4.0}, D_HEAVY | {"TTFT_S": 3.0}, P_HEAVY | {"TTFT_S": 2.0})
    assert choose(bound("taichi"), place(MEAN_PROMPT=1500), rows) == 2


def test_taichi_starts_decodes_on_d_heavy_until_memory_is_short() -> None:
    ctx = context(Kind.PLACE_DECODE, SOURCE=0)
    room = {"TOTAL_BLOCKS": 100, "FREE_BLOCKS": 50}
    full = {"TOTAL_BLOCKS": 100, "FREE_BLOCKS": 4}
    assert choose(bound("taichi"), ctx, instances(P_HEAVY | room, D_HEAVY | room)) == 1
    assert choose(bound("taichi"), ctx, instances(P_HEAVY | room, D_HEAVY | full)) == 0


# -- Splitwise ---------------------------------------------------------------------------------------------


def test_splitwise_borrows_a_token_machine_only_when_prompt_and_mixed_queues_are_long() -> None:
    long = {"ROLE": P, "QUEUE_N": 1, "QUEUE_TOKENS": 7500}
    mixed = {"ROLE": D, "QUEUE_N": 1, "QUEUE_TOKENS": 2000}
    token, token_busy = {"ROLE": D, "RUN_N": 5}, {"ROLE": D, "RUN_N": 9}
    splitwise = bound("splitwise")
    assert choose(splitwise, place(PROMPT=500), instances(long, mixed, token)) == 0
    assert choose(splitwise, place(PROMPT=1000), instances(long, mixed, token)) == 1
    assert choose(splitwise, place(PROMPT=7000), instances(long, mixed, token_busy, token)) == 3
    empty = {"ROLE": P}
    assert choose(splitwise, place(PROMPT=9000), instances(long, mixed, token, empty)) == 3


def test_splitwise_decodes_where_the_least_memory_is_used() -> None:
    rows = instances(
        {"ROLE": D, "TOTAL_BLOCKS": 10, "FREE_BLOCKS": 4}, {"ROLE": D, "TOTAL_BLOCKS": 20, "FREE_BLOCKS": 9}
    )
    assert choose(bound("splitwise"), context(Kind.PLACE_DECODE), rows) == 1


# -- Mooncake ----------------------------------------------------------------------------------------------


def test_mooncake_takes_the_least_predicted_ttft_of_the_prefill_pool() -> None:
    rows = instances({"ROLE": P, "TTFT_S": 0.5}, {"ROLE": P, "TTFT_S": 0.4}, {"ROLE": D, "TTFT_S": 0.1})
    assert choose(bound("mooncake"), place(), rows) == 1


@pytest.mark.parametrize(("ttft", "step", "answer"), [(0.9, 0.09, 0), (1.1, 0.09, 3), (0.9, 0.11, 3)])
def test_mooncake_rejects_early_what_would_miss_a_target(ttft: float, step: float, answer: int) -> None:
    rows = instances({"ROLE": P, "TTFT_S": ttft}, {"ROLE": D, "STEP_WITH_S": step, "TTFT_S": 0.1})
    rows = with_shed(rows)
    assert choose(bound("mooncake", rejection="now"), place(), rows) == answer
    assert choose(bound("mooncake", rejection="off"), place(), rows) == 0
    assert choose(bound("mooncake", rejection="now"), place(), rows, 3) == 0


# -- Arrow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ttft", "tpot", "row"), [(0.95, 0.04, 4), (0.4, 0.095, 1), (0.95, 0.095, 0), (0.4, 0.04, 0)])
def test_arrow_flips_towards_the_target_at_risk(ttft: float, tpot: float, row: int) -> None:
    table = roles_table({"ROLE": P}, {"ROLE": D, "OUTSTANDING": 10}, {"ROLE": D, "OUTSTANDING": 20})
    ctx = context(Kind.REALLOCATE, **PLACE | {"WIN_TTFT_S": ttft, "WIN_TPOT_S": tpot, "WIN_SPAN_S": 1.0})
    policy = bound("arrow", 3)
    assert choose(policy, ctx, table) == row
    if row:
        assert [choose(policy, ctx, table) for _ in range(5)] == [0, 0, 0, 0, row]  # cooldown 5 s

"""Production routers on hand-made decisions: SGLang, Dynamo, llm-d, AIBrix."""

from __future__ import annotations

import numpy as np
import pytest
from decisions import choose, context, instances
from published import D, M, P, bound, place

from engine.core.columns import Kind

# -- SGLang ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "low", "cached", "row"),
    [
        (33, 1, 600, 0),  # apart by 32: balanced, the match wins
        (34, 1, 600, 1),  # by more: the idler one
        (400, 367, 600, 0),  # by 33, but only 1.09 times as many
        (20, 1, 500, 1),  # half the prompt is not more than half
        (20, 1, 501, 0),
    ],
)
def test_sglang_breaks_affinity_only_when_both_thresholds_are_passed(
    high: int, low: int, cached: int, row: int
) -> None:
    rows = instances({"RUN_N": high, "CACHED_TOKENS": cached}, {"RUN_N": low})
    assert choose(bound("sglang_cache_aware"), place(PROMPT=1000), rows) == row


# -- Dynamo ------------------------------------------------------------------------------------------------

WARM = {"QUEUE_TOKENS": 320, "CACHED_TOKENS": 800, "RUN_CTX": 16_000}  # 20 + 63 − 50 blocks, 1000
COLD = {"QUEUE_TOKENS": 0, "CACHED_TOKENS": 0, "RUN_CTX": 15_600}  # 63, 975


@pytest.mark.parametrize(("values", "row"), [({}, 0), ({"overlap_credit": 0.0}, 1), ({"cost": "lmetric"}, 0)])
def test_dynamo_adds_uncached_prefill_blocks_and_decode_blocks(values: dict[str, object], row: int) -> None:
    """1008 / 16 = 63 blocks: 32.5 + 1000 = 1032.5 against 63 + 975 = 1038; without credit 83 + 1000."""
    rows = instances({"QUEUE_TOKENS": 312} | {k: v for k, v in WARM.items() if k != "QUEUE_TOKENS"}, COLD)
    assert choose(bound("dynamo_kv", **values), place(PROMPT=1008), rows) == row


def test_dynamo_product_weighs_prefill_by_the_decodes_it_disturbs() -> None:
    rows = instances({"QUEUE_TOKENS": 800, "RUN_CTX": 1600}, {"QUEUE_TOKENS": 8000, "RUN_CTX": 0})
    # linear: 60 + 100 = 160 against 510 + 0; product: 60 · 101 = 6060 against 510 · 1
    assert choose(bound("dynamo_kv"), place(PROMPT=160), rows) == 0
    assert choose(bound("dynamo_kv", cost="lmetric"), place(PROMPT=160), rows) == 1


def test_dynamo_temperature_samples_the_softmax() -> None:
    rows = instances({"RUN_CTX": 0}, {"RUN_CTX": 1600}, {"RUN_CTX": 3200})
    policy = bound("dynamo_kv", temperature=0.5, seed=4)
    shares = np.bincount([choose(policy, place(), rows) for _ in range(2000)], minlength=4)[:3] / 2000
    weights = np.exp(-np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.04)


# -- llm-d -------------------------------------------------------------------------------------------------

TIGHT = {"TTFT_S": 0.9, "STEP_WITH_S": 0.09, "RUN_N": 1}
LOOSE = {"TTFT_S": 0.1, "STEP_WITH_S": 0.01, "RUN_N": 1}
LATE = {"TTFT_S": 1.5, "STEP_WITH_S": 0.05, "RUN_N": 1}
SLOW = {"TTFT_S": 0.5, "STEP_WITH_S": 0.15, "RUN_N": 1}
CALM = {"epsilon": 0.0}


def test_llmd_packs_the_tightest_pod_that_meets_both_targets() -> None:
    rows = instances(LOOSE, TIGHT, LATE, SLOW)
    assert choose(bound("llmd_latency", **CALM), place(), rows) == 1
    assert choose(bound("llmd_latency", strategy="most", **CALM), place(), rows) == 0


def test_llmd_prefers_idle_then_slow_then_late_pods_when_none_meets_the_targets() -> None:
    policy, both = bound("llmd_latency", **CALM), {"TTFT_S": 1.2, "STEP_WITH_S": 0.12, "RUN_N": 1}
    idle = both | {"RUN_N": 0, "TTFT_S": 9.0}
    assert choose(policy, place(), instances(both, LATE, SLOW, idle)) == 3
    assert choose(policy, place(), instances(both, LATE, SLOW)) == 2
    assert choose(policy, place(), instances(both, LATE)) == 1
    worse = LATE | {"TTFT_S": 1.6}
    assert choose(policy, place(), instances(worse, LATE)) == 1


def test_llmd_foresees_that_a_backlog_rides_on_every_decode_step() -> None:
    """0.1 s for 1,000 tokens: a step that carries 512 of them takes 51 ms more than the 60 ms of decode."""
    busy = LOOSE | {"ROLE": M, "STEP_WITH_S": 0.06, "PREFILL_S": 0.1, "CHUNK_TOKENS": 512, "TTFT_S": 0.8}
    rows = instances(busy | {"QUEUE_TOKENS": 5000}, busy | {"TTFT_S": 0.1})
    assert choose(bound("llmd_latency", **CALM), place(), rows) == 1
    assert choose(bound("llmd_latency", **CALM), place(), rows[:, :] * 1.0, 1) == 0
    assert choose(bound("llmd_latency", **CALM), place(TPOT_SLO_S=0.12), rows) == 0


def test_llmd_explores_the_negative_tier_once_in_a_hundred() -> None:
    policy, rows = bound("llmd_latency", epsilon=0.01, seed=2), instances(LOOSE, LATE)
    share = np.mean([choose(policy, place(), rows) == 1 for _ in range(8000)])
    assert 0.005 < share < 0.017


def test_llmd_sticks_to_a_cached_prefix_unless_it_costs_too_much() -> None:
    warm = LOOSE | {"CACHED_TOKENS": 850, "TTFT_S": 0.5}
    rows = instances(TIGHT, warm)
    assert choose(bound("llmd_latency", **CALM), place(), rows) == 1
    assert choose(bound("llmd_latency", tau=0.9, **CALM), place(), rows) == 0
    cheaper = instances(LOOSE | {"TTFT_S": 0.05, "STEP_WITH_S": 0.08}, warm | {"TTFT_S": 0.99, "STEP_WITH_S": 0.01})
    assert choose(bound("llmd_latency", strategy="most", **CALM), place(), cheaper) == 1
    assert choose(bound("llmd_latency", strategy="most", max_penalty_s=0.5, **CALM), place(), cheaper) == 0


def test_llmd_token_load_follows_the_bottleneck() -> None:
    rows = instances(
        {"QUEUE_TOKENS": 500, "RUN_CTX": 100, "TOTAL_BLOCKS": 100},
        {"QUEUE_TOKENS": 900, "CACHED_TOKENS": 600, "RUN_CTX": 900, "TOTAL_BLOCKS": 100},
    )
    policy = bound("llmd_token_load")
    assert choose(policy, place(PREFILL_RHO=0.9, DECODE_RHO=0.2, KV_MEAN=0.5), rows) == 1
    assert choose(policy, place(PREFILL_RHO=0.4, DECODE_RHO=0.2, KV_MEAN=0.5), rows) == 0
    biased = bound("llmd_token_load", bias=2.0)
    assert choose(biased, place(PREFILL_RHO=0.4, DECODE_RHO=0.2, KV_MEAN=0.5), rows) == 1


# -- AIBrix ------------------------------------------------------------------------------------------------


def test_aibrix_sends_short_prompts_and_overflow_to_combined_pods() -> None:
    busy = {"ROLE": P, "QUEUE_N": 4}
    rows = instances(busy, busy | {"QUEUE_N": 5}, {"ROLE": D}, {"ROLE": M})
    assert choose(bound("aibrix_pd"), place(), rows) == 3
    assert choose(bound("aibrix_pd", overload=5), place(), rows) == 0
    assert choose(bound("aibrix_pd", overload=5, bucket_tokens=1000), place(), rows) == 3
    taken = instances(busy, busy, {"ROLE": D}, {"ROLE": M, "RUN_N": 1})
    assert choose(bound("aibrix_pd"), place(), taken) == 0


def test_aibrix_balances_before_it_looks_at_prefixes() -> None:
    rows = instances({"ROLE": P, "QUEUE_N": 16, "CACHED_TOKENS": 500}, {"ROLE": P, "QUEUE_N": 0})
    assert choose(bound("aibrix_pd"), place(), rows) == 0
    assert choose(bound("aibrix_pd", score="least_request"), place(), rows) == 1
    apart = instances({"ROLE": P, "QUEUE_N": 17, "CACHED_TOKENS": 500}, {"ROLE": P, "QUEUE_N": 0})
    assert choose(bound("aibrix_pd"), place(), apart) == 1


def test_aibrix_decodes_on_the_fewest_requests_when_they_are_far_apart() -> None:
    ctx = context(Kind.PLACE_DECODE)
    near = instances({"ROLE": D, "RUN_N": 15, "STEP_WITH_S": 0.01}, {"ROLE": D, "STEP_WITH_S": 0.02})
    far = instances({"ROLE": D, "RUN_N": 16, "STEP_WITH_S": 0.01}, {"ROLE": D, "STEP_WITH_S": 0.02})
    assert [choose(bound("aibrix_pd"), ctx, rows) for rows in (near, far)] == [0, 1]


def test_aibrix_pods_by_fractions() -> None:
    plan = bound("aibrix_pd", 8, layout="pods").arrangement
    assert plan is not None
    assert [p.role for p in plan] == [P, P, P, D, D, D, M, M]

"""Every rule does what its doc says, answers every kind, and never picks a masked candidate."""

from __future__ import annotations

import numpy as np
import pytest
from decisions import choose, context, instances, random_decision, setting
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.columns import Col, Kind
from engine.core.kinds import Role
from engine.core.policy import Policy
from engine.latency import Profile, pack
from policies import registry

PLACE = context(Kind.PLACE_PREFILL)


def bound(name: str, n: int = 4, **values: object):
    """The rule on instances whose profile has SM shares, with every kind of decision asked."""
    profile, share = pack((Profile.load("llama-8b-h100"),))
    return registry.get(name).bind(values, setting(n, profile=profile, share=share, kinds=frozenset(Kind)))


@pytest.mark.parametrize("name", registry.names())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_rule_answers_every_kind_with_an_allowed_candidate(name: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kind = data.draw(st.sampled_from(list(Kind)))
    rows = data.draw(st.integers(2, 5))
    ctx, table = random_decision(rng, kind, rows)
    if data.draw(st.booleans()):
        table[:, Col.TTFT : Col.DRAINING] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)), np.uint8)
    policy = bound(name)
    answer = int(policy.decide(ctx, table, mask, policy.params, policy.memory))
    assert answer == -1 if not mask.any() else mask[answer] == 1


@pytest.mark.parametrize("name", registry.names())
def test_every_rule_satisfies_the_protocol(name: str) -> None:
    policy = bound(name)
    assert isinstance(policy, Policy)
    assert policy.describe()["name"] == name
    assert policy.params.dtype == policy.memory.dtype == np.float64


@pytest.mark.parametrize("name", registry.names())
def test_reset_memory_repeats_the_same_decisions(name: str) -> None:
    policy = bound(name)
    runs = []
    for _ in range(2):
        policy.memory[:] = 0.0
        rng = np.random.default_rng(7)
        runs.append([choose(policy, *random_decision(rng, Kind(i % 4), 5)) for i in range(40)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("kind", [Kind.REALLOCATE, Kind.TUNE])
def test_simple_rules_keep_the_arrangement(name: str, kind: Kind) -> None:
    if registry.get(name).source not in SIMPLE_SOURCES:
        pytest.skip("a published system with control of its own")
    rows = instances({}, {}, last=Col.IS_KEEP)
    assert choose(bound(name), context(kind), rows) == 2


SIMPLE = (
    "round_robin",
    "power_of_two",
    "least_tokens",
    "static_split",
    "chunked",
    "linear_score",
    "predicted_ttft",
)
SIMPLE_SOURCES = {registry.get(name).source for name in SIMPLE}


@pytest.mark.parametrize("name", SIMPLE)
def test_holds_only_when_no_instance_is_allowed(name: str) -> None:
    rows = instances({"TTFT": 40.0, "TTFT_S": 40.0, "SLACK_AFTER": -3.0}, {"TTFT": 90.0, "TTFT_S": 90.0})
    assert choose(bound(name), PLACE, rows) in (0, 1)
    assert choose(bound(name), PLACE, rows, 0, 1) == 2


@pytest.mark.parametrize("name", SIMPLE)
def test_a_finished_prefill_stays_where_it_may_decode(name: str) -> None:
    busy = {"IN_PLACE": 1.0, "RUN_CTX": 900.0, "STEP_WITH_S": 0.09, "STEP_WITH": 0.9}
    idle = {"RUN_CTX": 0.0, "STEP_WITH_S": 0.01, "STEP_WITH": 0.1}
    ctx = context(Kind.PLACE_DECODE, SOURCE=1)
    assert choose(bound(name), ctx, instances(idle, busy)) == 1
    assert choose(bound(name), ctx, instances(idle, busy | {"ROLE": Role.PREFILL})) == 0


def test_round_robin_takes_turns_and_skips_what_is_masked() -> None:
    policy, rows = bound("round_robin"), instances({}, {}, {})
    assert [choose(policy, PLACE, rows) for _ in range(4)] == [0, 1, 2, 0]
    assert choose(policy, PLACE, rows, 1) == 2


def test_least_tokens_takes_the_fewest_and_breaks_ties_by_row() -> None:
    rows = instances({"OUTSTANDING": 30}, {"OUTSTANDING": 10}, {"OUTSTANDING": 10})
    assert choose(bound("least_tokens"), PLACE, rows) == 1
    assert choose(bound("least_tokens"), PLACE, rows, 1) == 2


def test_power_of_two_never_takes_the_most_loaded_and_repeats_itself() -> None:
    rows = instances(*({"OUTSTANDING": load} for load in (5, 40, 20, 10)))

    def draws() -> list[int]:
        policy = bound("power_of_two")
        return [choose(policy, PLACE, rows) for _ in range(600)]

    chosen = draws()
    # of 6 equally likely pairs, the least loaded wins 3, the next 2, the next 1, the most loaded none
    shares = np.bincount(chosen, minlength=4) / len(chosen)
    np.testing.assert_allclose(shares, [3 / 6, 0, 1 / 6, 2 / 6], atol=0.07)
    assert chosen == draws()


def test_static_split_counts_prompts_before_tokens() -> None:
    rows = instances(
        {"QUEUE_N": 2, "QUEUE_TOKENS": 10},
        {"QUEUE_N": 1, "QUEUE_TOKENS": 900},
        {"QUEUE_N": 1, "QUEUE_TOKENS": 800},
    )
    assert choose(bound("static_split"), PLACE, rows) == 2


@pytest.mark.parametrize(("fraction", "n_prefill"), [(0.0, 1), (0.5, 2), (0.75, 3), (1.0, 3)])
def test_static_split_gives_each_phase_at_least_one_instance(fraction: float, n_prefill: int) -> None:
    plan = bound("static_split", prefill_fraction=fraction, prefill_tokens=4096).arrangement
    assert [p.role for p in plan] == [Role.PREFILL] * n_prefill + [Role.DECODE] * (4 - n_prefill)
    assert plan[0].prefill_tokens == 4096


@pytest.mark.parametrize(("router", "row"), [("tokens", 0), ("queue", 1), ("ttft", 2)])
def test_chunked_routes_by_what_it_is_told(router: str, row: int) -> None:
    rows = instances(
        {"OUTSTANDING": 1, "QUEUE_N": 3, "TTFT_S": 3},
        {"OUTSTANDING": 3, "QUEUE_N": 1, "TTFT_S": 2},
        {"OUTSTANDING": 2, "QUEUE_N": 2, "TTFT_S": 1},
    )
    policy = bound("chunked", router=router, chunk_tokens=256)
    assert choose(policy, PLACE, rows) == row
    assert {(p.role, p.chunk_tokens) for p in policy.arrangement} == {(Role.MIXED, 256)}


@pytest.mark.parametrize("name", ["predicted_ttft", "linear_score"])
def test_predicted_ttft_wins_unless_running_requests_would_miss_their_tpot(name: str) -> None:
    fast, slow = {"TTFT": 0.4, "SLACK_AFTER": 0.5}, {"TTFT": 0.8, "SLACK_AFTER": 0.5}
    assert choose(bound(name), PLACE, instances(slow, fast)) == 1
    assert choose(bound(name), PLACE, instances(slow, fast | {"SLACK_AFTER": -1.0})) == 0


def test_linear_score_is_the_weighted_sum_it_says() -> None:
    zero = {p.name: 0.0 for p in registry.get("linear_score").params if p.name[:2] in ("p_", "d_")}
    rows = instances({"KV_WITH": 0.9, "CACHED": 1.0}, {"KV_WITH": 0.2, "CACHED": 0.0})
    cheap_memory = bound("linear_score", **(zero | {"p_kv": 1.0}))
    assert choose(cheap_memory, PLACE, rows) == 1
    # 0.9·1 − 1·0.8 = 0.1 against 0.2
    cached_too = bound("linear_score", **(zero | {"p_kv": 1.0, "p_cached": -0.8}))
    assert choose(cached_too, PLACE, rows) == 0


def test_linear_score_holds_above_its_threshold_only() -> None:
    policy = bound("linear_score", hold=1.5)
    assert choose(policy, PLACE, instances({"TTFT": 0.5, "SLACK_AFTER": 0.0})) == 0
    assert choose(policy, PLACE, instances({"TTFT": 3.0, "SLACK_AFTER": 0.0})) == 1

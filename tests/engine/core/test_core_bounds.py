"""Bounded waits: second deadlines in every queue order, holds that end in time, refusals that are early or not at all.

1 ms a prompt token, so that work is known; requests end with their first token unless a test says otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drive import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, ProfileSpec, RequestSpec, ShareSpec
from test_core_behaviour import DECODE, MIXED, MULTIPLEXED, PREFILL, ms, one, serve

from engine.core.columns import Col
from engine.core.decide.patience import may_shed
from engine.core.kinds import Batching, Order, RequestState, Role
from engine.core.policy import POLICY_SIGNATURE
from engine.core.setup import ClusterOptions, InstanceSpec, SloClass
from engine.core.state import ClusterState, attach
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from engine.jit.rows import addresses

_IS_HOLD, _IS_SHED, _INSTANCE, _WAIT = int(Col.IS_HOLD), int(Col.IS_SHED), int(Col.INSTANCE), int(Col.QUEUE_TOKENS)

#: Every way in which an instance computes prompts.
WAYS: list[tuple[Role, dict[str, Any]]] = [
    (MIXED, {"chunk_tokens": 32}),
    (MIXED, {"batching": Batching.PREFILL_FIRST, "prefill_tokens": 1}),
    (MIXED, {"batching": Batching.PREFILL_FIRST, "prefill_tokens": 100}),
    (PREFILL, {"prefill_tokens": 100, "chunk_tokens": 48}),
    (DECODE, {}),
    (MULTIPLEXED, {"batching": Batching.LAYERED, "prefill_tokens": 64}),
    (MULTIPLEXED, {"batching": Batching.LAYERED, "prefill_tokens": 64, "stand_aside": True}),
    (MULTIPLEXED, {"batching": Batching.CHUNKED, "chunk_tokens": 64}),
]
SHARES = (ShareSpec(50, (0, 0, 1e-3, 0), (0, 0, 1e-4), (0, 0, 1e-4)), ShareSpec(100, decode_small=(0, 0, 1e-4)))
TARGETS = [0.1, 0.2]


@st.composite
def bearable(draw: st.DrawFn, most: float, length: int = 200) -> tuple[RequestSpec, ...]:
    """Arrivals that never put more than ``most`` seconds of work before an instance, most of them as soon as it can."""
    specs: list[RequestSpec] = []
    backlog = 0.0
    for _ in range(draw(st.integers(10, 60))):
        prompt = draw(st.integers(2, 20) | st.integers(2, length))
        gap = draw(st.sampled_from([0.0, 0.0, prompt * 1e-3]))
        gap = max(gap, backlog + prompt * 1e-3 - most)
        backlog = max(backlog - gap, 0.0) + prompt * 1e-3
        specs.append(RequestSpec(prompt, 1, gap_s=gap, ttft_slo_s=draw(st.sampled_from(TARGETS))))
    return tuple(specs)


def waits(state: ClusterState) -> np.ndarray:
    """Time to the first token in TTFT targets, per request; all have one."""
    assert (state.req["first_token"] >= 0).all()
    return (state.req["first_token"] - state.req["arrival"]) / state.req["ttft_slo"]


@pytest.mark.parametrize("order", [o for o in Order if o != Order.FCFS])
@pytest.mark.parametrize("way", range(len(WAYS)))
@given(data=st.data(), factor=st.sampled_from([8.0, 10.0]))
@settings(max_examples=25, deadline=None)
def test_nobody_waits_beyond_the_bound_while_the_work_at_hand_allows_it(
    order: Order, way: int, data: st.DataObject, factor: float
) -> None:
    role, how = WAYS[way]
    requests = data.draw(bearable(most=0.6 * factor * TARGETS[0]))
    case = Case(
        (one(role, order=order, split=0 if role == MULTIPLEXED else -1, **how),),
        requests,
        (ProfileSpec(SHARES),),
        options=ClusterOptions(tail_factor=factor),
    )
    assert waits(serve(case)).max() <= factor


def endless(order: Order, *, factor: float = 10.0) -> tuple[ClusterState, float]:
    """A prompt of 100 tokens, and short ones that leave no gap for 3 s."""
    short = (RequestSpec(10, 1, gap_s=0.010, ttft_slo_s=0.05) for _ in range(300))
    requests = (RequestSpec(15, 1), RequestSpec(100, 1, ttft_slo_s=0.1), *short)
    how = one(MIXED, batching=Batching.PREFILL_FIRST, prefill_tokens=1, order=order)
    state = serve(Case((how,), requests, options=ClusterOptions(tail_factor=factor)))
    return state, ms(state, "first_token")[1]


@pytest.mark.parametrize("order", [Order.SHORTEST, Order.SHORTEST_PREEMPTIVE, Order.ON_TIME])
def test_a_long_prompt_is_not_passed_over_for_ever(order: Order) -> None:
    _, first = endless(order)
    assert 700 <= first <= 1000, "late for its target of 100 ms, in time for ten of them"


def test_until_the_bound_is_near_the_prompts_in_time_go_first() -> None:
    state, _ = endless(Order.ON_TIME)
    before = state.req[2:60]
    assert (before["ttft_ok"] == 1).all()


def test_a_larger_factor_lets_a_prompt_wait_longer() -> None:
    assert endless(Order.ON_TIME, factor=20.0)[1] > 1400


@pytest.mark.parametrize("order", list(Order))
@given(
    burst=st.lists(st.integers(20, 300), min_size=5, max_size=25),
    load=st.sampled_from([0.6, 0.9]),
    output=st.sampled_from([1, 3]),
)
@settings(max_examples=20, deadline=None)
def test_nobody_stays_starved_when_the_load_falls_after_an_overload(
    order: Order, burst: list[int], load: float, output: int
) -> None:
    drained = sum(burst) / (1.0 - load)  # ms
    n = int(1.3 * drained * load / 10) + 20
    after = (RequestSpec(10, 1, gap_s=0.010 / load, ttft_slo_s=0.05) for _ in range(n))
    requests = (*(RequestSpec(tokens, output, ttft_slo_s=0.05) for tokens in burst), *after)
    state = serve(Case((one(MIXED, chunk_tokens=32, order=order),), requests, (ProfileSpec(SHARES),)))
    assert waits(state)[len(burst) + n - 15 :].max() <= 10.0
    assert max(ms(state, "first_token")[: len(burst)]) <= 1.2 * drained + 100


def overloaded(order: Order, longs: int) -> tuple[ClusterState, list[float]]:
    """A quarter more short prompts than an instance can serve for 8 s, among them long ones in the first 90 ms."""
    short = [RequestSpec(10, 1, gap_s=0.008, ttft_slo_s=0.05) for _ in range(1000)]
    long = [RequestSpec(300 + k, 1, gap_s=0.03, ttft_slo_s=0.05) for k in range(longs)]
    how = one(MIXED, batching=Batching.PREFILL_FIRST, prefill_tokens=1, order=order)
    state = serve(Case((how,), (*long, *short), (ProfileSpec(SHARES),)))
    return state, ms(state, "first_token")


@pytest.mark.parametrize("order", [Order.SHORTEST, Order.SHORTEST_PREEMPTIVE, Order.ON_TIME])
def test_who_was_given_up_twice_has_a_turn_while_the_overload_lasts(order: Order) -> None:
    state, first = overloaded(order, 6)
    twice = abs(state.req["late"][:6]) == 2
    assert twice.sum() >= 3, "1.8 s of long prompts do not fit into ten targets of 50 ms"
    served = np.sort(np.array(first[:6])[twice])
    assert served[-1] < state.req["arrival"].max() / 1e9, "all have had their turn before the load falls"
    assert (np.diff(served) > 400).all(), "one in the time of a second deadline: those that can keep theirs come first"


@pytest.mark.parametrize("order", [Order.SHORTEST, Order.SHORTEST_PREEMPTIVE, Order.ON_TIME])
def test_a_step_looks_past_nobody_who_was_given_up_twice(order: Order) -> None:
    state, _ = overloaded(order, 6)
    last = state.req["late"] >= 2
    assert last.sum() > 100, "they pile up"
    in_reach = state.req[~last]
    waited = (in_reach["first_token"] - in_reach["arrival"]) / in_reach["ttft_slo"]
    assert np.quantile(waited, 0.95) <= 10.0, "and the others keep their second deadlines"


# -- HOLD and SHED -----------------------------------------------------------------------------------------


@kernel(POLICY_SIGNATURE)
def unwilling(context, candidates, mask, params, memory):
    """HOLD (``params[0]`` 1) or SHED (2) whenever allowed, else the instance with the fewest tokens to prefill."""
    best, least = -1, np.inf
    for k in range(mask.shape[0]):
        if mask[k] == 0:
            continue
        if (params[0] == 1.0 and candidates[k, _IS_HOLD] == 1.0) or (
            params[0] == 2.0 and candidates[k, _IS_SHED] == 1.0
        ):
            return k
        if candidates[k, _INSTANCE] >= 0.0 and candidates[k, _WAIT] < least:
            best, least = k, candidates[k, _WAIT]
    if best >= 0:
        return best
    for k in range(mask.shape[0]):
        if mask[k] != 0:
            return k
    return -1


def reluctant(case: Case, answer: int) -> ClusterState:
    """``case`` under a policy that holds (1) or refuses (2) whenever it may, jumping and stepping."""
    found = []
    for jump in (True, False):
        state, sim = case.build(fast_forward=jump)
        driver = Driver(case, state, sim, decide=unwilling, needs=1)
        driver.params = np.array([float(answer)])
        driver.finish()
        found.append(state)
    for name in ("placed", "first_token", "finished"):
        np.testing.assert_array_equal(found[0].req[name], found[1].req[name])
    return found[0]


def busy(state: ClusterState, i: int) -> list[tuple[int, int]]:
    """When instance ``i`` had something to do, merged; every request ends where it was placed first."""
    mine = state.req[state.req["first_inst"] == i]
    spans = sorted((int(r["placed"]), int(r["finished"])) for r in mine)
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def covered(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    return any(a <= start and end <= b for a, b in spans)


@st.composite
def fleets(draw: st.DrawFn, **options: Any) -> Case:
    n = draw(st.integers(1, 3))
    order = draw(st.sampled_from(list(Order)))
    role = draw(st.sampled_from([0, 1, 5, 7]))
    instances: tuple[InstanceSpec, ...] = tuple(
        one(WAYS[role][0], pool=i, order=order, split=0 if WAYS[role][0] == MULTIPLEXED else -1, **WAYS[role][1])
        for i in range(n)
    )
    requests = tuple(
        RequestSpec(
            draw(st.integers(2, 150)),
            draw(st.integers(1, 4)),
            gap_s=draw(st.sampled_from([0.0, 0.01, 0.05, 0.3])),
            ttft_slo_s=draw(st.sampled_from([0.05, 0.2, 1.0])),
        )
        for _ in range(draw(st.integers(1, 40)))
    )
    options["hold_s"] = draw(st.sampled_from([0.003, 0.05, 1.0]))
    options["hold_scan"] = draw(st.integers(1, 3))
    return Case(instances, requests, (ProfileSpec(SHARES),), options=ClusterOptions(**options))


@given(fleets(hold=True))
@settings(max_examples=120, deadline=None)
def test_nobody_is_held_past_the_target_less_the_prefill_nor_while_an_instance_is_idle(case: Case) -> None:
    state = reluctant(case, 1)
    spans = [busy(state, i) for i in range(len(case.instances))]
    for r in state.req:
        prefill = int(r["prompt"]) * 10**9
        assert r["placed"] <= r["arrival"] + max(int(r["ttft_slo"]) - prefill, 0)
        if r["placed"] > r["arrival"]:
            assert all(covered(s, int(r["arrival"]), int(r["placed"])) for s in spans)
    assert (state.req["state"] == RequestState.FINISHED).all()


@given(fleets(shed=True))
@settings(max_examples=120, deadline=None)
def test_only_what_is_out_of_reach_is_refused_early_and_never_on_an_idle_fleet(case: Case) -> None:
    state = reluctant(case, 2)
    shed = state.req["state"] == RequestState.SHED
    spans = [busy(state, i) for i in range(len(case.instances))]
    for r in state.req[shed]:
        assert r["finished"] - r["arrival"] <= r["ttft_slo"]
        assert all(any(a <= r["finished"] <= b for a, b in s) for s in spans)
    assert shed.sum() == 0 or state.req["prompt"].sum() > 50


@given(fleets(shed=True))
@settings(max_examples=60, deadline=None)
def test_nobody_is_refused_whom_the_next_free_instance_serves_in_time(case: Case) -> None:
    state = reluctant(case, 2)
    for r in state.req[state.req["state"] == RequestState.SHED]:
        others = state.req[(state.req["placed"] >= 0) & (state.req["arrival"] <= r["arrival"])]
        for i in range(len(case.instances)):
            mine = others[(others["first_inst"] == i) & (others["finished"] >= r["finished"])]
            work = int(mine["prompt"].sum() + r["prompt"]) * 10**9
            # Half a decode step and a chunk's room are all that the forecast may add to the work ahead.
            assert work * 1.5 + 2 * 10**9 > r["ttft_slo"], "it was in reach"


def test_a_target_that_cannot_be_met_may_be_refused_and_one_that_can_may_not() -> None:
    requests = (RequestSpec(300, 1), RequestSpec(20, 1, gap_s=0.01, ttft_slo_s=0.2), RequestSpec(20, 1, ttft_slo_s=0.5))
    state = reluctant(Case((one(),), requests, options=ClusterOptions(shed=True)), 2)
    assert state.req["state"].tolist() == [RequestState.FINISHED, RequestState.SHED, RequestState.FINISHED]


@kernel
def may_be_refused(words, r, now):
    return may_shed(attach(words), r, now)


def test_nobody_is_refused_once_the_target_has_passed() -> None:
    requests = (RequestSpec(300, 1), RequestSpec(20, 1, gap_s=0.01, ttft_slo_s=0.2))
    case = Case((one(),), requests, options=ClusterOptions(shed=True))
    state, sim = case.build()
    Driver(case, state, sim, decide=unwilling, needs=1).step(2)  # both wait on the one instance
    asked = [bool(may_be_refused(addresses(state), 1, at * 10**9)) for at in (10, 200, 210, 211)]
    assert asked == [True, True, True, False]


def test_a_refusal_counts_prompts_that_would_be_overtaken() -> None:
    # 300 ms queue behind the one that runs, given up or due later: a new prompt goes before them.
    requests = (RequestSpec(50, 1), RequestSpec(300, 1, ttft_slo_s=5.0), RequestSpec(20, 1, gap_s=0.01, ttft_slo_s=0.1))
    found = []
    for order in (Order.FCFS, Order.ON_TIME):
        how = one(MIXED, batching=Batching.PREFILL_FIRST, prefill_tokens=1, order=order)
        found.append(int(reluctant(Case((how,), requests, options=ClusterOptions(shed=True)), 2).cluster[0]["n_shed"]))
    assert found == [1, 0]


@pytest.mark.parametrize("factor", [0.99, -1.0, float("nan")])
def test_a_bound_below_the_target_is_refused(factor: float) -> None:
    case = Case((one(),), (RequestSpec(1, 1),), classes=(SloClass(1.0, 1.0),))
    with pytest.raises(SlalomError, match="tail_factor"):
        Case(case.instances, case.requests, options=ClusterOptions(tail_factor=factor)).build()

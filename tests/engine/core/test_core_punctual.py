"""Order ON_TIME against the best subset found by brute force: 1 ms a prompt token, one prompt at a time."""

from __future__ import annotations

from itertools import permutations

from drive import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, RequestSpec
from test_core_behaviour import MIXED, ms, one, serve

from engine.core.kinds import Batching, Order
from engine.core.setup import ClusterOptions, InstanceSpec

BLOCKER = 10  # tokens of the prompt that computes while the others arrive


def instance(order: Order) -> InstanceSpec:
    return one(MIXED, batching=Batching.PREFILL_FIRST, prefill_tokens=1, order=order)


def on_time(jobs: list[tuple[int, int]], order: Order) -> int:
    """How many of the jobs (tokens, target in ms), all there when the blocker ends, meet their target."""
    requests = (RequestSpec(BLOCKER, 1), *(RequestSpec(n, 1, ttft_slo_s=due / 1e3) for n, due in jobs))
    # Nobody's second deadline comes near: it would go first, and the number in time would not be the largest.
    patient = ClusterOptions(tail_factor=1e6)
    first = ms(serve(Case((instance(order),), requests, options=patient)), "first_token")[1:]
    return sum(t <= due + 1e-6 for t, (_, due) in zip(first, jobs, strict=True))


def most_on_time(jobs: list[tuple[int, int]]) -> int:
    """The most that any sequence gets done in time."""
    best = 0
    for sequence in permutations(jobs):
        end, n = BLOCKER, 0
        for tokens, due in sequence:
            end += tokens
            n += end <= due
        best = max(best, n)
    return best


@given(st.lists(st.tuples(st.integers(2, 60), st.integers(15, 160)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_as_many_prompts_as_possible_are_in_time(jobs: list[tuple[int, int]]) -> None:
    assert on_time(jobs, Order.ON_TIME) == most_on_time(jobs)


def test_the_prompt_that_makes_others_late_is_put_last_and_served_all_the_same() -> None:
    # Due after 60 ms: the long one (45) and two short ones do not fit together; after 100: one of 30.
    requests = (
        RequestSpec(10, 1), RequestSpec(45, 1, ttft_slo_s=0.060), RequestSpec(15, 1, ttft_slo_s=0.060),
        RequestSpec(20, 1, ttft_slo_s=0.060), RequestSpec(30, 1, ttft_slo_s=0.100),
    )  # fmt: skip
    found = ms(serve(Case((instance(Order.ON_TIME),), requests)), "first_token")
    assert found == [10, 120, 25, 45, 75]


def test_a_lower_priority_value_goes_before_an_earlier_deadline() -> None:
    requests = (RequestSpec(10, 1), RequestSpec(20, 1, ttft_slo_s=0.05), RequestSpec(20, 1, ttft_slo_s=5.0))
    case = Case((instance(Order.ON_TIME),), requests)
    state, sim = case.build()
    state.req["priority"][2] = -1
    Driver(case, state, sim).finish()
    assert ms(state, "first_token") == [10, 50, 30]

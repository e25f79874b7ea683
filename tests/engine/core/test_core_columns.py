"""Decision columns on cases small enough to be computed by hand: 1 ms a prompt token, 10 ms a decode step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drive import Driver
from strategies import Case, ProfileSpec, RequestSpec

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Order, Role
from engine.core.policy import POLICY_SIGNATURE
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass
from engine.jit.kernel import kernel

PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED
_NOW, _KIND = int(Ctx.NOW_S), int(Ctx.KIND)
_ALL = int(Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS | Need.QUEUE)


@kernel(POLICY_SIGNATURE)
def first(context, candidates, mask, params, memory):
    """The first allowed row."""
    for k in range(mask.shape[0]):
        if mask[k] != 0:
            return k
    return -1


def asked(case: Case, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Context and candidates of the ``n``-th decision (from 1), every decision answered by the first allowed row."""
    state, sim = case.build()
    driver = Driver(case, state, sim, decide=first, needs=_ALL)
    driver.step(n)
    return sim.context.copy(), sim.candidates.copy()


def one(role: Role = MIXED, kv_tokens: int = 16_000, pool: int = 0, **changes: Any) -> InstanceSpec:
    return InstanceSpec(role, pool, kv_tokens, **changes)


@pytest.mark.parametrize(
    ("order", "ahead", "slack"),
    [
        # A (40, in flight until 40), B (30), C (20) wait; the new prompt has 25 tokens, targets are 100 ms from 0.
        (Order.FCFS, 90, 10),  # after everyone: C ends at 90
        (Order.SHORTEST, 60, -15),  # after C (60), before B, which then ends at 115
        (Order.ON_TIME, 90, 10),  # the same deadline: in order of arrival
    ],
)
def test_work_ahead_and_least_slack_follow_the_order_of_the_queue(order: Order, ahead: float, slack: float) -> None:
    requests = tuple(RequestSpec(n, 1) for n in (40, 30, 20, 25))
    instances = (one(PREFILL, order=order, prefill_tokens=1), one(DECODE, pool=1))
    _, rows = asked(Case(instances, requests, classes=(SloClass(0.1, 1.0),)), 4)
    assert rows[0, Col.AHEAD_S] == pytest.approx(ahead / 1e3)
    assert rows[0, Col.QUEUE_SLACK_S] == pytest.approx(slack / 1e3)
    assert rows[1, Col.QUEUE_SLACK_S] > 100  # nobody waits there


def test_transfers_are_foreseen_when_a_prompt_is_placed() -> None:
    """1,000 bytes a token over 1 MB/s and 5 ms: 10 tokens in 15 ms; the mixed instance keeps them."""
    instances = (one(PREFILL), one(DECODE, pool=1), one(MIXED, pool=2))
    case = Case(instances, (RequestSpec(10, 2),), links=(LinkSpec(1e6, 0.005),))
    _, rows = asked(case, 1)
    assert rows[:3, Col.TRANSFER_S].tolist() == pytest.approx([0.015, 0, 0])
    assert rows[:3, Col.INBOUND].tolist() == [0, 0, 0]  # the network's column still means PLACE_DECODE only


def test_what_a_receiver_has_cached_need_not_move() -> None:
    requests = (RequestSpec(64, 2, hashed=4, shared=4), RequestSpec(64, 2, gap_s=1.0, hashed=4, shared=2))
    instances = (one(PREFILL), one(DECODE, pool=1))
    case = Case(instances, requests, links=(LinkSpec(1e6, 0.0),), options=ClusterOptions(hash_tokens=16))
    context, rows = asked(case, 4)
    assert context[_KIND] == Kind.PLACE_DECODE
    assert rows[1, Col.CACHED_TOKENS] == 32
    assert rows[1, Col.TRANSFER_S] == pytest.approx(0.032)
    assert rows[1, Col.CACHED] == 0.0


def test_a_relative_target_is_known_to_control_decisions() -> None:
    options = ClusterOptions(reallocate=True, control_s=0.5)
    classes = (SloClass(0.01, 1.0, ttft_factor=5.0),)
    requests = (RequestSpec(40, 200), RequestSpec(60, 2))
    context, _ = asked(Case((one(), one(pool=1)), requests, classes=classes, options=options), 3)
    assert context[_KIND] == Kind.REALLOCATE
    assert context[Ctx.TTFT_FACTOR] == 5.0
    assert context[Ctx.TTFT_SLO_S] == pytest.approx(5 * 0.050)


def test_ready_requests_are_told_apart_from_running_ones() -> None:
    """B is through its prefill at 27 ms, in the middle of a decode step of A."""
    slow = ProfileSpec(n_layers=1)
    shared = (one(PREFILL), one(DECODE))  # one pool: the hand-over is free
    requests = (RequestSpec(10, 30), RequestSpec(12, 5, gap_s=0.015), RequestSpec(5, 1, gap_s=0.013))
    context, rows = asked(Case(shared, requests, (slow,)), 5)
    assert context[_NOW] == pytest.approx(0.028)
    assert (rows[1, Col.RUN_N], rows[1, Col.READY_N]) == (2, 1)


def test_answers_of_one_token_have_no_tpot_in_the_window_that_policies_read() -> None:
    """Three prompts in one step; then the third decodes twice, 10 ms each."""
    options = ClusterOptions(reallocate=True, control_s=0.5)
    requests = (RequestSpec(10, 1), RequestSpec(10, 1), RequestSpec(10, 3), RequestSpec(10, 1, gap_s=1.0))
    context, _ = asked(Case((one(), one(pool=1)), requests, options=options), 4)
    assert context[_KIND] == Kind.REALLOCATE
    assert context[Ctx.WIN_OUTPUT] == pytest.approx(5 / 3)
    assert context[Ctx.WIN_TPOT_S] == pytest.approx(0.010)


def test_prefix_lookups_and_hits_are_counted_at_the_same_time() -> None:
    """Both prompts are admitted when the second decision after them is asked for; neither has ended."""
    requests = tuple(RequestSpec(64, 500, gap_s=gap, hashed=4, shared=4) for gap in (0.0, 1.0, 1.0))
    state, sim = Case((one(),), requests, options=ClusterOptions(hash_tokens=16)).build()
    Driver(Case((one(),), requests), state, sim, decide=first, needs=_ALL).step(3)
    cluster = state.cluster[0]
    assert cluster["n_finished"] == 0
    assert (cluster["looked_up_tokens"], cluster["cached_tokens"]) == (128, 48)

"""Role changes: what they wait for, how many at once, into which roles, and what stays able meanwhile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from audit import check, check_end
from drive import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, ProfileSpec, RequestSpec, cases

from engine.core.columns import Col, Ctx, Kind
from engine.core.events import interrupt
from engine.core.events.slots import slots_of
from engine.core.kinds import Batching, RequestState, Role
from engine.core.loop import answer, begin, finish_lane, finish_switch, start_idle
from engine.core.policy import POLICY_SIGNATURE
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec
from engine.core.state import ClusterState
from engine.jit.kernel import kernel
from engine.jit.rows import addresses

MS = 10**9  # ticks


@kernel(POLICY_SIGNATURE)
def changing(context, candidates, mask, params, memory):
    """Prompts and decodes to the first that may; at control time ``params[0]`` becomes ``params[1]``, ``params[2]``
    ``params[3]``, ... each as soon as that is allowed."""
    if int(context[Ctx.KIND]) == Kind.REALLOCATE:
        for p in range(params.shape[0] // 2):
            for k in range(1, mask.shape[0]):
                wanted = (
                    candidates[k, Col.INSTANCE] == params[2 * p] and candidates[k, Col.NEW_ROLE] == params[2 * p + 1]
                )
                if wanted and mask[k] != 0:
                    return k
        return 0
    for k in range(mask.shape[0]):
        if mask[k] != 0:
            return k
    return -1


def one(role: Role, pool: int, **changes: object) -> InstanceSpec:
    return InstanceSpec(role, pool, 16_000, **changes)  # type: ignore[arg-type]


def case(options: ClusterOptions, *requests: RequestSpec, decoders: int = 2, kb_per_token: float = 1.0) -> Case:
    """A prefill instance and some that decode: 1 ms a prompt token, 10 ms a decode step, 1 ms to move 1000 tokens."""
    profile = ProfileSpec(kv_bytes_per_token=1000.0 * kb_per_token, switch_s=0.05)
    specs = (one(Role.PREFILL, 0), *(one(Role.DECODE, 1 + k) for k in range(decoders)))
    return Case(specs, requests, (profile,), links=(LinkSpec(1e9, 0.0),), options=options)


def play(what: Case, *changes: int, horizon_s: float = 1e4) -> ClusterState:
    """Jumping and stepping, which agree."""
    ends = []
    for jump in (False, True):
        state, sim = what.build(fast_forward=jump, horizon_s=horizon_s)
        driver = Driver(what, state, sim, decide=changing)
        driver.params = np.array(changes, np.float64)
        driver.finish()
        ends.append(state)
    for name in ("first_token", "last_token", "finished"):
        np.testing.assert_array_equal(ends[0].req[name], ends[1].req[name])
    return ends[1]


TO_PREFILL = (1, int(Role.PREFILL))


def test_a_change_waits_for_decodes_or_hands_them_over() -> None:
    request, later = RequestSpec(100, 500), RequestSpec(10, 1, gap_s=7.0)  # the first decodes from 100 to 5,090 ms
    for hand_over in (False, True):
        options = ClusterOptions(reallocate=True, control_s=1.0, hand_over=hand_over)
        state = play(case(options, request), *TO_PREFILL, horizon_s=2.0)
        assert state.inst[1]["role"] == (Role.PREFILL if hand_over else Role.DECODE)
        assert state.req[0]["inst"] == (2 if hand_over else 1)
        state = play(case(options, request, later), *TO_PREFILL)
        assert state.req[0]["state"] == RequestState.FINISHED
        assert state.inst[1]["role"] == Role.PREFILL
        assert state.cluster[0]["n_preempted"] == 0
        # From prefill to decode, and once more where it is handed over: 0.19 ms later in the end, the transfer's time.
        assert state.cluster[0]["n_migrated"] == 1 + hand_over
        assert state.req[0]["finished"] < 5102 * MS


def test_only_what_others_have_room_for_is_handed_over_and_the_rest_decodes_on() -> None:
    options = ClusterOptions(reallocate=True, control_s=0.5, hand_over=True)
    what = case(options, *(RequestSpec(10, 200) for _ in range(6)), RequestSpec(10, 1, gap_s=7.0))
    what = replace(what, instances=(*what.instances[:2], replace(what.instances[2], max_batch=2)))
    state = play(what, *TO_PREFILL)
    assert state.req["state"].tolist() == [RequestState.FINISHED] * 7
    assert state.inst[1]["role"] == Role.PREFILL
    # Two seats at the receiver: the four others never stood still for longer than a step.
    assert state.cluster[0]["n_migrated"] == 6 + 2
    lasted = (state.req["finished"] - state.req["first_token"])[:6]
    assert lasted.max() < 2.2e3 * MS


def test_several_change_at_once_but_never_below_what_must_stay_able() -> None:
    request = RequestSpec(100, 900)
    wishes = [x for i in (1, 2, 3) for x in (i, int(Role.PREFILL))]
    for at_once, expected in ((1, 1), (2, 2), (3, 2)):  # of three that decode one must stay
        options = ClusterOptions(reallocate=True, control_s=0.2, at_once=at_once)
        requests = (request, replace(request, gap_s=0.0), replace(request, gap_s=0.0))
        what = case(options, *requests, decoders=3)
        state, sim = what.build(horizon_s=1.1)
        driver = Driver(what, state, sim, decide=changing)
        driver.params = np.array(wishes, np.float64)
        state.inst["max_batch"] = 1  # one request on each
        driver.finish()
        assert (state.inst["target_role"] >= 0).sum() + (state.inst["role"][1:] == Role.PREFILL).sum() >= 1
        assert state.cluster[0]["moving_roles"] <= expected


@pytest.mark.parametrize("role", [Role.MIXED, Role.MULTIPLEXED])
def test_every_role_is_a_target_where_it_is_allowed(role: Role) -> None:
    wish = (1, int(role))
    for roles, becomes in (((Role.PREFILL, Role.DECODE), Role.DECODE), ((Role.DECODE, role), role)):
        options = ClusterOptions(reallocate=True, control_s=0.2, roles=roles)
        state = play(case(options, RequestSpec(50, 100)), *wish)
        assert state.inst[1]["role"] == becomes
        assert interrupt.request_role(addresses(state), 2, int(role)) == (becomes == role)


def test_batching_follows_a_role_there_and_back() -> None:
    options = ClusterOptions(reallocate=True, control_s=0.2)
    what = replace(
        case(options, RequestSpec(50, 300)),
        instances=(one(Role.PREFILL, 0), one(Role.MIXED, 1, batching=Batching.PREFILL_FIRST)),
    )
    there = play(what, 1, int(Role.MULTIPLEXED))
    assert there.inst[1]["batching"] == Batching.LAYERED
    words = addresses(there)
    assert interrupt.request_role(words, 1, int(Role.MIXED))
    finish_switch(words, 1)
    assert there.inst[1]["batching"] == Batching.PREFILL_FIRST


def able(state: ClusterState) -> tuple[int, int]:
    """Instances that prefill, and that decode, whatever becomes of the changes under way."""
    roles = list(zip(state.inst["role"].tolist(), state.inst["target_role"].tolist(), strict=True))
    return sum(Role.DECODE not in pair for pair in roles), sum(Role.PREFILL not in pair for pair in roles)


@settings(max_examples=300)
@given(cases(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 12))
def test_minima_and_the_number_at_once_hold_at_every_moment(what: Case, prefill: int, decode: int, pause: int) -> None:
    options = replace(what.options, reallocate=True, min_prefill=prefill, min_decode=decode)
    what = replace(what, options=options, keep=0.1)
    state, sim = what.build()
    least = [min(bound, start) for bound, start in zip((prefill, decode), able(state), strict=True)]
    driver = Driver(what, state, sim)
    for _ in range(40):
        taken = driver.step(pause)
        check(state, sim)
        assert (state.inst["target_role"] >= 0).sum() <= options.at_once
        assert able(state)[0] >= least[0]
        assert able(state)[1] >= least[1]
        if taken < pause:
            check_end(state, sim)
            return
    driver.finish()
    check_end(state, sim)


def test_a_role_change_that_waits_for_a_hand_over_in_place_goes_on_at_once() -> None:
    """Two instances on one pool; the first prefills a prompt that the second is to decode, and drains meanwhile."""
    options = ClusterOptions(place_decode=True)
    specs = (one(Role.MIXED, 0), one(Role.MIXED, 0))
    state, _ = Case(specs, (RequestSpec(10, 5),), (ProfileSpec(switch_full=1),), options=options).build()
    words, started = addresses(state), np.zeros(8, np.int32)
    begin(words, 0, 0)
    answer(words, Kind.PLACE_PREFILL, 0, 0, 0)
    assert start_idle(words, 0, started) == 1
    assert interrupt.request_role(words, 0, Role.PREFILL)
    finish_lane(words, 0, 0, 10)
    state.inst["dirty"] = 0  # the loop has looked at it: the prompt is not handed over yet
    answer(words, Kind.PLACE_DECODE, 0, 1, 10)
    begun = started[: start_idle(words, 10, started)].tolist()
    assert slots_of(2, 1).switches in begun


def test_a_pool_is_not_cleared_while_a_transfer_that_was_given_up_may_write_to_it() -> None:
    options = ClusterOptions(hand_over=True)
    specs = (one(Role.PREFILL, 0), one(Role.DECODE, 1), one(Role.DECODE, 2))
    what = Case(specs, (RequestSpec(20, 5),), (ProfileSpec(switch_full=1),), options=options)
    state, _ = what.build()
    words, started = addresses(state), np.zeros(12, np.int32)
    begin(words, 0, 0)
    answer(words, Kind.PLACE_PREFILL, 0, 0, 0)
    start_idle(words, 0, started)
    finish_lane(words, 0, 0, 10)
    answer(words, Kind.PLACE_DECODE, 0, 1, 10)
    start_idle(words, 10, started)
    tail, n, _ = interrupt.fail_transfer(words, 0, True)
    assert interrupt.request_role(words, 1, Role.PREFILL)
    switch = slots_of(3, 1).switches + 1
    assert switch not in started[: start_idle(words, 11, started)]
    interrupt.release_blocks(words, 1, tail, n)
    assert switch in started[: start_idle(words, 12, started)]

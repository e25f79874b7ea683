"""A layer-sliced prefill stands aside for a short prompt: when it may, what it costs, and that nothing is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from audit import check, check_end
from drive import Driver, played
from strategies import Case, ProfileSpec, RequestSpec, ShareSpec

from engine.core.events import interrupt
from engine.core.kinds import Batching, RequestState, Role
from engine.core.setup import InstanceSpec
from engine.core.state import ClusterState
from engine.jit.rows import addresses

MS = 10**9
#: 1 ms a prompt token on either half of the device, 10 ms a decode step, ten layers: slices of 100 ms for 1000 tokens.
PROFILE = ProfileSpec(shares=(ShareSpec(50), ShareSpec(100)), n_layers=10)
INSTANCE = InstanceSpec(
    role=Role.MULTIPLEXED,
    pool=0,
    kv_tokens=8000,
    batching=Batching.LAYERED,
    split=0,
    prefill_tokens=1,
    stand_aside=True,
)
DECODING = RequestSpec(prompt=10, output=400)
LONG = RequestSpec(prompt=1000, output=3, gap_s=0.05, ttft_slo_s=2.0)
SHORT = RequestSpec(prompt=50, output=3, gap_s=0.25, ttft_slo_s=0.2)


def case(*requests: RequestSpec, **changes: object) -> Case:
    return Case((replace(INSTANCE, **changes),), (DECODING, *requests), profiles=(PROFILE,))


def first_ms(state: ClusterState) -> list[float]:
    """TTFT of each request."""
    return ((state.req["first_token"] - state.req["arrival"]) / MS).tolist()


@pytest.mark.parametrize("fast_forward", [True, False])
def test_a_short_prompt_goes_first_and_costs_the_long_one_its_own_time(fast_forward: bool) -> None:
    (before, _), (after, sim) = (
        played(case(LONG, SHORT, stand_aside=on), fast_forward=fast_forward) for on in (False, True)
    )
    check_end(after, sim)
    assert before.inst[0]["stood_aside"] == 0
    assert after.inst[0]["stood_aside"] == 1
    assert first_ms(before)[2] > 200.0
    assert first_ms(after)[2] < 200.0
    assert first_ms(after)[1] - first_ms(before)[1] == pytest.approx(50.0, abs=0.01)
    assert (after.req["ttft_ok"] == 1).all()


@pytest.mark.parametrize(
    ("long", "short"),
    [
        pytest.param(LONG, replace(SHORT, ttft_slo_s=2.0), id="it is in time anyway"),
        pytest.param(LONG, replace(SHORT, ttft_slo_s=0.03), id="it is late anyway"),
        pytest.param(replace(LONG, ttft_slo_s=1.02), SHORT, id="the long one would be late"),
        pytest.param(LONG, replace(SHORT, prompt=900, ttft_slo_s=1.0), id="it is not the shorter one"),
    ],
)
def test_nobody_stands_aside_where_it_does_not_help_or_harms(long: RequestSpec, short: RequestSpec) -> None:
    state, sim = played(case(long, short))
    check_end(state, sim)
    assert state.inst[0]["stood_aside"] == 0


def test_who_preempts_is_not_preempted() -> None:
    middle = replace(SHORT, prompt=300, ttft_slo_s=0.5)
    tiny = RequestSpec(prompt=20, output=2, gap_s=0.15, ttft_slo_s=0.1)
    alone, _ = played(case(middle, tiny))
    assert alone.inst[0]["stood_aside"] == 1
    state, sim = played(case(LONG, middle, tiny))
    check_end(state, sim)
    assert state.inst[0]["stood_aside"] == 1
    assert state.req["first_token"][3] > state.req["first_token"][2]


def test_without_room_for_the_short_prompt_the_long_one_goes_on() -> None:
    state, sim = played(case(LONG, SHORT, kv_tokens=1104))  # 69 blocks: the long prompt takes 63
    check_end(state, sim)
    assert state.inst[0]["stood_aside"] == 0


def test_a_lost_instance_gives_up_the_parked_batch_too() -> None:
    asked = RequestSpec(prompt=20, output=2, gap_s=0.08)  # asks for a decision while the short prompt is computed
    lost = case(LONG, replace(SHORT, prompt=200, ttft_slo_s=0.4), asked)
    state, sim = lost.build()
    Driver(lost, state, sim).step(4)
    assert state.inst[0]["parked_n"] == 1
    assert state.req["state"][1] == state.req["state"][2] == RequestState.PREFILLING
    check(state, sim)
    words = addresses(state)
    interrupt.lose(words, 0)
    interrupt.evacuate(words, 0)
    assert state.inst[0]["parked_n"] == state.inst[0]["parked_work"] == 0
    assert (state.req["state"] == RequestState.PLACING).all()
    assert (state.pool["free"] == state.pool["n_blocks"]).all()
    assert not np.any([state.inst[0][name] for name in ("queue_tokens", "queue_work", "held_tokens", "started_n")])

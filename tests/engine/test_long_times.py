"""Clocks that have run for years, targets of a day, steps of an hour: no sum of times overflows, nothing is garbage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from live_cases import GREEDY, KV, PROMPTS, Ends, FirstAllowed, engine_on, mixed, send
from runtime_cases import tables
from waiting import until

from engine.core.columns import Col, Ctx
from engine.core.kinds import Role
from engine.core.origin import FAR, move_origin
from engine.core.setup import ClusterOptions, InstanceSpec, SloClass, new_cluster
from engine.core.state import NEVER
from engine.core.ticks import LONGEST_STRETCH_S, arrival_ticks, duration_ticks
from engine.errors import SlalomError
from engine.latency import Profile
from engine.latency.evaluate import FOREVER, PROFILE, SHARE, TICKS_PER_S, times, to_ticks
from engine.latency.profile import list_profiles
from engine.live.engine import Engine

DAY_NS = 86_400 * 10**9
LONG = replace(GREEDY, max_tokens=60)
PD = [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)]


class Watcher(FirstAllowed):
    """Keeps what it was shown."""

    needs = 15

    def __init__(self) -> None:
        self.now_s: list[float] = []
        self.age_s: list[float] = []
        self.slack_s: list[float] = []

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        assert np.isfinite(context).all()
        assert np.isfinite(candidates[:-2]).all()
        self.now_s.append(float(context[Ctx.NOW_S]))
        self.age_s.append(float(context[Ctx.NOW_S] - context[Ctx.ARRIVAL_S]))
        self.slack_s.extend(candidates[candidates[:, Col.RUN_N] > 0, Col.MIN_SLACK_S].tolist())
        return super().decide(context, candidates, mask, params, memory)


def set_ahead(engine: Engine, days: float) -> None:
    engine.clock._zero -= int(days * DAY_NS)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine_on(mixed()) as engine:
        return [send(engine, prompt, LONG).wait().tokens for prompt in PROMPTS]


@pytest.mark.parametrize("days", [60.0, 120.0, 3653.0])
@pytest.mark.parametrize("place", [mixed(2), PD], ids=["mixed", "apart"])
def test_after_days_and_years_requests_are_served_with_their_targets(
    days: float, place: list[InstanceSpec], expected: list[list[int]]
) -> None:
    seen: list[tuple[int, int, int]] = []
    policy = Watcher()
    with engine_on(place, policy=policy) as engine:
        engine.observers.append(
            Ends(
                lambda request, record, finish: seen.append(
                    (int(record["ttft_ok"]), int(record["tpot_ok"]), int(record["last_token"] - record["arrival"]))
                )
            )
        )
        targets = {"ttft_s": 1000.0, "tpot_s": 500.0}
        assert send(engine, PROMPTS[0], LONG, **targets).wait().tokens == expected[0]
        set_ahead(engine, days)
        for _ in range(2):  # before and after the origin has moved
            callers = [send(engine, PROMPTS[0], LONG, **targets)]
            until(lambda callers=callers: len(callers[0].tokens) > 3)  # type: ignore[misc]
            callers += [send(engine, prompt, LONG, **targets) for prompt in PROMPTS[1:]]
            assert [caller.wait().tokens for caller in callers] == expected
        until(lambda: engine.n_open == 0)
        late = [send(engine, prompt, LONG, ttft_s=1e-9, tpot_s=1e-9) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in late] == expected
        until(lambda: engine.n_open == 0)
        assert engine.clock.now < FAR
        assert engine.clock.uptime_s() == pytest.approx(days * 86_400, rel=1e-3)
    assert [fate[:2] for fate in seen] == [(1, 1)] * 13 + [(0, 0)] * 6
    assert all(0 < took < 300 * TICKS_PER_S for _, _, took in seen)
    assert policy.now_s == sorted(policy.now_s), "the time that policies see never goes back"
    assert policy.now_s[-1] > days * 86_000
    assert all(0.0 <= age < 300.0 for age in policy.age_s)
    assert policy.slack_s
    assert all(-300.0 < slack < 500.0 * 61 for slack in policy.slack_s)


def test_the_origin_moves_while_requests_are_open(expected: list[list[int]]) -> None:
    with engine_on(mixed(2), policy=Watcher()) as engine:
        callers = [send(engine, prompt, replace(LONG, max_tokens=600)) for prompt in PROMPTS]
        until(lambda: all(len(caller.tokens) > 3 for caller in callers))
        for days in (14.0, 30.0, 365.0):
            before = len(callers[0].tokens)
            set_ahead(engine, days)
            until(lambda before=before: len(callers[0].tokens) > before + 3 or callers[0].done.is_set())  # type: ignore[misc]
        assert [caller.wait().tokens[:60] for caller in callers] == expected
        assert engine.clock.origin > FAR


@pytest.mark.parametrize("tpot_s", [86_400.0, 1e6, 1e30])
def test_the_longest_targets_are_met(tpot_s: float) -> None:
    seen: list[tuple[int, float]] = []
    policy = Watcher()
    with engine_on(mixed(), policy=policy) as engine:
        engine.state.cls["tpot_s"] = engine.state.cls["ttft_s"] = tpot_s
        engine.observers.append(
            Ends(lambda request, record, finish: seen.append((int(record["ttft_ok"]), int(record["tpot_ok"]))))
        )
        first = send(engine, PROMPTS[1], replace(GREEDY, max_tokens=300))
        until(lambda: len(first.tokens) > 150)
        send(engine, PROMPTS[0]).wait()
        first.wait()
        until(lambda: len(seen) == 2)
    assert seen == [(1, 1)] * 2
    assert all(slack > 0.0 for slack in policy.slack_s)


def test_seconds_become_ticks_without_overflow() -> None:
    assert int(to_ticks(1.5)) == 1_500_000_000_000
    for huge in (1e9, 1e300, float("inf"), float("nan")):
        assert int(to_ticks(huge)) == FOREVER
    assert int(to_ticks(-1e300)) == -FOREVER
    assert int(times(86_400 * TICKS_PER_S, 10)) == 864_000 * TICKS_PER_S
    assert int(times(86_400 * TICKS_PER_S, 2**31 - 1)) == 2 * FOREVER
    assert duration_ticks(np.array([0.0, 2.5, 1e300]), 1).tolist() == [1, 2_500_000_000_000, FOREVER]
    assert arrival_ticks("trace", np.array([0.0, LONGEST_STRETCH_S])).tolist() == [
        0,
        int(LONGEST_STRETCH_S) * TICKS_PER_S,
    ]
    assert int(LONGEST_STRETCH_S) * TICKS_PER_S + 3 * FOREVER < NEVER + FOREVER
    for long in (200 * 86_400.0, 1e300, float("inf"), float("nan")):
        with pytest.raises(SlalomError, match="49 days"):
            arrival_ticks("trace", np.array([0.0, long]))


@pytest.mark.parametrize("name", ["hold_s", "control_s"])
@pytest.mark.parametrize("seconds", [0.0, 1e-13, -1.0, float("nan")])
def test_intervals_of_no_length_are_refused(name: str, seconds: float) -> None:
    spec, tables = InstanceSpec(Role.MIXED, 0, KV), (np.zeros(1, PROFILE), np.ones((1, 1), SHARE))
    with pytest.raises(SlalomError, match=name):
        new_cluster([spec], *tables, classes=[SloClass(1.0, 1.0)], options=ClusterOptions(**{name: seconds}))


@pytest.mark.parametrize(
    "changes",
    [
        {"step_overhead_s": 4000.0},
        {"switch_s": 1e300},
        {"ctx_overhead_s": 3600.0},
        {"kv_tokens": 2**31},
        {"shares": 1e12},
    ],
    ids=str,
)
def test_profiles_whose_steps_take_hours_are_refused(changes: dict[str, Any]) -> None:
    content = Profile.load(list_profiles()[0]).model_dump()
    if "shares" in changes:
        content["shares"][-1]["decode_small_s"] = (1.0, 1.0, changes["shares"])
        changes = {}
    with pytest.raises(ValueError, match=r"hour|3600|2147483648"):
        Profile.model_validate(content | changes, strict=False)


def test_every_time_of_the_state_moves_with_the_origin() -> None:
    state = new_cluster([InstanceSpec(Role.MIXED, 0, KV)], *tables(), classes=[SloClass(1.0, 0.1)])
    state.due[0, 0], state.watch[0], state.cluster["hold_due"] = 5 * FAR // 2, 5.0 * FAR / 2.0, 5 * FAR // 2
    move_origin(state, FAR, FAR)
    left = 3 * FAR // 2
    assert (state.due[0, 0], state.watch[0], state.cluster["hold_due"][0]) == (left, float(left), left)
    state.due[0, 0], state.watch[0], state.cluster["hold_due"] = NEVER, float(NEVER), NEVER
    move_origin(state, FAR, 2 * FAR)
    assert (state.due[0, 0], state.watch[0], state.cluster["hold_due"][0]) == (NEVER, float(NEVER), NEVER)

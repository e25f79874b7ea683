"""Each trigger of the guard, fired on purpose while requests are being served."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_cases import Plain, cluster, first, forever, guarded, question
from hypothesis import given
from hypothesis import strategies as st

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Col, Ctx, Kind
from engine.core.kinds import Role
from engine.errors import SlalomError
from engine.live.modelled import play
from policies.guard import Guard
from policies.guard.breaker import Breaker, BreakerState
from policies.guard.checks import FINE, NOT_FINITE, OUTSIDE, inspect
from policies.guard.config import BreakerConfig, GuardConfig
from policies.guard.log.log import DecisionLog
from policies.load import load_policy
from policies.setting import Setting

NO_BOUNDS = np.zeros((0, 0))


def test_a_good_policy_decides_everything_and_changes_nothing() -> None:
    alone = cluster()
    play(alone, load_policy("predicted_ttft", Setting.of_state(alone)), n_roots=len(alone.req))
    state = cluster()
    guard, _ = guarded("predicted_ttft", state)
    assert not guard.fallbacks
    assert guard.reasons[0] > 200
    np.testing.assert_array_equal(state.req["finished"], alone.req["finished"])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda c, k, m: 10**9, "invalid"),
        (lambda c, k, m: -1, "invalid"),
        (lambda c, k, m: int(np.flatnonzero(m == 0)[-1]), "invalid"),  # a masked row
        (lambda c, k, m: None, "invalid"),
        (lambda c, k, m: "instance 3", "invalid"),
        (lambda c, k, m: float("nan"), "invalid"),
        (lambda c, k, m: 1 / 0, "error"),
        (lambda c, k, m: exec("raise SystemExit"), "error"),
        (forever, "deadline"),
    ],
    ids=["huge", "negative", "masked", "none", "text", "nan", "raises", "exits", "hangs"],
)
def test_misbehaviour_costs_no_request_and_trips_the_breaker(answer: Any, reason: str) -> None:
    policy = Plain(answer)
    config = {"deadline_us": 20_000.0, "breaker": {"failures": 3, "cooldown_s": 100.0}}
    if reason == "deadline":
        config["breaker"] = {"failures": 1, "cooldown_s": 100.0}
    guard, runtime = guarded(policy, **config)
    decisions = sum(runtime.decisions.values())
    assert guard.fallbacks[reason] >= 1
    assert sum(guard.fallbacks.values()) == decisions
    assert guard.breaker.state == BreakerState.OPEN
    assert guard.breaker.trips == 1
    assert policy.asked <= 3, "an open breaker does not ask"
    assert guard.fallbacks["breaker"] >= decisions - 3 - guard.fallbacks["busy"]


def test_an_endless_loop_is_interrupted_and_nobody_waits_for_it_twice() -> None:
    interrupted = threading.Event()

    def spin(context: Any, candidates: Any, mask: Any) -> int:
        try:
            while True:
                pass
        except BaseException:
            interrupted.set()
            raise

    guard, _ = guarded(Plain(spin), deadline_us=5_000.0, breaker={"failures": 1, "cooldown_s": 1e3})
    assert interrupted.wait(10.0)
    assert guard.fallbacks["deadline"] == 1


def test_a_late_answer_is_never_used_for_a_later_question() -> None:
    state, gate = cluster(), threading.Event()

    def late_once(context: Any, candidates: Any, mask: Any) -> int:
        if policy.asked == 1:
            gate.wait(10.0)
            return 3
        return first(context, candidates, mask)

    policy = Plain(late_once)
    fallback = load_policy("least_tokens", Setting.of_state(state))
    guard = Guard(state, policy, fallback, GuardConfig(deadline_us=20_000.0))
    context, candidates, mask = question()
    candidates[1:4, Col.OUTSTANDING] = 5.0
    guard.choose(0, 0, 0, context, candidates, mask)
    guard.choose(0, 1, 0, context, candidates, mask)
    assert (guard.fallbacks["deadline"], guard.fallbacks["busy"]) == (1, 1)
    gate.set()
    end = time.monotonic() + 10.0
    while guard.reasons[0] == 0 and time.monotonic() < end:
        assert guard.choose(0, 2, 0, context, candidates, mask) == 0
    assert guard.reasons[0] > 0
    guard.close()


def test_the_breaker_closes_again_when_the_policy_recovers() -> None:
    def heals(context: Any, candidates: Any, mask: Any) -> int:
        return -1 if policy.asked <= 4 else first(context, candidates, mask)

    policy = Plain(heals)
    guard, runtime = guarded(policy, deadline_us=1e6, breaker={"failures": 3, "cooldown_s": 0.05, "probes": 2})
    assert guard.fallbacks["invalid"] == 4, "three trip it, the first probe fails, the next two are good"
    assert guard.breaker.trips == 2
    assert guard.breaker.state == BreakerState.CLOSED
    assert guard.fallbacks["breaker"] > 0
    assert guard.reasons[0] == sum(runtime.decisions.values()) - sum(guard.fallbacks.values()) > 100


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.booleans()), max_size=60))
def test_breaker_never_asks_during_its_cooldown(steps: list[tuple[float, bool]]) -> None:
    breaker = Breaker(BreakerConfig(failures=3, window_s=50.0, cooldown_s=10.0, max_cooldown_s=40.0, probes=2))
    now, opened, cooldown = 0.0, None, 10.0
    for wait, good in steps:
        now += wait
        if not breaker.lets(now):
            assert opened is not None
            assert now < opened + cooldown
            continue
        half = breaker.state == BreakerState.HALF_OPEN
        trips = breaker.trips
        if good:
            breaker.succeeded() if half else None
            cooldown = 10.0 if breaker.state == BreakerState.CLOSED else cooldown
        else:
            breaker.failed(now)
        if breaker.trips > trips:
            opened = now
            cooldown = min(2 * cooldown, 40.0) if half else 10.0


# -- what the policy is shown


def test_unusual_features_go_to_the_fallback_without_asking() -> None:
    context_bounds = np.array([[-np.inf] * CONTEXT_DIMENSIONLESS, [np.inf] * CONTEXT_DIMENSIONLESS])
    candidate_bounds = np.array([[-np.inf] * CANDIDATE_DIMENSIONLESS, [np.inf] * CANDIDATE_DIMENSIONLESS])
    candidate_bounds[:, Col.QUEUE] = 0.0  # in training nobody ever waited
    state = cluster()
    bound = load_policy("predicted_ttft", Setting.of_state(state))
    guard, _ = guarded(replace(bound, bounds=(context_bounds, candidate_bounds)), state)
    assert guard.fallbacks["ood"] > 10
    assert guard.reasons[0] > 10
    assert guard.breaker.state == BreakerState.CLOSED, "being asked the unknown is no failure"


@given(
    st.integers(0, len(Col) - 1),
    st.integers(0, 5),
    st.sampled_from([np.nan, np.inf, -np.inf, 2.0, -1.0, 0.5]),
)
def test_inspect_sees_every_allowed_cell(column: int, row: int, value: float) -> None:
    context, candidates, mask = question()
    ones = (np.array([[-0.1] * CONTEXT_DIMENSIONLESS, [1.0] * CONTEXT_DIMENSIONLESS]),
            np.array([[-0.1] * CANDIDATE_DIMENSIONLESS, [1.0] * CANDIDATE_DIMENSIONLESS]))  # fmt: skip
    candidates[row, column] = value
    if column == Col.INSTANCE:
        return
    expected = FINE
    if mask[row] and not np.isfinite(value):
        expected = NOT_FINITE
    elif mask[row] and column < CANDIDATE_DIMENSIONLESS and not -0.1 <= value <= 1.0:
        expected = OUTSIDE
    assert inspect(context, candidates, mask, *ones) == expected
    assert inspect(context, candidates, mask, NO_BOUNDS, NO_BOUNDS) == (NOT_FINITE if expected == NOT_FINITE else FINE)


def test_nan_features_and_nan_scores() -> None:
    from decisions import BASE, network

    from policies.network import compiled
    from policies.network.normalise import default_normalisation

    state = cluster()
    setting = Setting.of_state(state)
    rows = compiled.rows_of(setting)
    net = network()
    params = compiled.pack(net.arrays(), default_normalisation(), rows)
    base = load_policy("linear_score", setting)
    learned = replace(
        base, decide=compiled.decide, params=params, kind="network",
        memory=np.zeros(compiled.memory_cells(net.hidden, rows)),
    )  # fmt: skip
    fallback = load_policy("least_tokens", setting)
    context, candidates, mask = question()
    candidates[0, Col.OUTSTANDING] = 9.0
    good = Guard(state, learned, fallback)
    assert mask[good.choose(0, 0, 0, context, candidates, mask)]
    assert (good.reasons[0], dict(good.fallbacks)) == (1, {})
    context[Ctx.SIZE] = np.nan
    assert good.choose(0, 0, 0, context, candidates, mask) == 1
    assert good.fallbacks["features"] == 1
    context[Ctx.SIZE] = 0.0
    broken = params.copy()
    broken[4 + 2 * CONTEXT_DIMENSIONLESS + 40] = np.nan
    broken[-8:] = np.nan
    bad = Guard(state, replace(learned, params=broken), fallback)
    assert bad.choose(0, 0, 0, context, candidates, mask) == 1
    assert bad.fallbacks["scores"] + bad.fallbacks["invalid"] == 1
    assert BASE is not None


# -- roles


def toggles(context: Any, candidates: Any, mask: Any) -> int:
    """Places anywhere and changes a role whenever it may."""
    allowed = np.flatnonzero(mask)
    return int(allowed[-1] if context[Ctx.KIND] == Kind.REALLOCATE else allowed[0])


def test_role_changes_are_bounded_cooled_down_and_verified() -> None:
    state = cluster(600, reallocate=True)
    guard, runtime = guarded(
        Plain(toggles), state, deadline_us=1e6, roles={"cooldown_s": 0.5, "min_prefill": 1, "min_decode": 2}
    )
    done = dict(guard.roles.results)
    assert sum(done.values()) >= 3
    assert {result for _, _, result in done} == {"done"}
    assert sum(done.values()) <= int(state.req["finished"].max()) * 1e-12 / 0.5 + 1
    assert int(state.cluster[0]["n_switches"]) == sum(done.values()) + len(guard.roles.pending)
    assert (state.inst["role"] != Role.PREFILL).sum() >= 2
    assert not guard.fallbacks
    loose, _ = guarded(Plain(toggles), cluster(600, reallocate=True), deadline_us=1e6, roles={"cooldown_s": 0.0})
    assert sum(loose.roles.results.values()) > sum(done.values())
    capped, _ = guarded(
        Plain(toggles), cluster(600, reallocate=True), deadline_us=1e6, roles={"cooldown_s": 0.0, "max_per_hour": 2}
    )
    assert sum(capped.roles.results.values()) == 2


def test_impossible_roles_change_nothing() -> None:
    def impossible(context: Any, candidates: Any, mask: Any) -> int:
        if context[Ctx.KIND] != Kind.REALLOCATE:
            return first(context, candidates, mask)
        closed = np.flatnonzero(mask == 0)
        return int(closed[-1]) if len(closed) else 10**6

    state = cluster(300, reallocate=True)
    before = state.inst["role"].copy()
    guard, _ = guarded(Plain(impossible), state, deadline_us=1e6, breaker={"failures": 1000})
    assert guard.fallbacks["invalid"] > 0
    np.testing.assert_array_equal(state.inst["role"], before)


@pytest.mark.parametrize("how", ["vanishes", "hangs"])
def test_a_switch_that_did_not_happen_is_an_alarm_and_the_last_one(how: str) -> None:
    state = cluster(reallocate=True)
    rule = load_policy("least_tokens", Setting.of_state(state))
    guard = Guard(state, rule, rule, GuardConfig.load(roles={"cooldown_s": 0.0, "verify_s": 5.0}))
    roles = guard.roles
    roles.begins(0, int(Role.DECODE), 1.0)
    assert not roles.allows(2.0), "one at a time"
    if how == "hangs":
        state.inst["target_role"][0] = Role.DECODE
        assert roles.check(5.9) is None
    change = roles.check(6.1)
    assert change is not None
    assert change.result == {"vanishes": "unverified", "hangs": "timeout"}[how]
    assert not roles.allows(1e6)
    guard.thaw()
    assert roles.allows(1e6)
    state.cluster["at_once"] = 2
    roles.begins(0, int(Role.DECODE), 1e6)
    assert roles.allows(1e6)
    roles.begins(1, int(Role.DECODE), 1e6)
    assert not roles.allows(1e6), "two at once"
    with pytest.raises(SlalomError, match="min_decode"):
        Guard(state, rule, rule, GuardConfig.load(roles={"min_decode": 4}))


# -- modes


def test_advisory_mode_acts_exactly_like_the_fallback_and_counts_agreement() -> None:
    alone = cluster()
    guarded("least_tokens", alone)
    state = cluster()
    guard, runtime = guarded("predicted_ttft", state, advisory=True)
    np.testing.assert_array_equal(state.req["finished"], alone.req["finished"])
    assert guard.advised == sum(runtime.decisions.values())
    assert 0 < guard.agreed < guard.advised
    assert not guard.fallbacks


def test_freezing_stops_changes_at_once_and_can_bring_the_arrangement_back() -> None:
    def run(restore: bool) -> tuple[Guard, Any, list[int]]:
        state = cluster(500, reallocate=True)
        start, switches = state.inst["role"].copy(), []

        def answer(context: Any, candidates: Any, mask: Any) -> int:
            if int(state.cluster[0]["n_switches"]) == 1 and not guard_of[0].frozen:
                guard_of[0].freeze(restore=restore)
                switches.append(int(state.cluster[0]["n_switches"]))
            return toggles(context, candidates, mask)

        guard_of: list[Guard] = []
        guarded(Plain(answer), state, guard=guard_of.append, deadline_us=1e6, roles={"cooldown_s": 0.0})
        return guard_of[0], start, [*switches, int(state.cluster[0]["n_switches"]), *state.inst["role"].tolist()]

    guard, start, (at_freeze, at_end, *roles) = run(restore=False)
    assert guard.mode == "frozen"
    assert guard.fallbacks["frozen"] > 100
    assert at_end - at_freeze <= 1, "at most the change of the decision under way"
    assert roles != start.tolist()
    guard, start, (*_, a, b, c, d) = run(restore=True)
    assert [a, b, c, d] == start.tolist()


def test_a_swap_is_whole() -> None:
    """100 swaps under load between policies whose function, constants and memory all carry one mark."""
    mixed: list[str] = []

    class Marked(Plain):
        def __init__(self, mark: int) -> None:
            super().__init__(first, f"mark-{mark}")
            self.mark, self.params, self.memory = mark, np.array([float(mark)]), np.array([-float(mark)])

        def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
            if params[0] != self.mark or abs(memory[0]) != self.mark:
                mixed.append(self.name)
            memory[0] = self.mark
            return super().decide(context, candidates, mask, params, memory)

    state = cluster(400)
    guards: list[Guard] = []
    policies = [Marked(k) for k in range(1, 102)]

    def swap_often(guard: Guard) -> None:
        guards.append(guard)
        choose = guard.choose

        def choosing(*question: Any) -> int:
            if guard._seq % 5 == 4 and guard.swaps < 100:
                guard.adopt(policies[guard.swaps + 1])
            return choose(*question)

        guard.choose = choosing  # type: ignore[method-assign]

    guard, _ = guarded(policies[0], state, guard=swap_often, deadline_us=1e6)
    assert guard.swaps == 100
    assert not mixed
    assert not guard.fallbacks
    assert all(policy.asked > 0 for policy in policies[:100])


def test_a_swap_is_rehearsed_first() -> None:
    state = cluster()
    fallback = load_policy("least_tokens", Setting.of_state(state))
    guard = Guard(state, fallback, fallback)
    for answer in (lambda c, k, m: 99, lambda c, k, m: 1 / 0):
        with pytest.raises(SlalomError, match="rehears"):
            guard.prepare(Plain(answer), rehearse=True)
    guard.adopt(guard.prepare(Plain(first), rehearse=True))
    assert guard.policy.name == "plain"
    guard.close()


# -- configuration


def test_config_says_where_it_is_wrong(tmp_path: Any) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text("deadline_us: 500\nbreaker: {failures: 2}\nroles: {min_decode: 2}\n")
    config = GuardConfig.load(path, deadline_us=None, advisory=True)
    assert (config.deadline_us, config.breaker.failures, config.roles.min_decode, config.advisory) == (500, 2, 2, True)
    wrong = {"deadline_us: 0": "deadline_us", "breaker: {x: 1}": "breaker.x", "- 1": "mapping", "a: [": "valid YAML"}
    for text, where in wrong.items():
        path.write_text(text)
        with pytest.raises(SlalomError, match=where):
            GuardConfig.load(path)
    with pytest.raises(SlalomError, match="readable file"):
        GuardConfig.load(tmp_path / "none.yaml")


def test_the_guard_looks_after_whoever_writes_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[float] = []
    log = DecisionLog(tmp_path / "log.jsonl", writer="thread")
    state = cluster()
    monkeypatch.setattr(log, "look_after", lambda: looked.append(1.0))
    guarded("least_tokens", state, log=log)
    log.close()
    assert 0 < len(looked) <= int(state.req["finished"].max()) * 1e-12 + 1, "at most once a second"

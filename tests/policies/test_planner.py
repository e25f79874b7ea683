"""The planner: what it thinks each phase needs, when it moves, and that it follows a day without flapping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decisions import choose, context
from hypothesis import given, settings
from hypothesis import strategies as st
from published import D, M, P, roles_table
from test_published_planners import profiled

from engine.core.columns import Col, Kind
from engine.core.kinds import Role
from engine.errors import SlalomError
from env.measure.phases import play_days, worst
from env.scenario import Scenario
from env.surrogate.simulate import bind_policy
from policies import registry
from policies.network.features import LATE, N_FEATURES
from policies.rule import BoundPolicy
from policies.rules import dyn_sla
from policies.rules.parts.planner import composition, corrected
from policies.rules.parts.profile_tables import profile_block
from policies.rules.planner import needs

NOTHING: dict[str, float] = dict.fromkeys(
    ("trend", "prefill", "decode", "backlog", "lead", "occ_share", "ttft_risk", "tpot_risk", "spare", "hysteresis"), 0.0
)
LOAD: dict[str, float] = {
    "WIN_SPAN_S": 5.0, "WIN_RATE": 6.0, "WIN_PROMPT": 1000.0, "WIN_OUTPUT": 400.0, "WIN_TTFT_S": 0.4,
    "WIN_TPOT_S": 0.03, "TTFT_SLO_S": 1.0, "TPOT_SLO_S": 0.05,
}  # fmt: skip


KINDS = frozenset(Kind)


def planner(**values: Any) -> BoundPolicy:
    return registry.get("planner").bind({"commit_s": 0.0, **values}, replace(profiled(), kinds=KINDS))


def ttft_target(policy: BoundPolicy) -> float:
    return float(policy.params[-len(profile_block(profiled())) - 2])


def tick(**columns: float) -> np.ndarray:
    return context(Kind.REALLOCATE, N_INSTANCES=8, **(LOAD | columns))


def fleet(n_p: int, busy: float = 0.0, queued: float = 0.0) -> np.ndarray:
    rows = [{"ROLE": P, "QUEUE_TOKENS": queued, "OUTSTANDING": queued}] * n_p
    return roles_table(*rows, *[{"ROLE": D, "RUN_N": busy, "RUN_CTX": 500.0 * busy, "OUTSTANDING": busy}] * (8 - n_p))


def asked(policy: BoundPolicy, columns: np.ndarray, table: np.ndarray) -> tuple[float, float]:
    """Needs after one tick."""
    memory = policy.memory.copy()
    policy.decide(columns, table, np.ones(len(table), np.uint8), policy.params, memory)
    return needs(columns, table, policy.params, memory)


@settings(deadline=None)
@given(rate=st.floats(0.5, 40.0), prompt=st.floats(64, 8000), output=st.floats(8, 2000))
def test_the_equations_of_dyn_sla_are_a_special_case(rate: float, prompt: float, output: float) -> None:
    policy = planner(**(NOTHING | {"prefill": 1.0, "decode": 1.0, "lead": 1.0, "headroom": 1.0}))
    load = tick(WIN_RATE=rate, WIN_PROMPT=prompt, WIN_OUTPUT=output)
    p, d = asked(policy, load, fleet(4))
    block = np.concatenate([np.zeros(1), profile_block(profiled())])
    n_p, n_d = dyn_sla.plan(block, 1, prompt, output, rate, 1.0, 1.0)
    assert n_p == max(np.ceil(p - 1e-9), 1.0) or n_p == max(np.ceil(p + 1e-9), 1.0)
    assert n_d == max(np.ceil(d - 1e-9), 1.0) or n_d == max(np.ceil(d + 1e-9), 1.0)


def test_the_signals_of_arrow_are_a_special_case() -> None:
    policy = planner(**(NOTHING | {"ttft_risk": 2.0, "tpot_risk": 3.0}))
    calm = asked(policy, tick(), fleet(4, busy=50.0, queued=9000.0))
    assert calm == (0.0, 0.0)
    late = asked(policy, tick(WIN_TTFT_S=2.0), fleet(4))
    target = ttft_target(policy)
    assert late == (pytest.approx(2.0 * (2.0 / target - 1.0)), 0.0)
    slow = asked(policy, tick(WIN_TPOT_S=0.1), fleet(4))
    assert slow == (0.0, pytest.approx(3.0))


SHARE = st.floats(0.0, 3.0)


@settings(deadline=None, max_examples=200)
@given(
    n_p=st.integers(2, 6),
    seen=st.tuples(SHARE, SHARE, SHARE, SHARE),
    high=st.floats(0.1, 3.0),
    low=st.floats(0.1, 3.0),
    load=st.lists(st.floats(0.0, 9.0), min_size=8, max_size=8, unique=True),
)
def test_by_risks_alone_it_is_arrow(
    n_p: int, seen: tuple[float, ...], high: float, low: float, load: list[float]
) -> None:
    rows: list[dict[str, float]] = [{"ROLE": P, "WAIT_S": seen[0] * (1 + k)} for k in range(n_p)]
    rows += [{"ROLE": D, "STEP_S": 0.05 * seen[1] / (1 + k)} for k in range(8 - n_p)]
    table = roles_table(*(row | {"OUTSTANDING": here} for row, here in zip(rows, load, strict=True)))
    columns = tick(WIN_TTFT_S=seen[2], WIN_TPOT_S=0.05 * seen[3])
    arrow = registry.get("arrow").bind(
        {"high": high, "low": low, "cooldown_s": 0.0}, replace(profiled(), kinds=KINDS, roles=(Role.PREFILL,) * 8)
    )
    ours = planner(by="risks", high=high, low=low, interval_s=1.0)
    assert choose(ours, columns, table) == choose(arrow, columns, table)


@pytest.mark.parametrize(
    ("wanted", "ttft", "tpot", "found"),
    [
        (4.0, 1.0, 0.2, 5.0),  # TTFT at risk, TPOT not: one more
        (6.0, 1.0, 0.2, 6.0),  # which demand had asked for anyway
        (3.0, 1.0, 0.2, 5.0),  # whatever demand says
        (4.0, 1.0, 0.6, 4.0),  # nobody can give one
        (4.0, 0.2, 1.0, 3.0),
        (2.0, 0.2, 1.0, 2.0),
        (4.0, 0.2, 0.2, 4.0),
    ],
)
def test_needs_are_corrected_where_one_target_alone_is_at_risk(
    wanted: float, ttft: float, tpot: float, found: float
) -> None:
    assert corrected(wanted, 4.0, ttft, tpot, 0.9, 0.5, 1.0, 7.0) == found


def test_backlog_and_decodes_count_as_stated() -> None:
    base = NOTHING | {"decode": 1.0}
    _, d = asked(planner(**base), tick(), fleet(4, busy=100.0))
    # Largest batch at contexts of 500 within 0.9 · 50 ms: (45 − 20) ms / (0.1 + 0.05) ms = 166.
    assert d == pytest.approx(400 / 166)
    p, _ = asked(planner(**(NOTHING | {"backlog": 0.5})), tick(), fleet(2, queued=5000.0))
    target = ttft_target(planner())
    assert p == pytest.approx(0.5 * 10_000 * 1e-4 / target)


@pytest.mark.parametrize(
    ("need", "now", "wanted"),
    [
        ((4.0, 4.0), 4, 4),  # fills the fleet: in proportion
        ((9.0, 3.0), 4, 6),
        ((2.0, 2.0), 4, 4),  # half of what is left, which changes nothing
        ((2.0, 4.0), 4, 4),  # 3.0, no more than ½ + 0.6 away
        ((1.0, 5.4), 4, 2),  # 1.8
        ((0.0, 0.0), 3, 3),  # nothing known
        ((0.1, 20.0), 4, 1),  # one of each at least
        ((20.0, 0.1), 4, 7),
    ],
)
def test_the_composition_is_fitted_to_the_fleet(need: tuple[float, float], now: int, wanted: int) -> None:
    assert composition(*need, 8.0, float(now), 0.5, 0.6, 1.0) == wanted


def test_nobody_has_to_prefill_only_where_the_others_prefill_too() -> None:
    assert composition(0.1, 20.0, 8.0, 4.0, 0.5, 0.6, 0.0) == 0
    day = Scenario.load("daynight-70b-30min")
    for side, prefill in (("decode", 1), ("mixed", 0), ("multiplexed", 0)):
        plans = bind_policy("planner", day, {"side": side, "start": 0.0, "guard": 0.8}).arrangement
        assert plans is not None
        assert [plan.role for plan in plans] == [Role.PREFILL] * prefill + [Role[side.upper()]] * (6 - prefill)
        assert {plan.headroom for plan in plans} == {0.8}


def test_weights_of_placement_reach_the_score() -> None:
    day = Scenario.load("daynight-70b-30min")
    plain, moved = (bind_policy("planner", day, values).params for values in ({}, {"p_late": 3.0}))
    changed = np.flatnonzero(plain != moved)
    assert changed.tolist() == [int(Kind.PLACE_PREFILL) * N_FEATURES + LATE]
    assert moved[changed[0]] == 3.0


DEMAND = NOTHING | {"prefill": 1.0, "decode": 1.0, "occ_share": 1.0}


def test_one_instance_a_tick_moves_and_those_under_way_count() -> None:
    load = tick(WIN_RATE=60.0)  # prompts keep six instances busy, nothing decodes yet
    table = fleet(2)
    table[table[:, Col.INSTANCE] == 5, Col.OUTSTANDING] = -1.0
    first = choose(planner(**DEMAND, interval_s=5.0), load, table)
    assert (table[first, Col.INSTANCE], table[first, Col.NEW_ROLE]) == (5, P)  # the least loaded
    for under_way, moves in ((2, True), (3, True), (4, False)):
        moving = fleet(2)
        moving[np.isin(moving[:, Col.INSTANCE], range(2, 2 + under_way)), Col.BECOMES] = 1.0 + P
        row = choose(planner(**DEMAND, interval_s=5.0), load, moving, *np.flatnonzero(moving[:, Col.BECOMES]))
        assert (row > 0) == moves


def test_a_composition_is_committed_to() -> None:
    for commit_s, goes_back in ((0.0, True), (60.0, False)):
        policy = planner(**(DEMAND | {"commit_s": commit_s}), interval_s=1.0, window_s=2.0)
        assert choose(policy, tick(WIN_RATE=60.0), fleet(4)) > 0
        table = fleet(6, busy=800.0)
        rows = [choose(policy, tick(WIN_RATE=0.1), table) for _ in range(3)]
        assert any(table[row, Col.ROLE] == P for row in rows if row > 0) == goes_back


def test_without_role_changes_there_is_nothing_to_plan() -> None:
    with pytest.raises(SlalomError, match=r"decisions\.reallocate.*allow them"):
        bind_policy("planner", Scenario.load("azure-conv-4xa100"))
    with pytest.raises(SlalomError, match="two or more"):
        registry.get("planner").bind({}, replace(profiled(1), kinds=KINDS))


def test_the_other_side_may_do_both_phases_where_the_scenario_allows_it() -> None:
    day = Scenario.load("daynight-70b")
    both = bind_policy("planner:side=multiplexed,start=0.2", day)
    assert [plan.role for plan in both.arrangement] == [Role.PREFILL] + [Role.MULTIPLEXED] * 5
    apart = day.with_overrides({"decisions.roles": ["prefill", "decode"]})
    with pytest.raises(SlalomError, match="multiplexed"):
        bind_policy("planner:side=multiplexed", apart)


def test_it_follows_days_of_any_length_and_does_not_flap() -> None:
    short = Scenario.load("daynight-70b-30min").with_overrides({"workload.duration_s": 2400.0})
    run, phases = play_days(short, "planner", 5.0, 0, "valid")
    _, fixed = play_days(short, "planner:interval_s=60,commit_s=300,hysteresis=1.5,prefill=0,decode=0", 5.0, 0, "valid")
    assert worst(phases) > 0.8 > 0.6 > worst(fixed)
    assert 8 <= run.cluster["n_switches"] <= 24
    assert run.cluster["n_failed"] == 0


def test_mixed_rows_are_told_apart() -> None:
    table = roles_table({"ROLE": M}, {"ROLE": P}, {"ROLE": D})
    p, d = asked(planner(), tick(), table)
    assert p > 0.0
    assert d > 0.0

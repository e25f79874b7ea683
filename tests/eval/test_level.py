"""The level of a run agrees with the definition of sustained goodput, and nobody raises it by starving somebody."""

import numpy as np
import pytest
from eval_cases import MS, steady
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core.kinds import RequestState
from env.measure.level import level_of, run_length
from env.measure.sustained import judge, sample_of
from env.scenario import Scenario
from train.search.levers import OWN, Levers, label

FIXTURE = [HealthCheck.function_scoped_fixture]  # it makes runs and keeps nothing


def late(row):
    row["first_token"] = row["arrival"] + 101 * MS


def level(make_run, rows, **options):
    return level_of(make_run(rows, **options), tail_factor=10.0, warmup=0.0)


def test_everybody_in_time_is_a_level_of_one_and_some_late_ones_their_share(make_run):
    rows = steady(200)
    assert level(make_run, rows) == 1.0
    for row in rows[::10]:
        late(row)
    assert level(make_run, rows) == pytest.approx(0.9)


def test_the_worst_fifth_and_the_worst_class_hold_it_down(make_run):
    rows = steady(200)
    for row in [row for row in rows if row["prompt"] > 170][::2]:
        late(row)  # a tenth of all, half of the longest fifth
    assert level(make_run, rows) == pytest.approx(0.6, abs=0.02)
    rows = steady(200)
    for i, row in enumerate(rows):
        row["cls"] = int(i % 20 == 0)
        if row["cls"]:
            late(row)
    assert level(make_run, rows, class_names=("chat", "batch")) == pytest.approx(0.1)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=FIXTURE)
@given(hurt=st.sets(st.integers(0, 199), max_size=60), target=st.sampled_from((0.9, 0.95, 0.99)))
def test_a_level_at_or_above_a_target_is_that_clauses_a_and_d_hold(make_run, hurt, target):
    rows = steady(200)
    for i in hurt:
        late(rows[i])
    run = make_run(rows)
    found = judge([sample_of(run, warmup=0.0)], target, tail_factor=10.0, limit=1e6, lone_s=0.1)
    held = all(clause.met for clause in found.clauses if clause.letter in "ad")
    assert (level_of(run, tail_factor=10.0, warmup=0.0) >= target - 1e-12) == held


def test_waits_cost_the_more_the_longer_they_are_and_who_is_unserved_costs_most(make_run):
    def waiting(targets):
        rows = steady(200)
        rows[7]["first_token"] = rows[7]["arrival"] + int(targets * 100 * MS)
        return level(make_run, rows)

    one_late = waiting(2.0)
    assert waiting(7.9) == one_late
    assert one_late > waiting(10.5) > waiting(21.0) > waiting(80.0)
    rows = steady(200)
    rows[7] |= {"state": int(RequestState.WAITING), "first_token": -1, "last_token": -1, "generated": 0, "finished": -1}
    assert level(make_run, rows, duration_ms=1e4) < waiting(10.5)


def test_a_backlog_that_grows_costs_before_anybody_waits_too_long(make_run):
    rows = steady(200)
    for i, row in enumerate(rows):  # of a hundred requests four more stay than end, each in time so far
        row["last_token"] = row["first_token"] + int(0.04 * i * 10 * MS)
        row |= {"finished": row["last_token"], "generated": 1000}
    assert level(make_run, rows) == pytest.approx(1.0 - 2.0 * 0.03, abs=0.02)
    assert level(make_run, steady(200)) == 1.0


def test_a_few_early_refusals_cost_a_miss_each_and_more_of_them_more(make_run):
    def refusing(n):
        rows = steady(200)
        for i in range(0, 200, 200 // n):
            gone = {"state": int(RequestState.SHED), "first_token": -1, "last_token": -1, "generated": 0}
            rows[i] |= gone | {"finished": rows[i]["arrival"] + 20 * MS}
        return level(make_run, rows)

    assert refusing(2) == pytest.approx(0.99)
    assert refusing(8) == pytest.approx(0.96 - 3.0 * 0.03)


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=FIXTURE)
@given(starved=st.sets(st.integers(0, 199), min_size=1, max_size=40))
def test_to_starve_somebody_never_pays(make_run, starved):
    rows = steady(200)
    before = level(make_run, rows, duration_ms=1e4)
    for i in starved:
        gone = {"state": int(RequestState.WAITING), "first_token": -1, "last_token": -1, "finished": -1}
        rows[i] |= gone | {"generated": 0}
    assert level(make_run, rows, duration_ms=1e4) < before


def test_runs_last_as_long_as_starvation_needs_to_show():
    shift, mooncake = Scenario.load("shift-pd-8xa100"), Scenario.load("mooncake-pd-8xh100")
    assert run_length(shift, 30.0, 100) >= 30 * 222  # a whole episode
    assert run_length(mooncake, 9.0, 100) > 1_000  # waits of ten targets are long there
    assert run_length(mooncake, 9.0, 50_000) == 50_000


def test_levers_at_their_defaults_leave_the_rule_as_published_and_others_arrange_all_instances():
    from env.surrogate.arena import arena_of
    from policies import registry

    setting = arena_of(Scenario.load("azure-conv-4xa100")).setting
    levers, values = Levers("muxwise", setting), registry.get("muxwise").values()
    assert levers.plans(levers.defaults, values) is None
    own = registry.get("muxwise").bind(values, setting).arrangement
    for start in levers.starts():
        plans = levers.plans(start, values)
        assert len(plans) == setting.n_instances
        assert {plan.order for plan in plans} == {3}
        if start["lever.roles"] != OWN:
            assert label(plans) == start["lever.roles"]
        else:
            assert [plan.role for plan in plans] == [plan.role for plan in own]
    doubled = levers.plans(levers.defaults | {"lever.headroom": 1.2}, values)
    assert np.allclose([p.headroom for p in doubled], [min(1.2 * p.headroom, 2.0) for p in own])

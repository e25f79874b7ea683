"""Planners of the prefill:decode ratio: their equations on numbers worked by hand, and their role changes."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from decisions import choose, context, instances, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from published import D, P, bound, place, roles_table

from engine.core.columns import Kind
from engine.errors import SlalomError
from engine.latency.evaluate import PROFILE, SHARE
from policies import registry
from policies.rule import BoundPolicy, Setting
from policies.rules import dopd, dopd_code, dyn_sla
from policies.rules.parts import arima
from policies.rules.parts.forecast import SERIES_CELLS, WINDOW, forecast, push
from policies.rules.parts.planner import fit_fleet
from policies.rules.parts.profile_tables import itl_prof, largest_batch, profile_block, ttft_prof

#: prefill 0.1 ms a token; decode 20 ms + 0.1 ms a sequence + 0.1 µs a context token
PREFILL, DECODE = 1e-4, (1e-7, 1e-4, 0.02)


def profiled(n: int = 8, kv_tokens: int = 200_000, tpot_s: float = 0.05) -> Setting:
    profile, share = np.zeros(1, PROFILE), np.zeros((1, 1), SHARE)
    profile["n_shares"], profile["regime_bs"] = 1, 10_000
    share["prefill"][0, 0, 2] = PREFILL
    share["decode_small"][0, 0] = share["decode_large"][0, 0] = DECODE
    target = setting().classes[0]._replace(tpot_s=tpot_s)
    return setting(n, profile=profile, share=share, kv_tokens=(kv_tokens,) * n, max_batch=(512,) * n, classes=(target,))


# -- tables ------------------------------------------------------------------------------------------------


def test_profile_tables_give_back_the_profile() -> None:
    block = profile_block(profiled())
    for n in (64, 700, 5000, 131072, 200_000):
        assert ttft_prof(block, 0, n) == pytest.approx(PREFILL * n, rel=1e-9)
    assert itl_prof(block, 0, 32, 500) == pytest.approx(0.02 + 32 * 1e-4 + 16_000 * 1e-7)


@settings(deadline=None)
@given(ctx=st.floats(1, 1e5), limit=st.floats(0.021, 1.0))
def test_the_largest_batch_meets_the_limit_and_one_more_does_not(ctx: float, limit: float) -> None:
    block = profile_block(profiled())
    bs = largest_batch(block, 0, ctx, limit)
    assert bs == 1 or itl_prof(block, 0, bs, ctx) <= limit * (1 + 1e-6)
    assert bs == 512 or itl_prof(block, 0, bs + 1, ctx) > limit


# -- equations ---------------------------------------------------------------------------------------------


def test_dopd_as_released_on_the_worked_example() -> None:
    """isl 1000, osl 200 → 9 blocks, B = 226; TTFT 0.10 s and TPOT 0.040 s → 2.83 → 3 per decode instance."""
    batch = dopd_code.concurrency(2040, 1000.0, 200.0)
    assert batch == 226
    assert dopd_code.plan(batch, 0.10, 0.040, 200.0, 500.0) == (3, math.ceil(500 / 226))


def test_dopd_repaired_scales_prefill_with_the_decode_instances() -> None:
    """B = min(floor(200000 / 1100), (0.05 − 0.02) / (1e-4 + 1100e-7)) = min(181, 142) = 142."""
    block = profile_block(profiled())
    isl, osl, rate = 1000.0, 200.0, 40.0
    tpot = 0.02 + 142 * 1e-4 + 142 * 1100 * 1e-7
    n_d = math.ceil(rate * osl * tpot / 142)
    n_p = math.ceil(n_d * 142 * 0.1 / (osl * tpot))
    assert dopd.plan(block, 0, isl, osl, rate, 1.0) == (n_p, n_d, 142)
    assert n_d == 3 > 1  # otherwise the test could not tell N_P from N_P per decode instance
    slow = dopd.plan(block, 0, isl, osl, rate, 2.0)
    assert slow[2] == 23  # d_corr 2: the same equation under half the target, (0.025 − 0.02) / 2.1e-4
    memory_bound = dopd.plan(profile_block(profiled(kv_tokens=55_000)), 0, isl, osl, rate, 1.0)
    assert memory_bound[2] == 50


def test_dyn_sla_divides_load_by_throughput_under_the_target() -> None:
    """Prefill 10,000 tokens a second; decode 142 ÷ 49.82 ms = 2,850 tokens a second."""
    block = profile_block(profiled())
    assert dyn_sla.plan(block, 0, 1000.0, 200.0, 40.0, 3.0, 1.0) == (4, 3)
    # a prefill that is faster than profiled needs fewer; a slower one does not ask for more
    assert dyn_sla.plan(block, 0, 1000.0, 200.0, 40.0, 0.5, 1.0) == (2, 3)


@pytest.mark.parametrize(
    ("n_p", "n_d", "n", "fitted"),
    [(3, 1, 4, 3), (8, 8, 4, 2), (30, 1, 4, 3), (1, 30, 4, 1), (1, 1, 8, 4), (2, 1, 8, 5)],
)
def test_a_plan_is_fitted_to_the_fleet(n_p: int, n_d: int, n: int, fitted: int) -> None:
    assert fit_fleet(float(n_p), float(n_d), n) == fitted


# -- forecasts ---------------------------------------------------------------------------------------------


def series(values: list[float] | np.ndarray) -> np.ndarray:
    memory = np.zeros(SERIES_CELLS)
    for value in values:
        push(memory, 0, float(value))
    return memory


def test_a_series_keeps_the_newest_fifty() -> None:
    memory = series(list(range(60)))
    assert memory[0] == WINDOW
    assert memory[1:].tolist() == list(range(10, 60))


@pytest.mark.parametrize("method", [0, 1, 2])
def test_too_few_points_forecast_the_last_value(method: int) -> None:
    assert forecast(series([4.0, 9.0, 1.0, 3.0]), 0, method) == 3.0
    assert forecast(np.zeros(SERIES_CELLS), 0, method) == 0.0


def test_ar1_is_the_least_squares_line_of_each_value_on_the_one_before() -> None:
    rng = np.random.default_rng(3)
    x = 10 + np.cumsum(rng.normal(size=40)) * 0.2
    slope, intercept = np.polyfit(x[:-1], x[1:], 1)
    assert forecast(series(x), 0, 1) == pytest.approx(intercept + slope * x[-1])


def test_order_selection_sees_a_trend_an_oscillation_and_noise() -> None:
    ramp = 100.0 + 3.0 * np.arange(20) + np.random.default_rng(0).normal(0, 0.01, 20)
    assert forecast(series(ramp), 0, 2) == pytest.approx(160.0, abs=0.2)
    wave = 10.0 + np.sin(np.arange(40) * 0.7)
    assert forecast(series(wave), 0, 2) == pytest.approx(10.0 + math.sin(40 * 0.7), abs=0.05)
    noise = 10.0 + np.random.default_rng(1).normal(0, 1, 50)
    assert forecast(series(noise), 0, 2) == pytest.approx(10.0, abs=0.9)


def _oracle(x: np.ndarray) -> float:
    """The same selection with numpy's least squares."""
    best, ahead = math.inf, x[-1]
    for d in range(2):
        y = np.diff(x, n=d)
        for p in range(3):
            rows = np.arange(3 - d, len(y))
            if len(rows) < p + 3:
                continue
            design = np.column_stack([np.ones(len(rows)), *(y[rows - k] for k in range(1, p + 1))])
            beta, *_ = np.linalg.lstsq(design, y[rows], rcond=None)
            rss = float(np.sum((y[rows] - design @ beta) ** 2))
            aic = len(rows) * math.log(rss / len(rows)) + 2 * (p + 1)
            if aic < best:
                best = aic
                ahead = beta @ np.array([1.0, *(y[len(y) - k] for k in range(1, p + 1))]) + (x[-1] if d else 0.0)
    return float(min(max(ahead, 0.5 * x.min()), 2 * x.max()))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(8, 50))
def test_order_selection_agrees_with_numpy(seed: int, n: int) -> None:
    x = 20.0 + np.cumsum(np.random.default_rng(seed).normal(size=n)) + np.random.default_rng(seed + 1).normal(size=n)
    x = x - x.min() + 1.0
    assert forecast(series(x), 0, 2) == pytest.approx(_oracle(x), rel=1e-6)


# -- decisions ---------------------------------------------------------------------------------------------

FLEET = [{"ROLE": P, "OUTSTANDING": 5}] * 2 + [{"ROLE": D, "OUTSTANDING": 30 - i} for i in range(6)]


def window(**columns: float) -> np.ndarray:
    base = {"WIN_SPAN_S": 1.0, "WIN_RATE": 40.0, "WIN_PROMPT": 1000, "WIN_OUTPUT": 200}
    return context(Kind.REALLOCATE, **(base | {"WIN_TTFT_S": 0.2, "WIN_TPOT_S": 0.03} | columns))


def planner(name: str, **values: Any) -> BoundPolicy:
    return registry.get(name).bind({"interval_s": 5} | values, profiled())


@pytest.mark.parametrize("name", ["dopd", "dopd_code", "dyn_sla"])
def test_a_planner_acts_after_its_intervals_and_moves_the_least_loaded_decode_instance(name: str) -> None:
    policy, table = planner(name, patience=2), roles_table(*FLEET)
    answers = [choose(policy, window(), table) for _ in range(10)]
    assert answers[:9] == [0] * 9
    assert answers[9] == 1 + 7 * 3  # instance 7 → PREFILL is its first row
    masked = range(1, len(table))
    assert choose(policy, window(), table, *masked) == 0  # a change is under way
    more = roles_table(*[{"ROLE": P}] * 3, *FLEET[2:7])
    assert choose(policy, window(), more) > 0  # not there yet: the next one follows


def test_a_planner_stops_at_its_target_and_ignores_idle_intervals() -> None:
    policy = planner("dyn_sla", patience=1)
    balanced = roles_table(*[{"ROLE": P}] * 5, *[{"ROLE": D}] * 3)  # (4, 3) fitted to 8
    assert {choose(policy, window(), balanced) for _ in range(12)} == {0}
    idle = planner("dyn_sla", patience=1)
    assert {choose(idle, window(WIN_RATE=0.0, WIN_OUTPUT=0.0), roles_table(*FLEET)) for _ in range(12)} == {0}


def test_dopd_places_by_length() -> None:
    policy = planner("dopd")
    ctx = {"MEAN_PROMPT": 1000.0}
    rows = instances(
        {"ROLE": P, "WAIT_S": 0.15, "QUEUE_TOKENS": 700, "QUEUE_N": 1, "PREFILLING": 1},
        {"ROLE": P, "WAIT_S": 0.10, "QUEUE_TOKENS": 300, "QUEUE_N": 1, "PREFILLING": 1},
        {"ROLE": D, "RUN_CTX": 9000},
    )
    assert choose(policy, place(PROMPT=3000, **ctx), rows) == 1  # long: free first
    assert choose(policy, place(PROMPT=900, **ctx), rows) == 0  # short: the fullest batch with room
    assert choose(policy, place(PROMPT=200, **ctx), rows) == 2  # very short: on decode
    full = rows.copy()
    assert choose(planner("dopd", wait_cap=0.12), place(PROMPT=900, **ctx), full) == 1


@pytest.mark.parametrize("name", ["dopd_code", "dyn_sla", "dyn_load"])
def test_conditional_disaggregation(name: str) -> None:
    queue = {"ROLE": P, "WAIT_S": 1.0, "QUEUE_N": 9, "PREFILLING": 1}
    rows = instances(queue, queue | {"WAIT_S": 0.5}, {"ROLE": D, "RUN_CTX": 800}, {"ROLE": D, "RUN_CTX": 900})
    assert choose(planner(name, max_prefill_queue=17), place(PROMPT=512), rows) == 1
    assert choose(planner(name, max_prefill_queue=17), place(PROMPT=511), rows) == 2
    assert choose(planner(name, max_prefill_queue=16), place(PROMPT=512), rows) == 2
    rows[3, :] = instances(*[{}] * 3, {"ROLE": D, "RUN_CTX": 900, "CACHED_TOKENS": 400})[3]
    assert choose(planner(name, max_prefill_queue=17), place(PROMPT=900), rows) == 3  # 500 left to compute


def _load(queue: float, used: float) -> np.ndarray:
    waiting = {"ROLE": P, "QUEUE_N": queue}
    memory = {"ROLE": D, "TOTAL_BLOCKS": 100, "FREE_BLOCKS": 100 * (1 - used)}
    return roles_table(waiting, waiting, memory, memory)


@pytest.mark.parametrize(
    ("queue", "used", "new"), [(6, 0.4, P), (6, 0.6, None), (4, 0.4, None), (0.1, 0.95, D), (1, 0.95, None)]
)
def test_dyn_load_moves_an_instance_to_the_side_that_asks_from_the_side_that_can_spare(
    queue: float, used: float, new: float | None
) -> None:
    policy, table = planner("dyn_load"), _load(queue, used)
    answers = [choose(policy, context(Kind.REALLOCATE, WIN_SPAN_S=1.0), table) for _ in range(5)]
    assert answers[:4] == [0] * 4
    rows = {None: 0, P: 1 + 2 * 3, D: 1}
    assert answers[4] == rows[new]


def test_dyn_load_waits_while_the_queue_falls_by_itself() -> None:
    policy = planner("dyn_load")
    tick = context(Kind.REALLOCATE, WIN_SPAN_S=1.0)
    assert {choose(policy, tick, _load(q, 0.1)) for q in (12, 10, 8, 6, 4)} == {0}


def test_dyn_load_gives_new_decode_instances_a_grace() -> None:
    policy, tick = planner("dyn_load", interval_s=1), context(Kind.REALLOCATE, WIN_SPAN_S=1.0)
    assert choose(policy, tick, _load(0.0, 0.95)) == 1
    assert [choose(policy, tick, _load(9, 0.1)) > 0 for _ in range(4)] == [False, False, False, True]


def test_bound_policies_of_one_rule_share_nothing() -> None:
    first, second = bound("dopd"), bound("dopd")
    first.memory[:] = 1.0
    assert not second.memory.any()


# -- the published forecast, from a library ----------------------------------------------------------------


def test_a_forecast_that_is_not_installed_is_refused_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    arima._model.cache_clear()
    monkeypatch.setitem(sys.modules, "statsforecast.models", None)
    with pytest.raises(SlalomError, match=r"slalom\[forecast\]"):
        planner("dopd", forecast="auto_arima")
    assert not planner("dopd", forecast="ari").python
    arima._model.cache_clear()


def test_a_search_never_draws_the_library() -> None:
    forecasts = next(p for p in registry.get("dopd").params if p.name == "forecast")
    assert forecasts.choices is not None
    assert "auto_arima" not in forecasts.choices
    assert forecasts.number("auto_arima") == len(forecasts.choices)


def test_auto_arima_extends_a_trend_and_keeps_short_or_constant_series() -> None:
    pytest.importorskip("statsforecast")
    ramp = 100.0 + 3.0 * np.arange(20) + np.random.default_rng(0).normal(0, 0.1, 20)
    assert arima.forecast_series(ramp) == pytest.approx(160.0, abs=1.0)
    assert arima.forecast_series(np.array([4.0, 9.0, 1.0, 3.0])) == 3.0
    assert arima.forecast_series(np.full(30, 7.0)) == 7.0


@pytest.mark.parametrize("name", ["dopd", "dopd_code", "dyn_sla"])
def test_a_planner_with_the_library_sees_what_the_library_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same series, forecast from outside: with "last value" in the library's place, both planners agree."""
    pytest.importorskip("statsforecast")
    seen: list[int] = []

    def last_value(values: np.ndarray) -> float:
        seen.append(len(values))
        return float(values[-1])

    monkeypatch.setattr(arima, "forecast_series", last_value)
    table = roles_table(*FLEET)
    library, plain = (planner(name, patience=2, forecast=f) for f in ("auto_arima", "last"))
    assert library.python
    for second in range(20):
        ctx = window(WIN_RATE=30.0 + second)
        assert choose(library, ctx, table) == choose(plain, ctx, table), second
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]

"""Simulated runs of weeks and targets of days: figures that are right, or a refusal that names the limit."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from engine.core.kinds import RequestState
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S, decode_s, prefill_s
from env.measure.level import level_of
from env.measure.metrics import absolute_s, detailed, summarize
from env.measure.phases import by_phase
from env.measure.sustained import DEFINITION, judge, sample_of
from env.scenario import Scenario
from env.surrogate import simulate as module
from env.surrogate.arena import arena_of, build_trace, slowed
from env.surrogate.simulate import simulate
from env.workload import Trace

DAY_S = 86_400.0


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario.load("tiny-4xa100")


def requests(days: float, n: int = 40, output: int = 300) -> Trace:
    return Trace.make(
        np.linspace(0.0, days * DAY_S, n), np.full(n, 200, np.int32), np.full(n, output, np.int32), name="long"
    )


def figures(scenario: Scenario, trace: Trace, **more: Any) -> dict[str, Any]:
    return summarize(simulate(scenario, "least_tokens", rate=1.0, trace=trace, **more), warmup=0.0)


@pytest.mark.parametrize("fast_forward", [True, False])
def test_a_run_of_48_days_has_the_figures_of_its_first_day(scenario: Scenario, fast_forward: bool) -> None:
    short, long = (figures(scenario, requests(days), fast_forward=fast_forward) for days in (1.0, 48.0))
    assert long["completed"] == short["completed"] == 40
    assert long["slo_attainment"] == short["slo_attainment"] > 0.9
    assert long["mean_ttft_ms"] == pytest.approx(short["mean_ttft_ms"], rel=1e-6)
    assert long["simulated_s"] > 47 * DAY_S


@pytest.mark.parametrize("days", [120.0, 200.0])
def test_a_run_of_months_has_the_figures_of_its_first_day(scenario: Scenario, days: float) -> None:
    """Bursts, so that requests wait and prompts queue; the last one arrives on the last day."""

    def bursts(days: float) -> Trace:
        at = np.repeat(np.linspace(0.0, days * DAY_S, 20), 8)
        return Trace.make(at, np.full(160, 2000, np.int32), np.arange(160, dtype=np.int32) % 7 * 40 + 1, name="bursts")

    short, long = (figures(scenario, bursts(d)) for d in (1.0, days))
    same = ("completed", "slo_attainment", "max_concurrent_requests", "total_output_tokens")
    assert {name: long[name] for name in same} == {name: short[name] for name in same}
    assert long["completed"] == 160
    for name in ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "mean_e2el_ms", "worst_wait_s"):
        assert long[name] == pytest.approx(short[name], rel=1e-6), name
    assert long["simulated_s"] > days * DAY_S
    assert long["duration"] > days * DAY_S


@pytest.mark.parametrize("name", ["creation-pd-4xa100", "rag-prefix-4xa100"])
def test_in_stretches_or_in_one_a_run_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four weeks with a minute of traffic now and then, hand-overs and prefix cache included."""
    scenario = Scenario.load(name)
    minute = build_trace(scenario, scenario.reference_rate, 60, 0, "test")
    roots = minute.n_roots
    at = np.concatenate([minute.arrival_s[:roots] + days * DAY_S for days in (0.0, 12.9, 13.5, 27.0)])
    rows = np.tile(np.arange(roots), 4)
    columns = {column: getattr(minute, column)[rows] for column in ("cls", "ttft_s", "tpot_s", "hash_start", "hash_n")}
    trace = Trace.make(
        at, minute.prompt[rows], minute.output[rows], hash_tokens=minute.hash_tokens, hashes=minute.hashes, **columns
    )
    whole = simulate(scenario, "least_tokens", rate=1.0, trace=trace)
    monkeypatch.setattr("env.surrogate.simulate.is_long", lambda trace: True)
    parts = simulate(scenario, "least_tokens", rate=1.0, trace=trace)
    assert whole.origin_s is None
    assert parts.origin_s is not None
    assert len(np.unique(parts.origin_s)) >= 2
    for later in ("placed", "prefill_start", "first_token", "last_token", "finished"):
        ours, theirs = (run.req[later] - run.req["arrival"] for run in (parts, whole))
        np.testing.assert_allclose(ours * 1e-12, theirs * 1e-12, atol=1e-6)
    np.testing.assert_allclose(parts.origin_s + parts.req["arrival"] * 1e-12, whole.req["arrival"] * 1e-12, atol=1e-6)
    one, other = (summarize(run, warmup=0.0) for run in (parts, whole))
    for figure in ("duration", "mean_ttft_ms", "p99_itl_ms", "slo_attainment", "max_concurrent_requests", "migrations"):
        assert one[figure] == pytest.approx(other[figure], rel=1e-6), figure
    assert one["max_output_tokens_per_s"] == pytest.approx(other["max_output_tokens_per_s"], rel=1e-4)


def test_requests_that_are_open_while_the_origin_moves_keep_their_times(scenario: Scenario) -> None:
    """One instance, prompts all the time: somebody is being served at every moment of two weeks and after them."""
    alone = scenario.with_overrides({"cluster.0.count": 1})
    trace = requests(60.0, n=4000, output=3)
    sparse = figures(alone, trace)
    slow = simulate(alone, "least_tokens", rate=1.0, trace=trace, slowdown=3e4)
    assert slow.origin_s is not None
    assert len(np.unique(slow.origin_s)) > 3
    done = slow.req["state"] == RequestState.FINISHED
    assert done.sum() > 100
    r = slow.req[done]
    stamps = [r[name] for name in ("arrival", "placed", "prefill_start", "first_token", "last_token")]
    assert all((b >= a).all() for a, b in pairwise(stamps))
    assert (r["finished"] - r["arrival"] < 60 * DAY_S * TICKS_PER_S).all()
    assert sparse["completed"] == 4000


def test_every_step_of_a_slowed_cluster_takes_so_much_longer(scenario: Scenario) -> None:
    state = arena_of(scenario.with_overrides({"profile": "opt-13b-a100-tp1"})).cluster(None, None)
    nominal, full = (table[state.inst["profile"]].copy() for table in (state.profile, state.share))
    slow, part = slowed(state, 3.0).values()
    assert decode_s(slow[0], part[0, -1], 100_000, 30) == pytest.approx(
        3 * decode_s(nominal[0], full[0, -1], 100_000, 30)
    )
    for of in (full, part):
        of["prefill"] = 0.0  # the roofline is all that is left
    assert prefill_s(slow[0], part[0, -1], 0.0, 0.0, 1e3) == pytest.approx(
        3 * prefill_s(nominal[0], full[0, -1], 0.0, 0.0, 1e3)
    )


def test_a_session_goes_on_over_months(scenario: Scenario) -> None:
    """Twelve turns, twenty days between an answer and the next one."""
    arrival = np.append([0.0, 230.0 * DAY_S], np.full(11, np.inf))
    next_turn = np.array([2, -1, *range(3, 13), -1], np.int32)
    lengths = np.full(13, 50, np.int32)
    trace = Trace.make(
        arrival, lengths, lengths, n_roots=2, next_turn=next_turn, think_s=np.full(13, 20.0 * DAY_S), name="session"
    )
    run = simulate(scenario, "least_tokens", rate=1.0, trace=trace)
    assert summarize(run, warmup=0.0)["completed"] == 13
    assert run.origin_s is not None
    came = run.origin_s + run.req["arrival"] * 1e-12
    turns = came[[0, *range(2, 13)]]
    np.testing.assert_allclose(np.diff(turns), 20.0 * DAY_S, atol=10.0)


def test_whoever_reads_stamps_of_a_long_run_counts_them_from_their_origin(scenario: Scenario) -> None:
    trace = requests(150.0)
    run = simulate(scenario, "least_tokens", rate=1.0, trace=trace)
    np.testing.assert_allclose(absolute_s(run, "arrival"), trace.arrival_s, atol=1e-6)
    assert detailed(run)["start_times"] == pytest.approx(trace.arrival_s.tolist())


def test_sustained_goodput_of_months_has_the_clauses_of_the_same_run_in_one_stretch(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = requests(40.0, n=400, output=2000)
    whole = simulate(scenario, "least_tokens", rate=1.0, trace=trace, slowdown=2e3)
    monkeypatch.setattr("env.surrogate.simulate.is_long", lambda trace: True)
    parts = simulate(scenario, "least_tokens", rate=1.0, trace=trace, slowdown=2e3)
    assert len(np.unique(parts.origin_s)) >= 2
    one, other = (sample_of(run, warmup=0.1).as_dict() for run in (parts, whole))
    assert one["span_s"] > 35 * DAY_S
    assert max(one["backlog"]) > 0.5
    assert one.pop("classes") == other.pop("classes")
    monkeypatch.setattr("env.measure.level.DEFINITION", replace(DEFINITION, limit_margin=-1.0))  # any growth counts
    levels = [level_of(run, tail_factor=1e9) for run in (parts, whole)]
    assert levels[0] == pytest.approx(levels[1])
    windows = [(k * 4 * DAY_S, (k + 1) * 4 * DAY_S) for k in range(10)]
    assert by_phase(parts, windows) == by_phase(whole, windows)
    for name, value in other.items():
        assert np.ravel(one[name]) == pytest.approx(np.ravel(value), rel=1e-6), name
    monkeypatch.undo()
    year = sample_of(simulate(scenario, "least_tokens", rate=1.0, trace=requests(365.0)), warmup=0.0)
    assert year.span_s == pytest.approx(365.0 * DAY_S)
    assert year.good == year.sent == 40
    assert judge([year], 0.9, tail_factor=10.0, limit=1.0, lone_s=1.0).met


def test_a_run_of_eleven_years_is_refused_with_the_limit(scenario: Scenario) -> None:
    with pytest.raises(SlalomError, match=r"4018 days.*3653 days"):
        figures(scenario, requests(4018.0))
    with pytest.raises(SlalomError, match="3653 days"):
        simulate(scenario, "least_tokens", rate=1e-9, n_requests=20)


def test_the_longest_targets_are_met(scenario: Scenario) -> None:
    patient = scenario.with_overrides({"classes.0.tpot_s": 60.0, "classes.0.ttft_s": 86_400.0})
    assert figures(patient, requests(1.0))["slo_attainment"] == 1.0


@pytest.mark.parametrize(
    ("field", "seconds"), [("tpot_s", 60.1), ("tpot_s", 1e300), ("ttft_s", 1e6), ("ttft_s", 1e300)]
)
def test_targets_that_nobody_can_miss_are_refused(scenario: Scenario, field: str, seconds: float) -> None:
    with pytest.raises(SlalomError, match=rf"classes\.0\.{field}.*less than or equal to"):
        scenario.with_overrides({f"classes.0.{field}": seconds})


@pytest.mark.parametrize("seconds", [1e6, 1e300])
def test_own_targets_and_pauses_of_any_length_do_not_overflow(scenario: Scenario, seconds: float) -> None:
    trace = requests(1.0, n=4)
    arrival = trace.arrival_s.copy()
    arrival[3] = np.inf
    own = Trace.make(
        arrival, trace.prompt, trace.output, n_roots=3, ttft_s=np.full(4, seconds), tpot_s=np.full(4, seconds),
        next_turn=np.array([3, -1, -1, -1], np.int32), think_s=np.array([seconds, 0, 0, 0]),
    )  # fmt: skip
    found = figures(scenario, own)
    assert found["completed"] == 3
    assert found["slo_attainment"] == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("control_interval_s", 1e-13), ("hold_interval_s", 0.0), ("cluster.0.kv_tokens", 2**31),
        ("cluster.0.count", 10**9), ("cluster.0.max_batch", 10**9), ("links.bandwidth_gb_s", -1.0),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(scenario: Scenario, field: str, value: float) -> None:
    with pytest.raises(SlalomError, match=field.split(".")[-1]):
        scenario.with_overrides({field: value})


def test_requests_of_two_to_the_thirtieth_tokens_are_refused() -> None:
    with pytest.raises(SlalomError, match=r"trace\.output"):
        requests(1.0, output=2**30)


def test_the_slowest_link_keeps_its_order(scenario: Scenario) -> None:
    """KV that takes for ever to move is simply not there yet when the run ends."""
    slow = Scenario.load("tiny-4xa100").with_overrides({"links.bandwidth_gb_s": 1e-300})
    found = figures(slow, requests(1.0, n=4))
    assert found["completed"] + found["unfinished"] == 4


@pytest.mark.parametrize("seconds", [1e7, 1e300])
@pytest.mark.parametrize("field", ["control_interval_s", "hold_interval_s", "hold_limit_s"])
def test_intervals_of_months_are_as_good_as_none(field: str, seconds: float) -> None:
    base = Scenario.load("shift-pd-8xa100").with_overrides({"decisions.hold": True})
    found = figures(base.with_overrides({field: seconds}), requests(0.01, n=40))
    assert found["completed"] == 40
    assert found["slo_attainment"] == 1.0


def test_a_device_that_needs_years_for_a_step_serves_nobody(scenario: Scenario) -> None:
    found = figures(scenario, requests(0.01, n=8), slowdown=1e12)
    assert found["completed"] == 0
    assert found["slo_attainment"] == 0.0


@pytest.mark.parametrize("changes", [{"cluster.0.count": 65_536}, {"cluster.0.kv_tokens": 2**31 - 1}], ids=str)
def test_a_cluster_whose_books_would_fill_the_memory_is_refused(scenario: Scenario, changes: dict[str, int]) -> None:
    with pytest.raises(SlalomError, match=r"cluster: got .* GiB"):
        figures(scenario.with_overrides(changes), requests(0.01, n=4))


@pytest.mark.parametrize("n", [0, 10**12])
def test_a_run_of_more_requests_than_memory_holds_is_refused(scenario: Scenario, n: int) -> None:
    with pytest.raises(SlalomError, match="requests"):
        simulate(scenario, "least_tokens", rate=1.0, n_requests=n)


def test_a_run_comes_up_for_ctrl_c_and_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Scenario.load("shift-pd-8xa100")
    whole = simulate(base, "dopd", rate=5.0, n_requests=60)
    monkeypatch.setattr(module, "_SLICE", 7)
    cut = simulate(base, "dopd", rate=5.0, n_requests=60)
    assert whole.decisions == cut.decisions > 20
    np.testing.assert_array_equal(whole.req, cut.req)
    compiled = module.ready()

    def interrupted(*arguments: Any) -> int:
        taken: int = compiled(*arguments)
        signal.raise_signal(signal.SIGINT)
        return taken

    monkeypatch.setattr(module, "ready", lambda: interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate(base, "dopd", rate=5.0, n_requests=60)
    finally:
        signal.signal(signal.SIGINT, before)

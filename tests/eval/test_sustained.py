"""Sustained goodput: each clause fails by name, the test of trend keeps its level, queueing theory gives the answer."""

import math
from dataclasses import replace

import numpy as np
import pytest
from eval_cases import MS, steady

from engine.core.kinds import RequestState
from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.measure.level import run_settings
from env.measure.sustained import DEFINITION, Clause, Sample, Verdict, backlog_trend, judge, sample_of
from env.measure.sustained_search import Goal, Search, measure_sustained
from env.scenario import Scenario


def verdict_of(run, target=0.9, **options):
    given = {"tail_factor": 10.0, "limit": 1e6, "lone_s": 0.1} | options
    return judge([sample_of(run, warmup=0.0, tail_factor=given["tail_factor"])], target, **given)


# -- clauses -------------------------------------------------------------------------------------------


def test_a_steady_run_meets_every_clause_and_is_told_to_be_too_short(make_run):
    found = verdict_of(make_run(steady(400)), 0.99)
    assert found.met
    assert found.failed == ""
    assert any("20,000" in text for text in found.missing)
    assert any("minutes" in text for text in found.missing)


def test_too_few_in_time_fails_by_clause_a_with_the_share(make_run):
    rows = steady(400)
    for row in rows[::5]:
        row["first_token"] = row["arrival"] + 101 * MS
    found = verdict_of(make_run(rows), 0.9)
    assert [c.letter for c in found.clauses if not c.met] == ["a"]
    assert "0.8" in found.failed


def test_one_wait_over_ten_targets_fails_by_clause_b(make_run):
    rows = steady(400)
    rows[7]["first_token"] = rows[7]["arrival"] + 1001 * MS
    found = verdict_of(make_run(rows))
    assert found.failed.startswith("(b) longest wait")
    assert "10.01, bound 10 (1 of 400 requests)" in found.failed
    assert verdict_of(make_run(rows), tail_factor=11.0).met


@pytest.mark.parametrize(("after_ms", "held"), [(90, True), (110, False)])
def test_a_refusal_counts_as_missed_and_fails_the_run_when_it_comes_late(make_run, after_ms, held):
    rows = steady(400)
    arrival = rows[9]["arrival"]
    rows[9] |= {"first_token": -1, "last_token": -1, "state": int(RequestState.SHED), "generated": 0}
    rows[9]["finished"] = arrival + after_ms * MS
    found = verdict_of(make_run(rows))
    assert found.clauses[0].value == 399 / 400
    assert found.met is held
    assert held or "refused later" in found.failed


def test_who_is_never_served_fails_the_run(make_run):
    rows = steady(400)
    rows[9] |= {"first_token": -1, "last_token": -1, "finished": -1, "state": int(RequestState.HELD), "generated": 0}
    assert "unserved" in verdict_of(make_run(rows)).failed


def test_a_starved_class_and_starved_lengths_fail_by_clause_d(make_run):
    rows = [row | {"cls": int(i % 20 == 0)} for i, row in enumerate(steady(400))]
    late = [row | ({"first_token": row["arrival"] + 200 * MS} if row["cls"] else {}) for row in rows]
    found = verdict_of(make_run(late, class_names=("chat", "code")))
    assert found.failed.startswith("(d) share of class code: 0")
    assert found.clauses[0].met
    long = sorted(row["prompt"] for row in steady(400))[-30]
    late = [row | ({"first_token": row["arrival"] + 200 * MS} if row["prompt"] > long else {}) for row in steady(400)]
    assert verdict_of(make_run(late)).failed.startswith("(d) share of prompts, longest fifth")


def test_a_class_without_requests_is_named(make_run):
    found = verdict_of(make_run(steady(400), class_names=("chat", "code")))
    assert "class code had no request; the others were measured" in found.missing


def test_a_rate_above_what_was_ever_served_fails_by_the_stability_limit(make_run):
    rows = steady(400)
    for i, row in enumerate(rows):  # half the speed at which they come
        row["first_token"] = row["last_token"] = row["finished"] = (20 * i + 20) * MS
    found = verdict_of(make_run(rows, duration_ms=8e3), limit=50.0)
    failed = [c for c in found.clauses if not c.met]
    assert {c.letter for c in failed} >= {"b", "c"}
    limit = next(c for c in failed if "stability" in c.name)
    assert limit.value == pytest.approx(100, rel=0.01)
    assert limit.bound == pytest.approx(50, rel=0.03)
    assert next(c for c in failed if "backlog" in c.name).value > 1.0


def test_the_backlog_is_the_time_average_of_requests_in_the_system(make_run):
    sample = sample_of(make_run(steady(400)), warmup=0.25)
    np.testing.assert_allclose(sample.backlog, 2.0, atol=0.05)


# -- the test of trend ---------------------------------------------------------------------------------


def backlogs(rng, seeds, correlation, growth=0.0, n=24, burn=60):
    noise = rng.normal(size=(seeds, n + burn))
    series = np.zeros((seeds, n + burn))
    for i in range(1, n + burn):
        series[:, i] = correlation * series[:, i - 1] + noise[:, i]
    return 100.0 * (1.0 + growth * (np.arange(n) / (n - 1) - 0.5)) + 10.0 * series[:, burn:]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_a_stationary_backlog_is_rarely_called_a_trend(correlation):
    rng = np.random.default_rng(1)
    found = [backlog_trend(backlogs(rng, 3, correlation)).found() for _ in range(400)]
    assert np.mean(found) <= 0.03  # 1 %, a little more where blocks hang together for long


@pytest.mark.parametrize(("growth", "power"), [(0.5, 0.95), (1.0, 0.99)])
def test_a_backlog_that_drifts_is_found(growth, power):
    rng = np.random.default_rng(2)
    found = [backlog_trend(backlogs(rng, 3, 0.5, growth)).found() for _ in range(200)]
    assert np.mean(found) >= power


def test_a_trend_that_does_not_matter_is_let_pass():
    tiny = 100.0 + np.linspace(0.0, 5.0, 24)
    trend = backlog_trend([tiny, tiny])
    assert trend.p < 1e-6
    assert not trend.found()


# -- one server: M/D/1 ---------------------------------------------------------------------------------

TARGET_S = 0.5


@pytest.fixture(scope="module")
def server():
    """One instance that prefills one prompt of 1,000 tokens at a time; answers of one token."""
    return Scenario.load("azure-conv-4xa100").with_overrides({
        "cluster": [{"count": 1, "role": "mixed", "batching": "prefill_first", "max_prefills": 1}],
        "workload": {"kind": "synthetic", "lengths": {"kind": "fixed", "prompt": 1000, "output": 1}},
        "decisions": {}, "classes.0.ttft_s": TARGET_S, "rates": {"low": 0.1, "high": 1000.0}, "reference_rate": 5.0,
    })  # fmt: skip


def search(scenario, seeds=(0, 1, 2), **options):
    with Evaluator(scenario, PointSettings(), measure=measure_sustained) as evaluator:
        return Search(evaluator, Contender("least_tokens"), seeds, **options)


@pytest.fixture(scope="module")
def found(server):
    return search(server)


def test_the_stability_limit_is_one_over_the_service_time(found):
    assert found.limit == pytest.approx(1.0 / found.lone_s, rel=0.02)


@pytest.mark.parametrize("changes", [{"reference_rate": 1.0}, {"workload.arrival": {"kind": "gamma", "cv": 3.0}}])
def test_the_stability_limit_hangs_on_the_cluster_not_on_how_many_happened_to_arrive(server, found, changes):
    """The rate of 2,000 arrivals is some percent off the one asked for: who serves all of them is not saturated."""
    other = search(server.with_overrides(changes), targets=(0.9,))
    assert other.limit == pytest.approx(found.limit, rel=0.02)
    assert other.as_dict()["stability_limit"] >= other.found[0].rate


def lindley(arrival, service, skip):
    """Share of a single server's customers that leave within the target, by Lindley's recursion."""
    work = np.arange(1, len(arrival) + 1) * service
    leave = work + np.maximum.accumulate(arrival - (work - service))
    return (leave - arrival <= TARGET_S)[skip:].mean()


def test_lindleys_recursion_on_the_same_arrivals_gives_the_sustained_goodput(server, found):
    def attainment(rate):
        given = run_settings(PointSettings(), rate, found.lone_s)
        arrivals = [server.workload.build(rate, given.n_requests, seed, "test").arrival_s for seed in (0, 1, 2)]
        return np.mean([lindley(a, found.lone_s, int(given.warmup * len(a))) for a in arrivals])

    for entry in found.found:
        assert attainment(entry.rate) >= entry.target
        assert attainment(entry.above.rate) < entry.target
        assert entry.above.rate == pytest.approx(1.01 * entry.rate)
        assert entry.verdict.met
        assert not entry.verdict.early
        assert entry.verdict.missing == ()


def test_m_d_1_gives_the_sustained_goodput(found):
    for entry in found.found:
        low, high = 0.5 / found.lone_s, 1.0 / found.lone_s
        for _ in range(12):
            middle = (low + high) / 2
            runs = [np.random.default_rng(100 + s).exponential(1 / middle, 100_000).cumsum() for s in range(8)]
            held = np.mean([lindley(a, found.lone_s, 5_000) for a in runs]) >= entry.target
            low, high = (middle, high) if held else (low, middle)
        assert entry.rate == pytest.approx(low, rel=0.04)  # 60,000 requests near saturation spread by some percent
        assert entry.rate < found.limit


def test_the_answer_has_run_as_long_as_the_definition_asks(found):
    for entry in found.found:
        assert all(s.sent >= DEFINITION.requests and s.span_s > 0.95 * DEFINITION.seconds
                   for s in found.samples_at(entry.rate))  # fmt: skip


def test_plain_bisection_gives_the_same_answer_for_more_requests(server):
    plain, found = (search(server, (0,), mode=mode) for mode in ("plain", "sequential"))
    for quick, full in zip(found.found, plain.found, strict=True):
        assert quick.rate == pytest.approx(full.rate, rel=0.02)
    assert plain.simulated_requests > found.simulated_requests


class Told(Search):
    """A search whose verdicts are given: per place of the grid the letter of the clause that fails; none: held."""

    def __init__(self, fails, first):
        self._fails, self._start, self.asked = fails, first, list[int]()
        self._runs, self._verdicts, self.mode, self._step, self.limit = {}, {}, "sequential", math.log1p(0.01), 5.0

    def _first(self):
        return self.rate_of(self._start) * 1.001

    def verdict(self, index, goal, final=False):
        self.asked.append(index)
        letter = self._fails(index)
        clause = Clause(letter or "a", "", 0.0, 0.0, not letter)
        self._verdicts[index, goal] = Verdict(self.rate_of(index), goal.target, (clause,), 3, 0, 0.0)
        return self._verdicts[index, goal]

    def answer(self):
        return self._index(self._find(Goal(0.9)).rate * 1.001)


@pytest.mark.parametrize("first", [50, 101, 104, 105])
def test_where_single_waits_fail_the_answer_does_not_depend_on_where_the_search_begins(first):
    waits = Told(lambda k: "" if k <= 100 or k == 104 else "b", first)
    assert waits.answer() == 104
    steep = Told(lambda k: "" if k <= 100 else ("b" if k == 101 else "a"), first)
    assert steep.answer() == 100
    assert not {103, 104} <= set(steep.asked)  # who fails by attainment is not asked again further up


def test_request_goodput_agrees_with_the_headline(server, found):
    best = found.found[0]
    settings = run_settings(PointSettings(), best.rate, found.lone_s)
    metrics = measure_sustained(server, Contender("least_tokens"), best.rate, 0, settings).metrics
    assert metrics["request_goodput"] == pytest.approx(best.rate * metrics["slo_attainment"], rel=0.03)


def test_shortest_first_starves_long_prompts_and_is_told_so(server):
    starving = server.with_overrides({
        "cluster.0.order": "srf", "tail_factor": 20.0,
        "workload.lengths": {"kind": "mixture", "parts": [
            {"weight": 0.95, "lengths": {"kind": "fixed", "prompt": 200, "output": 1}},
            {"weight": 0.05, "lengths": {"kind": "fixed", "prompt": 8000, "output": 1}}]},
    })  # fmt: skip
    quick = search(starving, targets=(0.9,))
    answer = quick.found[0]
    rate = 0.97 * quick.limit
    settings = run_settings(PointSettings(), rate, quick.lone_s)
    point = measure_sustained(starving, Contender("least_tokens"), rate, 0, settings)
    sample = Sample(**point.metrics["sustained"])
    told = judge([sample], 0.9, tail_factor=20.0, limit=quick.limit, lone_s=quick.lone_s)
    assert not told.met
    assert "(b) longest wait" in told.failed or "(d) share of prompts, longest" in told.failed
    assert answer.rate < rate


# -- what is missing -----------------------------------------------------------------------------------


def test_a_trace_too_short_is_measured_as_far_as_it_goes_and_told_so(server, tmp_path):
    path = tmp_path / "short.jsonl"
    arrivals = np.cumsum(np.random.default_rng(0).exponential(0.1, 3_000))
    rest = '"input_length": 1000, "output_length": 1, "hash_ids": []'
    path.write_text("\n".join(f'{{"timestamp": {1000 * t:.0f}, {rest}}}' for t in arrivals))
    workload = {"kind": "trace", "source": {"path": str(path), "format": "mooncake", "time_unit": "ms"}}
    short = search(server.with_overrides({"workload": workload}), targets=(0.9,))
    assert short.found[0].rate > 0.0
    told = short.as_dict()["missing"]
    assert any("requests were measured; the definition asks for 20,000" in text for text in told)


def test_a_tail_factor_below_one_is_refused(server):
    with pytest.raises(SlalomError, match="tail_factor"):
        server.with_overrides({"tail_factor": 0.5})


def test_a_target_that_nobody_can_miss_is_refused(server):
    with pytest.raises(SlalomError, match="ttft_s"):
        server.with_overrides({"classes.0.ttft_s": 1e7})
    with pytest.raises(SlalomError, match="tpot_s"):
        server.with_overrides({"classes.0.tpot_s": 1e7})


def test_targets_out_of_reach_give_no_rate_and_the_reason(server):
    out_of_reach = search(server.with_overrides({"classes.0.ttft_s": 0.001}), targets=(0.9,)).found[0]
    assert out_of_reach.rate == 0.0
    assert out_of_reach.verdict is None
    assert "(a)" in out_of_reach.above.failed


def test_settings_differ_only_in_length_and_windows():
    made = run_settings(PointSettings(), 10.0, 1.0)
    assert 10 * (120 + 2000) <= made.n_requests <= 1.25 * 10 * (120 + 2000)
    assert made.warmup * made.n_requests == pytest.approx(10 * 120)
    assert replace(made, n_requests=10_000, warmup=0.05) == PointSettings()

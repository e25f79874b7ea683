"""Metrics against cases small enough to compute by hand."""

import numpy as np
import pytest
from eval_cases import MS, request

from engine.core.kinds import RequestState
from engine.core.slo import ITL_BINS, itl_edges_s
from engine.errors import SlalomError
from env.measure.metrics import block_counts, detailed, histogram_stats, outcomes, summarize


def test_four_requests_by_hand(make_run):
    rows = [
        request(0, 50, 90, out=5),  # TTFT 50, TPOT 10: both exactly or well inside -> good
        request(100, 250, 250, out=1),  # TTFT 150: late; one token, so TPOT is met
        request(200, 220, 320, out=6),  # TPOT 20: too slow
        request(300, state=RequestState.SHED, out=0, finished=300 * MS),
    ]
    m = summarize(make_run(rows), warmup=0.0)
    assert (m["num_prompts"], m["completed"], m["shed"], m["failed"], m["unfinished"]) == (4, 3, 1, 0, 0)
    assert m["slo_attainment"] == 0.25
    assert m["slo_attainment_by_metric"] == {"ttft": 0.5, "tpot": 0.5}
    assert m["duration"] == pytest.approx(0.32)  # first arrival to last token
    assert m["request_goodput"] == pytest.approx(1 / 0.32)
    assert m["goodput_per_gpu"] == pytest.approx(1 / 0.32 / 2)
    assert m["token_goodput"] == pytest.approx(5 / 0.32)
    assert m["mean_ttft_ms"] == pytest.approx((50 + 150 + 20) / 3)
    assert m["median_tpot_ms"] == pytest.approx(15)  # of 10 and 20
    assert m["mean_e2el_ms"] == pytest.approx((90 + 150 + 120) / 3)
    assert m["worst_wait_s"] == pytest.approx(0.15)
    assert m["max_concurrent_requests"] == 2
    assert (m["total_input_tokens"], m["total_output_tokens"]) == (40, 12)


def test_who_was_refused_is_in_the_system_no_longer(make_run):
    rows = [request(0, 50, 1000, out=5)]
    rows += [request(10 * k, state=RequestState.SHED, out=0, finished=(10 * k + 5) * MS) for k in range(1, 50)]
    assert summarize(make_run(rows, duration_ms=1000), warmup=0.0)["max_concurrent_requests"] == 2


def test_targets_are_met_on_the_tick_and_missed_one_after(make_run):
    on_time = request(0, 100, 140, out=5)
    late = dict(on_time, first_token=on_time["first_token"] + 1)
    slow = dict(on_time, last_token=on_time["last_token"] + 1)
    found = outcomes(make_run([on_time, late, slow]), warmup=0.0)
    assert found.good.tolist() == [True, False, False]
    assert found.ttft_ok.tolist() == [True, False, True]
    assert found.tpot_ok.tolist() == [True, True, False]


def test_unfinished_is_sent_and_missed_but_unsent_is_not_counted(make_run):
    rows = [
        request(0, 10, 20, out=2),
        request(10, 20, 30, out=2, state=RequestState.RUNNING),  # first token in time, never finished
        request(20, state=RequestState.WAITING, out=0),
        request(-1 / 1e9, state=RequestState.NEW, out=0, arrival=-1),
    ]
    m = summarize(make_run(rows, duration_ms=500), warmup=0.0)
    assert m["num_prompts"] == 3
    assert m["unfinished"] == 2
    assert m["slo_attainment"] == pytest.approx(1 / 3)
    assert m["slo_attainment_by_metric"] == pytest.approx({"ttft": 2 / 3, "tpot": 1 / 3})
    assert m["worst_wait_s"] == pytest.approx(0.48)  # still waiting when the run ended
    assert m["duration"] == pytest.approx(0.5)


def test_windows_leave_out_first_and_last_arrivals_whatever_their_row(make_run):
    late_first = [request(100 - i, 200, 201, out=2) for i in range(20)]  # rows in reverse order of arrival
    run = make_run(late_first)
    found = outcomes(run, warmup=0.1, drain=0.05)
    assert len(found.rows) == 17
    assert set(range(20)) - set(found.rows.tolist()) == {19, 18, 0}
    assert found.sent_total == 20
    assert summarize(run, warmup=0.1, drain=0.05)["windows"]["measured"] == 17


@pytest.mark.parametrize("windows", [(0.6, 0.4), (-0.1, 0.0), (float("nan"), 0.0)])
def test_windows_that_make_no_sense_are_refused(make_run, windows):
    with pytest.raises(SlalomError, match="warm-up"):
        outcomes(make_run([request(0, 1, 2, out=2)]), warmup=windows[0], drain=windows[1])


def test_a_run_that_sent_nothing_is_refused(make_run):
    with pytest.raises(SlalomError, match="measured window"):
        summarize(make_run([request(0, state=RequestState.NEW, arrival=-1)]))


def test_classes_are_reported_apart(make_run):
    rows = [request(i, i + (50 if i % 2 else 150), i + 160, out=1, cls=i % 2) for i in range(10)]
    table = summarize(make_run(rows, class_names=("batch", "chat", "empty")), warmup=0.0)["slo_attainment_by_class"]
    assert table["batch"]["slo_attainment"] == 0.0
    assert table["chat"]["slo_attainment"] == 1.0
    assert "empty" not in table


def test_gap_histogram_gives_the_percentiles_of_the_gaps():
    edges = itl_edges_s()
    gaps_s = np.random.default_rng(0).lognormal(np.log(0.02), 0.5, size=50_000)
    counts, _ = np.histogram(gaps_s, bins=edges)
    stats = histogram_stats(counts, edges)
    for name, exact in (("mean", gaps_s.mean()), ("std", gaps_s.std()), ("p99", np.percentile(gaps_s, 99))):
        assert stats[f"{name}_itl_ms"] == pytest.approx(exact * 1e3, rel=0.01)
    assert histogram_stats(np.zeros(ITL_BINS), edges)["p90_itl_ms"] is None


def test_peak_tokens_counts_overlapping_requests(make_run):
    rows = [
        request(0, 0, 2000, out=100),
        request(0, 500, 1500, out=100),
    ]  # 50/s and 100/s; worst second 0.5..1.5
    peak = summarize(make_run(rows, duration_ms=2000), warmup=0.0)["max_output_tokens_per_s"]
    assert 90 <= peak <= 150  # bins start at the first token: 100 or so fall into [0, 1) or [1, 2)


def test_blocks_partition_the_measured_requests(make_run):
    rows = [request(i, i + (50 if i < 30 else 500), i + 500, out=1) for i in range(40)]
    sent, good = block_counts(outcomes(make_run(rows), warmup=0.0), 4)
    assert sent == [10, 10, 10, 10]
    assert good == [10, 10, 10, 0]


def test_sessions_are_asked_by_session_and_reported_by_request(make_run):
    run = make_run([request(0, 50, 100, next_turn=1), request(1000, 1050, 1100), request(2000, 2050, 2100)])
    found = summarize(run, warmup=0.0)
    assert found["session_rate"] == 5.0
    assert found["request_rate"] == pytest.approx(1.0)
    assert "session_rate" not in summarize(make_run([request(0, 50, 100)]), warmup=0.0)


def test_detailed_keeps_every_request_in_order_of_arrival(make_run):
    rows = [request(10, 60, 100, out=3), request(0, state=RequestState.SHED)]
    found = detailed(make_run(rows))
    assert found["start_times"] == [0.0, 0.01]
    assert found["ttfts"] == [None, pytest.approx(0.05)]
    assert found["errors"] == ["shed", ""]
    assert {len(values) for values in found.values()} == {2}


def test_one_token_has_no_tpot_and_who_was_never_looked_up_is_no_miss(make_run):
    rows = [
        request(0, 50, 90, out=5, prefill_start=1, cached=5),
        *(request(k, 50, 50, out=1, prefill_start=1) for k in range(1, 10)),
        request(20, state=RequestState.WAITING, out=0, prefill_start=-1),
    ]
    m = summarize(make_run(rows), warmup=0.0)
    assert m["mean_tpot_ms"] == m["median_tpot_ms"] == m["p90_tpot_ms"] == pytest.approx(10)
    assert m["slo_attainment_by_metric"]["tpot"] == pytest.approx(10 / 11)
    assert m["prefix_hit_rate"] == pytest.approx(5 / 100)
    assert detailed(make_run(rows))["tpots"][1:] == [None] * 10

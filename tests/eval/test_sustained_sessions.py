"""Sustained goodput of workloads with sessions: measured when their load has settled, and told where it has not."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from eval_cases import MS, request

from engine.core.kinds import RequestState
from engine.core.setup import blank_requests
from engine.core.state import REQUEST
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S
from engine.live.request import ABORT
from env.live.client import Client
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator, simulated
from env.measure.level import level_settings, mean_level, measure_level, rate_unit, run_settings
from env.measure.metrics import outcomes
from env.measure.sustained import DEFINITION, sample_of
from env.measure.sustained_search import Search, measure_sustained
from env.measure.sustained_stop import cut_short, unsteady
from env.scenario import Scenario
from env.surrogate.simulate import abandon
from env.workload import write_trace

TURNS, THINK_S = 8, 40.0
TURNS_S = (TURNS - 1) * THINK_S  # from the first turn of a session to its last, but for the answers
SHORT = replace(DEFINITION, seconds=100.0, requests=1_000, lone_times=1.0, warmup_s=5.0, warmup_lone_times=1.0)
WHO = Contender("least_tokens")


@pytest.fixture(scope="module")
def talks():
    """One instance that prefills one prompt at a time. Eight turns, the first of them ten times as short as the others,
    forty seconds apart: a run that begins empty has next to nothing to do at first. Nothing said is forgotten."""
    return Scenario.load("azure-conv-4xa100").with_overrides({
        "cluster": [{"count": 1, "role": "mixed", "batching": "prefill_first", "max_prefills": 1,
                     "kv_tokens": 20_000_000}],
        "workload": {"kind": "sessions", "turns": TURNS, "first": 100, "growth": 1000, "output": 1,
                     "think": {"median_s": THINK_S, "p90_s": THINK_S}},
        "decisions": {}, "classes.0.ttft_s": 0.5, "rates": {"low": 0.01, "high": 100.0}, "reference_rate": 0.5,
    })  # fmt: skip


def search(scenario, definition=SHORT, seeds=(0, 1, 2)):
    with Evaluator(scenario, PointSettings(), measure=measure_sustained) as evaluator:
        return Search(evaluator, WHO, seeds, targets=(0.9,), definition=definition)


@pytest.fixture(scope="module")
def found(talks):
    return search(talks)


def span_s(found):
    """Of a session whose turns are answered as a lone request is."""
    return TURNS_S + (TURNS - 1) * found.lone_s


# -- the measured window -------------------------------------------------------------------------------


def settled_run(scenario, found, rate, seed=0, who=WHO):
    """(settings, run) as the search plays it."""
    load = found.load
    settings = run_settings(PointSettings(), rate, found.lone_s, turns=load.turns, settle_s=load.settle_s,
                            definition=replace(SHORT, requests=16_000))  # fmt: skip
    return settings, simulated(scenario, who, rate, seed, settings)


def sessions_of(run):
    """When each session began and ended, seconds."""
    roots = len(run.req) - int((run.req["next_turn"] > 0).sum())
    owner = np.arange(len(run.req))
    for row, turn in enumerate(run.req["next_turn"]):
        if turn > 0:
            owner[turn] = owner[row]
    ended = np.zeros(roots)
    sent = run.req["arrival"] >= 0
    np.maximum.at(ended, owner[sent], run.req["finished"][sent] / TICKS_PER_S)
    return run.req["arrival"][:roots] / TICKS_PER_S, ended


@pytest.fixture(scope="module")
def half(talks, found):
    """A run at half the goodput, with the times at which its measured window begins and ends."""
    settings, run = settled_run(talks, found, 0.5 * found.found[0].rate)
    arrival = run.req["arrival"][outcomes(run, **settings.windows).rows] / TICKS_PER_S
    return run, float(arrival.min()), float(arrival.max())


def test_in_the_measured_window_requests_come_as_often_at_its_end_as_at_its_beginning(half, found):
    run, first, last = half
    arrival = run.req["arrival"][run.req["arrival"] >= 0] / TICKS_PER_S
    per_s = np.histogram(arrival, np.linspace(first, last, 5))[0] / ((last - first) / 4)
    assert per_s == pytest.approx([0.5 * found.found[0].rate * TURNS] * 4, rel=0.12)


def test_live_sessions_obey_littles_law_all_through_the_window(half, found):
    run, first, last = half
    begun, ended = sessions_of(run)
    live = [((begun <= t) & (ended > t)).sum() for t in np.linspace(first, last, 200)]
    expected = 0.5 * found.found[0].rate * (ended - begun).mean()
    assert [np.mean(part) for part in np.split(np.array(live), 4)] == pytest.approx([expected] * 4, rel=0.12)
    assert np.mean(live) == pytest.approx(expected, rel=0.05)


def test_turns_that_come_after_the_last_session_has_begun_are_not_measured(half):
    run, first, last = half
    begun, ended = sessions_of(run)
    assert first == pytest.approx(TURNS_S, rel=0.1)
    assert last <= begun.max()
    assert (ended > begun.max()).any()


def test_shares_are_of_the_time_in_which_sessions_begin(make_run):
    """Two sessions, at 0 and 100 ms, with five turns each, 30 ms apart."""
    rows = [request(0, 1, 1, next_turn=2), request(100, 101, 101, next_turn=6)]
    for begun, place in ((0, 2), (100, 6)):
        for k in range(4):
            at = begun + 30 * (k + 1)
            rows.append(request(at, at + 1, at + 1, next_turn=place + k + 1 if k < 3 else -1, finished=(at + 1) * MS))
    run = make_run(rows)
    assert sorted(run.req["arrival"][outcomes(run, warmup=0.5, settled=True).rows] // MS) == [60, 90, 100]
    assert len(outcomes(run, warmup=0.5, drain=0.2, settled=True).rows) == 1
    assert len(outcomes(run, warmup=0.0).rows) == 10
    sample = sample_of(run, warmup=0.5, settled=True)
    assert (sample.sent, sample.due) == (3, pytest.approx(100.0))


@pytest.mark.parametrize("end", [RequestState.SHED, RequestState.FAILED])
def test_turns_after_one_that_ended_early_end_as_it_did_when_they_would_have_come(end):
    run = np.zeros(5, dtype=REQUEST)
    run["next_turn"] = [2, 3, -1, 4, -1]
    run["state"][:2], run["finished"][:2], run["think"] = [RequestState.FINISHED, end], [10, 20], 7
    run["arrival"] = [0, 10, 17, -1, -1]
    run["state"][2] = RequestState.RUNNING
    origin_s = np.array([0.0, 9.0, 0.0, 0.0, 0.0])
    abandon(run, origin_s)
    assert run["state"].tolist() == [RequestState.FINISHED, end, RequestState.RUNNING, end, end]
    assert run["arrival"].tolist() == [0, 10, 17, 27, 34]
    assert run["finished"][3:].tolist() == [27, 34]
    assert origin_s.tolist() == [0.0, 9.0, 0.0, 9.0, 9.0]


def test_whoever_refuses_a_turn_misses_the_rest_of_the_session_too(talks, found):
    """At twice the capacity about half of all turns is missed, though most of those are never sent."""
    strict = talks.with_overrides({"decisions": {"shed": True}})
    settings, run = settled_run(strict, found, 2.0 * found.limit, who=Contender("linear_score:shed=0"))
    sample = sample_of(run, warmup=settings.warmup, settled=True)
    assert sample.offered == pytest.approx(sample.due, rel=0.05)
    assert 0.4 < sample.good / sample.sent < 0.6
    assert (sample.unserved, sample.refused_late) == (0, 0)
    assert (run.cluster["n_sent"] - run.cluster["n_finished"]) / run.cluster["n_sent"] < 0.25


def test_the_client_of_live_runs_counts_them_as_well(talks):
    """A server that refuses the second request it gets: a first turn."""
    trace = talks.workload.build(1000.0, 3 * TURNS, 0, "test")
    client = Client(trace, vocabulary=100)
    asked = []

    def send(row, prompt):
        record = blank_requests(1)[0]
        end = RequestState.SHED if asked else RequestState.RUNNING
        record["state"], record["arrival"], record["finished"] = end, 5 * MS, 6 * MS
        asked.append(SimpleNamespace(number=row))
        finish = "shed" if len(asked) > 1 else ABORT
        threading.Timer(0.0, client.request_ended, (asked[-1], record, finish, None)).start()
        return asked[-1]

    client.send_all(send, drain_s=60.0)
    req = client.sealed(zero=4 * MS)
    assert len(asked) == trace.n_roots == 3
    assert (req["state"] == RequestState.SHED).sum() == 2 * TURNS
    assert (req["arrival"][:3] == MS).all()
    later = req["arrival"][trace.n_roots :]
    assert sorted(later[later >= 0] // (THINK_S * TICKS_PER_S)) == sorted([*range(1, TURNS)] * 2)


# -- the search ----------------------------------------------------------------------------------------


def test_the_warm_up_lasts_until_the_last_turns_come(found):
    about = found.as_dict()
    assert about["settle_s"] == pytest.approx(span_s(found))
    assert about["warmup_s"] == about["settle_s"]
    assert about["missing"] == []
    assert all(s.span_s > 0.9 * SHORT.seconds and s.sent > 0.9 * SHORT.requests
               for s in found.samples_at(found.found[0].rate))  # fmt: skip


def test_the_stability_limit_is_one_over_the_work_of_a_session(talks, found):
    """Where hardly two sessions meet, the time in which requests are answered is the work of the instance."""
    alone = simulated(talks, WHO, 0.001, 0, PointSettings(n_requests=20 * TURNS))
    busy = (alone.req["last_token"] - alone.req["arrival"]).sum() / TICKS_PER_S
    assert found.limit == pytest.approx(20 / busy, rel=0.03)
    assert 0.5 * found.limit < found.found[0].rate < found.limit


def test_ten_times_longer_runs_give_the_same_sustained_goodput(talks, found):
    longer = replace(SHORT, seconds=10 * SHORT.seconds, requests=10 * SHORT.requests)
    assert search(talks, longer).found[0].rate == pytest.approx(found.found[0].rate, rel=0.03)


def test_parts_of_a_mixture_that_are_bound_to_a_class_by_name_are_measured(talks):
    """Their sessions are a hundredth of the tokens that come: the load is there at once."""
    brief = talks.workload.model_dump(mode="json") | {"turns": 2, "first": 20, "growth": 20}
    plain = {"kind": "synthetic", "lengths": {"kind": "fixed", "prompt": 1000, "output": 1}}
    parts = [{"weight": 1, "workload": plain, "cls": "chat"}, {"weight": 0.1, "workload": brief, "cls": "agent"}]
    mixed = talks.with_overrides({
        "workload": {"kind": "mix", "parts": parts}, "reference_rate": 4.0,
        "classes": [{"name": name, "share": 0.5, "ttft_s": 0.5, "tpot_s": 0.1} for name in ("chat", "agent")],
    })  # fmt: skip
    answer = search(mixed)
    assert answer.load.turns == pytest.approx(1.0 + 0.1 / 1.1, rel=0.05)
    assert answer.load.settle_s == 0.0
    assert answer.as_dict()["missing"] == []
    assert 0.8 * answer.limit < answer.found[0].rate < answer.limit


# -- what is missing -----------------------------------------------------------------------------------


def recorded(talks, path, requests):
    """The same sessions as a file."""
    write_trace(talks.workload.build(1.0, requests, 0, "test"), path)
    source = {"path": str(path), "format": "slalom"}
    return talks.with_overrides({"workload": {"kind": "trace", "source": source, "split_at": [0.3, 0.4]}})


def test_a_recorded_trace_that_ends_before_its_sessions_have_settled_is_told(talks, found, tmp_path):
    whole = search(recorded(talks, tmp_path / "whole.jsonl", 12_000), seeds=(0,)).as_dict()
    assert whole["missing"] == []
    assert whole["goodput"]["0.9"]["rate"] == pytest.approx(found.found[0].rate, rel=0.06)
    ends = search(recorded(talks, tmp_path / "ends.jsonl", 3_000), seeds=(0,)).as_dict()
    told = next(text for text in ends["missing"] if "the trace ends after" in text)
    assert "settles after 4.6" in told
    assert "that still rose" in told


def test_a_trace_that_is_cut_keeps_the_warm_up_of_sessions_and_the_share_of_open_loop_requests():
    asked = PointSettings(n_requests=10_000, warmup=0.2)
    assert cut_short(asked, None) == cut_short(asked, 10_000) == asked
    assert cut_short(asked, 5_000) == replace(asked, n_requests=5_000)
    settled = replace(asked, sessions="settled")
    assert cut_short(settled, 5_000).warmup == pytest.approx(0.4)
    assert cut_short(settled, 2_000).warmup == 0.8


def test_fewer_turns_than_sessions_hold_are_told(make_run):
    rows = [request(10 * i, 10 * i + 1, 10 * i + 1, finished=(10 * i + 1) * MS) for i in range(100)]
    sample = sample_of(make_run(rows), warmup=0.0)
    assert unsteady([sample], 60.0, 60.0, 60.0) == []
    long = replace(sample, due=1.3 * sample.offered)
    assert "sessions outlast the runs" in unsteady([long], 60.0, 60.0, 60.0)[0]


def test_sessions_that_settle_in_no_run_at_all_are_refused(talks):
    month = 30 * 86_400.0
    long = {"workload.think": {"median_s": month, "p90_s": month, "cap_s": 2 * month}}
    with pytest.raises(SlalomError, match=r"workload.*settles in 5.04e\+03 hours.*shorten"):
        search(talks.with_overrides(long))


# -- the level that searches maximise ------------------------------------------------------------------


@pytest.mark.parametrize(("times", "low", "high"), [(0.8, 0.9, 1.0), (1.2, -9.0, 0.5)])
def test_the_level_of_sessions_is_that_of_the_long_run(talks, found, times, low, high):
    with Evaluator(talks, PointSettings(n_requests=500, split="train"), measure=measure_level) as evaluator:
        assert low <= mean_level(evaluator, WHO, times * found.limit, (0, 1)) <= high


def test_rates_of_sessions_count_sessions(talks):
    assert rate_unit(talks) == "sessions/s"
    assert rate_unit(Scenario.load("azure-conv-4xa100")) == "requests/s"


def test_only_runs_with_sessions_leave_out_two_thirds_for_their_level(talks):
    given = PointSettings(warmup=0.1)
    assert level_settings(given, talks, 900) == replace(given, n_requests=900, warmup=2 / 3, sessions="settled")
    assert level_settings(given, Scenario.load("azure-conv-4xa100"), 900) == replace(given, n_requests=900)

"""Metrics and the command on the real surrogate: they agree with the core's own books and with each other."""

import json
import subprocess
import sys

import numpy as np
import pytest

from engine.latency.evaluate import TICKS_PER_S
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.measure.metrics import outcomes, summarize
from env.scenario import Scenario
from env.surrogate.simulate import simulate
from eval import cli

TINY = "tiny-4xa100"


@pytest.fixture(scope="module")
def scenario():
    return Scenario.load(TINY)


@pytest.fixture(scope="module", params=[0.7, 1.4], ids=["below the knee", "above the knee"])
def run(request, scenario):
    return simulate(scenario, "least_tokens", rate=request.param * scenario.reference_rate, n_requests=600)


def test_attainment_is_what_the_core_counted_request_by_request(run):
    found = outcomes(run, warmup=0.0)
    assert found.good.sum() == run.cls["good"].sum()
    assert found.ttft_ok.sum() == run.cls["ttft_ok"].sum()
    assert found.tpot_ok.sum() == run.cls["tpot_ok"].sum()


def test_gap_histogram_holds_one_gap_per_token_after_the_first_and_their_total_time(run):
    m = summarize(run, warmup=0.0)
    gaps = m["total_output_tokens"] - m["completed"]
    spans = (run.req["last_token"] - run.req["first_token"]).sum() / TICKS_PER_S
    assert m["unfinished"] == 0
    assert run.itl.sum() == pytest.approx(gaps, rel=1e-3)
    assert m["mean_itl_ms"] == pytest.approx(1e3 * spans / gaps, rel=0.02)


def test_throughput_obeys_littles_law_and_conservation(run):
    """L = λW with W the mean end-to-end latency: the mean number in the system never exceeds its peak."""
    m = summarize(run, warmup=0.0)
    mean_inside = m["request_throughput"] * m["mean_e2el_ms"] / 1e3
    assert mean_inside <= m["max_concurrent_requests"]
    assert m["completed"] + m["shed"] + m["failed"] + m["unfinished"] == m["num_prompts"] == 600
    assert m["p90_ttft_ms"] <= m["p95_ttft_ms"] <= m["p99_ttft_ms"] <= 1e3 * m["worst_wait_s"] + 1e-6


def test_policies_see_the_same_arrivals_and_a_point_repeats_exactly(scenario):
    rate = scenario.reference_rate
    runs = [simulate(scenario, name, rate=rate, n_requests=200, seed=5) for name in ("least_tokens", "round_robin")]
    for column in ("arrival", "prompt", "output", "ttft_slo"):
        np.testing.assert_array_equal(runs[0].req[column], runs[1].req[column])
    settings = PointSettings(n_requests=200)
    points = []
    for _ in range(2):
        with Evaluator(scenario, settings) as evaluator:
            points += evaluator.points(Contender("least_tokens"), rate, [5])
    assert (points[0].good, points[0].sent) == (points[1].good, points[1].sent)


def test_command_prints_one_json_object(tmp_path):
    command = [sys.executable, "-m", "eval.cli", "--scenario", TINY, "--policy", "least_tokens"]
    command += ["--policy", "round_robin", "--seeds", "2", "--requests", "200", "--rates", "2,4", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert len(result["policies"]) == 2
    assert (tmp_path / "report.html").is_file()


def test_a_comparison_in_which_nobody_finishes_says_so(scenario, tmp_path, monkeypatch, capsys):
    """Prompts that no instance can hold."""
    lengths = {"kind": "fixed", "prompt": 200, "output": 20}
    small = scenario.with_overrides({"cluster.0.kv_tokens": 64, "workload": {"kind": "synthetic", "lengths": lengths}})
    (tmp_path / "small.yaml").write_text(small.to_yaml())
    asked = ["--policy", "least_tokens", "--policy", "round_robin", "--rates", "5,10", "--requests", "40"]
    command = ["eval-policy", "--scenario", str(tmp_path / "small.yaml"), *asked, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "No request finished under any policy" in said
    assert "100 % failed" in said
    assert "nobody was served" in " ".join((tmp_path / "out" / "report.html").read_text().split())

"""Sustained goodput leads every output; the classic figure stands beside it and no other figure contradicts it."""

import pytest

from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.scenario import Scenario
from eval.compare.headline import lead_with
from eval.compare.paired import compare
from eval.compare.result import Comparison
from eval.compare.session import Request, evaluate
from eval.compare.verdict import reasons, verdict
from eval.report.page import write_report
from eval.report.parts import cards, starved


@pytest.fixture(scope="module")
def result():
    """Two servers that prefill one prompt at a time: the better rule evens them out."""
    scenario = Scenario.load("azure-conv-4xa100").with_overrides({
        "cluster": [{"count": 2, "role": "mixed", "batching": "prefill_first", "max_prefills": 1}],
        "workload": {"kind": "synthetic", "lengths": {"kind": "fixed", "prompt": 1000, "output": 1}},
        "decisions": {}, "rates": {"low": 0.1, "high": 1000.0}, "reference_rate": 5.0,
    })  # fmt: skip
    request = Request(scenario=scenario, policies=("power_of_two", "least_tokens"), targets=(0.9, 0.95), sustained=True,
                      settings=PointSettings(n_requests=500))  # fmt: skip
    return evaluate(request)


def test_the_headline_is_sustained_and_classic_is_no_lower(result):
    assert result.is_sustained
    for side in result.policies:
        found, classic = side.at(0.9), side.classic_at(0.9)
        assert 0.0 < found.rate <= classic.rate < 1.01 * side.sustained["stability_limit"]
        assert found.low < found.rate < found.high
        assert found.verdict["met"]
        assert found.fails_above
        assert found.at["longest_wait_targets"] <= 10.0


def test_request_goodput_at_the_headline_rate_agrees_with_it(result):
    best = result.ranking()[0]
    rate = best.at(0.9).rate
    assert result.at_rate == rate
    point = next(p for p in best.points if p["rate"] == rate)
    assert point["request_goodput"] == pytest.approx(rate * point["slo_attainment"], rel=0.03)
    assert point["slo_attainment"] == pytest.approx(best.at(0.9).at["attainment"], abs=1e-9)
    assert all(run["num_prompts"] >= 20_000 for run in point["runs"])


def test_the_verdict_names_the_clause_that_ends_it(result):
    told = " ".join(verdict(result))
    assert "sustains 90 % of requests sent up to" in told
    for side in result.policies:
        assert f"{side.label} sustains {side.at(0.9).rate:.4g} requests/s" in told
    assert "fails by (" in told


def test_rates_of_sessions_are_told_to_be_of_sessions(result):
    assert not any("Rates count sessions" in text for text in reasons(result))
    content = result.to_json()
    content["policies"][0]["sustained"] |= {"turns": 4.06, "settle_s": 1650.0}
    content["settings"] = result.settings | {"rate_unit": "sessions/s"}
    sessions = Comparison.from_json(content)
    told = reasons(sessions)
    assert told[0].startswith("Rates count sessions, of 4.06 requests each; their load settles in 27.5 minutes")
    for text in (*verdict(sessions), *(f"{a} {b}" for a, b, _ in cards(sessions)), *starved(sessions)):
        assert "requests/s" not in text
    assert f"up to {result.ranking()[0].at(0.9).rate:.4g} sessions/s" in " ".join(verdict(sessions))


def test_a_pair_is_compared_seed_by_seed(result):
    pair = result.pairs[0]
    gap = pair.goodput["0.9"].difference
    a, b = result.side(pair.a), result.side(pair.b)
    assert gap.value == pytest.approx(a.at(0.9).rate - b.at(0.9).rate)
    assert gap.low < gap.value < gap.high
    assert result.difference(b, a) == (-gap.high, -gap.low)


def test_the_page_leads_with_it_and_defines_it(result, tmp_path):
    page = write_report(result, tmp_path)["report"].read_text()
    assert page.index("sustained goodput of") < page.index("Numbers")
    for text in ("sustained at 90 %", "classic at 90 %", "stability limit", "Sustained goodput: the largest rate"):
        assert text in page


def test_a_policy_that_holds_no_rate_is_last_with_its_reason():
    def entry(rate):
        at = {
            "rate": rate,
            "above": {"rate": 1.0, "failed": "(b) x"},
            "fails_above": "(b) x",
            "at": None,
            "per_gpu": rate,
        }
        return {"goodput": {"0.9": at}, "classic": {"0.9": at | {"rate": 9.0}}, "by_seed": [rate] * 3,
                "simulated_requests": 1, "missing": ["too short"]}  # fmt: skip

    with Evaluator(Scenario.load("tiny-4xa100"), PointSettings(n_requests=64)) as evaluator:
        contenders = [Contender("least_tokens", label=name) for name in "ab"]
        result = compare(evaluator, contenders, [0], start=8.0, targets=(0.9,), resamples=10)
    led = lead_with(result, {"a": entry(0.0), "b": entry(5.0)})
    assert [side.label for side in led.ranking()] == ["b", "a"]
    assert "a sustains no rate: 1 fails by (b) x." in reasons(led)
    assert "a: too short." in reasons(led)
    assert led.pairs[0].goodput["0.9"].difference.high < 0

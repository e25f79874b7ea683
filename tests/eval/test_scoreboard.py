"""The scoreboard's figures: who is compared with whom, in which direction, and what stands where nobody holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.compare.result import Comparison
from eval.studies import scoreboard
from eval.studies.scoreboard import CHECKPOINTS, Effort, main, row, score
from eval.studies.scoretable import table

TARGETS = ("0.9", "0.95", "0.99")
SCENARIO = "azure-conv-4xa100"


def policy(label: str, rates: tuple[float, float, float], wait: float = 1.0, plan: bool = False) -> dict[str, Any]:
    classes = {"chat": {"slo_attainment": 0.9}, "code": {"slo_attainment": 0.9 - wait / 100.0}}
    runs = [{"request_throughput": 10.0 - wait}, {"request_throughput": 10.0 + wait}]
    point = {"rate": 20.0, "slo_attainment": 0.9, "slo_attainment_by_class": classes, "worst_wait_s": wait}
    found = {"low": None, "high": None, "per_gpu": 1.0}
    goodput = {target: found | {"rate": rate} for target, rate in zip(TARGETS, rates, strict=True)}
    facts: dict[str, Any] = {"label": label, "policy_id": label, "values": {}, "tuned": False, "goodput": goodput}
    return facts | {"points": [point | {"runs": runs}], "cluster": [{}] if plan else []}


def pair(a: str, b: str, low: float | None, high: float | None) -> dict[str, Any]:
    gap = {"value": 1.0, "low": low, "high": high}
    return {
        "a": a,
        "b": b,
        "goodput": {target: {"ratio": gap, "difference": gap} for target in TARGETS},
        "attainment": [],
    }


def result(**changes: Any) -> Comparison:
    policies = [
        policy("rule", (10.0, 9.0, 0.0), wait=5.0),
        policy("static_plan", (12.0, 6.0, 0.0), wait=7.0, plan=True),
        policy(SCENARIO, (15.0, 6.0, 0.0), wait=3.0),
    ]
    pairs = [pair("rule", SCENARIO, 0.5, 0.8), pair(SCENARIO, "static_plan", 1.1, 1.4)]
    tuning = [{"trials": 40, "simulated_requests": 1e6}]
    settings = {"scenario": SCENARIO, "tuning": tuning, "requests_per_run": 2000, "split": "valid", "slo_scale": 1.0}
    facts = {"mode": "goodput", "targets": [0.9, 0.95, 0.99], "second_rate": None, "simulated_requests": 0}
    return Comparison.from_json(
        facts | {"policies": policies, "pairs": pairs, "at_rate": 20.0, "settings": settings} | changes
    )


def test_the_best_opponent_is_chosen_at_each_target_and_pairs_are_read_in_both_directions() -> None:
    found = row(result(), SCENARIO)
    assert (found["0.9"]["opponent"], found["0.9"]["ratio"]) == ("static_plan", 1.25)
    assert (found["0.9"]["low"], found["0.9"]["high"]) == (1.1, 1.4)
    assert (found["0.95"]["opponent"], found["0.95"]["ratio"]) == ("rule", pytest.approx(2.0 / 3.0))
    assert (found["0.95"]["low"], found["0.95"]["high"]) == (1.25, 2.0)
    assert found["0.99"]["ratio"] is None


def test_waits_classes_and_throughput_stand_beside_those_of_opponent_and_rule() -> None:
    at = row(result(), SCENARIO)["at_rate"]
    assert [at[key]["worst_wait_s"] for key in ("learned", "opponent", "rule")] == [3.0, 7.0, 5.0]
    assert at["learned"]["worst_class"] == "code"
    assert at["learned"]["finished_per_s"] == 10.0
    second = result(second_rate=20.0)
    assert row(second, SCENARIO)["second_rate"] == at
    assert table([row(second, SCENARIO)]).count("| 3.0 | 7.0 | 5.0 |") == 2


def test_a_rival_without_goodput_leaves_no_ratio_and_a_lost_target_is_a_ratio_of_zero() -> None:
    policies = [policy("a", (5.0, 0.0, 0.0)), policy("b", (0.0, 5.0, 0.0))]
    found = result(policies=policies, pairs=[pair("a", "b", None, None)])
    have, lack = found.policies
    assert found.ratio(have, lack, 0.9).value is None
    assert found.ratio(have, lack, 0.95).value == 0.0
    assert found.ratio(lack, have, 0.9).value == 0.0


def test_the_table_averages_ratios_and_names_what_has_none() -> None:
    text = table([row(result(), SCENARIO)])
    assert "At 90 %: geometric mean 1.250, smallest 1.250." in text
    assert "At 95 %: geometric mean 0.667" in text
    assert "At 99 %" not in text  # nobody holds it
    assert "| nobody |" in text
    assert "0.870 code | 0.830 code | 3.0 | 7.0 | 5.0 |" in text


def test_opponents_are_searched_under_the_scaled_targets_with_their_share_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(request: Any, watcher: Any) -> Any:
        asked.append(request)
        return result()

    monkeypatch.setattr(scoreboard, "evaluate", fake)
    for scale in (1.0, 0.5):
        score(SCENARIO, tmp_path, Effort(share=0.5, slo_scale=scale))
    plain, halved = asked
    assert (plain.out, halved.out) == (tmp_path / SCENARIO, tmp_path / f"{SCENARIO}-slo0.5")
    for before, after in zip(plain.scenario.classes, halved.scenario.classes, strict=True):
        assert (after.ttft_s, after.tpot_s) == (before.ttft_s / 2, before.tpot_s / 2)
    spent = scoreboard._trained_with(CHECKPOINTS / SCENARIO)
    assert halved.tune_requests == 0.5 * spent
    assert halved.sustained
    assert str(CHECKPOINTS / SCENARIO) in halved.policies


def test_opponents_can_be_searched_before_anybody_sees_the_test_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoreboard.OPPONENTS, SCENARIO, ("power_of_two", "muxwise"))
    assert main([SCENARIO, "--search", "--trials", "1", "--out", str(tmp_path)]) == 0
    folder = tmp_path / SCENARIO
    assert {path.name.split("-")[0] for path in (folder / "tuning").iterdir()} >= {"muxwise", "static_plan"}
    assert not (folder / "points").exists()
    assert not (folder / "result.json").exists()


def test_finished_results_are_read_back_without_simulating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from engine.common.files import write_json

    write_json(tmp_path / SCENARIO / "result.json", result().to_json())
    assert main([SCENARIO, "--read", "--out", str(tmp_path)]) == 0
    assert "1.250" in capsys.readouterr().out
    assert main(["classes-6xa100", "--read", "--out", str(tmp_path)]) == 2
    assert main([SCENARIO, "--slo-scale", "-1", "--out", str(tmp_path)]) == 2
    assert main(["nowhere", "--out", str(tmp_path)]) == 2

"""What each way of learning adds: equal effort, the same days, nothing measured twice, and a table that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from env.scenario import Scenario
from eval.studies.control import ARMS, HALF, WHOLE, main, study, table


def test_a_small_study_from_search_to_table(tmp_path: Path) -> None:
    changes = {
        "cluster.0.count": 1, "cluster.1.count": 2, "reference_rate": 2.0, "workload.duration_s": 1800.0,
        "decisions.roles": ["prefill", "decode"],
    }  # fmt: skip
    small = Scenario.load("daynight-70b-30min").with_overrides(changes)
    said: list[str] = []
    result = study(small, requests=60_000, days=1, seeds=1, out=tmp_path, say=said.append)
    rows = result["rows"]
    assert set(rows) == {HALF, WHOLE, *ARMS}
    for name, (row,) in rows.items():
        assert row["test"]["goodput"][0] > 0.5
        assert row["requests"] <= 500_000
        if name in ARMS:
            assert row["values"] == rows[HALF][0]["values"]
            assert row["chosen"] in row["stages"]
            assert row["block"] == row["stages"][row["chosen"]]
    text = table(result)
    assert text.count("\n| ") == len(rows) + 2
    measured = len(list(tmp_path.glob("*.json")))
    again = study(small, requests=60_000, days=1, seeds=1, out=tmp_path, say=said.append)
    assert again["rows"] == rows
    assert len(list(tmp_path.glob("*.json"))) == measured


def test_the_table_is_about_seeds_and_days() -> None:
    def row(goodput: list[float], stands: float) -> dict[str, object]:
        return {"test": {"goodput": goodput, "role_changes": 12}, "stands": [stands, stands], "chosen": "start"}

    rows = {name: [row([1.0, 2.0], 0.5), row([1.0, 2.0], 0.5)] for name in (HALF, WHOLE, *ARMS)}
    rows["all three"] = [row([1.1, 2.2], 0.9), row([1.1, 2.2], 0.9)]
    result = {
        "scenario": "x", "days": 2, "requests": 1e6, "commit": "c", "clairvoyant": [3.0], "rate": 1.5, "rows": rows
    }  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line for line in table(result).splitlines() if line.startswith("| ")}
    assert "| 1.100 (1.100 to 1.100) | 90.0 (90.0 to 90.0) | start, start | 12 |" in lines["all three"]
    assert "| 1.50 (1.50 to 1.50) | 1.000 (1.000 to 1.000) |" in lines[WHOLE]


def test_a_scenario_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["nowhere", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("control: scenario: got 'nowhere'")

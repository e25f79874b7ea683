"""The drift table: days are paired, what was finished is kept, and every row says what it holds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from env.measure.roles import role_timeline
from env.scenario import Scenario
from eval.studies.drift import main, paired, parts, study, table

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "policies" / "daynight-70b"


def test_ratios_are_of_each_day() -> None:
    mean, low, high = paired([3.0, 6.0, 9.0], [1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((3.0, 3.0, 3.0))
    mean, low, high = paired([2.0, 4.0], [1.0, 1.0])
    # Student's 97.5 % quantile of one degree of freedom is 12.706; the deviation of 2 and 4 is √2.
    assert (mean, high - mean) == pytest.approx((3.0, 12.706), rel=1e-3)
    assert math.isnan(paired([1.0], [1.0])[1])


@pytest.fixture(scope="module")
def small() -> Scenario:
    changes = {
        "cluster.0.count": 1, "cluster.1.count": 2, "reference_rate": 2.0, "workload.duration_s": 1800.0,
        "decisions.roles": ["prefill", "decode"], "rates.low": 0.1,
    }  # fmt: skip
    return Scenario.load("daynight-70b-30min").with_overrides(changes)


def test_a_small_table_from_search_to_picture(small: Scenario, tmp_path: Path) -> None:
    said: list[str] = []
    result = study(small, [], ["dyn_sla"], requests=20_000, days=2, seeds=1, out=tmp_path, say=said.append)
    rows = result["rows"]
    names = {"dyn_sla, tuned", "controller, seed 0", "distserve, replanned", "fixed split", "fixed, any roles"}
    assert set(rows) == {*names, "clairvoyant"}
    assert all(len(row["goodput"]) == 2 for row in rows.values())
    assert np.mean(rows["clairvoyant"]["goodput"]) > np.mean(rows["fixed split"]["goodput"]) > 0.0
    assert rows["fixed split"]["role_changes"] == 0 < rows["clairvoyant"]["role_changes"]
    assert rows["distserve, replanned"]["role_changes"] > 0
    assert (tmp_path / "roles.png").stat().st_size > 1000
    text = table(result)
    assert text.count("\n| ") == len(rows) + 2
    assert "clairvoyant | " in text
    alike = [str(tmp_path / run / "best") for run in ("one", "two")]
    for folder in alike:
        shutil.copytree(CHECKPOINT, folder)
    learned = study(small, alike, [], requests=20_000, days=2, seeds=1, out=tmp_path, say=said.append)["rows"]
    assert {"learned (one)", "learned (two)"} < set(learned)
    about = [(tmp_path / f"learned-{name}.json").read_text() for name in ("one", "two")]
    (tmp_path / "one" / "best" / "README.md").write_text("trained again, in its place")
    study(small, alike, [], requests=20_000, days=2, seeds=1, out=tmp_path, say=said.append)
    again = [(tmp_path / f"learned-{name}.json").read_text() for name in ("one", "two")]
    assert about[0] != again[0]  # played again
    assert about[1] == again[1]
    before = len(said)
    assert (
        study(small, [], ["dyn_sla"], requests=20_000, days=2, seeds=1, out=tmp_path, say=said.append)["rows"] == rows
    )
    assert not any("runs: worst phase" in line for line in said[before:])  # read back, not played again


def test_levers_are_added_one_after_the_other(small: Scenario, tmp_path: Path) -> None:
    prefilling = small.with_overrides({"cluster.0.count": 2, "cluster.1.count": 1})  # too much of it for nights
    text = parts(prefilling, "planner:pack=0", days=1, out=tmp_path, say=lambda line: None)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[0].split(":")[0].split(",")[0] for row in rows] == [
        "least predicted TTFT", "+ arrangement", "+ order of queues", "+ placement and budgets", "+ role changes",
    ]  # fmt: skip
    assert float(rows[1][1]) > float(rows[0][1]) > 0.0
    assert [int(row[3]) > 0 for row in rows] == [False, False, False, False, True]


def test_roles_are_drawn_under_the_demand(small: Scenario) -> None:
    from env.surrogate.arena import build_trace
    from eval.report.plots_drift import roles_under_demand

    line = role_timeline(small, "planner", 1.5, 0)
    trace = build_trace(small, 1.5, 2700, 0, "test")
    figure = roles_under_demand(trace, {"planner": line, "again": line})
    assert [axis.get_ylabel().split("\n")[0] for axis in figure.axes] == ["demand", "planner", "again"]
    assert line.switches >= 3
    assert len(line.at_s) > 3


def test_a_stopped_study_and_a_folder_that_is_none_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["daynight-70b", "--out", str(tmp_path / "file")]) == 2

    def stopped(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.studies.drift.study", stopped)
    assert main(["daynight-70b", "--out", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "it is a file" in said[0]
    assert said[1] == "drift: interrupted"


def test_a_scenario_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["nowhere", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("drift: scenario: got 'nowhere'")

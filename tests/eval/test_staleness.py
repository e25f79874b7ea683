"""The study of delays and routers, at one rate and small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from env.scenario import Scenario
from eval.studies.staleness import RULES, Effort, contenders, drawn, main

CONV = Scenario.load("azure-conv-4xa100")
SMALL = ["--rate", "24", "--requests", "400", "--budget", "0", "--seeds", "1", "--delays", "0", "0.5", "--routers", "4"]


def test_a_small_study_is_told_drawn_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [CONV.name, *SMALL, "--out", str(tmp_path)]
    assert main(command) == 0
    rows = json.loads((tmp_path / "staleness.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == [name for name in ("learned", *RULES) for _ in range(2)]
    by = {(row["policy"], row["delay_s"]): row["value"] for row in rows}
    assert by["predicted_ttft", 0.5] < by["predicted_ttft", 0.0] <= 100.0
    told = capsys.readouterr().out
    assert f"| learned | 4 | {by['learned', 0.0]:.2f} | {by['learned', 0.5]:.2f} |" in told
    assert (tmp_path / "staleness.png").stat().st_size > 10_000
    kept = tmp_path / CONV.name / "learned-0.5-4.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"value": 12.34}))
    assert main(command) == 0
    assert "12.34" in capsys.readouterr().out


def test_rules_stand_on_the_arrangement_of_the_checkpoint() -> None:
    learned, *rules = contenders(CONV)
    assert learned.plans == ()
    assert len({str(rule.plans) for rule in rules}) == 1
    assert len(rules[0].plans) == 4


def test_training_meets_every_delay_and_its_windows_the_middle() -> None:
    found = drawn(CONV, Effort(delays=(0.0, 0.1, 1.0), routers=(1, 2, 4)))
    assert (found.observation_delay_s, found.routers) == (0.1, 2)
    assert found.randomise.observation_delay_s == (0.0, 0.1, 1.0)
    assert found.randomise.routers == (1, 2, 4)


def test_a_scenario_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smollm2-2xcpu", *SMALL, "--out", str(tmp_path)]) == 2
    assert "no checkpoint is shipped" in capsys.readouterr().err

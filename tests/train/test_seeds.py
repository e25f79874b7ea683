"""Curves of several seeds: read from logs, measured on one yardstick, combined by interquartile mean, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.errors import SlalomError
from eval.studies.seeds import Curve, _draw, _told, app, read_stages, summarise

DESIGN = {"rule": "least_tokens", "values": {}, "plans": None, "theta": None}


def log(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def incumbent(seconds: float, rule: str = "least_tokens") -> dict[str, Any]:
    return {"event": "incumbent", "seconds": seconds} | DESIGN | {"rule": rule}


def evaluation(trained_s: float, score: float) -> dict[str, Any]:
    name = f"{trained_s:04.0f}"
    return {"event": "evaluation", "name": name, "trained_s": trained_s, "score": score, "base": 0.90}


def test_a_search_is_read_from_its_last_beginning(tmp_path: Path) -> None:
    events = [
        {"event": "search"},
        incumbent(3.0, "gone"),
        {"event": "search"},
        incumbent(1.0),
        incumbent(5.0, "chunked"),
    ]
    folder = log(tmp_path / "a", [*events, {"event": "base", "seconds": 7.0, "score": 0.9, **DESIGN}])
    stages = read_stages(folder)
    assert [stage.seconds for stage in stages] == [1.0, 5.0, 7.0]
    assert [stage.design["rule"] for stage in stages if stage.design] == ["least_tokens", "chunked", "least_tokens"]


def test_of_a_training_the_best_snapshot_so_far_counts_after_the_search(tmp_path: Path) -> None:
    base = {"event": "base", "seconds": 20.0, **DESIGN}
    learned = [evaluation(5.0, 0.89), evaluation(10.0, 0.93), evaluation(15.0, 0.91), {"event": "selected"}]
    folder = log(tmp_path / "a", [{"event": "search"}, incumbent(2.0), base, *learned])
    stages = read_stages(folder)
    assert [stage.seconds for stage in stages] == [2.0, 20.0, 30.0, 35.0]
    assert [Path(stage.folder).name for stage in stages[2:]] == ["0010", "best"]


def test_a_run_has_passed_when_it_never_falls_behind_again() -> None:
    curve = Curve("s", 0, (10.0, 20.0, 30.0, 40.0), (0.8, 1.1, 0.9, 1.2), shipped=1.21)
    assert curve.at(9.0) == 0.0  # no policy yet
    assert curve.at(29.0) == 1.1
    assert curve.passed_s == 40.0
    assert curve.shipped_s == 40.0  # within the tolerance
    assert Curve("s", 0, (10.0, 20.0), (1.2, 1.0)).passed_s is None  # as good as is not better
    assert Curve("s", 0, (10.0,), (1.2,)).shipped_s is None


def test_the_interquartile_mean_leaves_out_the_luckiest_and_the_worst() -> None:
    ratios = (0.5, 1.1, 1.2, 1.3, 9.0)
    curves = [Curve("s", seed, (10.0, 20.0 + seed), (0.9, ratio), 1.25) for seed, ratio in enumerate(ratios)]
    summary = summarise(curves)
    assert 1.1 < summary["ratio_iqm"][-1] < 1.3
    assert summary["low"][-1] <= summary["ratio_iqm"][-1] <= summary["high"][-1]
    assert summary["best_rule"] == {"runs": 5, "reached": 4, "median_s": 23.0, "latest_s": None}
    assert summary["shipped"]["reached"] == 2
    assert summary["shipped"]["median_s"] is None  # most did not
    assert _draw(summary).startswith(b"\x89PNG")
    rule = {"scenario": "s", "rule": "r", "tuned": True, "requests": 3e6, "goodput": 20.0, "shipped_ratio": 1.25}
    text = _told(summary, [rule])
    assert "4 of 5 runs; time median 23.0 s, latest not within the budget" in text
    json.dumps(summary, allow_nan=False)


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match="search"):
        read_stages(tmp_path)


@pytest.mark.slow
def test_trainings_are_measured_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.studies.seeds._WINDOWS", (7_000,))
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text("default: {designs: 8, starts: 1, final_seeds: 1, eval_requests: 200, direct_size: 200}\n")
    command = ["--out", str(tmp_path / "out"), "--scenario", "azure-code-mux-4xa100", "--seeds", "1"]
    command += ["--rule", "least_tokens", "--config", str(sizes), "--json"]
    first = CliRunner().invoke(app, [*command, "--budget", "40k"], catch_exceptions=False)
    assert first.exit_code == 0
    found = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert found["best_rule"]["runs"] == 1
    assert all(len(run["seconds"]) > 3 for run in found["runs"])  # a curve, not a step
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("train.run._stages", None)  # nothing is trained again
    monkeypatch.setattr("train.search.fitness.Fitness.goodput", None)  # nor measured
    again = CliRunner().invoke(app, [*command, "--budget", "40k"], catch_exceptions=False)
    assert json.loads(again.stdout) == json.loads(first.stdout)
    with pytest.raises(SlalomError, match="budget"):
        CliRunner().invoke(app, [*command, "--budget", "50k"], catch_exceptions=False)

"""Curves of several seeds: read from logs, combined by interquartile mean, drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import SlalomError
from train.seeds import _draw, read_curve, summarise


def log(folder: Path, base: dict[str, float], evaluations: list[tuple[float, float]]) -> Path:
    folder.mkdir()
    events = [{"event": "base", **base}]
    events += [{"event": "evaluation", "trained_s": t, "score": score, "base": 0.90} for t, score in evaluations]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_run_counts_its_best_policy_so_far(tmp_path: Path) -> None:
    base = {"seconds": 20.0, "score": 0.88, "default_score": 0.89}
    curve = read_curve(log(tmp_path / "a", base, [(5.0, 0.89), (10.0, 0.93), (15.0, 0.91)]), "s", 0)
    assert curve.at(19.0) == 0.0  # no policy yet
    assert curve.at(20.0) == pytest.approx(-0.01)
    assert curve.at(29.0) == pytest.approx(-0.01)
    assert curve.at(30.0) == curve.at(99.0) == pytest.approx(0.02)
    assert curve.passed_s == 30.0


def test_the_interquartile_mean_leaves_out_the_luckiest_and_the_worst(tmp_path: Path) -> None:
    gains = (-0.05, 0.01, 0.02, 0.03, 0.50)
    curves = []
    for seed, gain in enumerate(gains):
        base = {"seconds": 10.0, "score": 0.8, "default_score": 0.8}
        folder = log(tmp_path / str(seed), base, [(10.0, 0.90 + gain)])
        curves.append(read_curve(folder, "s", seed))
    summary = summarise(curves)
    assert 0.0 < summary["gain_iqm"][-1] < 0.05
    assert summary["low"][-1] <= summary["gain_iqm"][-1] <= summary["high"][-1]
    assert summary["passed"] == 4
    assert summary["median_time_to_pass_s"] == 20.0
    assert _draw(summary).startswith(b"\x89PNG")


def test_most_runs_must_pass_for_a_time_to_be_told(tmp_path: Path) -> None:
    base = {"seconds": 10.0, "score": 0.8, "default_score": 0.81}
    summary = summarise([read_curve(log(tmp_path / "a", base, [(5.0, 0.90)]), "s", 0)])
    assert summary["passed"] == 0
    assert summary["median_time_to_pass_s"] is None


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match="search"):
        read_curve(tmp_path, "s", 0)

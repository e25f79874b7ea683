"""Clusters a checkpoint was not trained on: how they are made, and one comparison from start to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import SlalomError
from env.scenario import Scenario
from eval.studies import zeroshot
from eval.studies.zeroshot import _apportioned, main, table, variant

CHAT, SHIFT = (Scenario.load(name) for name in ("azure-conv-4xa100", "shift-pd-8xa100"))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_groups_keep_their_shares(counts: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(counts), 200))
    found = _apportioned(np.array(counts), total)
    assert found.sum() == total
    assert found.min() >= 1
    exact = np.array(counts) / sum(counts) * total
    if exact.min() >= 1.0:
        assert (abs(found - exact) < 1.0).all()


@pytest.mark.parametrize("n", [2, 8, 16, 64])
def test_load_and_length_of_runs_follow_the_number_of_instances(n: int) -> None:
    for scenario in (CHAT, SHIFT):
        found, before = variant(scenario, instances=n), len(scenario.placements())
        assert len(found.placements()) == n
        assert found.reference_rate == pytest.approx(scenario.reference_rate * n / before)
        assert found.n_requests >= scenario.n_requests
        if n > before:  # arrivals last as long
            assert found.n_requests / found.reference_rate == pytest.approx(
                scenario.n_requests / scenario.reference_rate
            )
        assert (found.classes, found.decisions, found.workload) == (
            scenario.classes,
            scenario.decisions,
            scenario.workload,
        )


def test_another_profile_is_on_every_instance_and_a_misfit_is_refused() -> None:
    assert variant(CHAT, profile="llama-8b-h100").profile_names() == ("llama-8b-h100",)
    assert variant(SHIFT, 16, "llama-70b-a100-tp8").n_gpus() == 128
    with pytest.raises(SlalomError, match="SM shares"):
        variant(Scenario.load("azure-code-mux-4xa100"), profile="opt-13b-a100-tp1")
    with pytest.raises(SlalomError, match="groups"):
        variant(SHIFT, instances=1)
    with pytest.raises(SlalomError, match="profile"):
        variant(CHAT, profile="nothing-of-the-sort")


def test_a_native_policy_that_a_rule_beats_is_marked() -> None:
    ratio = {"ratio": 1.2, "low": 1.0, "high": 1.3}
    facts: dict[str, Any] = {"variant": "v", "checkpoint": "c", "zero_shot": 12.0, "rule": "r", "rule_rate": 11.0}
    weak = facts | {"native": 10.0, "to_native": ratio, "to_rule": ratio}
    text = table([weak, weak | {"native": 13.0, "to_native": ratio | {"ratio": 0.9}}])
    assert "10.00 *" in text
    assert "13.00 |" in text
    assert "on 1 of 2 variants" in text
    assert "too briefly" in text


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--instances", "two"], ["--checkpoint", "nobody"], ["--instances", "", "--profiles", ""]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_variant_from_training_to_table_and_once_more_from_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeroshot, "_LONGEST_SEARCH", 200)
    command = ["--checkpoint", "azure-conv-4xa100", "--instances", "2", "--profiles", "", "--budget", "10k"]
    command += [
        "--rule",
        "least_tokens",
        "--seeds",
        "1",
        "--requests",
        "200",
        "--split",
        "valid",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "zeroshot.json").read_text())
    assert len(rows) == 1
    assert rows[0]["native"] > 0.0
    assert rows[0]["zero_shot"] > 0.0
    assert rows[0]["to_native"]["low"] <= rows[0]["to_native"]["ratio"] <= rows[0]["to_native"]["high"]
    monkeypatch.setattr("train.run._stages", None)  # nothing is trained again
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert main([*command[:7], "12k", *command[8:]]) == 2  # another budget, the same folder


def test_profiles_of_the_default_command_exist() -> None:
    for each in zeroshot._variants(CHAT, "2,64", "llama-8b-h100,llama-70b-a100-tp8"):
        assert each.load_profiles()

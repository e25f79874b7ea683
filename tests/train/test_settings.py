"""The search over PPO's settings: its first trial, what it leaves behind, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from engine.errors import SlalomError
from train.budget import Budget
from train.config import TrainConfig, load_config
from train.search.settings import SPACE, main, search, suggest

SMALL: dict[str, Any] = {
    "tune_trials": 4, "tune_requests": 60, "n_envs": 8, "groups": 2, "n_steps": 32, "n_requests": 60, "batch_size": 128,
    "hidden": 8, "critic_warmup": 0, "eval_requests": 60, "eval_seeds": 1, "final_seeds": 1,
}  # fmt: skip


def test_settings_reach_as_far_as_the_configuration_they_start_from() -> None:
    config = TrainConfig(**SMALL, learning_rate=2e-2)
    trial = optuna.trial.FixedTrial({name: getattr(config, name) for name in SPACE})
    values = suggest(trial, config)
    assert values.pop("learning_rate_final") == pytest.approx(2e-3)
    assert values == {name: getattr(config, name) for name in SPACE}
    TrainConfig(**(SMALL | values))


def test_a_search_goes_on_where_it_stopped_and_writes_a_configuration(tmp_path: Path) -> None:
    def go(trials: int) -> dict[str, Any]:
        return search("tiny-4xa100", trials, Budget(frames=1500), tmp_path, rule="linear_score", overrides=SMALL)

    first = go(1)
    assert (first["trials"], first["pruned"]) == (1, 0)
    assert {name: first["settings"][name] for name in SPACE} == {
        name: getattr(TrainConfig(**SMALL), name) for name in SPACE
    }
    assert first["fresh"]["winner"] == pytest.approx(first["fresh"]["defaults"])
    again = go(2)
    assert again["trials"] + again["pruned"] == 2
    assert again["score_in_search"] >= first["score_in_search"]
    config = load_config(tmp_path / "config.yaml", "tiny-4xa100")
    assert {name: getattr(config, name) for name in again["settings"]} == again["settings"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trials", "0", "--out", str(tmp_path)]) == 2
    assert "--trials" in capsys.readouterr().err
    with pytest.raises(SlalomError):
        search("nowhere", 1, Budget(frames=100), tmp_path)

"""Hyper-parameter files and budgets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.errors import SlalomError
from train.budget import parse_budget
from train.config import TrainConfig, load_config


def test_scenario_section_overrides_default_section_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("default: {n_steps: 64, hidden: 16}\nmine: {hidden: 8}\nother: {hidden: 4}\n")
    config = load_config(path, "mine")
    assert (config.n_steps, config.hidden) == (64, 8)
    assert config.clip_range == TrainConfig().clip_range


def test_written_configuration_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(hidden=8, eval_loads=(0.5, 1.5), target_kl=None)
    path = tmp_path / "config.yml"
    path.write_text(config.to_yaml())
    assert load_config(path, "any") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("default: {learning_rat: 1}", r"did you mean learning_rate\?"),
        ("default: {tune_share: 7}", "tune_share: got 7; it must be less than or equal to"),
        ("default: {hidden: many}", "hidden"),
        ("default: {load_low: 2, load_high: 1}", "load_low must not exceed"),
        ("default: {n_envs: 10, groups: 4}", "multiple of groups"),
        ("default: 3", "field: value"),
        ("[1, 2]", "scenario name"),
        ("hidden: 8", "settings stand in a section"),
        ("default: {hidden: 8}\nn_steps: 64", "settings stand in a section"),
        ("defautl: {hidden: 8}", "did you mean default"),
        ("default: {hidden: 8}\nmime: {hidden: 16}", "did you mean mine"),
        ("default: {hidden: 8}\nazure-conv-4xa10: {hidden: 16}", "did you mean azure-conv-4xa100"),
        ("other: {hidden: 8}", "nothing in it is for this run"),
        ("{}", "nothing in it is for this run"),
        ("a: b: c", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SlalomError, match=says):
        load_config(path, "mine")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match="readable"):
        load_config(tmp_path / "none.yaml", "mine")


def test_every_field_that_needs_words_has_them() -> None:
    silent = {n for n, f in TrainConfig.model_fields.items() if not f.description}
    assert silent <= {"learning_rate", "clip_range", "gae_lambda", "vf_coef", "max_grad_norm"}


@pytest.mark.parametrize(
    ("text", "seconds", "frames"),
    [("90s", 90, None), ("2m", 120, None), ("1.5h", 5400, None), ("500k", math.inf, 500_000)],
)
def test_budget(text: str, seconds: float, frames: int | None) -> None:
    budget = parse_budget(text)
    assert (budget.seconds, budget.frames) == (seconds, frames)


def test_minutes_and_millions_differ() -> None:
    assert parse_budget("2m").seconds == 120
    assert parse_budget("2M").frames == 2_000_000


@pytest.mark.parametrize("text", ["", "s", "-3s", "0", "0.0001k", "3 weeks", "1e5", "nan", "3", "0.9k"])
def test_bad_budget(text: str) -> None:
    with pytest.raises(SlalomError, match="--budget"):
        parse_budget(text)

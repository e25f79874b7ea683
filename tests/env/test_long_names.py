"""Names longer than a file may have, and with characters that none may have: one line, wherever a name is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.common.documents import read_json, read_text
from engine.common.files import claim, write_text
from engine.common.files import read_json as read_result
from engine.common.lines import lines
from engine.common.yaml_documents import read_yaml
from engine.errors import SlalomError
from engine.latency import Profile
from engine.model import load_tokenizer, open_checkpoint
from env.measure.contender import Contender
from env.measure.digest import policy_sha256
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.workload import parse_workload, read_trace
from eval.explain.log import summary
from policies.checkpoint.folder import load
from policies.guard.config import GuardConfig
from policies.load import load_policy
from policies.serve import load_classes
from train.budget import Budget
from train.config import load_config
from train.recipe import load_recipe
from train.run import Request, run

LONG = "muxwise:" + ",".join(f"parameter{k}=0.123456789" for k in range(40))
TINY = "tiny-4xa100"
TRACE = {"kind": "trace", "source": {"path": LONG, "format": "azure"}}
TAKES: dict[str, Callable[[str], Any]] = {
    "scenario": Scenario.load,
    "scenario file": lambda name: Scenario.load(f"{name}.yaml"),
    "profile": Profile.load,
    "profile file": lambda name: Profile.load(f"{name}.json"),
    "recipe": load_recipe,
    "recipe file": lambda name: load_recipe(f"{name}.yaml"),
    "policy": lambda name: load_policy(name, arena_of(Scenario.load(TINY)).setting),
    "checkpoint": lambda name: load(Path(name)),
    "model": open_checkpoint,
    "GGUF": lambda name: open_checkpoint(f"{name}.gguf"),
    "tokenizer": load_tokenizer,
    "trace": lambda name: read_trace(name, "azure"),
    "workload": lambda name: parse_workload(
        {"kind": "trace", "source": {"path": name, "format": "azure"}}
    ).build(1.0, 5, 0, "train"),
    "text": lambda name: read_text(name, "--x"),
    "JSON": lambda name: read_json(name, "--x"),
    "YAML": lambda name: read_yaml(name, "--x"),
    "lines": lambda name: list(lines(Path(name), "--x")),
    "result": lambda name: read_result(Path(name)),
    "output": lambda name: write_text(Path(name), "x"),
    "claim": lambda name: claim(Path(name)),
    "decision log": lambda name: summary(Path(name)),
    "guard": GuardConfig.load,
    "classes": lambda name: load_classes(name, 1.0, 1.0),
    "training": lambda name: load_config(Path(name), "mine"),
    "run": lambda name: run(Request(TINY, "search", "round_robin", Budget(frames=1), out=Path(name))),
}  # fmt: skip


@pytest.mark.parametrize("name", [LONG, "x" * 5000, "a\0b", "a/" * 3000], ids=["rule", "long", "null", "deep"])
@pytest.mark.parametrize("what", TAKES)
def test_a_name_that_no_file_can_have_is_one_line(what: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SlalomError) as caught:
        TAKES[what](name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_a_rule_with_forty_parameters_has_a_digest() -> None:
    assert policy_sha256(Contender(LONG)) != policy_sha256(Contender(LONG + "1"))


def test_no_name_is_not_the_folder_in_which_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = policy_sha256(Contender(""))
    (tmp_path / "another").write_text("of somebody else")
    assert policy_sha256(Contender("")) == before

"""Checkpoints: what is saved comes back, and whatever is damaged is refused with a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decisions import choose, context, instances, network, random_decision, setting
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

from engine.core.columns import Kind
from engine.core.kinds import Role
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from policies.checkpoint import folder as checkpoint
from policies.checkpoint.folder import Facts, load, save_network, save_rule
from policies.load import load_policy
from policies.network import compiled
from policies.rules import linear_score

FACTS = Facts(
    name="test policy",
    scenario="toy",
    training={"seed": 3, "steps": 1000},
    evaluation=[{"policy": "test policy", "goodput": 4.5}, {"policy": "least_tokens", "goodput": 3.0}],
    bounds={"context": {"SIZE": (0.0, 2.0)}, "candidate": {"TTFT": (0.0, 9.0)}},
    arrangement=[InstancePlan(role=Role.MIXED, chunk_tokens=256)] * 4,
)


def save(folder: Path, **changes: Any) -> checkpoint.LoadedPolicy:
    arguments = {
        "base": "linear_score",
        "base_values": linear_score.RULE.values(),
        "profile": {"name": "toy"},
        "facts": FACTS,
    } | changes
    return save_network(folder, network(), **arguments)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "policy")
    return tmp_path / "policy"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "policy.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_loaded_network_decides_like_the_one_that_was_saved(saved: Path) -> None:
    policy = load_policy(saved, setting(4))
    net = network()
    rng = np.random.default_rng(0)
    for trial in range(30):
        ctx, rows = random_decision(rng, Kind(trial % 4), 5)
        params = compiled.pack(net.arrays(), net.normalisation, 5)
        want = compiled.decide(ctx, rows, np.ones(5, np.uint8), params, np.zeros(compiled.memory_cells(16, 5)))
        assert choose(policy, ctx, rows) == want
    assert policy.describe()["kind"] == "network"
    assert policy.arrangement[3].chunk_tokens == 256
    larger = load_policy(saved, setting(9)).arrangement
    assert larger is not None
    assert [plan.chunk_tokens for plan in larger] == [256] * 9
    with pytest.raises(SlalomError, match="fixed"):
        load_policy(saved, setting(4), {"p_ttft": 1.0})


def test_facts_come_back_and_the_card_tells_them(saved: Path) -> None:
    loaded = load(saved)
    assert loaded.profile == {"name": "toy"}
    assert loaded.manifest.training == {"seed": 3, "steps": 1000}
    ctx, candidate = loaded.bounds()
    assert ctx[:, 4].tolist() == [0.0, 2.0]
    assert candidate[:, 9].tolist() == [0.0, 9.0]
    assert np.isinf(ctx[:, 5]).all()
    card = (saved / "README.md").read_text()
    assert "test policy" in card
    assert "| least_tokens | 3 |" in card


def test_a_tuned_rule_round_trips(tmp_path: Path) -> None:
    save_rule(tmp_path / "r", rule="chunked", values={"chunk_tokens": 300}, profile={}, facts=Facts(name="mine"))
    policy = load_policy(tmp_path / "r", setting(2))
    assert policy.name == "mine"
    assert policy.params.tolist() == [300.0, 0.0]
    assert policy.arrangement[0].chunk_tokens == 300
    assert choose(policy, context(Kind.PLACE_PREFILL), instances({"OUTSTANDING": 2}, {"OUTSTANDING": 1})) == 1


def _rewrite_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any], fix_hash: bool = True) -> None:
    import hashlib

    path = folder / "weights.safetensors"
    arrays = {k: v.copy() for k, v in parse_safetensors(path.read_bytes()).items()}
    change(arrays)
    blob = format_safetensors(arrays)
    path.write_bytes(blob)
    if fix_hash:
        edit(folder, lambda d: d["network"].update(sha256=hashlib.sha256(blob).hexdigest()))


def _truncate(name: str) -> Callable[[Path], Any]:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _garbage_weights(folder: Path) -> None:
    import hashlib

    blob = b"\xff" * 64
    (folder / "weights.safetensors").write_bytes(blob)
    edit(folder, lambda d: d["network"].update(sha256=hashlib.sha256(blob).hexdigest()))


CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated manifest": (_truncate("policy.json"), "not valid JSON"),
    "truncated profile": (_truncate("profile.json"), "not valid JSON"),
    "truncated weights": (_truncate("weights.safetensors"), "sha256"),
    "no manifest": (lambda f: (f / "policy.json").unlink(), "needs this file"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "needs this file"),
    "no profile": (lambda f: (f / "profile.json").unlink(), "needs this file"),
    "binary manifest": (lambda f: (f / "policy.json").write_bytes(b"\x80\x04\x95"), "not valid JSON"),
    "deeply nested": (lambda f: (f / "policy.json").write_text("[" * 100_000), "not valid JSON"),
    "a list": (lambda f: (f / "policy.json").write_text("[]"), "format"),
    "another format": (lambda f: edit(f, lambda d: d.update(format="other")), "format"),
    "newer version": (lambda f: edit(f, lambda d: d.update(version=99)), "update"),
    "unknown field": (lambda f: edit(f, lambda d: d.update(surprise=1)), "surprise"),
    "missing field": (lambda f: edit(f, lambda d: d.pop("rule")), "rule"),
    "unknown kind": (lambda f: edit(f, lambda d: d.update(kind="magic")), "kind"),
    "rule with weights": (lambda f: edit(f, lambda d: d.update(kind="rule")), "network"),
    "other columns": (lambda f: edit(f, lambda d: d.update(columns_sha256="0" * 64)), "decision columns"),
    "other features": (lambda f: edit(f, lambda d: d["normalisation"]["context"].pop()), "context features"),
    "zero scale": (lambda f: edit(f, lambda d: d["normalisation"]["context"][0].update(scale=0)), "scale"),
    "unknown base": (lambda f: edit(f, lambda d: d["rule"].update(name="nobody")), "nobody"),
    "unknown fallback": (lambda f: edit(f, lambda d: d.update(fallback="nobody")), "fallback"),
    "bad base value": (lambda f: edit(f, lambda d: d["rule"]["values"].update(p_ttft=1e9)), "p_ttft"),
    "unknown bound": (lambda f: edit(f, lambda d: d["bounds"]["context"].update(NOW_S=[0, 1])), "NOW_S"),
    "no golden vectors": (lambda f: edit(f, lambda d: d.update(golden=[])), "golden"),
    "golden differs": (lambda f: edit(f, lambda d: d["golden"][3]["logits"].__setitem__(0, 55.0)), "golden"),
    "golden ragged": (lambda f: edit(f, lambda d: d["golden"][3]["candidates"][0].pop()), "golden"),
    "a name of two lines": (lambda f: edit(f, lambda d: d.update(name="a\nb")), "one line of printable"),
    "a name that acts on terminals": (
        lambda f: edit(f, lambda d: d.update(name="\x1b]0;x\x07")),
        "one line of printable",
    ),
    "a scenario of that kind": (lambda f: edit(f, lambda d: d.update(scenario="\x1b[2J")), "one line of printable"),
    "a name of 300 characters": (lambda f: edit(f, lambda d: d.update(name="x" * 300)), "at most 200"),
    "NaN in JSON": (lambda f: edit(f, lambda d: d["training"].update(loss=float("nan"))), "not valid JSON"),
    "wrong width": (lambda f: edit(f, lambda d: d["network"].update(hidden=20)), "expected float32"),
    "wrong hash": (lambda f: edit(f, lambda d: d["network"].update(sha256="0" * 64)), "sha256"),
    "weights are garbage": (_garbage_weights, "safetensors"),
    "weight changed": (lambda f: _rewrite_weights(f, lambda a: a["out.weight"].__imul__(1.5)), "golden"),
    "weight swapped unseen": (lambda f: _rewrite_weights(f, lambda a: a["base"].fill(0), False), "sha256"),
    "NaN weight": (lambda f: _rewrite_weights(f, lambda a: a["pool.bias"].fill(np.nan)), "diverged"),
    "array missing": (lambda f: _rewrite_weights(f, lambda a: a.pop("pool.bias")), "arrays"),
    "array of doubles": (
        lambda f: _rewrite_weights(f, lambda a: a.update({"pool.bias": a["pool.bias"].astype(float)})),
        "float32",
    ),
}


@pytest.mark.parametrize("damage", CORRUPTIONS)
def test_a_damaged_checkpoint_is_refused(saved: Path, damage: str) -> None:
    corrupt, message = CORRUPTIONS[damage]
    corrupt(saved)
    with pytest.raises(SlalomError, match=message):
        load(saved)


def test_weights_that_diverged_are_not_saved(tmp_path: Path) -> None:
    net = network()
    with torch.no_grad():
        net.head.weight[0, 0] = float("inf")
    with pytest.raises(SlalomError, match="diverged"):
        save_network(tmp_path / "p", net, base="linear_score", base_values={}, profile={}, facts=FACTS)
    assert list(tmp_path.iterdir()) == []


def test_facts_that_are_no_json_are_refused(tmp_path: Path) -> None:
    for training in ({"loss": float("nan")}, {"when": object()}):
        with pytest.raises(SlalomError):
            save_rule(tmp_path / "p", rule="chunked", values={}, profile={}, facts=Facts("p", training=training))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "policy.json").read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(SlalomError, match="No space left"):
        save(saved, facts=Facts(name="newer"))
    assert (saved / "policy.json").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["policy"]


def test_a_failed_move_brings_the_old_checkpoint_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.os.replace
    calls = []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", second_fails)
    with pytest.raises(SlalomError, match="Input/output"):
        save(saved, facts=Facts(name="newer"))
    assert load(saved).name == "test policy"
    assert [p.name for p in saved.parent.iterdir()] == ["policy"]


def test_saving_again_replaces_a_checkpoint_but_never_another_folder(saved: Path, tmp_path: Path) -> None:
    save(saved, facts=Facts(name="newer"))
    assert load(saved).name == "newer"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(SlalomError, match="no checkpoint"):
        save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"

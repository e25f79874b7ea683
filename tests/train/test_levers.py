"""One kind of decision alone: what may move, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.core.columns import Kind
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.surrogate.simulate import simulate
from train import levers
from train.levers import KINDS, cases, every_lever, main
from train.search.space import Design, Space

SHIFT = every_lever(Scenario.load("shift-pd-8xa100"))
SETTING = arena_of(SHIFT).setting


@pytest.mark.parametrize("name", ["placement", "REALLOCATE", "TUNE"])
def test_only_the_weights_of_the_kinds_asked_for_move(name: str) -> None:
    kinds = KINDS[name]
    design = Design("linear_score", kinds=kinds)
    space = Space(SETTING, design)
    whole = Space(SETTING, Design("linear_score"))
    assert 0 < len(space) < len(whole)
    still, moved = (space.network(np.full(len(space), x)).arrays() for x in (0.0, 3.0))
    for array in ("base", "gate"):
        for kind in Kind:
            same = np.array_equal(still[array][kind], moved[array][kind])
            assert same or kind in kinds
    assert space.plans(np.ones(len(space))) == space.plans(np.zeros(len(space)))


def test_without_moved_weights_the_start_decides() -> None:
    def first_tokens(design: Design) -> list[int]:
        policy = design.bind(SETTING)
        run = simulate(SHIFT, policy, rate=SHIFT.reference_rate, n_requests=300, seed=1, split="train")
        return run.req["first_token"].tolist()

    alone = Design("linear_score")
    bound = Design("linear_score", kinds=KINDS["REALLOCATE"], theta=np.zeros(len(_space("REALLOCATE"))))
    assert first_tokens(bound) == first_tokens(alone)


def _space(name: str) -> Space:
    return Space(SETTING, Design("linear_score", kinds=KINDS[name]))


def test_all_kinds_are_the_sum_of_each() -> None:
    parts = [len(_space(name)) for name in ("placement", "REALLOCATE", "TUNE")]
    assert len(_space("all together")) == sum(parts)


def test_tuning_alone_is_only_tried_where_there_is_something_to_turn() -> None:
    tried = [(case.start, case.kinds) for case in cases(SETTING)]
    assert ("mixed", "TUNE") in tried
    assert ("scenario", "TUNE") not in tried
    assert [start for start, kinds in tried if not kinds] == ["scenario", "mixed"]


@pytest.mark.slow
def test_from_searches_to_a_table_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levers, "_WINDOWS", 2)
    monkeypatch.setattr(levers, "KINDS", {name: KINDS[name] for name in ("placement", "TUNE")})
    command = ["--scenario", "tiny-4xa100", "--budget", "20k", "--start", "mixed", "--out", str(tmp_path)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.count("| mixed |") == 3
    rows = json.loads((tmp_path / "levers.json").read_text())
    assert all(row["requests"] >= 20_000 for row in rows if row["kinds"])
    assert main(command) == 0
    assert capsys.readouterr().out == text
    assert main(["--budget", "soon"]) == 2

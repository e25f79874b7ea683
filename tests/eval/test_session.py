"""Who takes part in a comparison, and by which name."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.jit.sources import ROOT
from env.measure.contender import PointSettings
from env.scenario import Scenario
from eval.compare.session import Request, Watcher, contenders_of

CHECKPOINT = ROOT / "checkpoints" / "policies" / "tiny-4xa100"


def test_two_folders_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    twin = tmp_path / "tiny-4xa100" / "best"
    shutil.copytree(CHECKPOINT, twin)
    request = Request(
        scenario=Scenario.load("tiny-4xa100"), policies=(str(CHECKPOINT), str(twin), "least_tokens"),
        rates=(50.0,), seeds=1, settings=PointSettings(n_requests=100),
    )  # fmt: skip
    labels = [contender.name for contender in contenders_of(request, Watcher())]
    assert labels == ["tiny-4xa100", str(twin), "least_tokens"]

"""The GPU check without a GPU: every measurement's code runs, dry; failures and time limits cost only themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_check import __main__ as check
from eval.gpu_check.catalogue import GROUPS, Group

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = """
import json, sys
from pathlib import Path
from eval.gpu_check.__main__ import measure_group
from eval.gpu_check.catalogue import GROUPS
for group in GROUPS:
    measure_group(group, Path(sys.argv[1]) / f"{group}.json", dry=True)
"""


@pytest.mark.slow
def test_every_measurement_runs_dry(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EVERYTHING, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = {}
    for group, spec in GROUPS.items():
        part = json.loads((tmp_path / f"{group}.json").read_text())
        assert part["failed"] == {}
        assert set(part["measured"]) == set(spec.measurements)
        figures |= part["measured"]
    assert figures["all_splits"]["splits"][1] == {"asked": 20, "group": 24, "remainder": 108}
    assert [row["batch"] for row in figures["decode"]["rows"]] == [1, 3]
    assert {row["mode"] for row in figures["itl"]["rows"]} == {
        "alone", "plain streams", "partition, alone", "partition"
    }  # fmt: skip
    assert all(row["passed"] for row in figures["correct"]["kernels"])
    assert figures["engine_tokens"]["equal"]
    assert figures["loop"]["cases"] == 6  # three policies, one of them learned on the way, at two loads
    assert figures["loop"]["calibration"]["decode_held_out_error"] > 0.0


def test_what_fails_is_written_down_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(rig: Any) -> dict[str, Any]:
        raise RuntimeError("an illegal address")

    measurements = {"breaks": breaks, "works": lambda rig: {"sms": rig.gpu.total}}
    monkeypatch.setitem(GROUPS, "broken", Group(10.0, measurements))
    check.measure_group("broken", tmp_path / "out.json", dry=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["measured"]["works"]["sms"] == 132
    assert "an illegal address" in found["failed"]["breaks"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "a half-written file is left"


def test_a_process_that_hangs_costs_its_own_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check.sys, "executable", "/bin/sleep")  # "sleep -m ..." ends at once, with an error
    out = tmp_path / "out.json"
    assert check.main(["--dry-run", "--json", str(out), "--only", "device"]) == 1
    found = json.loads(out.read_text())
    assert set(found["failed"]) == set(GROUPS["device"].measurements)
    assert "exit code" in found["failed"]["versions"]
    assert check.main(["--dry-run", "--json", str(out), "--budget", "0"]) == 1
    assert "budget" in json.loads(out.read_text())["failed"]["itl"]
    hanging = tmp_path / "hang"
    hanging.write_text("#!/bin/sh\nexec sleep 30\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(check.sys, "executable", str(hanging))
    monkeypatch.setitem(GROUPS, "device", Group(0.2, GROUPS["device"].measurements))
    assert check.main(["--dry-run", "--json", str(out), "--only", "device"]) == 1
    assert "ended after" in json.loads(out.read_text())["failed"]["versions"]


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_has_gpu", lambda: False)
    assert check.main(["--json", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(check, "_has_gpu", lambda: True)
    assert check.main(["--json", str(tmp_path / "out.json"), "--only", "nothing"]) == 2
    assert list(tmp_path.iterdir()) == []

"""The GPU check without a GPU: every measurement's code runs, dry; failures, time limits and kills cost themselves."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from eval.gpu_check import __main__ as check
from eval.gpu_check.catalogue import GROUPS, Group
from eval.gpu_check.group import _function, measure_group
from eval.gpu_check.loop import _NEEDED, _command
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import REAL, Rig

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
#: Everything that the check may need on a machine with a GPU, beside what the commands of ``loop`` import.
PACKAGES = ("torch", "triton", "numpy", "numba", "safetensors", "tokenizers")
#: What those commands import, as it is installed; and what neither they nor the check use of all that is required.
OF_LOOP = ["pyyaml" if name == "yaml" else name for name in _NEEDED]
UNUSED = ("huggingface-hub", "tzdata")  # no weights are fetched; zones are the system's


def with_requirements(names: Iterable[str], but: Iterable[str] = ()) -> dict[str, importlib.metadata.Distribution]:
    """These installed packages and all that they require, by name; ``but`` are neither looked at nor into."""
    left, found = list(names), dict[str, importlib.metadata.Distribution]()
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found or name in but:
            continue
        with suppress(importlib.metadata.PackageNotFoundError):  # for another platform, or an extra
            found[name] = importlib.metadata.distribution(name)
            required = [r for r in found[name].requires or () if "extra ==" not in r]
            left += [re.split(r"[^\w.-]", requirement)[0] for requirement in required]
    return found


def clean_environment(folder: Path, names: Iterable[str], but: Iterable[str] = ()) -> Path:
    """The interpreter of a new virtual environment in which only ``names`` and what they require are installed."""
    venv.create(folder, symlinks=True)
    there = next((folder / "lib").glob("python*/site-packages"))
    for found in with_requirements(names, but).values():
        for top in {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (there / top).exists() or (there / top).symlink_to(found.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_whole_check_runs_dry_where_only_torch_and_numba_are(tmp_path: Path) -> None:
    python, out = clean_environment(tmp_path / "venv", PACKAGES), tmp_path / "out.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
    alone = subprocess.run([python, "-c", "import pydantic"], env=environment, capture_output=True, check=False)
    assert alone.returncode == 1, "the environment is not clean"
    command = [python, "-m", "eval.gpu_check", "--dry-run", "--json", out, "--budget", "900"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    report = json.loads(out.read_text())
    assert set(report["failed"]) == {"loop"}, done.stderr
    assert "pydantic" in report["failed"]["loop"]
    assert "docs/gpu.md" in done.stderr.splitlines()[-1]
    wanted = {name for group in GROUPS.values() for name in group.measurements}
    assert set(report["measured"]) == wanted - {"loop"}
    check_figures(report["measured"])


def check_figures(figures: dict[str, Any]) -> None:
    assert {"asked": 20, "group": 24, "remainder": 108} in figures["all_splits"]["rows"]
    assert [row["batch"] for row in figures["decode"]["rows"]] == [1, 3]
    assert {row["mode"] for row in figures["itl"]["rows"]} == {
        "alone", "plain streams", "partition, alone", "partition"
    }  # fmt: skip
    assert all(row["relative_error"] < 0.01 for row in figures["correct"]["rows"])
    assert figures["engine_tokens"]["equal"]
    assert {row["eager"] for row in figures["engine_tokens"]["rows"]} == {True, False}
    assert not any(row.get("unfinished") for row in figures.values())


@pytest.mark.slow
def test_the_loop_runs_dry_with_the_wheels_that_are_carried_for_it(tmp_path: Path) -> None:
    python, out = clean_environment(tmp_path / "venv", [*PACKAGES, *OF_LOOP], UNUSED), tmp_path / "out.json"
    command = [python, "-m", "eval.gpu_check", "--dry-run", "--json", out, "--only", "loop"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    calibrated, fidelity = json.loads(out.read_text())["measured"]["loop"]["rows"]
    assert calibrated["decode_held_out_error"] > 0.0
    assert fidelity["cases"] == 2  # two rules at one load


def group_of(monkeypatch: pytest.MonkeyPatch, limit_s: float, **functions: Any) -> None:
    """A group ``ours`` of measurements that are defined here."""
    module = ModuleType("eval.gpu_check.ours")
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, "eval.gpu_check.ours", module)
    monkeypatch.setitem(GROUPS, "ours", Group(limit_s, {name: f"ours:{name}" for name in functions}))


def test_what_fails_is_written_down_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("an illegal address")

    def breaks(rig: Rig, cases: Cases) -> dict[str, Any]:
        return fail()

    def partly(rig: Rig, cases: Cases) -> dict[str, Any]:
        assert cases.take({"cut": 1}, lambda: {"ms": 2.0}) == {"ms": 2.0}
        so_far = json.loads((tmp_path / "out.json").read_text())["measured"]["partly"]
        assert so_far == {"unfinished": True, "rows": [{"cut": 1, "ms": 2.0}]}
        assert cases.take({"cut": 2}, fail) is None
        cases.take({"cut": 3}, lambda: {"ms": 4.0})
        return {"unit": "ms"}

    group_of(monkeypatch, 10.0, breaks=breaks, partly=partly, works=lambda rig, cases: {"sms": rig.gpu.total})
    measure_group("ours", tmp_path / "out.json", dry=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["measured"]["works"]["sms"] == 132
    assert "an illegal address" in found["failed"]["breaks"]
    rows = found["measured"]["partly"]["rows"]
    assert [row.get("ms") for row in rows] == [2.0, None, 4.0]
    assert "an illegal address" in rows[1]["error"]
    assert found["failed"]["partly"].startswith("1 of 3 cases")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "a half-written file is left"


def test_a_process_that_breaks_off_costs_its_own_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check.sys, "executable", "/bin/sleep")  # "sleep -m ..." ends at once, with an error
    out = tmp_path / "out.json"
    assert check.main(["--dry-run", "--json", str(out), "--only", "device"]) == 1
    found = json.loads(out.read_text())
    assert set(found["failed"]) == set(GROUPS["device"].measurements)
    assert "exit code" in found["failed"]["versions"]
    assert check.main(["--dry-run", "--json", str(out), "--budget", "0"]) == 1
    assert "budget" in json.loads(out.read_text())["failed"]["itl"]


#: Stands for a group's process: leaves one finished case, says something, and hangs with a child of its own.
HANGS = """#!{python}
import json, subprocess, sys, time
out = sys.argv[sys.argv.index("--json") + 1]
report = json.load(open(out))
report["measured"]["versions"] = {{"unfinished": True, "rows": [{{"ms": 1.5}}]}}
json.dump(report, open(out, "w"))
child = subprocess.Popen(["sleep", "60"])
print("child", child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; whoever inherits it may take a moment to bury it."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def child_of(log: Path) -> int:
    while not (log.exists() and "child" in log.read_text()):
        time.sleep(0.02)
    return int(log.read_text().split()[1])


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    found = tmp_path / "hangs"
    found.write_text(HANGS.format(python=sys.executable))
    found.chmod(0o755)
    return found


def test_a_group_that_times_out_keeps_what_it_has_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hanging: Path
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(check.sys, "executable", str(hanging))
    monkeypatch.setitem(GROUPS, "device", Group(0.4, GROUPS["device"].measurements))
    assert check.main(["--dry-run", "--json", str(out), "--only", "device"]) == 1
    report = json.loads(out.read_text())
    assert report["measured"]["versions"]["rows"] == [{"ms": 1.5}]
    assert "ended after 2 s" in report["failed"]["versions"]
    assert gone(child_of(tmp_path / "out.log"))


RUN = """
import sys
from eval.gpu_check import __main__ as check
check.sys.executable = sys.argv[1]
sys.exit(check.main(["--dry-run", "--json", sys.argv[2], "--only", "device"]))
"""


def test_a_run_that_is_ended_from_outside_keeps_what_it_has(tmp_path: Path, hanging: Path) -> None:
    """By a time limit around it, say: the report is there, no process is left."""
    out = tmp_path / "out.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", RUN, str(hanging), str(out)], cwd=ROOT, env=environment)
    child = child_of(tmp_path / "out.log")
    run.terminate()
    assert run.wait(30) == 128 + signal.SIGTERM
    assert json.loads(out.read_text())["measured"]["versions"]["rows"] == [{"ms": 1.5}]
    assert gone(child)


def test_a_killed_run_ends_its_group(tmp_path: Path) -> None:
    """Not even the chance to tidy up: the group's process notices by itself."""
    watched = """
import os, subprocess, threading, time
from eval.gpu_check import __main__ as check
print(os.getpid(), subprocess.Popen(["sleep", "60"]).pid, flush=True)
threading.Thread(target=check._end_with_parent, args=(os.getppid(),), daemon=True).start()
time.sleep(60)
"""
    starts = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {watched!r}], start_new_session=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", starts], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    group, child = map(int, run.stdout.readline().split())
    time.sleep(0.5)
    run.kill()
    run.wait()
    run.stdout.close()
    assert gone(group)
    assert gone(child)


def test_what_a_command_of_the_loop_says_is_kept_as_it_says_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the group's log, that is, should the group run out of time; and what it prints is its answer."""
    (tmp_path / "says.py").write_text(
        "import sys\nprint('measuring', file=sys.stderr)\nprint(7)\nsys.exit(len(sys.argv) > 1 and 'no such file')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert _command("says") == "7\n"
    with pytest.raises(AssertionError, match=r"says ended with 1: measuring\nno such file"):
        _command("says", "--wrong")
    assert capfd.readouterr().err == "measuring\nmeasuring\nno such file\n"


@pytest.mark.parametrize(
    ("wanted", "compiled"),
    [(["device", "engine"], ["engine"]), (["engine"], []), (["loop"], ["loop"]),
     (["kernels", "engine", "loop"], ["engine", "loop"]), (["device", "kernels"], [])],
)  # fmt: skip
def test_spare_cores_compile_what_runs_on_the_host(
    monkeypatch: pytest.MonkeyPatch, wanted: list[str], compiled: list[str]
) -> None:
    started: list[str] = []

    def popen(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert "--dry-run" in command
        assert env["CUDA_VISIBLE_DEVICES"] == "", "what is compiled for takes a part of the GPU that is measured"
        started.append(command[command.index("--group") + 1])
        return SimpleNamespace(pid=2**22 + 1, wait=lambda: 0)  # no process has this number

    monkeypatch.setattr(check, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    for cores, dry in ((16, False), (16, True), (2, False)):
        started.clear()
        monkeypatch.setattr(check.os, "cpu_count", lambda cores=cores: cores)
        with check._core_compiled(argparse.Namespace(dry_run=dry), wanted):
            pass
        assert started == (compiled if cores == 16 and not dry else [])


def test_the_page_names_all_wheels_to_carry() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lists = [line.partition("#")[0].split()[1:] for line in text.splitlines() if line.startswith("$fetch")]
    carried = {re.split(r"[<>=]", word.strip("'"))[0] for words in lists for word in words}
    there = with_requirements(["torch", "triton", "numpy", "pydantic"])  # pip adds what the last one requires
    assert set(with_requirements([*PACKAGES, *OF_LOOP], {*there, *UNUSED})) - carried == set()
    ranges = {word.strip("'") for words in lists for word in words if "<" in word}
    for name in ("numba", "gymnasium"):
        assert any(f'"{one}"' in (ROOT / "pyproject.toml").read_text() for one in ranges if one.startswith(name))
    (llvmlite,) = (one.removeprefix("llvmlite") for one in ranges if one.startswith("llvmlite"))
    least, below = (tuple(map(int, part.lstrip("<>=").split("."))) for part in llvmlite.split(","))
    assert least <= tuple(map(int, importlib.metadata.version("llvmlite").split(".")[:2])) < below


def test_limits_leave_room_in_a_quarter_of_an_hour() -> None:
    assert sum(group.limit_s for group in GROUPS.values()) <= 480.0
    assert next(iter(GROUPS)) == "device"
    assert list(GROUPS)[-1] == "loop"
    assert REAL.cuts[-1] == 12, "the least certain cut comes last"


def test_every_measurement_is_there() -> None:
    for group in GROUPS.values():
        for address in group.measurements.values():
            assert callable(_function(address))


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_has_gpu", lambda: False)
    assert check.main(["--json", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(check, "_has_gpu", lambda: True)
    assert check.main(["--json", str(tmp_path / "out.json"), "--only", "nothing"]) == 2
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert check.main(["--json", str(tmp_path / "file" / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("gpu-check: output file: got")


def test_a_bare_machine_runs_by_carried_wheels(tmp_path: Path) -> None:
    """One script: wheels go to a folder of their own, once, and the command gets them and this repository."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WEIGHT = 7\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    said = "import os, carried, engine; print(carried.WEIGHT, os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    command = ["sh", str(ROOT / "eval" / "gpu_check" / "bare.sh"), str(wheels), "-c", said]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS")}
    environment |= {"PYTHON": sys.executable, "SLALOM_SITE": str(site)}
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["7", "32"], done.stderr
        wheels.rename(tmp_path / "gone") if wheels.exists() else None  # the second time nothing is unpacked
    done = subprocess.run(command, env=environment | {"SLALOM_SITE": f"{site}2"}, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1

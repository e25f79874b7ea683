"""Machine code follows the source: of the kernel's own file, and of every file of ours below it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numba.core.caching import NullCache

from engine.jit import sources
from engine.jit.kernel import _Files, _usable, kernel
from engine.jit.rows import addresses, make_attach
from engine.jit.warm import told, warm

HELPER = "from engine.jit.kernel import kernel\n\n\n@kernel\ndef helper(x):\n    return x + {}\n"
TOP = "from rooms.inner.helper import helper\nfrom engine.jit.kernel import kernel\n\n\n@kernel\ndef top(x):\n"
TOP += "    return helper(x)\n"


def _package(folder: Path, number: int) -> Path:
    inner = folder / "rooms" / "inner"
    inner.mkdir(parents=True, exist_ok=True)
    for place in (folder / "rooms", inner):
        (place / "__init__.py").touch()
    (folder / "rooms" / "top.py").write_text(TOP)
    (inner / "helper.py").write_text(HELPER.format(number))
    return folder / "rooms" / "top.py"


def _answer(folder: Path) -> int:
    surroundings = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(folder), str(sources.ROOT))),
        "SLALOM_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-c", "from rooms.top import top; print(top(1))"]
    return int(subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True).stdout)


def test_a_change_in_a_sub_folder_is_compiled_anew(tmp_path: Path) -> None:
    _package(tmp_path, 10)
    assert _answer(tmp_path) == 11
    cached = set((tmp_path / "cache").iterdir())
    assert {p.name.rsplit("-", 1)[0] for p in cached} == {"rooms.top", "rooms.inner.helper"}
    _package(tmp_path, 20)
    assert _answer(tmp_path) == 21  # top.py itself is as it was
    assert len(set((tmp_path / "cache").iterdir()) - cached) == 2


def test_a_kernel_is_made_of_its_imports_and_of_nothing_else() -> None:
    names = {sources.dotted(path) for path in sources.closure([sources.path_of("engine.core.schedule.prompts")])}
    assert {"engine.core.schedule.prompts", "engine.core.kv", "engine.core.lists", "engine.jit.kernel"} <= names
    assert not {name for name in names if not name.startswith("engine.")}
    assert "engine.core.loop" not in names  # which imports kv, not the other way round


def test_relative_and_parenthesised_imports_are_followed(tmp_path: Path) -> None:
    inner = tmp_path / "rooms" / "inner"
    inner.mkdir(parents=True)
    for place in (tmp_path / "rooms", inner):
        (place / "__init__.py").touch()
    (tmp_path / "rooms" / "a.py").write_text("X = 1\n")
    (inner / "b.py").write_text("Y = 2\n")
    (inner / "c.py").write_text("from ..a import X\nfrom rooms.inner import (\n    b,\n)\n")
    found = {path.name for path in sources.closure([inner / "c.py"])}
    assert found == {"a.py", "b.py", "c.py", "__init__.py"}


def test_a_cache_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    assert _usable(mine)
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)
    assert not _usable(mine)  # numba unpickles what lies there
    (tmp_path / "file").touch()
    assert not _usable(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["SLALOM_CACHE_DIR", "NUMBA_CACHE_DIR"])
def test_a_named_cache_that_others_may_write_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from engine.jit.kernel import CACHE_DIR; print(CACHE_DIR)"]
    mine = tmp_path / "mine"
    surroundings = os.environ | {"SLALOM_CACHE_DIR": "", "PYTHONPATH": str(sources.ROOT), name: str(mine)}
    for mode, code in ((None, 0), (0o755, 0), (0o770, 2), (0o707, 2)):
        if mode is not None:
            mine.chmod(mode)
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr == (
                f"slalom: {name}: got '{mine}'; name a folder that is yours and that nobody else can write "
                "(chmod 700): code is run from it\n"
            )
        else:
            assert done.stdout == f"{mine}\n"


_attach = make_attach("Box", [("number", np.int32, 1), ("words", np.int64, 2)])


@kernel
def _part(box, i, more):
    return box.number[i] + (1 if more else 0)


@kernel
def _entry(words):
    box = _attach(words)
    return _part(box, 0, True) + _part(box, box.number[0], False) + _part(box, np.int64(0), box.words[0, 0] > 0)


def test_a_part_is_made_once_for_all_integers_and_has_no_machine_code() -> None:
    """What takes state cannot be called from Python; its callers may hold a literal, an int32 or an int64."""
    _entry._cache = _part._cache = NullCache()  # an entry found on disk would run without looking at its parts
    box = (np.array([1, 7], np.int32), np.ones((1, 1), np.int64))
    assert _entry(addresses(box)) == (1 + 1) + 7 + (1 + 1)
    (made,) = _part.overloads.values()
    assert made.library.get_pointer_to_function(made.fndesc.llvm_func_name) == 0


def test_parts_are_read_back_by_another_process(tmp_path: Path) -> None:
    """A changed entry finds its parts on disk; an entry found on disk runs without them."""
    (tmp_path / "state.py").write_text(
        "import numpy as np\nfrom engine.jit.rows import make_attach\n"
        'attach = make_attach("Box", [("number", np.int64, 1)])\n'
    )
    (tmp_path / "part.py").write_text(
        "from engine.jit.kernel import kernel\n@kernel\ndef part(box, i):\n"
        '    if box.number[i] < 0:\n        raise ValueError("below zero")\n    return box.number[i]\n'
    )
    program = (
        "import numpy as np\nfrom engine.jit.kernel import kernel\nfrom engine.jit.rows import addresses\n"
        "from part import part\nfrom state import attach\n@kernel\ndef entry(words):\n"
        "    return part(attach(words), 0) + {}\n"
        "five, less = np.array([5]), np.array([-5])\nprint(entry(addresses([five])))\n"
        "hits = sum(part._cache_hits.values())\n"
        "try:\n    entry(addresses([less]))\nexcept ValueError as error:\n    print(error, hits)\n"
    )
    surroundings = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(sources.ROOT))),
        "SLALOM_CACHE_DIR": str(tmp_path / "cache"),
    }
    said = []
    for number in (1, 1, 2):
        (tmp_path / "program.py").write_text(program.format(number))
        run = [sys.executable, str(tmp_path / "program.py")]
        done = subprocess.run(run, env=surroundings, capture_output=True, text=True, check=True)
        said.append(done.stdout.split("\n")[:2])
    assert said == [["6", "below zero 0"], ["6", "below zero 0"], ["7", "below zero 1"]]


def test_two_signatures_never_share_a_file(tmp_path: Path) -> None:
    """Two processes that compile at once each see an empty folder; neither may find the other's machine code."""
    first, second = (_Files(str(tmp_path), "name", "stamp") for _ in range(2))
    assert first.load("int64") is None
    assert second.load("float64") is None
    first.save("int64", "code for int64")
    second.save("float64", "code for float64")
    for files in (first, second):
        assert files.load("int64") == "code for int64"
        assert files.load("float64") == "code for float64"
        assert files.load("float32") is None


def good_step() -> None:
    Path(os.environ["WARM_TEST"], "done").touch()


def bad_step() -> None:
    raise ValueError("no such kernel")


def test_steps_run_in_processes_and_one_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WARM_TEST", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert not warm([(bad_step,), (good_step,)], aloud=True)
    assert (tmp_path / "done").exists()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "could not compile bad step beforehand: ValueError: no such kernel", "compiled good step, 2 of 2",
    ]  # fmt: skip


def test_who_waits_hears_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with told("compiling", quiet_s=0.01):
        time.sleep(0.2)
    first, *more = capsys.readouterr().err.splitlines()
    assert first == "compiling ..."
    assert more
    assert more[0].startswith("compiling: ")


def test_what_is_listed_to_be_compiled_exists() -> None:
    for module in ("env.warm", "policies.warm"):
        for stage in importlib.import_module(module).STAGES:
            for step in stage:
                assert getattr(importlib.import_module(step.__module__), step.__name__) is step

"""Machine code follows the source: of the kernel's own file, and of every file of ours below it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engine.jit import sources
from engine.jit.kernel import _usable

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

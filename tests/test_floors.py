"""The house keeps its order: imports point down, no two files import each other, rooms and files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("engine", "policies", "env", "train", "eval")
MOST_LINES = 400
MOST_ENTRIES = 15


def _files() -> dict[str, Path]:
    """Every file of the product by its dotted name; a package's is its ``__init__.py``."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = _files()


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """The files of ours that ``path`` imports anywhere, inside functions and for types too, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in inside if name in FILES]
            names += [node.module] if len(names) < len(inside) else []
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in FILES)


GRAPH = {name: list(_imports(path)) for name, path in FILES.items()}


def test_every_import_points_down() -> None:
    up = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, targets in GRAPH.items()
        for target, line in targets
        if FLOORS.index(target.split(".")[0]) > FLOORS.index(name.split(".")[0])
    ]
    assert not up


def _circles() -> list[list[str]]:
    """Groups of files that reach each other (Tarjan's strongly connected components of two files and more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target, _ in GRAPH[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in GRAPH:
        if name not in index:
            visit(name)
    return found


def test_no_files_import_each_other() -> None:
    assert not _circles()


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_shows_rooms(floor: str) -> None:
    listed = subprocess.run(["git", "ls-files", floor], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    entries = {line.split("/")[1] for line in listed.splitlines()}
    if not entries:
        pytest.skip("not a git checkout")
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_files_stay_readable() -> None:
    long = {name: n for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long


#: What the engine may import on a machine where it is only measured (docs/gpu.md); torch brings the last one.
BARE = {"torch", "triton", "numpy", "numba", "llvmlite", "safetensors", "tokenizers", "jinja2"}


def _at_once(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are carried out when a file is: none inside a function, none for types only."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _at_once(node.body)
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(node)[:20]:
            yield from _at_once([*node.body, *node.orelse])


def _needs(name: str) -> tuple[set[str], set[str]]:
    """(files of ours, packages of others) that importing the file ``name`` imports at once."""
    ours = {name.rpartition(".")[0]} if "." in name else set()
    others = set()
    for node in _at_once(ast.parse(FILES[name].read_text(encoding="utf-8")).body):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias}" for alias in names)]
        ours |= {found for found in names if found in FILES}
        others |= {names[0].partition(".")[0]} - set(FLOORS) - sys.stdlib_module_names
    return ours & FILES.keys(), others


def test_the_check_of_a_gpu_needs_no_package_of_the_upper_floors() -> None:
    """All groups but ``loop``: a bare machine has torch, and what was carried there beside it."""
    left = [name for name in FILES if name.startswith("eval.gpu_check") and not name.endswith(".loop")]
    left += ["engine.live.engine", "engine.model"]
    seen: dict[str, set[str]] = {}
    while left:
        name = left.pop()
        if name not in seen:
            ours, seen[name] = _needs(name)
            left += ours
    assert {name: others - BARE for name, others in seen.items() if others - BARE} == {}

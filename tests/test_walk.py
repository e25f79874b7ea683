"""``docs/walk.md`` leads through functions that exist: a reader who follows it never stands before a wall."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_STEP = re.compile(r"^- `(?P<file>[^`]+)` `(?P<name>[^`]+)`: \S", re.MULTILINE)
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def steps(text: str) -> list[tuple[str, str]]:
    """(file, name) of every step of a walk; a name is a function, a class or ``Class.method``."""
    return [(step["file"], step["name"]) for step in _STEP.finditer(text)]


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def is_defined(file: str, name: str) -> bool:
    """Whether ``file`` defines ``name``, at whatever depth; of a dotted name each part inside the one before."""
    scopes: list[ast.AST] = [_tree(file)]
    for part in name.split("."):
        inside = (node for scope in scopes for node in ast.walk(scope) if node is not scope)
        scopes = [node for node in inside if isinstance(node, _Definition) and node.name == part]
    return bool(scopes)


WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "name"), dict.fromkeys(steps(WALK)))
def test_every_step_of_the_walk_exists(file: str, name: str) -> None:
    assert (ROOT / file).is_file(), f"docs/walk.md names {file}, which does not exist"
    assert is_defined(file, name), f"docs/walk.md names {name}, which {file} does not define"


def test_every_bullet_of_the_walk_is_a_step() -> None:
    bullets = [line for line in WALK.splitlines() if line.startswith("- ")]
    assert len(bullets) == len(steps(WALK)), "write `- `file` `name`: what happens there`"


def test_the_four_walks_are_there() -> None:
    parts = re.split(r"^## ", WALK, flags=re.MULTILINE)[1:]
    assert len(parts) == 4
    assert all(len(steps(part)) >= 10 for part in parts)


def test_a_name_that_is_gone_is_seen() -> None:
    assert is_defined("tests/test_walk.py", "is_defined")
    assert not is_defined("tests/test_walk.py", "was_defined")
    assert not is_defined("tests/test_walk.py", "is_defined.inner")

"""What ``--help`` of every command says, kept word for word under ``tests/help``.

After a change that is meant, look at the difference and write the texts anew:

    .venv/bin/python tests/test_help.py
"""

from __future__ import annotations

import importlib
import io
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "tests" / "help"
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
WIDTH = 100


def rendered(name: str, module: str) -> str:
    """The help text of the command ``name``, whose ``app`` is in ``module``: of fixed width, without colour."""
    app: Any = importlib.import_module(module).app
    shown = io.StringIO()
    plain = {"MAX_WIDTH": WIDTH, "FORCE_TERMINAL": False, "COLOR_SYSTEM": None}
    with mock.patch.multiple("typer.rich_utils", **plain), redirect_stdout(shown):
        typer.main.get_command(app).main(["--help"], prog_name=name, standalone_mode=False)
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_text_is_as_it_was(name: str) -> None:
    kept = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
    assert rendered(name, SCRIPTS[name].partition(":")[0]) == kept


def test_no_text_is_kept_of_a_command_that_is_gone() -> None:
    assert {file.stem for file in TEXTS.glob("*.txt")} == set(SCRIPTS)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TEXTS.mkdir(exist_ok=True)
    for command, entry in SCRIPTS.items():
        (TEXTS / f"{command}.txt").write_text(rendered(command, entry.partition(":")[0]), encoding="utf-8")

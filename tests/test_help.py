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

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "tests" / "help"
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
WIDTH = 80


def rendered(name: str, module: str) -> str:
    """The help text of the command ``name``, whose ``app`` is in ``module``: as in a terminal of 80 columns."""
    app: Any = importlib.import_module(module).app
    shown = io.StringIO()
    with redirect_stdout(shown):
        typer.main.get_command(app).main(["--help"], prog_name=name, standalone_mode=False, terminal_width=WIDTH)
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_text_is_as_it_was(name: str) -> None:
    kept = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
    assert rendered(name, SCRIPTS[name].partition(":")[0]) == kept


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_written_out_in_a_narrow_terminal(name: str) -> None:
    module = SCRIPTS[name].partition(":")[0]
    command: Any = typer.main.get_command(importlib.import_module(module).app)
    words = rendered(name, module).split()
    assert [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o not in words] == []


def test_no_text_is_kept_of_a_command_that_is_gone() -> None:
    assert {file.stem for file in TEXTS.glob("*.txt")} == set(SCRIPTS)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TEXTS.mkdir(exist_ok=True)
    for command, entry in SCRIPTS.items():
        (TEXTS / f"{command}.txt").write_text(rendered(command, entry.partition(":")[0]), encoding="utf-8")

"""Options named once: what typer is shown of a dataclass, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from engine.common.options import only, option, takes
from engine.errors import SlalomError


@dataclass(frozen=True)
class Options:
    model: str = option(..., "a model")
    n: int = option(3, "a number", min=1)
    loud: bool = option(False, "a flag", "--loud")
    cache: bool = option(True, "a flag and its opposite")
    out: Path | None = option(None, "a folder")
    names: list[str] | None = option(None, "repeated", "--name")


app = typer.Typer()
got: list[Options] = []


@app.command()
@takes(Options)
def command(options: Options) -> None:
    """What it does."""
    got.append(options)


def test_the_command_gets_what_was_written_and_defaults_for_the_rest() -> None:
    assert CliRunner().invoke(app, ["--model", "m"]).exit_code == 0
    assert got.pop() == Options("m")
    written = ["--model", "m", "--n", "7", "--loud", "--no-cache", "--out", "x", "--name", "a", "--name", "b"]
    assert CliRunner().invoke(app, written).exit_code == 0
    assert got.pop() == Options("m", 7, True, False, Path("x"), ["a", "b"])


@pytest.mark.parametrize("written", [[], ["--model", "m", "--n", "0"], ["--model", "m", "--n", "x"], ["--other"]])
def test_what_is_missing_or_out_of_bounds_is_refused(written: list[str]) -> None:
    assert CliRunner().invoke(app, written).exit_code == 2
    assert got == []


def test_the_help_is_that_of_the_function_and_of_the_fields() -> None:
    said = CliRunner().invoke(app, ["--help"]).output
    assert "What it does." in said
    assert "repeated" in said


def test_an_option_that_would_do_nothing_is_refused() -> None:
    only(Options("m", loud=True), ("model", "loud"), "leave it out")
    with pytest.raises(SlalomError, match=r"^--loud: got True; leave it out"):
        only(Options("m", loud=True), ("model",), "leave it out")
    with pytest.raises(SlalomError, match=r"^--name: got \['a'\]; leave it out"):
        only(Options("m", names=["a"]), ("model",), "leave it out")
    with pytest.raises(SlalomError, match=r"^--out: "):
        only(Options("m", out=Path("x")), ("model",), "leave it out")

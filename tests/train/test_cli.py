"""The command line: mistakes end with exit code 2 and a sentence, before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train import cli

ROOT = Path(__file__).resolve().parents[2]


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command with arguments: exit code, and what it said on standard error."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["train-policy", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--env", "gpu"], "--init"),
        (["--init", "somewhere", "--algo", "direct"], "only ppo goes on"),
        (["--init", "somewhere", "--rule", "least_tokens"], "leave it out"),
        (["--init", "somewhere", "--recipe", "tiny-4xa100"], "trains from nothing"),
        (["--budget", "1m", "--recipe", "tiny-4xa100"], "--budget: got '1m'; a recipe says"),
        (["--storage", "trials"], "only the search of one rule"),
        (["--ray", "auto"], "direct runs on this machine alone"),
        (["--env", "gpu", "--init", "somewhere", "--resume"], "--resume: got True; it does nothing with --env gpu"),
        (["--env", "gpu", "--init", "somewhere", "--budget", "9k"], "the engine takes real time"),
        (["--env", "moon"], "use surrogate"),
        (["--algo", "dqn"], "choose auto, controller, direct, ppo or search"),
        (["--budget", "soon"], "write a time"),
        (["--budget", "0s"], "write a time"),
        (["--algo", "direct", "--rule", "round_robin"], "belongs to --algo search"),
        (["--seed", "-1"], "seed"),
        (["--sped", "3"], "sped"),
    ],
)
def test_bad_flags_exit_2(command: Command, arguments: list[str], says: str) -> None:
    code, said = command(*arguments)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_the_process_says_it_and_ends_with_the_same_code() -> None:
    called = [sys.executable, "-m", "train.cli", "--algo", "dqn"]
    done = subprocess.run(called, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--algo", "search", "--rule", "no_such_rule"], ["--algo", "ppo", "--init", "nowhere"]]
)
def test_what_is_refused_leaves_no_run_behind(command: Command, tmp_path: Path, arguments: list[str]) -> None:
    assert command("--scenario", "tiny-4xa100", "--out", str(tmp_path / "run"), *arguments)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys, train.cli\n"
        "try: train.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numba', 'optuna', 'stable_baselines3', 'numpy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--budget" in done.stdout

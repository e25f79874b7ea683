"""The display of long work where standard error is no terminal: never silent for long, never a flood."""

from __future__ import annotations

import threading

import pytest

from engine.common.progress import Display
from eval.compare.progress import Bar


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def spoken(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_it_speaks_within_ten_seconds_even_when_nobody_reports(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = Display(clock=clock)
    display.phase("compile")
    display.update(0.0, "kernels")
    assert spoken(capsys) == ["compile: 0 %  kernels  (0 s)"]
    times = []
    for second in range(1, 121):
        clock.now = float(second)
        display.beat()
        times += [second] * len(spoken(capsys))
    assert max(b - a for a, b in zip([0, *times], [*times, 120], strict=True)) <= 10
    assert len(times) <= 20


def test_a_flood_of_reports_is_a_line_now_and_then_and_the_last_one_is_heard(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    display = Display(clock=clock)
    display.phase("search", 100)
    for done in range(101):
        clock.now = done / 4
        display.update(done, f"trial {done}")
    said = spoken(capsys)
    assert said[0].startswith("search: 0/100  trial 0")
    assert said[1] == "search: 36/100  trial 36  (9 s, about 16 s left)"
    assert said[-1] == "search: 100/100  trial 100  (25 s)"
    assert len(said) == 4


def test_more_pieces_than_foreseen_are_no_flood(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(clock=Clock())
    display.phase("chunked", 2)
    for done in range(6):
        display.update(done)
    assert spoken(capsys) == ["chunked: 0/2  (0 s)", "chunked: 2/2  (0 s)"]


def test_the_heart_beats_by_itself_while_the_caller_is_busy(capsys: pytest.CaptureFixture[str]) -> None:
    """A caller that reports nothing: the display speaks from a thread of its own, and stops at the end."""
    heard = threading.Event()

    class Told(Display):
        def say(self, line: str) -> None:
            heard.set()

    with Told(quiet_s=0.0) as display:
        display.phase("long", None)
        assert heard.wait(60.0)
    with pytest.raises(ZeroDivisionError), Told(quiet_s=3600.0):
        _ = 1 / 0


def test_a_comparison_speaks_at_every_stage_and_counts_trials_within_one(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = Bar(Display(clock=clock))
    bar.phase("tune chunked", None)
    for trial in range(200):
        clock.now += 0.125
        bar.phase(f"tune chunked: {trial}/200, 90.00 %", None)
    bar.phase("chunked", 25)
    said = spoken(capsys)
    assert [line.split("  ")[0] for line in said] == [
        "tune chunked", "tune chunked: 71/200, 90.00 %", "tune chunked: 143/200, 90.00 %", "chunked: 0/25"
    ]  # fmt: skip

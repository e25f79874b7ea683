"""A direct search that is interrupted, wherever that is, ends as it would have: to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import SlalomError
from env.scenario import Scenario
from train.budget import Budget
from train.run import Request, run
from train.search import choose, fitness
from train.search.direct import DirectConfig, direct_search
from train.search.fitness import Fitness
from train.search.generalist import named, train_generalist
from train.search.journal import Journal

TIMES = ("seconds", "content_sha256")
SMALL = {"designs": 8, "starts": 2, "final_seeds": 1, "eval_requests": 100, "direct_size": 100}
SIZES = DirectConfig(designs=8, rounds=1, starts=1, parents=3, n_requests=100, population=6, rules=("round_robin",))
TINY = Scenario.load("tiny-4xa100")


class Stop(BaseException):
    """Ctrl-C, a kill: whatever ends a search between two simulations."""


class Counter:
    """Counts simulations; stops at number ``limit``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.n, self.limit = 0, 10**9
        level = Fitness.level

        def counted(fitness: Fitness, *given: Any) -> float:
            if self.n == self.limit:
                raise Stop
            self.n += 1
            return level(fitness, *given)

        patch.setattr(Fitness, "level", counted)

    def of(self, work: Any, limit: int = 10**9) -> int:
        self.n, self.limit = 0, limit
        if limit < 10**9:
            with pytest.raises(Stop):
                work()
        else:
            work()
        self.limit = 10**9
        return self.n


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they are asked for, not as long as it takes to see somebody starve: here nobody looks at the score."""
    monkeypatch.setattr(fitness, "run_length", lambda scenario, rate, n, split, waits: n)
    monkeypatch.setattr(choose, "_LONGEST", 200)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def train(out: Path, resume: bool = False) -> dict[str, Any]:
    budget = Budget(frames=20_000)
    return run(Request(TINY.name, "direct", "auto", budget, seed=3, out=out, resume=resume, overrides=SMALL))


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind but times, and the sum over them."""
    base = json.loads((folder / "base.json").read_text())
    files = {path.name: path.read_bytes() for path in sorted((folder / "best").iterdir())}
    return files | {"base": {name: value for name, value in base.items() if name not in TIMES}}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, counter: Counter) -> None:
    whole = counter.of(lambda: train(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "search.jsonl").exists()  # it has done its work
    again = tmp_path / "again"
    parts = [0.1, 0.35, 0.3]  # among the rules, among designs, in CMA-ES
    done = 0
    for k, part in enumerate(parts):
        done += counter.of(lambda k=k: train(again, resume=k > 0), int(part * whole))  # type: ignore[misc]
    rest = counter.of(lambda: train(again, resume=True))
    found, expected = outcome(again), outcome(tmp_path / "whole")
    assert found["base"] == expected["base"]
    assert found == expected
    assert done + rest <= whole + 4 * 24  # of what was simulated nothing is again, but for the answers in hand
    assert rest < 0.5 * whole


def search(journal: Journal | None, **given: Any) -> Any:
    return direct_search(TINY, SIZES, seed=1, journal=journal, **given)


def test_what_a_crash_leaves_at_the_end_is_cut_off(tmp_path: Path, counter: Counter) -> None:
    path, whole = tmp_path / "search.jsonl", search(None, requests=6_000)
    counter.of(lambda: search(Journal(path, "a"), requests=6_000), 40)
    n = len(path.read_bytes().splitlines())
    for tail in (b"[12, [0.", b"\0" * 512, b'{"a": 1}\n[1, 2, 3]\n', b"\xff\n"):
        with path.open("ab") as file:
            file.write(tail)
        Journal(path, "a").close()
        assert len(path.read_bytes().splitlines()) == n
    found = search(Journal(path, "a"), requests=6_000)
    np.testing.assert_array_equal(found.design.theta, whole.design.theta)
    assert (found.knee, found.requests, found.history) == (whole.knee, whole.requests, whole.history)


def test_a_search_of_something_else_begins_anew_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    first = Journal(path, "a")
    assert (first.ask("x", lambda: 1), first.anew) == (1, False)
    assert Journal(path, "a").ask("x", lambda: 2) == 1
    other = Journal(path, "b")
    assert other.anew
    assert other.ask("x", lambda: 3) == 3
    with pytest.raises(SlalomError, match="goes another way"):
        Journal(path, "b").ask("y", lambda: 4)


def test_time_goes_on_where_it_stopped(tmp_path: Path) -> None:
    now = [100.0]
    first = Journal(tmp_path / "a", "", lambda: now[0])
    for now[0] in (101.0, 105.0):
        first.seconds()
    now[0] = 9000.0
    second = Journal(tmp_path / "a", "", lambda: now[0])
    assert [second.seconds(), second.seconds()] == [1.0, 5.0]
    now[0] = 9002.5
    assert second.seconds() == 7.5


def test_a_search_by_the_clock_goes_on_with_the_time_it_had(tmp_path: Path, counter: Counter) -> None:
    """Every simulation takes a second of this clock."""
    path = tmp_path / "search.jsonl"

    def journal() -> Journal:
        return Journal(path, "", lambda: float(counter.n))

    whole = search(Journal(None, "", lambda: float(counter.n)), seconds=60.0)
    n = counter.n
    counter.of(lambda: search(journal(), seconds=60.0), 25)
    stopped, counter.n = counter.n, 0
    found = search(journal(), seconds=60.0)
    assert stopped + counter.n <= n + 48  # the answer that was in hand, twice
    assert found.seconds == pytest.approx(n, abs=48)
    assert found.history[:3] == whole.history[:3]


def test_a_generalist_goes_on_too(tmp_path: Path, counter: Counter) -> None:
    pair = [named("tiny-4xa100@2"), TINY]
    whole, n, _ = train_generalist(pair, requests=40_000, population=4, seed=1)
    path = tmp_path / "search.jsonl"
    counter.of(lambda: train_generalist(pair, requests=40_000, population=4, seed=1, journal=Journal(path)), 12)
    found, m, _ = train_generalist(pair, requests=40_000, population=4, seed=1, journal=Journal(path))
    np.testing.assert_array_equal(found.theta, whole.theta)
    assert n == m
    assert counter.n + 12 < n / 2000 + 24

"""Sessions in the long run: how long their load rises, and a stretch of them that is settled at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from engine.errors import SlalomError
from env.workload import Trace, parse_workload
from env.workload.steady import longest, offsets, sample, settling, stream

FOUR: dict[str, Any] = {
    "kind": "sessions", "turns": 4, "first": 1000, "growth": 200, "output": 100,
    "think": {"median_s": 10.0, "p90_s": 10.0},
}  # fmt: skip
OPEN: dict[str, Any] = {"kind": "synthetic", "lengths": {"kind": "fixed", "prompt": 1000, "output": 100}}


def build(section: dict[str, Any], rate: float, n: int, seed: int = 0) -> Trace:
    return parse_workload(section).build(rate, n, seed, "test")


def test_a_turn_comes_after_all_answers_and_pauses_before_it() -> None:
    trace = build(FOUR, 1.0, 40)
    place = {0: 0.0, 1: 12.0, 2: 24.0, 3: 36.0}
    turn, row = np.zeros(trace.n, int), 0
    for root in range(trace.n_roots):
        row, k = root, 0
        while row >= 0:
            turn[row], row, k = k, int(trace.next_turn[row]), k + 1
    assert offsets(trace, 2.0) == pytest.approx([place[k] for k in turn])


def test_the_load_of_sessions_settles_with_their_last_turns_and_open_loop_load_at_once() -> None:
    found = settling(build(FOUR, 1.0, 4_000), 2.0)
    assert (found.turns, found.settle_s) == (4.0, pytest.approx(36.0))
    assert settling(build(OPEN, 1.0, 4_000), 2.0).settle_s == 0.0


def test_late_turns_count_by_their_tokens() -> None:
    """One session in two hundred goes on for a second turn, with half of all tokens."""
    prompt = np.full(201, 100)
    prompt[200] = 20_000
    following = {"next_turn": np.array([200, *([-1] * 200)]), "think_s": np.array([500.0, *([0.0] * 200)])}
    arrival = np.append(np.arange(200.0), np.inf)
    trace = Trace.make(arrival, prompt, np.ones(201, int), n_roots=200, **following)
    assert settling(trace, 0.0).settle_s == 500.0


def test_a_mixture_settles_as_the_tokens_of_its_sessions_do() -> None:
    parts = [{"weight": 1, "workload": FOUR}, {"weight": 1, "workload": OPEN}]
    found = settling(build({"kind": "mix", "parts": parts}, 2.0, 5_000), 0.0)
    assert found.turns == pytest.approx(2.5, rel=0.02)
    assert found.settle_s == pytest.approx(30.0)
    few = [{"weight": 1, "workload": FOUR}, {"weight": 2_000, "workload": OPEN}]
    assert settling(build({"kind": "mix", "parts": few}, 2.0, 20_000), 0.0).settle_s == 0.0


def test_a_stream_has_the_mix_of_the_long_run_from_its_first_request_on() -> None:
    think = {"median_s": 300.0, "p90_s": 300.0}
    made = partial(build, FOUR | {"think": think}, 10.0)
    found = stream(made, 4_000)
    assert (found.n, found.n_roots) == (4_000, 4_000)
    assert (found.next_turn == -1).all()
    assert found.n / found.duration_s == pytest.approx(40.0, rel=0.1)
    for part in (found.prompt[:2_000], found.prompt[2_000:]):  # 1000, 1300, 1600 and 1900 tokens, as often each
        assert np.unique(part, return_counts=True)[1] / 2_000 == pytest.approx([0.25] * 4, abs=0.06)
    rising = made(1_000)
    first = rising.arrival_s[rising.owner()] + offsets(rising, 0.0)
    assert rising.prompt[first < rising.duration_s].mean() < 1_100  # a run that begins empty meets first turns


def test_turns_of_a_stream_find_what_their_sessions_said_before() -> None:
    found = stream(partial(build, FOUR, 1.0), 2_000)
    seen: set[int] = set()
    known = []
    for row in range(found.n):
        chain = found.hashes[found.hash_start[row] :][: found.hash_n[row]]
        known.append(int(chain[0]) in seen)
        seen.add(int(chain[0]))
    late = found.arrival_s > 30.0  # whoever spoke before the stream began has spoken again
    assert np.array_equal(np.array(known)[late], found.prompt[late] > 1000)


def test_open_loop_requests_are_streamed_as_they_are() -> None:
    plain, found = build(OPEN, 1.0, 300), stream(partial(build, OPEN, 1.0), 300)
    assert np.array_equal(plain.arrival_s, found.arrival_s)


def test_a_workload_that_ends_gives_what_it_has() -> None:
    whole = build(FOUR, 1.0, 777)

    def short(n: int) -> Trace:
        return whole.take(n)

    assert longest(short, 5_000).n == 777
    assert sample(short).n == 777
    last = stream(short, 5_000)
    assert 777 - 4 * 45 < last.n < 777  # without the turns that come when no session begins any more
    with pytest.raises(SlalomError, match="rate"):
        longest(lambda n: build(FOUR, -1.0, n), 100)

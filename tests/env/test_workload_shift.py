"""Workloads whose rate and mix change: phases, episodes and runs that end within one."""

from __future__ import annotations

import numpy as np
import pytest

from env.workload import parse_workload


def test_shift_moves_rate_and_mix() -> None:
    phases = [
        {"duration": 1, "rate": 1, "weights": [1, 0]},
        {"duration": 1, "rate": 3, "weights": [0, 1]},
        {"duration": 2, "rate": 1, "weights": [1, 0], "ramp": True},
    ]
    lengths = [{"kind": "fixed", "prompt": p, "output": 1} for p in (10, 20)]
    trace = parse_workload({"kind": "shift", "lengths": lengths, "phases": phases}).build(10, 80_000, 0, "train")
    assert trace.duration_s == pytest.approx(8000, rel=0.02)
    quarter = np.minimum((trace.arrival_s // 2000).astype(int), 3)
    # over the ramp the rate falls 3 -> 1: its halves average 2.5 and 1.5 of the total 1 + 3 + 2.5 + 1.5 = 8
    assert np.bincount(quarter) / 80_000 == pytest.approx([1 / 8, 3 / 8, 2.5 / 8, 1.5 / 8], abs=0.01)
    share = [(trace.prompt[quarter == q] == 20).mean() for q in range(4)]
    assert share[:2] == [0, 1]
    # on the ramp, x from 0 to 1, the rate is 3 - 2x and the second model's weight 1 - x
    x = np.linspace(0, 1, 10_001)
    density = (3 - 2 * x) * (1 - x)
    ramp = [density[half].mean() / (3 - 2 * x[half]).mean() for half in (x < 0.5, x >= 0.5)]
    assert share[2:] == pytest.approx(ramp, abs=0.02)


SWITCH = {
    "kind": "shift",
    "lengths": [{"kind": "fixed", "prompt": p, "output": 1} for p in (10, 20)],
    "phases": [{"duration": 60, "rate": 1, "weights": [1, 0]}, {"duration": 30, "rate": 2, "weights": [0, 1]}],
    "duration_s": 90,
}


@pytest.mark.parametrize("n", [18_000, 63_000])
def test_phases_of_a_shift_last_their_seconds_whatever_the_length_of_a_run(n: int) -> None:
    trace = parse_workload(SWITCH).build(100.0, n, 0, "train")
    assert trace.duration_s == pytest.approx(n / 100, rel=0.02)
    second = (trace.arrival_s % 90.0) >= 60.0
    np.testing.assert_array_equal(trace.prompt == 20, second)
    counts = np.bincount((trace.arrival_s // 30).astype(int))[: int(n / 100 // 30)]
    # 60 s at one rate and 30 s at twice that, 100 requests/s on average: 75, 75 and 150 a second
    assert counts / 30 == pytest.approx(np.resize([75, 75, 150], len(counts)), rel=0.1)


def test_random_phases_are_drawn_anew_for_every_episode_and_do_not_depend_on_the_length() -> None:
    section = {**SWITCH, "phases": None, "random": {"phases": [3, 3]}}
    spec = parse_workload({key: value for key, value in section.items() if value is not None})
    short, long = (spec.build(50.0, n, 3, "train").meta["phases"] for n in (9_000, 45_000))
    assert long[: len(short)] == short
    episodes = [long[k : k + 3] for k in range(0, len(long), 3)]
    assert [sum(p["duration"] for p in episode) for episode in episodes] == pytest.approx([90.0] * len(episodes))
    assert len({episode[0]["rate"] for episode in episodes}) == len(episodes) == 11


def test_a_run_that_ends_in_the_middle_of_an_episode_says_so() -> None:
    spec = parse_workload(SWITCH)
    assert spec.unfinished(100.0, 18_000) == ""
    assert "30 s after it began (2 complete)" in spec.unfinished(100.0, 21_000)
    assert spec.build(100.0, 21_000, 0, "train").meta["unfinished"] == spec.unfinished(100.0, 21_000)
    assert "unfinished" not in spec.build(100.0, 18_000, 0, "train").meta
    mixed = parse_workload({"kind": "mix", "parts": [{"weight": 1, "workload": SWITCH}] * 2})
    assert "2 complete" in mixed.unfinished(100.0, 21_000)


def test_a_shift_without_a_natural_length_spreads_over_the_run_as_before() -> None:
    spec = parse_workload({key: value for key, value in SWITCH.items() if key != "duration_s"})
    trace = spec.build(100.0, 30_000, 0, "train")
    assert (trace.prompt[trace.arrival_s < 0.66 * trace.duration_s] == 10).all()
    assert spec.unfinished(100.0, 21_000) == ""

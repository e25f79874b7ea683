"""Replanning: what counts as a shift, which split is planned, what it gains when it is simulated, the command."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.kinds import Role
from engine.errors import SlalomError
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from env.workload import Trace
from eval.placement import cli as placement_cli
from eval.placement.replan import best_split, capacity, changes, find_shifts, load_of, replan, splits
from eval.placement.schedule import scheduled

WINDOW_S = 100.0
LONG_S = 1000.0


def traffic(seed: int, step_s: float = LONG_S, rate: float = 1.0, prompt: float = 1.0, output: float = 1.0) -> Trace:
    """20 requests a second for 1000 s, lengths around 800 and 200; from ``step_s`` on times a factor."""
    rng = np.random.default_rng(seed)
    before = np.cumsum(rng.exponential(0.05, int(40 * LONG_S)))
    before = before[before < step_s]
    after = step_s + np.cumsum(rng.exponential(0.05 / rate, int(80 * LONG_S)))
    arrival = np.concatenate([before, after[after < LONG_S]])
    factor = [np.where(arrival < step_s, 1.0, by) for by in (prompt, output)]
    lengths = [1 + rng.exponential(mean, len(arrival)) * by for mean, by in zip((800.0, 200.0), factor, strict=True)]
    return Trace.make(arrival, lengths[0].astype(np.int32), lengths[1].astype(np.int32))


@pytest.mark.parametrize("seed", range(6))
def test_without_a_shift_there_is_the_first_plan_only(seed: int) -> None:
    assert [shift.at_s for shift in find_shifts(traffic(seed), WINDOW_S)] == [WINDOW_S]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    step_s=st.floats(250.0, 800.0),
    which=st.sampled_from([("rate",), ("prompt",), ("output",), ("prompt", "output"), ("rate", "prompt", "output")]),
    factor=st.sampled_from([0.4, 0.6, 1.7, 3.0]),
)
def test_a_step_is_planned_on_once_and_within_one_window(
    seed: int, step_s: float, which: tuple[str, ...], factor: float
) -> None:
    shifts = find_shifts(traffic(seed, step_s, **dict.fromkeys(which, factor)), WINDOW_S)
    assert len(shifts) == 2, shifts
    assert step_s < shifts[1].at_s <= step_s + WINDOW_S
    assert set(shifts[1].changed) <= set(which)
    for name, by in shifts[1].changed.items():
        assert np.sign(by) == np.sign(factor - 1.0)
        # what is planned on is close to the load after the step, whatever part of a quarter lay before it
        assert getattr(shifts[1].load, name) / getattr(shifts[0].load, name) == pytest.approx(factor, rel=0.35)


def test_a_load_that_keeps_moving_is_planned_on_all_the_same() -> None:
    rng = np.random.default_rng(0)
    arrival = LONG_S * np.sqrt(np.sort(rng.random(30_000)))  # the rate grows all the time
    trace = Trace.make(arrival, rng.integers(1, 999, 30_000), rng.integers(1, 99, 30_000))
    shifts = find_shifts(trace, WINDOW_S)
    rates = [shift.load.rate for shift in shifts]
    assert len(shifts) >= 4
    assert rates == sorted(rates)


def test_a_change_must_pass_the_threshold_and_the_noise() -> None:
    before, after = load_of(traffic(0), 0.0, 500.0), load_of(traffic(1, 0.0, rate=1.3), 0.0, 500.0)
    assert changes(before, after, 0.2) == {"rate": pytest.approx(0.3, abs=0.05)}
    assert changes(before, after, 0.5) == {}
    few = load_of(traffic(1, 0.0, rate=1.3), 0.0, 1.0)  # some 26 requests: such a rate may be chance
    assert "rate" not in changes(before, few, 0.2)
    assert changes(before, load_of(traffic(0), 2000.0, 2100.0), 0.2) == {}  # nobody came: nothing to plan on


@pytest.mark.parametrize(
    ("window_s", "threshold", "word"),
    [(0.0, 0.2, "--window"), (501.0, 0.2, "--window"), (5.0, 0.2, "at least"), (np.nan, 0.2, "--window"),
     (100.0, 0.0, "--threshold"), (100.0, np.inf, "--threshold")],
)  # fmt: skip
def test_a_bad_window_or_threshold_is_refused(window_s: float, threshold: float, word: str) -> None:
    with pytest.raises(SlalomError, match=word):
        find_shifts(traffic(0), window_s, threshold)


@given(
    kinds=st.lists(st.tuples(st.integers(1, 5), st.floats(0.0, 9.0), st.floats(0.0, 9.0)), min_size=1, max_size=2),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_planned_split_holds_most_and_moves_least(kinds: list[tuple[int, float, float]], data: Any) -> None:
    have, prefill, decode = zip(*kinds, strict=True)
    listed = splits(have)
    if not listed:
        assert have == (1,)
        return
    now = data.draw(st.sampled_from(listed))
    best = best_split(have, prefill, decode, now)

    def moves(split: tuple[int, ...]) -> int:
        return sum(abs(a - b) for a, b in zip(split, now, strict=True))

    held = capacity(best, have, prefill, decode)
    assert best in listed
    assert all(held >= capacity(split, have, prefill, decode) for split in listed)
    assert all(moves(best) <= moves(split) for split in listed if capacity(split, have, prefill, decode) == held)


PHASES = [{"duration": 1.0, "rate": 1.0, "weights": [0, 1, 0]}, {"duration": 1.0, "rate": 1.0, "weights": [0, 0, 1]}]


def stepping(**changed: Any) -> Scenario:
    """Four instances; half-way the workload turns from code (long prompts) to writing (long answers)."""
    step = {"name": "stepping", "workload.random": None, "workload.phases": PHASES, "workload.duration_s": None}
    counts = {"cluster.0.count": 2, "cluster.1.count": 2}
    return Scenario.load("shift-pd-8xa100").with_overrides({**step, **counts, **changed})


def test_a_plan_in_force_is_reached_one_role_at_a_time() -> None:
    scenario = stepping()
    trace = build_trace(scenario, 3.0, 600, 0, "test")
    run = simulate(scenario, scheduled([(0.0, (1,)), (60.0, (3,))], (0, 0, 0, 0), 2048), rate=3.0, trace=trace)
    assert run.cluster["n_switches"] == 2
    assert list(run.inst["role"]).count(Role.PREFILL) == 3
    assert (run.req["finished"] > 0).all()


def test_a_step_from_prompts_to_answers_moves_instances_and_pays() -> None:
    scenario = stepping()
    result = replan(scenario, rate=14.0, n_requests=6000, seeds=1)
    (found,) = result["workloads"]
    first, second = found["timeline"]
    step_s = 6000 / 14.0 / 2.0
    assert step_s < second["at_s"] <= step_s + result["window_s"]
    assert second["changed"].keys() >= {"prompt", "output"}
    old, new = second["before"], second["plan"]
    assert first["plan"]["split"] == old["split"] != new["split"]
    assert found["role_changes"] == int(old["split"][0]) - int(new["split"][0]) > 0
    assert new["capacity"] > old["capacity"]
    assert new["within_targets"] > old["within_targets"] + 0.1
    assert found["planned_anew"] > max(found["first_plan_kept"], found["best_fixed"])
    assert found["best_fixed"] >= found["first_plan_kept"]
    json.dumps(result, allow_nan=False)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan-placement", *arguments])
    with pytest.raises(SystemExit) as stop:
        placement_cli.main()
    return int(stop.value.code or 0)


def test_the_command_prints_a_timeline_or_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    file, out = tmp_path / "stepping.yaml", tmp_path / "plan.json"
    file.write_text(stepping().to_yaml())
    base = ["--scenario", str(file), "--replan", "--requests", "3000", "--rate", "9", "--seeds", "1"]
    assert command(monkeypatch, *base, "--out", str(out)) == 0
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    for row in result["workloads"][0]["timeline"]:
        assert f"{row['at_s']:.0f} s" in text
        assert row["plan"]["split"] in text
    for word in ("first plan kept", "planned anew", "in hindsight", "all mixed", "Not included"):
        assert word in text
    assert command(monkeypatch, *base, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["mean"] == result["mean"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--window", "60"], "--replan"),
        (["--replan", "--gpus", "4"], "--gpus"),
        (["--replan", "--rate", "-1"], "--rate"),
        (["--replan", "--window", "1e9"], "--window"),
        (["--replan", "--threshold", "0"], "--threshold"),
        (["--replan", "--goal", "2"], "goal"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert command(monkeypatch, "--scenario", "shift-pd-8xa100", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert word in captured.err


def test_one_instance_cannot_be_split() -> None:
    alone = Scenario.load("azure-conv-4xa100").with_overrides({"cluster.0.count": 1})
    with pytest.raises(SlalomError, match="one instance"):
        replan(alone, seeds=1)

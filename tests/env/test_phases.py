"""Goodput in every phase: windows follow the workload, and the worst of them decides."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import SlalomError
from env.measure.phases import GOAL, Phase, by_phase, phase_goodput, phases_of, play_days, standing, worst
from env.measure.sustained import sample_of, worst_of
from env.scenario import Scenario, list_scenarios
from env.surrogate.arena import build_trace


@pytest.fixture(scope="module")
def short() -> Scenario:
    """The 70B day with phases of a minute."""
    return Scenario.load("daynight-70b").with_overrides({"workload.duration_s": 240.0})


def test_windows_are_the_phases_that_a_run_covers(short: Scenario) -> None:
    day = build_trace(short, 5.0, 1200, 3, "valid")
    assert phases_of(day) == [(0, 60), (60, 120), (120, 180), (180, 240)]
    assert phases_of(build_trace(short, 5.0, 1000, 3, "valid")) == [(0, 60), (60, 120), (120, 180)]
    assert len(phases_of(build_trace(short, 5.0, 2400, 3, "valid"))) == 8
    with pytest.raises(SlalomError, match="in its first phase"):
        phases_of(build_trace(short, 5.0, 100, 3, "valid"))
    steady = Scenario.load("azure-conv-4xa100")
    with pytest.raises(SlalomError, match="it has no phases"):
        phases_of(build_trace(steady, 5.0, 100, 3, "valid"))
    with pytest.raises(SlalomError, match="length of an episode"):
        play_days(steady, "least_tokens", 1.0, 0, "train")


def test_a_good_mean_does_not_hide_a_bad_phase(short: Scenario) -> None:
    prefill = short.with_overrides({"cluster.0.count": 5, "cluster.1.count": 1})
    run, phases = play_days(prefill, "distserve", 5.0, 0, "test")
    assert [p.start_s for p in phases] == [0, 60, 120, 180]
    arrival = run.req["arrival"] / 1e12
    assert sum(p.sent for p in phases) == (arrival[arrival >= 0] < 240).sum()
    day, night = phases[0], phases[1]
    assert night.share < 0.5 < 0.95 < day.share  # one decode instance is enough for short answers only
    assert worst(phases) <= night.share
    assert by_phase(run, [(0.0, 240.0)])[0].share > worst(phases)


def test_the_rate_found_meets_the_target_in_every_phase_and_the_one_above_does_not(short: Scenario) -> None:
    seen: dict[float, float] = {}

    def note(run: object, phases: list[Phase]) -> None:
        seen[run.rate] = standing(short, run, phases)  # type: ignore[arg-type, attr-defined]

    (rate,) = phase_goodput(short, "linear_score", (5,), split="valid", tolerance=0.05, on_run=note)
    held = max(r for r, share in seen.items() if share >= 0.9)
    lost = min(r for r, share in seen.items() if share < 0.9 and r > held)
    assert held <= rate <= lost <= 1.06 * held


def test_who_holds_no_rate_at_all_has_none(short: Scenario) -> None:
    hopeless = short.with_overrides({"classes.0.tpot_s": 1e-4})
    assert phase_goodput(hopeless, "least_tokens", (0,), start=1.0) == [0.0]


def test_a_day_stands_at_its_goal_exactly_when_shares_waits_and_lengths_do(short: Scenario) -> None:
    split = short.with_overrides({"cluster.0.count": 4, "cluster.1.count": 2})
    for rate in (1.0, 3.0, 9.0):
        run, phases = play_days(split, "linear_score", rate, 0, "test")
        sample = sample_of(run, warmup=0.0)
        length = worst_of([sample])["worst_length"][1]
        for factor in (1.0, 0.99 * sample.tail, 1.01 * sample.tail):
            limited = split.model_copy(update={"tail_factor": factor})
            held = worst(phases) >= GOAL and length >= GOAL - 0.1 and sample.tail <= factor
            assert (standing(limited, run, phases) >= GOAL) == held
    assert standing(split, run, phases) < GOAL  # the last is overloaded
    patient = split.model_copy(update={"tail_factor": 1e6})
    assert length < 0.8
    assert standing(patient, run, [Phase(0.0, 240.0, 1, 1)]) == pytest.approx(length + 0.1)  # whatever phases say
    longer = [standing(split.model_copy(update={"tail_factor": f}), run, phases) for f in (1.0, 4.0, 1e6)]
    assert longer == sorted(longer)


@pytest.mark.parametrize("name", [n for n in list_scenarios() if n.startswith(("daynight", "surprise"))])
def test_days_of_training_validation_and_test_differ(name: str) -> None:
    scenario = Scenario.load(name)
    traces = [build_trace(scenario, 1.0, 300, 0, split) for split in ("train", "valid", "test")]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not np.array_equal(traces[a].prompt, traces[b].prompt)
        assert not np.isin(traces[a].arrival_s, traces[b].arrival_s).any()
    if name.startswith("daynight"):
        day = build_trace(scenario, 0.2, int(0.2 * scenario.workload.natural_s), 0, "test")
        lengths = {round(b - a) for a, b in phases_of(day)}
        assert lengths == {1800 if "30min" in name else 7200}

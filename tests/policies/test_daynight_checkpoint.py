"""The shipped controller acts: it changes roles when phases change, on the surrogate and in the engine's runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.core.kinds import Role
from engine.live.modelled import play
from env.measure.phases import play_days, worst
from env.measure.roles import role_timeline
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, horizon_s
from env.surrogate.simulate import bind_policy, simulate

FOLDER = str(Path(__file__).resolve().parents[2] / "checkpoints" / "policies" / "daynight-70b")


def test_it_holds_days_that_no_fixed_split_holds_and_changes_roles_when_phases_do() -> None:
    day = Scenario.load("daynight-70b-30min").with_overrides({"workload.duration_s": 3600.0})
    run, phases = play_days(day, FOLDER, 6.0, 3, "test")
    assert worst(phases) > 0.85
    for split in ("distserve", "linear_score"):  # three instances for each phase
        assert worst(play_days(day, split, 6.0, 3, "test")[1]) < 0.6
    line = role_timeline(day, FOLDER, 6.0, 3)
    prefill = line.instances[:, Role.PREFILL]
    for start, most in ((0.0, True), (900.0, False), (1800.0, True), (2700.0, False)):
        settled = prefill[np.searchsorted(line.at_s, start + 400.0, side="right") - 1]
        assert settled >= 4 if most else settled <= 2
    assert run.cluster["n_switches"] <= 24  # a composition is four changes away from the other


def test_it_decides_alike_in_the_runtime_of_the_live_engine() -> None:
    """Modelled instances on a virtual clock: the same stamps, request for request."""
    day = Scenario.load("daynight-70b").with_overrides({"workload.duration_s": 240.0})
    trace = build_trace(day, 4.0, 800, 1, "test")
    bound = bind_policy(FOLDER, day)
    ours = arena_of(day).cluster(bound.arrangement, trace, horizon_s(trace))
    play(ours, bound, n_roots=trace.n_roots)
    theirs = simulate(day, bound, rate=4.0, trace=trace)
    for name in ("first_token", "last_token", "finished", "inst", "state"):
        np.testing.assert_array_equal(ours.req[name], theirs.req[name])
    assert ours.cluster[0]["n_switches"] == theirs.cluster["n_switches"] >= 3

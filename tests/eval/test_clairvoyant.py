"""The clairvoyant: a schedule is followed to the second, and knowing is worth more than any fixed split."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from engine.core.kinds import Role
from engine.errors import SlalomError
from env.measure.phases import phase_goodput
from env.measure.roles import role_timeline
from env.scenario import Scenario
from eval.placement.clairvoyant import Leg, _kinds, _Plan, clairvoyant, followed
from eval.placement.cli import app
from policies.rules.planner import RULE


@pytest.fixture(scope="module")
def brief() -> Scenario:
    """The 70B day on three instances, phases of a hundred seconds."""
    small = {"cluster.0.count": 1, "cluster.1.count": 2, "reference_rate": 2.0, "workload.duration_s": 400.0}
    return Scenario.load("daynight-70b-30min").with_overrides(small | {"decisions.roles": ["prefill", "decode"]})


def test_a_schedule_is_followed() -> None:
    day = Scenario.load("daynight-70b").with_overrides({"workload.duration_s": 120.0})
    policy = followed([(0.0, 2), (30.0, 4), (60.0, 3)], 6, RULE.values({"side": "decode"}))
    found = role_timeline(day, policy, 2.0, 0)
    prefill = found.instances[:, Role.PREFILL].tolist()
    assert prefill == [2, 3, 4, 3]
    np.testing.assert_allclose(found.at_s[1:], [30.0, 31.0, 60.0], atol=4.5)  # looked at every few decisions
    assert found.switches == 3
    assert found.instances.sum(axis=1).tolist() == [6] * 4


def test_legs_become_a_timeline() -> None:
    legs = {(-1, 0): Leg(4), (0, 1): Leg(1, (-5.0, 10.0)), (1, 0): Leg(4, (0.0,))}
    plan = _Plan(legs, RULE.values())
    phases = [(0.0, 100.0), (100.0, 200.0), (200.0, 300.0)]
    timeline = plan.timeline(phases, [0, 1, 0])
    assert timeline == [(0.0, 4), (95.0, 3), (110.0, 2), (110.0, 1), (200.0, 2), (200.0, 3), (200.0, 4)]
    alike = [{"rate": 1.0, "weights": [1, 0]}, {"rate": 2.0, "weights": [1, 0]}, {"rate": 1.0, "weights": [1, 0]}]
    assert _kinds(alike, 3) == [0, 1, 0]


def test_knowing_beats_every_fixed_split(brief: Scenario) -> None:
    found = clairvoyant(brief, seeds=2)
    assert len(found["goodput"]) == len(found["fixed"]["goodput"]) == 2
    assert len(found["shares"]) == 4
    assert np.mean(found["goodput"]) > 1.02 * np.mean(found["fixed"]["goodput"]) > 0.0
    assert found["role_changes"] >= 3
    json.dumps(found, allow_nan=False)
    assert found == clairvoyant(brief, seeds=2)


def test_where_phases_are_random_every_day_has_its_own_schedule(brief: Scenario) -> None:
    """A schedule of one day is worth little on another: its changes come at the wrong times."""
    lengths = Scenario.load("surprise-70b").workload.model_dump(mode="json")["lengths"]
    drawn = {"kind": "shift", "lengths": lengths, "random": {"phases": [2, 3], "sharpness": 0.1}, "duration_s": 300.0}
    days = brief.with_overrides({"workload": drawn | {"max_context": 32768}})
    found = clairvoyant(days, seeds=2)
    plan = [(row["at_s"], row["prefill"]) for row in found["schedule"]]
    first = followed(plan, len(days.placements()), found["values"])
    assert found["goodput"][1] > 1.2 * phase_goodput(days, first, (1,), start=found["goodput"][1])[0]


def test_what_it_cannot_do_is_said(brief: Scenario) -> None:
    with pytest.raises(SlalomError, match="roles cannot change"):
        clairvoyant(Scenario.load("azure-conv-4xa100"))
    with pytest.raises(SlalomError, match="between 0 and 1"):
        clairvoyant(brief, goal=1.0)
    runner = CliRunner()
    for options, field in (
        (["--clairvoyant", "--replan"], "--clairvoyant"),
        (["--clairvoyant", "--gpus", "8"], "--gpus"),
        (["--clairvoyant", "--requests", "100"], "--requests"),
        (["--clairvoyant", "--window", "10"], "--window"),
        (["--rate", "3"], "--rate"),
    ):
        result = runner.invoke(app, ["--scenario", "daynight-70b", *options])
        assert isinstance(result.exception, SlalomError)
        assert result.exception.field == field

"""What a planner's network learns: a planner that is late is shifted in time, and nothing gets worse."""

from __future__ import annotations

import numpy as np
import pytest

from env.measure.phases import play_days
from env.scenario import Scenario
from env.surrogate.simulate import bind_policy
from policies.rules.planner import shifted
from train.control.shifting import learn_shift

LATE = {"interval_s": 60.0, "window_s": 60.0}
RATE = 5.5


@pytest.fixture(scope="module")
def brief() -> Scenario:
    """Half-hour days of six instances, two roles."""
    changes = {"workload.duration_s": 1800.0, "decisions.roles": ["prefill", "decode"]}
    return Scenario.load("daynight-70b-30min").with_overrides(changes)


@pytest.mark.slow
def test_imitation_hastens_a_planner_that_looks_once_a_minute(brief: Scenario) -> None:
    found = learn_shift(brief, LATE, RATE, requests=900_000, ppo=False)
    assert found.plan[0] > 0  # more instances prefill as soon as long prompts come
    assert found.chosen == "imitation"
    assert found.standings["imitation"] > found.standings["start"] + 0.05
    assert found.requests < 1_200_000
    late = bind_policy("planner", brief, LATE)
    (_, before), (_, after) = (
        play_days(brief, policy, RATE, 0, "test") for policy in (late, shifted(late, found.block))
    )
    missed = [sum(phase.sent - phase.good for phase in day) for day in (before, after)]
    assert missed[1] < 0.7 * missed[0]


@pytest.mark.slow
def test_the_better_of_start_and_result_is_kept_and_a_seed_repeats_itself(brief: Scenario) -> None:
    one, two = (learn_shift(brief, {}, RATE, requests=350_000, seed=1, imitation=False) for _ in range(2))
    assert set(one.standings) == {"start", "ppo, half", "ppo, end"}
    assert one.standings[one.chosen] == max(one.standings.values())
    assert one.standings == two.standings
    np.testing.assert_array_equal(one.blocks["ppo, end"], two.blocks["ppo, end"])
    assert one.blocks["ppo, end"][2:].any()
    assert (one.blocks["ppo, end"] != one.blocks["ppo, half"]).any()

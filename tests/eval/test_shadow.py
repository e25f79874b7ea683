"""A run watched decision by decision is the run that the simulator makes in one go."""

import numpy as np
import pytest

from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.simulate import simulate
from eval.compare.session import scaled
from eval.compare.shadow import shadow

SETTINGS = PointSettings(n_requests=300)
SHIFT = Scenario.load("shift-pd-8xa100")


def good(policy, rate):
    found = outcomes(simulate(SHIFT, policy, rate=rate, n_requests=300), warmup=0.0)
    return int(found.good.sum())


def test_nobody_differs_from_himself_and_outcomes_are_those_of_the_simulator():
    tropical = Contender("tropical")
    watched = shadow(SHIFT, tropical, tropical, 40.0, 0, SETTINGS)
    assert {count["differing"] for count in watched["kinds"].values()} == {0}
    alike = watched["differing"]["groups"]["placed alike"]
    assert alike["requests"] == 300
    assert alike["good"] == alike["good_under_rival"] == good("tropical", 40.0)
    assert watched["differing"]["ways"] == {}


def test_differences_are_counted_and_every_request_is_in_one_group():
    watched = shadow(SHIFT, Contender("tropical"), Contender("distserve"), 60.0, 0, SETTINGS)
    groups = watched["differing"]["groups"]
    assert sum(group["requests"] for group in groups.values()) == 300
    assert sum(group["good"] for group in groups.values()) == good("tropical", 60.0)
    assert sum(group["good_under_rival"] for group in groups.values()) == good("distserve", 60.0)
    different = groups["placed differently"]
    assert different["requests"] > 0
    assert different["good"] - different["good_under_rival"] == different["gained"] - different["lost"]
    # DistServe knows no prefill on decode instances
    assert any(way.startswith("a decode instance instead of") for way in watched["differing"]["ways"])


def test_the_timeline_counts_every_instance_at_every_moment():
    t = shadow(SHIFT, Contender("dopd"), Contender("distserve"), 20.0, 0, SETTINGS)["timeline"]
    assert np.all(np.sum(list(t["roles"].values()), axis=0) == 8)
    assert np.all(np.diff(t["at_s"]) > 0)
    width = t["attained_at_s"][1] - t["attained_at_s"][0]
    assert sum(t["arrivals_per_s"]) * width == pytest.approx(300)


def test_scaled_targets():
    half = scaled(SHIFT, 0.5)
    assert [c.ttft_s for c in half.classes] == [c.ttft_s / 2 for c in SHIFT.classes]
    assert [c.tpot_s for c in half.classes] == [c.tpot_s / 2 for c in SHIFT.classes]
    assert scaled(SHIFT, 1.0) is SHIFT
    with pytest.raises(SlalomError, match="positive"):
        scaled(SHIFT, 0.0)

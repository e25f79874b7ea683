"""What TUNE could earn at most: what counts as room, and which phases are one kind."""

from __future__ import annotations

import pytest

from engine.errors import SlalomError
from env.scenario import Scenario
from env.workload.shift import ShiftSpec
from eval.studies.budgets import Composition, ceilings, kinds_of

APART, BESIDE = Composition(3, "decode"), Composition(1, "multiplexed")
SMALL, LARGE = (0.5, 1.0), (2.0, 1.0)


def test_room_is_what_budgets_that_follow_the_phase_hold_beyond_one_set() -> None:
    held = {
        (APART, SMALL): (5.0, 1.0),
        (APART, LARGE): (1.0, 5.0),
        (BESIDE, SMALL): (1.0, 4.0),
        (BESIDE, LARGE): (6.0, 1.0),
    }
    stays, changes = ceilings(held).values()
    assert stays == (1.0, 5.0)  # of one set, the worst phase; else of the best of each, under prefill and decode apart
    assert changes == (5.0, 5.0)  # large budgets beside each other for one phase and apart for the other
    assert list(ceilings(dict.fromkeys(held, (2.0, 2.0))).values()) == [(2.0, 2.0), (2.0, 2.0)]


def test_every_kind_of_phase_is_played_alone_at_its_part_of_the_rate() -> None:
    (prompts, more), (answers, less) = kinds_of(Scenario.load("daynight-70b-30min"))
    assert (more, less) == (pytest.approx(7.3 / 7.66), pytest.approx(8.02 / 7.66))
    for only, weights in ((prompts, (1.0, 0.0)), (answers, (0.0, 1.0))):
        assert isinstance(only.workload, ShiftSpec)
        assert [phase.weights for phase in only.workload.phases or ()] == [weights]
    with pytest.raises(SlalomError, match="name one whose phases are given"):
        kinds_of(Scenario.load("surprise-70b"))

"""Whatever a policy does, no request is lost, no block is leaked, and the books agree with a recount."""

from __future__ import annotations

import os

from audit import check, check_end
from drive import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, cases

EXAMPLES = int(os.environ.get("SLALOM_EXAMPLES", "1200"))


@settings(max_examples=EXAMPLES)
@given(cases(), st.lists(st.integers(1, 40), max_size=3))
def test_every_request_ends_once_and_every_block_comes_back(case: Case, pauses: list[int]) -> None:
    state, sim = case.build()
    driver = Driver(case, state, sim)
    for pause in pauses:
        before = int(sim.sim[0]["now"])
        driver.step(pause)
        assert sim.sim[0]["now"] >= before, "time runs back"
        check(state, sim)
    driver.finish()
    check_end(state, sim)

"""Least predicted TTFT with a TPOT guard.

Cost of an instance = predicted TTFT ÷ target + ``penalty`` × max(0, ``guard`` − TPOT slack left there after
the stall that this prefill causes). The first term alone is a strong rule by itself.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, is_instance, kind_of, least, or_hold
from policies.rule import Param, Rule


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: guard, penalty."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    guard, penalty = params[0], params[1]
    best, cost = -1, np.inf
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k):
            lacking = max(0.0, guard - candidates[k, Col.SLACK_AFTER])
            here = candidates[k, Col.TTFT] + penalty * lacking
            if here < cost:
                best, cost = k, here
    if best < 0:
        best = least(candidates, mask, Col.OUTSTANDING)
    return or_hold(best, candidates, mask)


RULE = Rule(
    name="predicted_ttft",
    doc="least predicted TTFT ÷ target, with a guard for the TPOT of requests already running",
    source="this project",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS,
    params=(
        Param("guard", -1.0, 2.0, 0.0, doc="TPOT slack to keep, in the unit of the column SLACK_AFTER"),
        Param("penalty", 0.0, 10.0, 1.0, doc="cost of one unit of slack that is lacking"),
    ),
)

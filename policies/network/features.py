"""What a scoring policy reads of a candidate: the dimensionless columns and three hinges made of them.

A linear score cannot say "late is bad, early is worth nothing"; the hinges let it.
"""

from __future__ import annotations

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Col, Ctx
from engine.jit.kernel import kernel

#: Extra columns after the dimensionless ones.
LATE = CANDIDATE_DIMENSIONLESS  # max(0, TTFT − 1)
SLACK_MISS = CANDIDATE_DIMENSIONLESS + 1  # max(0, −SLACK_AFTER)
STEP_MISS = CANDIDATE_DIMENSIONLESS + 2  # max(0, STEP_WITH − 1)
N_FEATURES = CANDIDATE_DIMENSIONLESS + 3
N_CONTEXT_FEATURES = CONTEXT_DIMENSIONLESS
#: Features beyond ± this are cut before any score, so that no weight meets infinity.
CLIP = 1000.0

CONTEXT_NAMES = tuple(c.name for c in Ctx if c < CONTEXT_DIMENSIONLESS)
CANDIDATE_NAMES = (
    *(c.name for c in Col if c < CANDIDATE_DIMENSIONLESS),
    "LATE",
    "SLACK_MISS",
    "STEP_MISS",
)


@kernel
def cut(x):
    """``x`` cut to ±CLIP; NaN reads as +CLIP, the worst of most columns."""
    return max(x, -CLIP) if x <= CLIP else CLIP


@kernel
def feature(candidates, k, f):
    """Feature ``f`` of row ``k``."""
    if f == LATE:
        return max(cut(candidates[k, Col.TTFT]) - 1.0, 0.0)
    if f == SLACK_MISS:
        return max(-cut(candidates[k, Col.SLACK_AFTER]), 0.0)
    if f == STEP_MISS:
        return max(cut(candidates[k, Col.STEP_WITH]) - 1.0, 0.0)
    return cut(candidates[k, f])

"""What the guard looks at before and after a policy is asked, compiled: a fraction of a microsecond each."""

from __future__ import annotations

import numpy as np

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Col
from engine.jit.kernel import kernel

FINE, NOT_FINITE, OUTSIDE = 0, 1, 2
_C, _F, _INSTANCE = CONTEXT_DIMENSIONLESS, CANDIDATE_DIMENSIONLESS, int(Col.INSTANCE)


@kernel
def inspect(context, candidates, mask, context_bounds, candidate_bounds):
    """Whether a policy may be trusted with this question: FINE, NOT_FINITE (NaN or infinity) or OUTSIDE its bounds.

    :param context_bounds: float64 (2, C) or (0, 0): least and greatest value per dimensionless column;
        ``candidate_bounds`` (2, F) likewise, for the rows of instances that are allowed
    """
    for j in range(context.shape[0]):
        if not np.isfinite(context[j]):
            return NOT_FINITE
    outside = False
    bounded = context_bounds.shape[0] == 2
    if bounded:
        for j in range(_C):
            outside |= context[j] < context_bounds[0, j] or context[j] > context_bounds[1, j]
    for k in range(candidates.shape[0]):
        if mask[k] == 0:
            continue
        for j in range(candidates.shape[1]):
            if not np.isfinite(candidates[k, j]):
                return NOT_FINITE
        if bounded and candidates[k, _INSTANCE] >= 0.0:
            for j in range(_F):
                x = candidates[k, j]
                outside |= x < candidate_bounds[0, j] or x > candidate_bounds[1, j]
    return OUTSIDE if outside else FINE


@kernel
def fits(action, mask, scores):
    """Whether ``action`` is an allowed row and, where the policy scores rows, every allowed score is a number."""
    if action < 0 or action >= mask.shape[0] or mask[action] == 0:
        return False
    for k in range(scores.shape[0]):
        if mask[k] != 0 and np.isnan(scores[k]):
            action = -1
    return action >= 0


def widened(bounds: np.ndarray, margin: float) -> np.ndarray:
    """``bounds`` (2, n) with ``margin`` × width, at least ``margin`` × 1e-3, added on either side."""
    width = np.where(np.isfinite(bounds).all(axis=0), bounds[1] - bounds[0], 0.0)
    room = margin * np.maximum(width, 1e-3)
    return np.ascontiguousarray(np.stack([bounds[0] - room, bounds[1] + room]))

"""What is answered where a policy is not: it fails, it is late, or it chooses what is not allowed."""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Kind


def safe_choice(kind: int, candidates: np.ndarray, mask: np.ndarray) -> int:
    """An answer that is never wrong: change nothing, or place where the fewest tokens wait."""
    if kind in (Kind.REALLOCATE, Kind.TUNE):
        return 0
    instances = np.flatnonzero(mask[: len(mask) - 2])
    if len(instances) == 0:
        return int(np.flatnonzero(mask)[0])
    return int(instances[candidates[instances, Col.OUTSTANDING].argmin()])

"""Hand-made decisions for the tests of published systems."""

from __future__ import annotations

from typing import Any

import numpy as np
from decisions import context, instances, setting

from engine.core.columns import Col, Kind
from engine.core.kinds import Role
from policies import registry
from policies.rule import BoundPolicy

P, D, M = float(Role.PREFILL), float(Role.DECODE), float(Role.MIXED)
PLACE: dict[str, float] = {
    "PROMPT": 1000,
    "TTFT_SLO_S": 1.0,
    "TPOT_SLO_S": 0.1,
    "NOW_S": 5.0,
    "ARRIVAL_S": 5.0,
}


def bound(name: str, n: int = 4, **values: Any) -> BoundPolicy:
    return registry.get(name).bind(values, setting(n))


def place(**columns: float) -> np.ndarray:
    return context(Kind.PLACE_PREFILL, **(PLACE | columns))


def with_shed(rows: np.ndarray) -> np.ndarray:
    """The table of ``instances`` with a SHED row behind HOLD."""
    shed = np.zeros((1, rows.shape[1]))
    shed[0, Col.INSTANCE], shed[0, Col.IS_SHED] = -1.0, 1.0
    return np.vstack([rows, shed])


def roles_table(*rows: dict[str, float]) -> np.ndarray:
    """REALLOCATE rows as the core builds them: KEEP, then every instance with each other role."""
    listed = []
    for i, row in enumerate(rows):
        listed += [row | {"INSTANCE": i, "NEW_ROLE": float(new)} for new in range(4) if new != int(row["ROLE"])]
    table = instances(*listed, last=Col.IS_KEEP)
    return np.vstack([table[-1:], table[:-1]])

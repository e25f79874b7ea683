"""What of a promised gain arrives: attainment over that of the first policy, on the surrogate and on the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.fidelity.errors import Case

#: Smaller promises than this are within what runs differ by.
LEAST_GAIN = 0.05


def promise_of(
    cases: Sequence[Case],
    ours: Mapping[Case, Mapping[str, Any]],
    theirs: Mapping[Case, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """One row a case, and the share of the promised gains of at least five points that arrived.

    A row's ``promised`` is the surrogate's attainment, None for a router of others; ``arrived`` the median over the
    engine's repetitions, which lie from ``low`` to ``high``. Gains are over the first policy at the same load.

    :param ours: the surrogate's answer, by case
    :param theirs: the engine's, one for each repetition
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        each = [float(entry["attainment"]) for entry in theirs[case]]
        found = {
            "promised": float(ours[case]["attainment"]) if case in ours else None,
            "arrived": float(np.median(each)),
        }
        first = next((r for r in rows if (r["scenario"], r["rate"]) == (case.scenario, case.rate)), found)
        rows.append(
            {"scenario": case.scenario, "load": case.load, "rate": case.rate, "policy": case.policy}
            | found
            | {
                "low": min(each),
                "high": max(each),
                "promised_gain": None
                if None in (found["promised"], first["promised"])
                else _gain(found, first, "promised"),
                "arrived_gain": _gain(found, first, "arrived"),
            }
        )
    large = [r for r in rows if r["promised_gain"] is not None and abs(r["promised_gain"]) >= LEAST_GAIN]
    promised = sum(abs(r["promised_gain"]) for r in large)
    arrived = sum(float(np.sign(r["promised_gain"])) * r["arrived_gain"] for r in large)
    return {"rows": rows, "share_arrived": arrived / promised if large else None}


def _gain(found: Mapping[str, Any], first: Mapping[str, Any], name: str) -> float:
    return float(found[name] - first[name])

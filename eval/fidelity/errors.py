"""The comparison of surrogate and engine: errors with the engine's own noise beside them, ranking, sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from engine.common.files import digest_of

PERCENTILES = (50, 90, 99)
#: Cases beyond this share of the policy's own goodput are shown, but not part of the headline errors.
WITHIN = 0.8


@dataclass(frozen=True)
class Case:
    """:param load: share of the median goodput of the compared policies, on the surrogate
    :param own_load: rate ÷ goodput of this very policy there
    """

    scenario: str
    policy: str
    load: float
    rate: float
    own_load: float
    n_requests: int

    @property
    def key(self) -> str:
        return digest_of([self.scenario, self.policy, self.rate, self.n_requests])[:16]


def _figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """The compared figures of one run: latencies in ms, attainment as a share, goodput per second."""
    found = {"attainment": entry["attainment"], "goodput": entry["goodput"]}
    for name in ("ttft", "tpot"):
        values = entry[f"{name}_ms"] or [float("nan")]
        found |= {f"{name}_p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return found


def row_of(case: Case, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the table: engine (median of its repetitions), surrogate, error and the engine's own noise.

    ``ours``: one run of the surrogate, or one for every repetition (the error is then the median of theirs).

    Errors and noise are relative, of attainment absolute. Noise: mean distance of a repetition from the median of
    the others.
    """
    models, runs = [_figures(entry) for entry in ours], [_figures(entry) for entry in theirs]
    figures = {}
    for name in models[0]:
        model = np.array([m[name] for m in models])
        values = np.array([run[name] for run in runs])
        engine = float(np.median(values))
        rest = [float(np.median(np.delete(values, k))) for k in range(len(values))]
        away = values - np.array(rest)
        if name != "attainment":
            away = away / np.maximum(np.abs(rest), 1e-12)
        surrogate, pairs = float(np.median(model)), engine if len(model) == 1 else values
        off = model - pairs if name == "attainment" else (model - pairs) / np.maximum(pairs, 1e-12)
        error = float(np.median(off))
        figures[name] = {
            "engine": engine, "surrogate": surrogate, "error": error, "noise": float(np.abs(away).mean())
        }  # fmt: skip
    names = theirs[0]["sources"]
    return {
        "scenario": case.scenario,
        "policy": case.policy,
        "load": case.load,
        "own_load": case.own_load,
        "rate": case.rate,
        "requests": case.n_requests,
        "figures": figures,
        "sources": {name: float(np.mean([entry["sources"][name] for entry in theirs])) for name in names},
    }


def _tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(kendalltau(a, b).statistic)


def _ranking(
    ours: Mapping[Case, Sequence[Mapping[str, Any]]], theirs: Mapping[Case, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Kendall's tau of the policies, by attainment and by mean latency in units of the targets, over all cases: the
    engine's figure is the median over its repetitions, as in the table."""
    policies = list(dict.fromkeys(case.policy for case in ours))
    result: dict[str, Any] = {}
    for name in ("attainment", "slowness"):
        model = [float(np.mean([entry[name] for c in ours if c.policy == p for entry in ours[c]])) for p in policies]
        n = min(len(runs) for runs in theirs.values())
        each = [
            [float(np.mean([theirs[c][k][name] for c in theirs if c.policy == p])) for p in policies] for k in range(n)
        ]
        engine = np.median(each, axis=0).tolist()
        itself = [_tau(each[i], each[j]) for i in range(n) for j in range(i)]
        known = [t for t in itself if t is not None]
        result[name] = {
            "tau": _tau(engine, model),
            "engine_against_itself": float(np.mean(known)) if known else None,
            "engine": dict(zip(policies, engine, strict=True)),
            "surrogate": dict(zip(policies, model, strict=True)),
        }
    return result


def summary_of(
    table: Sequence[Mapping[str, Any]],
    ours: Mapping[Case, Sequence[Mapping[str, Any]]],
    theirs: Mapping[Case, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Errors over the cases within 80 % of a policy's own goodput, noise beside them, ranking, sources."""
    within = [row for row in table if row["own_load"] <= WITHIN + 1e-9]
    errors = {}
    for name in table[0]["figures"]:
        cells = [row["figures"][name] for row in within]
        if cells:
            size = np.abs([c["error"] for c in cells])
            errors[name] = {
                "mean_error": float(np.mean([c["error"] for c in cells])),
                "mean_abs_error": float(size.mean()),
                "max_abs_error": float(size.max()),
                "noise": float(np.mean([c["noise"] for c in cells])),
            }
    names = table[0]["sources"]
    return {
        "cases": len(table),
        "cases_within": len(within),
        "errors": errors,
        "ranking": _ranking(ours, theirs),
        "sources": {name: float(np.mean([row["sources"][name] for row in table])) for name in names},
        "step_spread": float(np.sqrt(np.mean([row["sources"]["step"] ** 2 for row in table]))),
    }

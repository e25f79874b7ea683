"""What a trace looks like: the figures by which workloads are compared and generators are checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from env.workload.hashing import flat_index

if TYPE_CHECKING:
    from env.workload.trace import Trace

__all__ = ["describe", "gap_cv", "idc", "reused_tokens"]


def gap_cv(arrival_s: np.ndarray) -> float:
    """Standard deviation over mean of the gaps between arrivals; 1 for Poisson, nan below three arrivals."""
    gaps = np.diff(arrival_s)
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else float("nan")


def idc(arrival_s: np.ndarray, window_s: float) -> float:
    """Index of dispersion: variance over mean of the counts in windows; 1 for Poisson at every window."""
    if len(arrival_s) < 2:
        return float("nan")
    bins = int((arrival_s[-1] - arrival_s[0]) // window_s)
    if bins < 2:
        return float("nan")
    place = ((arrival_s - arrival_s[0]) / window_s).astype(np.int64)
    counts = np.bincount(place[place < bins], minlength=bins)
    return float(counts.var() / counts.mean())


def reused_tokens(trace: Trace) -> np.ndarray:
    """Prompt tokens an infinite cache would find, i8 (n,): leading blocks seen in an earlier row."""
    row, index = flat_index(trace.hash_start, trace.hash_n)
    values, block = np.unique(trace.hashes, return_inverse=True)  # stored entries: rows may share them
    block = block[index]
    first = np.empty(len(values), np.int64)
    first[block[::-1]] = row[::-1]  # the last write wins, which is the earliest row
    seen = first[block] < row  # entries are chained, so the seen ones of a row are its leading ones
    blocks = np.bincount(row[seen], minlength=trace.n)
    return np.minimum(blocks * trace.hash_tokens, trace.prompt)


def _lengths(tokens: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = np.percentile(tokens, [50, 90, 99])
    return {
        "mean": float(tokens.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(tokens.max()),
    }


def describe(trace: Trace) -> dict[str, Any]:
    """Figures of a non-empty trace.

    ``rate`` (req/s over first to last open-loop arrival), ``cv`` of gaps, ``idc`` at 1, 10 and 60 s,
    ``prompt`` and ``output`` (mean, p50, p90, p99, max tokens), ``reuse`` (share of prompt tokens an
    infinite cache would serve), ``n``, ``n_roots``, ``classes`` (rows per class).
    """
    if not trace.n:
        return {"n": 0, "n_roots": 0}
    roots = trace.arrival_s[: trace.n_roots]
    span = float(roots[-1] - roots[0])
    return {
        "n": trace.n,
        "n_roots": trace.n_roots,
        "rate": trace.n_roots / span if span > 0 else float("nan"),
        "cv": gap_cv(roots),
        "idc": {w: idc(roots, w) for w in (1, 10, 60)},
        "prompt": _lengths(trace.prompt),
        "output": _lengths(trace.output),
        "reuse": float(reused_tokens(trace).sum() / trace.prompt.sum()),
        "classes": np.bincount(trace.cls).tolist(),
    }

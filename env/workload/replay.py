"""``kind: trace``: rows of a file in their order, on their own clock or on another's (body swap)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from env.workload.arrivals import ArrivalSpec
from env.workload.base import Split, WorkloadBase, check_request, stream
from env.workload.source import SourceSpec
from env.workload.trace import Trace, classes_by_name, concat, scale_rate


class TraceSpec(WorkloadBase):
    """A window of a trace file, drawn at random within the split.

    Without ``arrival`` the file's own arrivals are stretched to the asked rate (``meta["time_factor"]``).
    With it only the bodies are the file's (DistServe, MuxWise); ``run`` then bounds how many consecutive
    rows stay together: long runs keep the locality of prefix reuse, short ones mix times of the day.
    """

    kind: Literal["trace"]
    source: SourceSpec
    window: tuple[float, float] | None = None
    split_at: tuple[float, float] = (0.6, 0.8)
    arrival: ArrivalSpec | None = None
    run: int | None = Field(default=None, ge=1)

    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        check_request(rate, n)
        rng = stream(seed, split)
        part = classes_by_name(self.source.part(split, self.split_at, self.window), classes)
        if self.arrival is None or self.run is None:
            trace = _random_window(part, n, rng)
        else:
            trace = body_runs(part, n, self.run, rng)
        if self.arrival is not None:
            trace = body_swap(trace, self.arrival.times(rate, trace.n_roots, rng, split))
        elif trace.n_roots > 1:
            trace = scale_rate(trace, rate)
        return replace(trace.compact(), meta=trace.meta | {"seed": seed, "split": split})


def _random_window(part: Trace, n: int, rng: np.random.Generator) -> Trace:
    starts = 1
    if part.n >= n:  # the last start from which n requests, turns included, still follow
        sizes = np.bincount(part.owner(), minlength=part.n_roots)
        remaining = sizes[::-1].cumsum()[::-1]
        starts = int((remaining >= n).sum())
    start = int(rng.integers(starts))
    trace = part.take(n, start)
    return replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])


def body_runs(part: Trace, n: int, run: int, rng: np.random.Generator) -> Trace:
    """``n`` bodies as contiguous runs of ``run`` rows, each from a random place of the part."""
    picks = []
    for size in (*(run for _ in range(n // run)), n % run):
        if size:
            picks.append(_random_window(part, size, rng))
    joined = concat(picks) if part.n_roots < part.n else _end_to_end(picks)
    return replace(joined, meta=part.meta | {"run": run}, name=part.name)


def _end_to_end(picks: list[Trace]) -> Trace:
    """Runs without turns share one ``hashes`` array: blocks of different runs may match, as in the file."""
    columns = ("prompt", "output", "cls", "ttft_s", "tpot_s", "next_turn", "think_s", "hash_start", "hash_n")
    joined: dict[str, Any] = {column: np.concatenate([getattr(t, column) for t in picks]) for column in columns}
    n = len(joined["prompt"])
    return replace(picks[0], arrival_s=np.zeros(n), n_roots=n, **joined)


def body_swap(bodies: Trace, arrival_s: np.ndarray) -> Trace:
    """The bodies in their order on other arrivals.

    :param arrival_s: f8 (n_roots,), sorted, seconds
    """
    moved = np.concatenate([arrival_s, np.full(bodies.n - bodies.n_roots, np.inf)])
    return replace(bodies, arrival_s=moved, meta=bodies.meta | {"body_swap": True})

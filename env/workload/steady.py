"""Workloads with sessions in the long run: when their load has settled, and a stretch that is settled at once.

Sessions begin at the asked rate, their later turns come for as long as sessions last. A run that begins empty
therefore sees the load rise, in number and more so in tokens, since late turns carry all that was said before them.
Open-loop requests have no later turns: their load is there from the first second.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import SlalomError
from env.workload.base import MOST_REQUESTS
from env.workload.trace import COLUMNS, Trace

SETTLED = 0.99  # of the tokens that come per second in the long run
_SAMPLE = 20_000  # requests that tell how long sessions last


@dataclass(frozen=True)
class Settling:
    """How the load of a workload rises; of an open-loop one: 1 and 0.

    :param turns: requests that come of one arrival
    :param settle_s: seconds after which ``SETTLED`` of the tokens per second come that come in the long run
    """

    turns: float = 1.0
    settle_s: float = 0.0


def offsets(trace: Trace, turn_s: float) -> np.ndarray:
    """Seconds from the beginning of its session to each request, f8 (n,).

    :param turn_s: from sending a turn to its answer
    """
    since = np.zeros(trace.n)
    for parents, turns in trace.generations():
        since[turns] = since[parents] + turn_s + trace.think_s[parents]
    return since


def settling(trace: Trace, turn_s: float) -> Settling:
    """How the load of the workload rises that ``trace`` is a sample of.

    While sessions begin at a steady rate, the tokens that come per second after ``t`` seconds are to those of the long
    run as the tokens of turns less than ``t`` after the beginning of their session are to all.

    :param turn_s: as in :func:`offsets`
    """
    if trace.n_roots == trace.n:
        return Settling()
    since = offsets(trace, turn_s)
    order = np.argsort(since, kind="stable")
    come = np.cumsum(trace.prompt[order] + trace.output[order], dtype=np.float64)
    settled = since[order[np.searchsorted(come, SETTLED * come[-1])]]
    return Settling(trace.n / trace.n_roots, float(settled))


def stream(build: Callable[[int], Trace], n: int) -> Trace:
    """The last ``n`` requests of a settled stretch as open-loop arrivals: the mix of the long run from the first on.

    Each turn comes when it would if answers took no time. Sessions that began before find nothing in the caches at
    first: about as long as sessions last, this is more work than later. A trace without sessions is given as it is.

    :param build: the workload, by number of requests
    :return: fewer than ``n`` where the workload has no more
    :raises SlalomError: the workload is refused for something else than its length
    """
    if (trace := longest(build, n)).n_roots == trace.n:
        return trace
    trace = longest(build, max(n, _SAMPLE))
    rising = math.ceil(trace.n * settling(trace, 0.0).settle_s / max(trace.duration_s, 1e-9))
    if rising + n > trace.n:
        trace = longest(build, rising + n)
    at = trace.arrival_s[trace.owner()] + offsets(trace, 0.0)
    order = np.argsort(at, kind="stable")
    rows = order[: np.searchsorted(at[order], trace.duration_s, side="right")][-n:]
    columns = {column: getattr(trace, column)[rows] for column in COLUMNS}
    columns |= {"arrival_s": at[rows] - at[rows[0]], "next_turn": np.full(len(rows), -1)}
    columns["think_s"] = np.zeros(len(rows))
    return replace(trace, n_roots=len(rows), **columns).compact()


def check_settles(settle_s: float, n: float) -> None:
    """Refuse sessions whose load settles after ``settle_s`` if a run of ``n`` requests, so long, is too long."""
    if n > MOST_REQUESTS:
        fix = f"a run has then {n:,.0f} requests, over {MOST_REQUESTS:,}: shorten its sessions, or ask for single rates"
        raise SlalomError("workload", f"its load settles in {settle_s / 3600:.3g} hours", fix)


def sample(build: Callable[[int], Trace]) -> Trace:
    """Enough requests to tell how the load rises, or as many as the workload has."""
    trace = longest(build, 500)
    return trace if trace.n_roots == trace.n else longest(build, _SAMPLE)


def longest(build: Callable[[int], Trace], n: int) -> Trace:
    """``n`` requests, or as many as the workload has; raises as :func:`most_of`."""
    try:
        return build(n)
    except SlalomError as error:
        if not error.field.startswith("trace"):
            raise
    return build(most_of(build, n))


def most_of(build: Callable[[int], object], n: int, least: int = 1) -> int:
    """The most requests, at most ``n``, that a workload gives; a recorded trace ends.

    :param least: fewer than so many are not tried
    :raises SlalomError: the workload is refused for something else than its length
    """

    def gives(n: int) -> bool:
        try:
            build(n)
        except SlalomError as error:
            if not error.field.startswith("trace"):
                raise
            return False
        return True

    if gives(n):
        return n
    return bisect_left(range(n), True, lo=least + 1, key=lambda n: not gives(n)) - 1

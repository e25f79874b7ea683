"""Goodput in every phase: the largest rate at which each phase of a drifting workload, alone, meets the target.

A mean over a day hides a bad night. Here every stretch of the workload that has its own rate and mix
(``workload.phases`` of kind ``shift``) is a window, and what counts is the worst of them: a policy that is slow to
follow loses in the phase that has just begun. Of the definition of sustained goodput (``env.measure.sustained``) a
drifting day keeps clause (a), phase by phase; (b), nobody waits too long, is left unserved or refused late; and (d),
the worst class and the worst fifth of the prompts by length. Clause (c) asks whether a backlog grows under a load that
stays what it is: here a backlog that grows misses its targets in the phase that follows.

:func:`standing` is all of this in one number, for searches and for the figure alike. The search over rates is that of
``env.measure.goodput``; every policy meets the same arrivals at the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.errors import SlalomError
from env.measure.goodput import largest_rate
from env.measure.metrics import absolute_s, outcomes
from env.measure.sustained import DEFINITION, sample_of, worst_of
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import RunResult, bind_policy, simulate
from env.workload import Trace

#: Share of requests within both targets.
GOAL = 0.9

#: Arrivals are random: a last phase that lacks less than this share of its length is complete.
_SPREAD = 0.05
_LEAST_SENT = 20  # requests below which a share says nothing
_LEAST_RUN = 100  # requests below which a run says nothing of its phases: whoever holds no rate above holds none
_DOUBLING = 0.1  # what each doubling of the longest wait costs from the longest allowed on
_WRONG = 0.1  # what a request costs that is left unserved or refused late


@dataclass(frozen=True)
class Phase:
    """A stretch of a run, in seconds, and its requests: ``good`` of those ``sent`` met both targets."""

    start_s: float
    end_s: float
    sent: int
    good: int

    @property
    def share(self) -> float:
        return self.good / self.sent


def phases_of(trace: Trace) -> list[tuple[float, float]]:
    """(start, end) in seconds of every phase that ``trace`` covers.

    :raises SlalomError: a workload without phases, or a run that is shorter than its first
    """
    phases = trace.meta.get("phases")
    if not phases:
        raise SlalomError("workload", trace.name, "it has no phases; name a scenario whose workload is of kind shift")
    ends = np.cumsum([float(phase["duration"]) for phase in phases])
    starts = np.concatenate([[0.0], ends[:-1]])
    last = float(trace.arrival_s[trace.n_roots - 1])
    found = [(float(a), float(b)) for a, b in zip(starts, ends, strict=True) if last >= b - _SPREAD * (b - a)]
    if not found:
        raise SlalomError("requests", trace.n, f"the run ends at {last:.0f} s, in its first phase; simulate more")
    return found


def by_phase(run: RunResult, windows: Sequence[tuple[float, float]]) -> list[Phase]:
    """What became of the requests that arrived in each window, nothing left out; windows with next to none are."""
    found = outcomes(run, warmup=0.0)
    arrival = absolute_s(run, "arrival")[found.rows]
    result = []
    for start, end in windows:
        inside = (arrival >= start) & (arrival < end)
        if inside.sum() >= _LEAST_SENT:
            result.append(Phase(start, end, int(inside.sum()), int(found.good[inside].sum())))
    return result


def worst(phases: Sequence[Phase]) -> float:
    """Share within targets in the worst phase."""
    return min(phase.share for phase in phases)


def standing(scenario: Scenario, run: RunResult, phases: Sequence[Phase], goal: float = GOAL) -> float:
    """At least ``goal`` exactly when clauses (a), (b) and (d) hold; the further below, the worse the worst of them.

    :param phases: those of ``run``
    """
    sample = sample_of(run, warmup=0.0)
    facts = worst_of([sample])
    group = min(share for _, share in (facts["worst_class"], facts["worst_length"]))
    wait = goal - _DOUBLING * math.log2(max(sample.tail, 1e-9) / scenario.tail_factor)
    found = min(worst(phases), group + DEFINITION.slack, wait)
    if sample.unserved or sample.refused_late:
        found = min(found, goal) - _WRONG
    return found


def play_days(
    scenario: Scenario, policy: Any, rate: float, seed: int, split: Literal["train", "valid", "test"], days: float = 1
) -> tuple[RunResult, list[Phase]]:
    """One run over ``days`` episodes, and the phases that it covers.

    :raises SlalomError: the workload has no episode of its own length
    """
    natural_s = scenario.workload.natural_s
    if natural_s <= 0.0:
        raise SlalomError("workload.duration_s", natural_s, "give the length of an episode in seconds")
    trace = build_trace(scenario, rate, math.ceil(rate * natural_s * days), seed, split)
    run = simulate(scenario, policy, rate=rate, seed=seed, split=split, trace=trace)
    return run, by_phase(run, phases_of(trace))


def phase_goodput(
    scenario: Scenario,
    policy: Any,
    seeds: Sequence[int],
    *,
    start: float | None = None,
    goal: float = GOAL,
    split: Literal["train", "valid", "test"] = "test",
    days: int = 1,
    tolerance: float = 0.02,
    on_run: Callable[[RunResult, list[Phase]], None] = lambda run, phases: None,
) -> list[float]:
    """Largest rate in requests per second whose :func:`standing` is ``goal``, for each of ``seeds``; 0: none.

    :param start: where the search begins (None: the scenario's reference rate)
    :param on_run: told of every run
    """
    bound = bind_policy(policy, scenario)
    found: list[float] = []
    for seed in seeds:

        def attainment(rate: float, seed: int = seed) -> float:
            if 0.0 < rate * scenario.workload.natural_s * days < _LEAST_RUN:
                return 0.0
            run, phases = play_days(scenario, bound, rate, seed, split, days)
            on_run(run, phases)
            return standing(scenario, run, phases, goal) if phases else 0.0

        near = found[-1] if found and found[-1] > 0.0 else start or scenario.reference_rate
        found.append(largest_rate(attainment, near, goal, tolerance=tolerance, step=1.15))
    return found

"""DistServe's replanning on workload shift, walked through a scenario's workload and measured on the surrogate.

A profiler watches request rate, mean prompt and mean output; when one of them has changed significantly, the
placement algorithm is run again on the recent requests (OSDI 2024, section 4.3). The paper gives no threshold:
here a change is significant above ``threshold`` (20 %) *and* three standard errors of the two means compared.
The window (inferred; the paper speaks of hours, 5 to 10 minutes are enough for means) is looked at in quarters: the
latest two are compared with the requests that the plan in force was made for, and planned on once they agree with
each other, or three quarters after the first sign where the load keeps moving.

What is planned is the split of the scenario's own instances into prefill and decode, by the goodput of one instance
of each phase alone (Algorithm 1, for a given number of GPUs): the split with the most requests per second, and of
equals the one nearest to what is. Weights stay where they are, so a switch is a change of roles.

Simulated: what each plan serves, the drain of an instance that changes its role, and the profile's role switch. Not:
the time of the search, a reload of weights (tensor parallelism stays), and that a profiler at run time learns of output
lengths only as requests end (here they count by arrival). The first plan holds from the start, as if known before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from engine.errors import SlalomError
from env.measure.metrics import absolute_s, outcomes
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from env.workload import Trace, scale_rate
from eval.placement.disaggregation import phase_goodput, steady_requests
from eval.placement.schedule import scheduled
from policies.rule import BoundPolicy

WINDOW_S = 300.0
#: Requests that the latest half of a window must hold on average: fewer say little about a 90th percentile.
LEAST_REQUESTS = 100
_ERRORS = 3.0
_WATCHED = ("rate", "prompt", "output")

Split = tuple[int, ...]  # prefill instances of each profile


class Load(NamedTuple):
    """What a stretch of requests asks for: rate per second, mean tokens; and the relative standard error of each."""

    rate: float
    prompt: float
    output: float
    errors: tuple[float, float, float]


class Shift(NamedTuple):
    """The load has changed; ``changed`` holds the relative change of what did. The first plan has none."""

    at_s: float
    load: Load
    changed: dict[str, float]


def load_of(trace: Trace, start_s: float, end_s: float) -> Load:
    """The load of the requests that arrive in ``[start_s, end_s)``, follow-up turns counted for their lengths."""
    part = trace.slice_time(start_s, end_s)
    gaps = np.diff(part.arrival_s[: part.n_roots])
    means, errors = [part.n_roots / (end_s - start_s)], [_error(gaps)]
    for tokens in (part.prompt, part.output):
        means.append(float(tokens.mean()) if part.n else 0.0)
        errors.append(_error(tokens))
    return Load(means[0], means[1], means[2], (errors[0], errors[1], errors[2]))


def _error(values: np.ndarray) -> float:
    """Relative standard error of the mean; infinite where there is nothing to go by."""
    if len(values) < 3 or values.mean() <= 0.0:
        return math.inf
    return float(values.std(ddof=1) / values.mean() / math.sqrt(len(values)))


def changes(before: Load, now: Load, threshold: float) -> dict[str, float]:
    """Relative change of rate, prompt and output, as far as it is significant."""
    found = {}
    for k, (name, old, new) in enumerate(zip(_WATCHED, before[:3], now[:3], strict=True)):
        error = math.hypot(before.errors[k] * old, now.errors[k] * new)
        if old > 0.0 and abs(new / old - 1.0) > threshold and abs(new - old) > _ERRORS * error:
            found[name] = new / old - 1.0
    return found


def find_shifts(trace: Trace, window_s: float, threshold: float = 0.2) -> list[Shift]:
    """When to plan: first on the first window, then after every significant change of the load.

    :raises SlalomError: a threshold that is not positive, or a window that is too short or too long for ``trace``
    """
    if not (math.isfinite(threshold) and threshold > 0.0):
        raise SlalomError("--threshold", threshold, "give a relative change above 0, e.g. 0.2")
    if not (math.isfinite(window_s) and 0.0 < 2.0 * window_s <= trace.duration_s):
        longest = trace.duration_s / 2.0
        raise SlalomError("--window", window_s, f"give more than 0 and at most {longest:.6g} s, half of the workload")
    if trace.n_roots * window_s / trace.duration_s < 2 * LEAST_REQUESTS:
        least = 2 * LEAST_REQUESTS * trace.duration_s / trace.n_roots
        raise SlalomError("--window", window_s, f"too few requests to plan on; give at least {least:.4g} s")
    step = window_s / 4.0
    found = [Shift(window_s, load_of(trace, 0.0, window_s), {})]
    signs = 0  # quarters in a row in which the load was another
    for quarter in range(5, int(trace.duration_s / step)):  # what is found at the very end helps nobody
        now = quarter * step
        recent = load_of(trace, now - 2.0 * step, now)
        changed = changes(found[-1].load, recent, threshold)
        signs = signs + 1 if changed else 0
        if not changed:
            continue
        moving = changes(load_of(trace, now - 2.0 * step, now - step), load_of(trace, now - step, now), threshold)
        if not moving or signs > 3:
            found.append(Shift(now, recent, changed))
            signs = 0
    return found


def repeated(recent: Trace, n: int) -> Trace:
    """``recent`` over and over, ``n`` requests in all; as it is where turns follow, or it is longer.

    :raises SlalomError: fewer than two requests
    """
    if recent.n != recent.n_roots or recent.n >= n:
        return recent
    if recent.n < 2:
        raise SlalomError("--window", recent.n, "fewer than two requests in half a window; make it longer")
    span = recent.duration_s + recent.duration_s / (recent.n - 1)
    rows = np.arange(n) % recent.n
    arrival = recent.arrival_s[rows] + span * (np.arange(n) // recent.n)
    return Trace.make(
        arrival, recent.prompt[rows], recent.output[rows], cls=recent.cls[rows], ttft_s=recent.ttft_s[rows],
        tpot_s=recent.tpot_s[rows],
    )  # fmt: skip


def capacity(split: Split, have: Sequence[int], prefill: Sequence[float], decode: Sequence[float]) -> float:
    """Requests per second that neither phase limits below: min(Σ k · g_P, Σ (n − k) · g_D) over the profiles.

    :param have: instances of each profile, and ``prefill`` and ``decode`` the goodput of one of them
    """
    by_prefill = sum(k * g for k, g in zip(split, prefill, strict=True))
    by_decode = sum((n - k) * g for k, n, g in zip(split, have, decode, strict=True))
    return min(by_prefill, by_decode)


def splits(have: Sequence[int]) -> list[Split]:
    """Every way to leave at least one instance to each phase."""
    return [k for k in product(*(range(n + 1) for n in have)) if 0 < sum(k) < sum(have)]


def best_split(have: Sequence[int], prefill: Sequence[float], decode: Sequence[float], now: Split | None) -> Split:
    """The split of most capacity; of equals the one with the fewest role changes from ``now``."""
    start = now or tuple(n // 2 for n in have)

    def worth(split: Split) -> tuple[float, int]:
        moves = sum(abs(k - old) for k, old in zip(split, start, strict=True))
        return capacity(split, have, prefill, decode), -moves

    return max(splits(have), key=worth)


@dataclass(frozen=True)
class _World:
    """The scenario with nothing but roles to decide, and its instances by profile."""

    scenario: Scenario
    have: tuple[int, ...]
    profile_of: tuple[int, ...]

    @staticmethod
    def of(scenario: Scenario) -> _World:
        profile_of = tuple(place.profile for place in scenario.placements())
        if len(profile_of) < 2:
            raise SlalomError("--replan", scenario.name, "one instance cannot be split; choose a scenario with more")
        start = sorted(scenario.usable_roles())
        levers = {"reallocate": True, "roles": ["prefill", "decode"], "start_roles": start}
        fixed = scenario.with_overrides({"decisions": levers, "min_prefill": 1, "min_decode": 1})
        return _World(fixed, tuple(profile_of.count(p) for p in range(max(profile_of) + 1)), profile_of)

    def label(self, split: Split) -> str:
        """E.g. ``5+3``: five prefill and three decode instances; with the profile where there are several."""
        names = [f" {name}" if len(self.have) > 1 else "" for name in self.scenario.profile_names()]
        return ", ".join(f"{k}+{n - k}{x}" for k, n, x in zip(split, self.have, names, strict=True))

    def goodputs(self, recent: Trace, goal: float) -> tuple[list[float], list[float]]:
        """Goodput of one instance of each profile, for prefill and for decode alone, on the ``recent`` requests."""
        first = self.scenario.cluster[0]
        long = repeated(recent, steady_requests(self.scenario))
        effort: dict[str, Any] = {
            "goal": goal, "prefill_tokens": first.prefill_tokens, "max_batch": first.max_batch,
            "requests_at": lambda rate: scale_rate(long, rate),
        }  # fmt: skip
        profiles = self.scenario.load_profiles()
        prefill, decode = (
            [phase_goodput(self.scenario, profile, phase, **effort) for profile in profiles]
            for phase in ("prefill", "decode")
        )
        return prefill, decode

    def plan(self, split: Split, goodputs: tuple[list[float], list[float]], share: float) -> dict[str, Any]:
        """What is told of a plan: requests per second that it holds, and the share within targets under it."""
        held = capacity(split, self.have, *goodputs)
        return {"split": self.label(split), "capacity": held, "within_targets": share}

    def served(self, trace: Trace, plans: Sequence[tuple[float, Split]]) -> _Served:
        """What becomes of ``trace`` under ``plans``."""
        policy = scheduled(plans, self.profile_of, self.scenario.cluster[0].prefill_tokens)
        return _served(self.scenario, policy, trace)


class _Served(NamedTuple):
    """Arrival in seconds and whether both targets were met, for every request sent; role changes that were made."""

    arrival_s: np.ndarray
    good: np.ndarray
    role_changes: int

    def share(self, start_s: float = 0.0, end_s: float = math.inf) -> float:
        inside = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        return float(self.good[inside].mean()) if inside.any() else math.nan


def _served(scenario: Scenario, policy: Any, trace: Trace) -> _Served:
    run = simulate(scenario, policy, rate=trace.n_roots / trace.duration_s, trace=trace)
    found = outcomes(run, warmup=0.0)
    return _Served(absolute_s(run, "arrival")[found.rows], found.good, int(run.cluster["n_switches"]))


def planned(
    scenario: Scenario, trace: Trace, window_s: float, threshold: float = 0.2, goal: float = 0.9
) -> tuple[BoundPolicy, int]:
    """(the policy that follows what replanning makes of ``trace``, number of plans), with the scenario's own levers.

    Which split is best does not depend on the rate, so the plans hold for the same load at another rate too.
    """
    world = _World.of(scenario)
    plans: list[tuple[float, Split]] = []
    for shift in find_shifts(trace, window_s, threshold):
        recent = trace.slice_time(shift.at_s - window_s / 2.0 if plans else 0.0, shift.at_s)
        old = plans[-1][1] if plans else None
        new = best_split(world.have, *world.goodputs(recent, goal), old)
        if new != old:
            plans.append((shift.at_s if plans else 0.0, new))
    return scheduled(plans, world.profile_of, scenario.cluster[0].prefill_tokens), len(plans)


def _walk(world: _World, trace: Trace, window_s: float, threshold: float, goal: float) -> dict[str, Any]:
    """Timeline of one workload: what changed when, what was planned, and what came of it."""
    shifts = find_shifts(trace, window_s, threshold)
    ends = [*(shift.at_s for shift in shifts[1:]), math.inf]
    plans: list[tuple[float, Split]] = []
    runs: list[_Served] = []  # under the first plan, the first two, ...
    timeline: list[dict[str, Any]] = []
    spent = 0.0
    for shift, end in zip(shifts, ends, strict=True):
        first = not plans
        begin = time.perf_counter()
        recent = trace.slice_time(0.0 if first else shift.at_s - window_s / 2.0, shift.at_s)
        goodputs = world.goodputs(recent, goal)
        old = None if first else plans[-1][1]
        new = best_split(world.have, *goodputs, old)
        spent += time.perf_counter() - begin
        # The first plan holds from the start, for whoever replans and whoever does not.
        row: dict[str, Any] = {"at_s": 0.0 if first else shift.at_s}
        row |= {name: shift.load[k] for k, name in enumerate(_WATCHED)}
        row |= {"changed": shift.changed, "before": None, "switched_at_no_cost": None}
        if new != old:
            plans.append((row["at_s"], new))
            runs.append(world.served(trace, plans))
        if old is not None and new != old:
            row["before"] = world.plan(old, goodputs, runs[-2].share(shift.at_s, end))
            alone = trace.slice_time(shift.at_s, min(end, trace.duration_s))
            row["switched_at_no_cost"] = world.served(alone, [(0.0, new)]).share()
        row["plan"] = world.plan(new, goodputs, runs[-1].share(row["at_s"], end))
        timeline.append(row)
    fixed = {split: world.served(trace, [(0.0, split)]).share() for split in splits(world.have)}
    hindsight = max(fixed, key=lambda split: fixed[split])
    return {
        "timeline": timeline,
        "first_plan_kept": runs[0].share(),
        "planned_anew": runs[-1].share(),
        "best_fixed": fixed[hindsight],
        "best_fixed_split": world.label(hindsight),
        "all_mixed": _served(world.scenario, "chunked", trace).share(),
        "role_changes": runs[-1].role_changes,
        "planning_s": spent / len(shifts),
    }


def replan(
    scenario: Scenario,
    *,
    rate: float | None = None,
    window_s: float | None = None,
    threshold: float = 0.2,
    goal: float = 0.9,
    n_requests: int | None = None,
    seeds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Walk ``seeds`` workloads of the scenario with and without replanning, see the module docstring.

    :param rate: requests per second (by default the scenario's reference rate)
    :param window_s: by default 300 s, or a tenth of the workload where that is less
    :param threshold: relative change of rate, mean prompt or mean output that counts
    :param goal: share of requests that the planner wants within each target
    :param n_requests: of one workload; by default ten times the scenario's, for shifts are slow
    :return: JSON-ready; per workload its timeline and the shares of requests with both targets met: first plan kept,
        planned anew, the best fixed split in hindsight, and all instances mixed (``chunked``, not tuned)
    :raises SlalomError: one instance only; bad rate, goal, window or threshold
    """
    if not 0.0 < goal < 1.0:
        raise SlalomError("goal", goal, "give a share of requests between 0 and 1, e.g. 0.9")
    asked = scenario.reference_rate if rate is None else rate
    if not (math.isfinite(asked) and asked > 0.0):
        raise SlalomError("--rate", asked, "give a positive number of requests per second")
    world = _World.of(scenario)
    n = n_requests or 10 * scenario.n_requests
    window = min(WINDOW_S, n / asked / 10.0) if window_s is None else window_s
    workloads = []
    for seed in range(seeds):
        trace = build_trace(scenario, asked, n, seed, "test")
        workloads.append({"seed": seed, **_walk(world, trace, window, threshold, goal)})
        say(f"workload {seed + 1} of {seeds}: planned {len(workloads[-1]['timeline'])} times")
    shares = ("first_plan_kept", "planned_anew", "best_fixed", "all_mixed")
    mean = {name: float(np.mean([w[name] for w in workloads])) for name in shares}
    return {
        "scenario": scenario.name,
        "scenario_sha256": scenario.hash(),
        "rate": asked,
        "requests": n,
        "window_s": window,
        "threshold": threshold,
        "goal": goal,
        "switch_s": max(profile.switch_s for profile in scenario.load_profiles()),
        "workloads": workloads,
        "mean": mean,
    }

"""The ceiling of a drifting workload: the best sequence of compositions for somebody who knows when it changes.

A schedule says, for every phase of the workload (``env.measure.phases``), how many instances prefill only (the others
take one further role), and when each of them changes: so many seconds before or after the phase begins. Phases of one
kind (same rate and mix) that follow phases of one kind are treated alike. Every schedule is played on the surrogate,
with what role changes cost: drains, hand-overs, the switch itself. Prompts and decodes are placed as the ``planner``
places them, so that the gap between the two is that of knowing.

The search: compositions first, each kind of phase for itself on a stretch of its own arrivals, all at once or one after
the other; then one number of the schedule at a time, at the largest rate that holds so far, as long as something gets
better. Days of more than two hours are compressed for it (changes are counted from the beginning of a phase, so they
mean the same in longer ones). Where phases are drawn at random, every day gets a search and a schedule of its own. A
search ends in a local optimum: the true ceiling may lie a little higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from engine.core.columns import Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from env.measure.metrics import outcomes
from env.measure.phases import phase_goodput, phases_of, play_days, standing
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace
from env.surrogate.simulate import simulate
from policies.common import kind_of
from policies.network.features import N_FEATURES
from policies.rule import BoundPolicy, Values
from policies.rules import linear_score
from policies.rules.parts.planner import toward
from policies.rules.planner import RULE, least_prefill, plans_of, weights_of
from train.control.days import practice

_PREFILL = int(Role.PREFILL)
_DISPATCH = len(Kind) * N_FEATURES
_STARTS = ((0.0, 0.0, 0.0, 0.0), (0.0, 10.0, 30.0, 120.0))  # seconds after a phase begins; patterns to start from
_MOVES = (-60.0, -15.0, -5.0, 5.0, 15.0, 60.0)  # seconds by which one change is tried sooner or later
_SCALES = (0.5, 2.0)  # factors on all of them
_STRETCH_S = 600.0  # of each kind of phase, on which compositions are compared
_SKIPPED = 0.25  # of it, while queues fill
_ROUNDS = 2
_TELL = 50  # changes between two lines that say how far it is

Say = Callable[[str], None]


@dataclass(frozen=True)
class Leg:
    """How the fleet is composed in a phase, and how it gets there.

    :param prefill: instances that prefill only
    :param at_s: seconds after the phase begins (below 0: before) at which the first, second, ... of them changes; the
        last entry counts for all further ones
    """

    prefill: int
    at_s: tuple[float, ...] = (0.0,)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: weights of the score, the other role, number of plans, then each plan's time [s] and prefill
    instances."""
    if kind_of(context) != Kind.REALLOCATE:
        return linear_score.decide(context, candidates, mask, params, memory)
    wanted = params[_DISPATCH + 3]
    for k in range(1, int(params[_DISPATCH + 1])):
        if params[_DISPATCH + 2 + 2 * k] <= context[Ctx.NOW_S]:
            wanted = params[_DISPATCH + 3 + 2 * k]
    return toward(candidates, mask, wanted, int(params[_DISPATCH]))


def followed(timeline: Sequence[tuple[float, int]], n: int, values: Values) -> BoundPolicy:
    """The policy that follows ``timeline``.

    :param timeline: (time in seconds, instances that prefill only), ascending; the first holds from the start
    :param n: instances
    :param values: of the ``planner``: the role of the other instances, budgets, order, and how prompts are placed
    """
    side = float(Role[str(values["side"]).upper()])
    return BoundPolicy(
        name="clairvoyant",
        decide=decide,
        needs=int(Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS),
        params=np.array([*weights_of(values), side, len(timeline), *(x for entry in timeline for x in entry)]),
        memory=np.zeros(1),
        arrangement=plans_of(values, timeline[0][1], n),
        values={},
    )


def compositions(scenario: Scenario) -> Iterator[tuple[int, str]]:
    """(instances that prefill only, role of the others) of every fixed composition that the scenario allows."""
    n, usable = len(scenario.placements()), arena_of(scenario).setting.usable_roles
    for side in (Role.DECODE, Role.MIXED, Role.MULTIPLEXED):
        for prefill in range(1 if side == Role.DECODE else 0, n) if side in usable else ():
            yield prefill, side.name.lower()


@dataclass(frozen=True)
class _Plan:
    """One leg for every kind of change: (kind of the phase before, kind of the phase); -1 before the first."""

    legs: dict[tuple[int, int], Leg]
    values: Values

    def timeline(self, phases: Sequence[tuple[float, float]], kinds: Sequence[int]) -> list[tuple[float, int]]:
        """Phases may not overlap in their changes: what is later takes the place of what is left of the one before."""
        first = self.legs[-1, kinds[0]].prefill
        found, before, have = [(0.0, first)], kinds[0], first
        for (start, _), kind in zip(phases[1:], kinds[1:], strict=True):
            leg = self.legs[before, kind]
            step = 1 if leg.prefill > have else -1
            for j, k in enumerate(range(have + step, leg.prefill + step, step) if leg.prefill != have else ()):
                found.append((max(start + leg.at_s[min(j, len(leg.at_s) - 1)], found[-1][0]), k))
            before, have = kind, leg.prefill
        return found


def _kinds(meta: Sequence[dict[str, Any]], n: int) -> list[int]:
    """Number of the kind of each of the first ``n`` phases: those of the same rate and weights are alike."""
    seen: dict[str, int] = {}
    return [seen.setdefault(repr((p["rate"], p["weights"])), len(seen)) for p in meta[:n]]


class _Search:
    def __init__(self, scenario: Scenario, seed: int, say: Say) -> None:
        self.scenario, self.seed, self.say = scenario, seed, say
        self.n = len(scenario.placements())
        self.rate = scenario.reference_rate
        self.runs = 0
        self._worlds: dict[float, tuple[list[tuple[float, float]], list[int]]] = {}

    def world(self, rate: float) -> tuple[list[tuple[float, float]], list[int]]:
        """Phases at ``rate``, and their kinds."""
        if rate not in self._worlds:  # a busy day takes as long to draw as to play
            self._worlds[rate] = self._world(rate)
        return self._worlds[rate]

    def _world(self, rate: float) -> tuple[list[tuple[float, float]], list[int]]:
        whole = int(np.ceil(rate * self.scenario.workload.natural_s))
        trace = build_trace(self.scenario, rate, whole, self.seed, "test")
        phases = phases_of(trace)
        return phases, _kinds(trace.meta["phases"], len(phases))

    def policy(self, plan: _Plan, rate: float) -> BoundPolicy:
        return followed(plan.timeline(*self.world(rate)), self.n, plan.values)

    def value(self, plan: _Plan) -> float:
        """Where the day stands; the mean share of all phases, a hundredth of it, tells equals apart."""
        run, found = play_days(self.scenario, self.policy(plan, self.rate), self.rate, self.seed, "test")
        self.runs += 1
        return standing(self.scenario, run, found) + 0.01 * float(np.mean([phase.share for phase in found]))

    def goodput(self, plan: _Plan, goal: float) -> float:
        policy = self.policy(plan, self.rate)  # phases do not depend on the rate
        (rate,) = phase_goodput(self.scenario, policy, (self.seed,), start=self.rate, goal=goal)
        return rate

    def compositions(self, values: Values) -> dict[int, int]:
        """Prefill instances for each kind of phase, by a stretch of its arrivals served alone."""
        phases, kinds = self.world(self.rate)
        whole = int(np.ceil(self.rate * self.scenario.workload.natural_s))
        trace = build_trace(self.scenario, self.rate, whole, self.seed, "test")
        best = {}
        for kind in dict.fromkeys(kinds):
            start, end = phases[kinds.index(kind)]
            middle = 0.5 * (start + end)
            length = min(_STRETCH_S, end - start)
            part = trace.slice_time(middle - 0.5 * length, middle + 0.5 * length)
            shares = []
            for k in range(least_prefill(values), self.n):
                run = simulate(self.scenario, followed([(0.0, k)], self.n, values), rate=self.rate, trace=part)
                self.runs += 1
                shares.append(float(outcomes(run, warmup=_SKIPPED).good.mean()))
            best[kind] = least_prefill(values) + int(np.argmax(shares))
        return best

    def plans(self, values: Values) -> list[_Plan]:
        """Where the search begins: the compositions of each kind of phase, reached at once or step by step."""
        best = self.compositions(values)
        _, kinds = self.world(self.rate)
        changes = dict.fromkeys(zip([-1, *kinds[:-1]], kinds, strict=True))
        return [_Plan({c: Leg(best[c[1]], at) for c in changes}, values) for at in _STARTS]

    def neighbours(self, plan: _Plan) -> Iterator[tuple[tuple[int, int], Leg]]:
        """(change, another leg for it), one number off."""
        least = least_prefill(plan.values)
        for change, leg in plan.legs.items():
            options = [replace(leg, prefill=leg.prefill + d) for d in (-1, 1)]
            if change[0] >= 0:
                options += [replace(leg, at_s=tuple(at * f for at in leg.at_s)) for f in _SCALES if any(leg.at_s)]
                for j, by in product(range(len(leg.at_s)), _MOVES):
                    at_s = tuple(sorted((*leg.at_s[:j], leg.at_s[j] + by, *leg.at_s[j + 1 :])))
                    options.append(replace(leg, at_s=at_s))
            yield from ((change, option) for option in options if least <= option.prefill < self.n)

    def improve(self, plan: _Plan) -> _Plan:
        """The best that single changes lead to from ``plan`` in one pass; each is kept at once."""
        value, kept, options = self.value(plan), plan, list(self.neighbours(plan))
        for done, (change, leg) in enumerate(options):
            if done and done % _TELL == 0:
                self.say(f"{done} of {len(options)} changes tried: worst phase {100 * value:.1f} %")
            tried = replace(kept, legs=kept.legs | {change: leg})
            found = self.value(tried)
            if found > value + 1e-4:
                value, kept = found, tried
        self.say(f"{self.runs} runs: worst phase {100 * value:.1f} % at {self.rate:.3g} req/s")
        return kept


def clairvoyant(
    scenario: Scenario,
    *,
    goal: float = 0.9,
    seeds: int = 3,
    rate: float | None = None,
    like: Sequence[Values] = (),
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """The best schedule found on the test arrivals of one seed for each course that a day may take, and what the
    schedules hold on all seeds.

    :param goal: share of requests within targets in every phase
    :param seeds: test seeds, from 0
    :param like: values of planners whose role beside prefill, budgets and placement are tried beside its defaults
    :param rate: requests per second at which the search begins (None: the scenario's reference rate)
    :return: JSON-ready: ``goodput`` per seed; of the first ``schedule`` [{at_s, prefill}], ``side``, ``order``,
        ``role_changes``; ``fixed``: the best fixed split under the same dispatch, per seed
    :raises SlalomError: a scenario without phases or role changes, several profiles, or one instance
    """
    if not 0.0 < goal < 1.0:
        raise SlalomError("goal", goal, "give a share of requests between 0 and 1, e.g. 0.9")
    if not scenario.decisions.reallocate:
        raise SlalomError("--clairvoyant", scenario.name, "its roles cannot change; allow decisions.reallocate")
    if len(scenario.profile_names()) > 1 or len(scenario.placements()) < 2:
        raise SlalomError("--clairvoyant", scenario.name, "it needs two instances or more, all of one profile")
    begin, tests = rate or scenario.reference_rate, range(seeds)
    days = [_Search(scenario, seed, say) for seed in tests]
    found: dict[str, tuple[_Plan, float]] = {}
    goodput: list[float] = []
    for day in days:
        course = repr(day.world(begin))
        if course not in found:
            found[course] = _sought(scenario, day.seed, goal, begin, like, say)
        plan, held = found[course]
        near = goodput[-1] if goodput and goodput[-1] > 0.0 else held
        goodput += phase_goodput(scenario, day.policy(plan, held), (day.seed,), start=near, goal=goal)
    best, held = next(iter(found.values()))  # of the first day
    run, shares = play_days(scenario, days[0].policy(best, held), float(np.mean(goodput)), 0, "test")
    fixed = _fixed(scenario, days[0].n, best.values, tests, goal, held)
    return {
        "scenario": scenario.name,
        "scenario_sha256": scenario.hash(),
        "goal": goal,
        "goodput": goodput,
        "side": best.values["side"],
        "order": best.values["order"],
        "values": dict(best.values),
        "schedule": [{"at_s": at, "prefill": k} for at, k in best.timeline(*days[0].world(held))],
        "role_changes": int(run.cluster["n_switches"]),
        "shares": [phase.share for phase in shares],
        "fixed": fixed,
    }


def _sought(
    scenario: Scenario, seed: int, goal: float, rate: float, like: Sequence[Values], say: Say
) -> tuple[_Plan, float]:
    """The best plan that the search finds for the test day ``seed``, and what it holds there, compressed."""
    search = _Search(practice(scenario), seed, say)
    search.rate = rate
    usable, allowed = arena_of(scenario).setting.usable_roles, set(scenario.decisions.roles)
    sides = [r for r in (Role.DECODE, Role.MULTIPLEXED, Role.MIXED) if r in usable and r.name.lower() in allowed]
    plain = product((side.name.lower() for side in sides), ("fcfs", "on_time"))
    worlds = [RULE.values({"side": side, "order": order}) for side, order in plain]
    starts = [p for values in (*worlds, *map(RULE.values, like)) for p in search.plans(values)]
    for _ in range(2):  # at a rate that tells them apart
        best = max(starts, key=search.value)
        held = search.goodput(best, goal)
        search.rate = max(1.02 * held, 1e-3)
    say(f"{best.values['side']} beside prefill, queues {best.values['order']}: {held:.3g} req/s to start from")
    for _ in range(_ROUNDS):
        search.rate = max(1.02 * held, 1e-3)
        tried = search.improve(best)
        found = search.goodput(tried, goal)
        if found <= held * 1.002:
            break
        best, held = tried, found
    return best, held


def _fixed(
    scenario: Scenario, n: int, values: Values, tests: Sequence[int], goal: float, start: float
) -> dict[str, Any]:
    """The best fixed split on the same seeds, under the same dispatch."""

    def goodput(on: Scenario, k: int, seeds: Sequence[int], near: float) -> list[float]:
        return phase_goodput(on, followed([(0.0, k)], n, values), seeds, start=near, goal=goal)

    found = {k: goodput(practice(scenario), k, tests[:1], start / 2)[0] for k in range(1, n)}
    best = max(found, key=lambda k: found[k])
    return {"prefill": best, "side": values["side"], "goodput": goodput(scenario, best, tests, found[best] or 1.0)}

"""The learner ``controller``: CMA-ES over the parameters of ``planner``, by what the worst phase of a day gets.

    race      every pair of choices (the role beside prefill, the order of queues) with the rule's defaults; CMA-ES
              begins from the best few and goes on with the one that leads
    refine    one day of training arrivals a generation, the same for all its members. What counts is the share within
              targets in the worst phase, at a rate that follows the leader up or down, so that it always lies where
              phases are about to fail
    choose    among the leaders and the rule as it is, by the worst phase of validation days of full length

Training compresses long days to two hours: phases keep their order, rates and mixes, and what role changes cost counts
for more. Placement of prompts and decodes is the planner's and not searched here. :func:`tune_on_days` gives any rule
the same search: an opponent of equal effort.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from cmaes import CMA

from engine.errors import SlalomError
from env.measure.phases import phase_goodput, play_days, worst
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies import registry
from policies.rule import Param, Rule, Value
from train.search.rule import SearchResult

__all__ = ["CONTROLLER", "RULE", "drifts", "practice", "train_controller", "tune_on_days"]

CONTROLLER, RULE = "controller", "planner"
_LEAST_S, _LONGEST_S = 1800.0, 7200.0  # an episode that counts as a drift of hours, and the longest in training
_STARTS, _RACE = 2, 0.3  # pairs of choices that CMA-ES begins from; share of the budget until one is left
_FINAL = 0.25  # share of the budget for the choice
_POPULATION, _SIGMA = 12, 0.12
_ROOM = (0.87, 0.92)  # the rate falls when the leader's worst phase is below, and rises when it is above
_FAR = (0.7, 0.96)  # and does so faster beyond these
_STEP, _LEAP = 1.02, 1.06
_FALL = 0.8  # at first the rate falls by this factor until the rule holds it,
_LOWEST = 0.05  # or it is this part of the reference rate
_MEAN = 0.1  # weight of the mean over phases, so that ways out of a deadlock are seen
_TRAIN_SEED, _VALID_SEED = 30_000, 1_000
_VALID_SEEDS, _BEYOND, _NEAR = 2, 1.05, 0.03  # of the choice: days, rate, and tolerance of the goodput

Report = Callable[[str, float, str], None]
Values = dict[str, Value]


def drifts(scenario: Scenario) -> bool:
    """Whether roles may follow a drift that takes at least half an hour."""
    return (
        scenario.decisions.reallocate
        and scenario.workload.kind == "shift"
        and scenario.workload.natural_s >= _LEAST_S
        and len(scenario.placements()) > 1
    )


def practice(scenario: Scenario) -> Scenario:
    """The scenario with its days compressed to what training plays."""
    if scenario.workload.natural_s <= _LONGEST_S:
        return scenario
    return scenario.with_overrides({"workload.duration_s": _LONGEST_S})


@dataclass(frozen=True)
class _Axis:
    """A parameter as a coordinate from 0 to 1."""

    param: Param

    def value(self, x: float) -> Value:
        p = self.param
        y = p.low * (p.high / p.low) ** x if p.log else p.low + x * (p.high - p.low)
        y = min(max(float(y), p.low), p.high)
        return round(y) if p.integer else y

    def place(self, value: Value) -> float:
        p, y = self.param, float(value)
        return float(np.log(y / p.low) / np.log(p.high / p.low)) if p.log else (y - p.low) / (p.high - p.low)


class _Search:
    """Budget spent, the rate in force, and what days of ``rule`` are worth at it."""

    def __init__(self, rule: str, scenario: Scenario, seconds: float, requests: float, report: Report) -> None:
        self.rule, self.scenario, self.report = registry.get(rule), practice(scenario), report
        self.most_seconds, self.most_requests = seconds, requests
        self.begin = time.monotonic()
        self.rate = self.reference = scenario.reference_rate
        self.requests = self.days = 0
        self.setting = arena_of(self.scenario).setting
        self.axes = [_Axis(p) for p in self.rule.params if p.choices is None]

    @property
    def used(self) -> float:
        """Share of the budget spent."""
        return max((time.monotonic() - self.begin) / self.most_seconds, self.requests / self.most_requests)

    def shares(self, values: Values, seed: int) -> list[float]:
        """Shares within targets, phase by phase; empty where the scenario does not allow this."""
        try:
            policy = self.rule.bind(values, self.setting)
        except SlalomError:
            return []
        run, phases = play_days(self.scenario, policy, self.rate, seed, "train")
        self.requests += len(run.req)
        self.days += 1
        return [phase.share for phase in phases]

    def value(self, values: Values, seed: int) -> tuple[float, float]:
        """(what is maximised, share of the worst phase)."""
        shares = self.shares(values, seed)
        if not shares:
            return -1.0, 0.0
        return min(shares) + _MEAN * float(np.mean(shares)), min(shares)

    def follow(self, leader: float) -> None:
        """Move the rate to where the leader's worst phase is about to fail."""
        if leader > _ROOM[1]:
            self.rate *= _LEAP if leader > _FAR[1] else _STEP
        elif leader < _ROOM[0]:
            self.rate /= _LEAP if leader < _FAR[0] else _STEP

    def note(self, phase: str, done: float, best: float) -> None:
        text = f"{self.days} days  {self.rate:.3g} req/s  worst phase {100 * best:.1f} %"
        self.report(phase, min(done, 1.0), text)


class _Climb:
    """CMA-ES from one pair of choices; its answer at any time is the mean of its last generation."""

    def __init__(self, search: _Search, choices: Values, seed: int) -> None:
        self.search, self.choices, self.generations = search, choices, 0
        defaults = search.rule.values(choices)
        mean = np.array([axis.place(defaults[axis.param.name]) for axis in search.axes])
        bounds = np.tile([0.0, 1.0], (len(mean), 1))
        self.optimiser = CMA(
            mean=np.clip(mean, 0.02, 0.98), sigma=_SIGMA, bounds=bounds, population_size=_POPULATION, seed=seed
        )

    def values(self, theta: np.ndarray) -> Values:
        found = {axis.param.name: axis.value(x) for axis, x in zip(self.search.axes, theta, strict=True)}
        return self.search.rule.values(self.choices | found)

    @property
    def answer(self) -> Values:
        """Where it stands; the rule's defaults before the first generation."""
        if self.generations == 0:
            return self.search.rule.values(self.choices)
        return self.values(self.optimiser.mean)

    def generation(self, seed: int) -> float:
        """One more; returns the share of its best member's worst phase."""
        told, best = [], (-2.0, 0.0)
        for _ in range(self.optimiser.population_size):
            theta = self.optimiser.ask()
            found = self.search.value(self.values(theta), seed)
            told.append((theta, -found[0]))
            best = max(best, found)
        self.optimiser.tell(told)
        self.generations += 1
        self.search.follow(best[1])
        return best[1]


def _pairs(rule: Rule) -> list[Values]:
    """Every combination of the rule's choices."""
    choices = [p for p in rule.params if p.choices is not None]
    names = [p.name for p in choices]
    return [dict(zip(names, picked, strict=True)) for picked in product(*(p.choices or () for p in choices))]


def _race(search: _Search, seed: int) -> list[_Climb]:
    """The best starts, after as many generations each as their share of the budget allows; best first."""
    pairs = _pairs(search.rule)
    while True:
        values: list[tuple[float, float]] = []
        for pair in pairs:
            values.append(search.value(pair, _TRAIN_SEED + seed))
            search.note("race", search.used / _RACE, max(values)[1])
        if max(values)[0] < 0.0:
            roles = list(search.scenario.decisions.roles)
            raise SlalomError("decisions.roles", roles, f"{search.rule.name} needs others, or fits no such cluster")
        if max(values)[1] >= _FAR[0] or search.rate < _LOWEST * search.reference or search.used > 0.5 * _RACE:
            break
        search.rate *= _FALL
    order = sorted(range(len(values)), key=lambda k: values[k], reverse=True)
    climbs = [_Climb(search, pairs[k], seed * 31 + k) for k in order[:_STARTS] if values[k][0] >= 0.0]
    turn = 0
    while search.used < _RACE:
        climb = climbs[turn % len(climbs)]
        best = climb.generation(_TRAIN_SEED + 100 * (seed + 1) + turn // len(climbs))
        search.note("race", search.used / _RACE, best)
        turn += 1
    fresh = _TRAIN_SEED + 50 * (seed + 1)
    return sorted(climbs, key=lambda climb: -search.value(climb.answer, fresh)[0])


def train_controller(
    scenario: Scenario,
    *,
    seconds: float = float("inf"),
    requests: float = float("inf"),
    seed: int = 0,
    report: Report = lambda phase, done, note: None,
) -> SearchResult:
    """A controller of roles: :func:`tune_on_days` for the planner, chosen on validation days of full length.

    :raises SlalomError: no drift to follow, or roles that the planner cannot use
    """
    return tune_on_days(RULE, scenario, seconds=seconds, requests=requests, seed=seed, report=report)


def tune_on_days(
    rule: str,
    scenario: Scenario,
    *,
    seconds: float = float("inf"),
    requests: float = float("inf"),
    seed: int = 0,
    report: Report = lambda phase, done, note: None,
    full_days: bool = True,
) -> SearchResult:
    """The best parameters found until ``seconds`` have passed or ``requests`` were simulated; one of them is finite.

    :param rule: name of a rule with two or more numbers to tune
    :param report: called with (phase, share done, note)
    :param full_days: choose on validation days of full length; else of the length of training
    :return: ``knee``: goodput in every phase of a validation day; ``score`` and ``default_score``: share of the worst
        phase at that rate, of the answer and of the rule's defaults
    :raises SlalomError: no drift to follow, or a rule that does not fit
    """
    if not drifts(scenario):
        fix = "it needs decisions.reallocate and a workload of kind shift with a duration_s of half an hour or more"
        raise SlalomError("--algo controller", scenario.name, fix)
    search = _Search(rule, scenario, seconds, requests, report)
    climbs = _race(search, seed)
    first, n = climbs[0], 0
    while search.used < 1.0 - _FINAL:
        best = first.generation(_TRAIN_SEED + 1000 * (seed + 1) + n)
        search.note("refine", (search.used - _RACE) / (1.0 - _FINAL - _RACE), best)
        n += 1
    finalists = [first.answer, *(climb.answer for climb in climbs[1:]), search.rule.values(first.choices)]
    final = scenario if full_days else search.scenario
    found = [_value(search, final, values, k / len(finalists)) for k, values in enumerate(finalists)]
    chosen = finalists[found.index(max(found))]
    knee = _goodput(search, final, chosen)
    scores = [_worst(search.rule, final, values, max(knee, 1e-3)) for values in (chosen, search.rule.values())]
    return SearchResult(
        rule=rule, values=chosen, knee=knee, default_score=scores[1], score=scores[0],
        trials=search.days, requests=search.requests, seconds=round(time.monotonic() - search.begin, 2),
        sampler=CONTROLLER,
    )  # fmt: skip


def _value(search: _Search, scenario: Scenario, values: Values, done: float) -> float:
    """What validation days are worth, a little beyond the rate of the search."""
    policy, rate = search.rule.bind(values, arena_of(scenario).setting), _BEYOND * search.rate
    found = []
    for seed in range(_VALID_SEED, _VALID_SEED + _VALID_SEEDS):
        _, phases = play_days(scenario, policy, rate, seed, "valid")
        shares = [phase.share for phase in phases]
        found.append(min(shares) + _MEAN * float(np.mean(shares)))
    search.report("choose", done, f"worst phase {100 * worst(phases):.1f} % of a validation day at {rate:.3g} req/s")
    return float(np.mean(found))


def _goodput(search: _Search, scenario: Scenario, values: Values) -> float:
    """Goodput in every phase of one validation day."""
    policy = search.rule.bind(values, arena_of(scenario).setting)
    (rate,) = phase_goodput(scenario, policy, (_VALID_SEED,), start=search.rate, split="valid", tolerance=_NEAR)
    search.report("choose", 1.0, f"{rate:.3g} req/s in every phase")
    return rate


def _worst(rule: Rule, scenario: Scenario, values: Values, rate: float) -> float:
    policy = rule.bind(values, arena_of(scenario).setting)
    return worst(play_days(scenario, policy, rate, _VALID_SEED, "valid")[1])

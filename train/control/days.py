"""The learner ``controller``: CMA-ES over the parameters of ``planner``, by where a day stands in its worst phase.

    race      every start (choices of the rule, orders, compositions) for a day, at rates up to the largest that one of
              them holds, beginning near what the rule as it is holds, the better half going on; CMA-ES begins from
              the best two, with small steps and with large ones, and goes on with what leads
    refine    one day of training arrivals a generation, the same for all its members, at a rate that follows the leader
              up or down, so that it always lies where phases are about to fail
    choose    among where the search has been, the other starts and the rule as it is, on validation days

What counts is ``env.measure.phases.standing``: the share within targets in the worst phase, and what the definition of
sustained goodput says beside it of waits, classes and lengths. Training compresses long days (:func:`practice`):
phases keep their order, rates and mixes, and what role changes cost counts for more. :func:`tune_on_days` gives any
rule the same search, and the levers that the controller's own parameters are: an opponent of equal effort.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Literal

import numpy as np
from cmaes import CMA

from engine.errors import SlalomError
from engine.jit.warm import cores
from env.measure.phases import GOAL, phase_goodput, play_days, standing
from env.scenario import Scenario
from train.control.space import Space, Values
from train.search.journal import Journal
from train.search.rule import SearchResult

CONTROLLER, RULE = "controller", "planner"
_LEAST_S, LONGEST_S = 1800.0, 7200.0  # an episode that counts as a drift of hours, and the longest in training
_MOST = 100_000  # requests of a day in training, at the reference rate: else a search sees too few days
_RACE = 0.3  # share of the budget until one climb is left
_CLIMBS = ((0, 0.05), (0, 0.15), (1, 0.1))  # (place among the starts, first step): near a good rule cliffs are many
_FRESH = 3  # days on which climbs are compared at the end of the race
_SURVIVE = 6  # starts that go on to a lower rate, at least
_FINAL = 0.1  # share of the budget for the choice
_POPULATION = 12
_ROOM = (0.87, 0.92)  # the rate falls when the leader stands below, and rises when it stands above
_FAR = (0.7, 0.96)  # and does so faster beyond these
_STEP, _LEAP = 1.02, 1.06
_BEGIN, _FALL, _RISE = 0.7, 0.85, 1.1  # part of the reference rate to begin with; how it falls or rises at first
_STRIDE, _BELOW = 1.3, 0.85  # steps in which the rule as it is finds its limit, and the part of that where all begin
_LOWEST = 0.05  # part of the reference rate below which nobody is asked
_UNFIT = -10.0  # value of what the scenario does not allow
_MEAN = 0.1  # weight of the mean over phases, so that ways out of a deadlock are seen
_TRAIN_SEED, _VALID_DAYS = 30_000, range(1_000, 1_003)
_BEYOND, _NEAR = 1.02, 0.03  # of the choice: rate, and tolerance of the goodput
_MARKS = (0.55, 0.75)  # of the budget, at which the answer so far is kept for the choice

Report = Callable[[str, float, str], None]
Split = Literal["train", "valid"]
Incumbent = Callable[[float, float, Values], None]


def drifts(scenario: Scenario) -> bool:
    """Whether roles may follow a drift that takes at least half an hour."""
    return (
        scenario.decisions.reallocate
        and scenario.workload.kind == "shift"
        and scenario.workload.natural_s >= _LEAST_S
        and len(scenario.placements()) > 1
    )


def practice(scenario: Scenario) -> Scenario:
    """The scenario with its days compressed to what training plays: two hours, less where many requests come."""
    return compressed(scenario, min(LONGEST_S, max(_MOST / scenario.reference_rate, _LEAST_S)))


def compressed(scenario: Scenario, longest_s: float) -> Scenario:
    """The scenario with days that are longer compressed to ``longest_s`` seconds."""
    if scenario.workload.natural_s <= longest_s:
        return scenario
    return scenario.with_overrides({"workload.duration_s": longest_s})


class _Search:
    """Budget spent, the rate in force, and what days are worth at it."""

    def __init__(
        self, space: Space, scenario: Scenario, seconds: float, requests: float, report: Report, journal: Journal
    ) -> None:
        self.space, self.scenario, self.report, self.journal = space, scenario, report, journal
        self.most_seconds, self.most_requests = seconds, requests
        self.rate = self.reference = scenario.reference_rate
        self.requests = self.days = self.moves = 0

    @property
    def used(self) -> float:
        """Share of the budget spent."""
        spent = self.requests / self.most_requests
        return max(spent, self.journal.seconds() / self.most_seconds) if math.isfinite(self.most_seconds) else spent

    def _play(self, values: Values, seed: int, split: Split, rate: float) -> list[float]:
        """[standing, mean share over phases, requests, role changes]; [] where the scenario does not allow this."""
        try:
            policy = self.space.bind(values)
        except SlalomError:
            return []
        run, phases = play_days(self.scenario, policy, rate, seed, split)
        mean = float(np.mean([phase.share for phase in phases]))
        return [standing(self.scenario, run, phases), mean, len(run.req), int(run.cluster["n_switches"])]

    def value(
        self, values: Values, seed: int, *, split: Split = "train", beyond: float = 1.0,
        played: Callable[[], list[float]] | None = None,
    ) -> tuple[float, float]:  # fmt: skip
        """(what is maximised, where the day stands).

        :param beyond: factor on the rate in force
        :param played: gives what was played elsewhere
        """
        rate = beyond * self.rate
        what = json.dumps([sorted(values.items()), seed, split, rate])
        found = self.journal.ask(what, played or (lambda: self._play(values, seed, split, rate)))
        if not found:
            return _UNFIT, 0.0
        self.requests += int(found[2])
        self.moves += int(found[3])
        self.days += 1
        return found[0] + _MEAN * found[1], found[0]

    def each(self, asked: Sequence[Values], seed: int) -> list[tuple[float, float]]:
        """:meth:`value` of several on training days, played side by side."""
        if self.journal.replays:
            return [self.value(values, seed) for values in asked]
        with ThreadPoolExecutor(cores()) as threads:  # the surrogate holds no lock of Python's
            runs = [threads.submit(self._play, values, seed, "train", self.rate) for values in asked]
            each = zip(asked, runs, strict=True)
            return [self.value(values, seed, played=run.result) for values, run in each]

    def follow(self, leader: float) -> None:
        """Move the rate to where the leader is about to fail."""
        if leader > _ROOM[1]:
            self.rate *= _LEAP if leader > _FAR[1] else _STEP
        elif leader < _ROOM[0]:
            self.rate /= _LEAP if leader < _FAR[0] else _STEP

    def note(self, phase: str, done: float, best: float) -> None:
        text = f"{self.days} days  {self.rate:.3g} req/s  {100 * best:.1f} % in the worst phase"
        self.report(phase, min(done, 1.0), text)


class _Climb:
    """CMA-ES from one start, at a rate of its own; its answer at any time is the mean of its last generation."""

    def __init__(self, search: _Search, choices: Values, step: float, seed: int) -> None:
        self.search, self.choices, self.generations, self.rate = search, choices, 0, search.rate
        mean = search.space.place(choices)
        bounds = np.tile([0.0, 1.0], (len(mean), 1))
        self.optimiser = CMA(
            mean=np.clip(mean, 0.02, 0.98), sigma=step, bounds=bounds, population_size=_POPULATION, seed=seed
        )

    @property
    def answer(self) -> Values:
        """Where it stands; the start before the first generation."""
        if self.generations == 0:
            return self.search.space.defaults | self.choices
        return self.search.space.values(self.choices, self.optimiser.mean)

    def generation(self, seed: int) -> float:
        """One more; returns where the day of its best member stands."""
        self.search.rate = self.rate
        thetas = [self.optimiser.ask() for _ in range(self.optimiser.population_size)]
        found = self.search.each([self.search.space.values(self.choices, theta) for theta in thetas], seed)
        self.optimiser.tell([(theta, -value) for theta, (value, _) in zip(thetas, found, strict=True)])
        best = max(found)
        self.generations += 1
        self.search.follow(best[1])
        self.rate = self.search.rate
        return best[1]


def _near_limit(search: _Search, seed: int) -> float:
    """A rate a little below what the rule as it is holds for a day: a reference rate may be far from it, and at light
    load nobody is told from others. Where it holds none, or does not fit, the part of the reference rate as it was."""
    begin = search.rate
    while _looked_at(search, [{}], seed)[0][1] >= GOAL and search.used < 0.2 * _RACE:
        search.rate *= _STRIDE
    return max(begin, _BELOW * search.rate)


def _first_look(search: _Search, seed: int) -> list[Values]:
    """Starts, the best first, at a rate that the first of them about holds for a day.

    A rule that changes roles begins from its own arrangement, whose proportions are parameters of its own; one that
    changes none may have any composition.
    """
    alive, further, fell, rose = search.space.choices(), search.space.compositions(), False, False
    search.rate *= _BEGIN
    search.rate, search.moves = _near_limit(search, seed), 0
    while True:
        values = _looked_at(search, alive, seed)
        if search.moves == 0 and further:
            alive, values = alive + further, values + _looked_at(search, further, seed)
        further = []
        if max(values)[0] <= _UNFIT:
            roles = list(search.scenario.decisions.roles)
            fix = f"{search.space.rule.name} needs others, or fits no such cluster"
            raise SlalomError("decisions.roles", roles, fix)
        fit = [k for k in range(len(values)) if values[k][0] > _UNFIT]
        kinds = {values[k]: alive[k] for k in reversed(fit)}  # choices that change nothing are the same start
        ranked = [kinds[value] for value in sorted(kinds, reverse=True)]
        best = max(where for _, where in values)
        if best < GOAL and not rose and search.rate > _LOWEST * search.reference:
            search.rate *= _FALL
            fell = True
        elif best < GOAL and rose:  # too far: nobody is told from others where all fail
            search.rate /= _RISE
            return alive
        elif not fell and search.used < 0.6 * _RACE:  # who holds more is seen at the limit only
            search.rate *= _RISE
            rose = True
        else:
            return ranked
        alive = ranked[: max(_SURVIVE, len(ranked) // 2)]


def _looked_at(search: _Search, starts: Sequence[Values], seed: int) -> list[tuple[float, float]]:
    found = search.each([search.space.defaults | choices for choices in starts], _TRAIN_SEED + seed)
    search.note("race", search.used / _RACE, max(found)[1])
    return found


def _race(search: _Search, seed: int) -> list[_Climb]:
    """The best starts, after as many generations each as their share of the budget allows; best first."""
    starts = _first_look(search, seed)
    begun = [(starts[min(place, len(starts) - 1)], step) for place, step in _CLIMBS]
    climbs = [_Climb(search, choices, step, seed * 31 + k) for k, (choices, step) in enumerate(begun)]
    turn = 0
    while search.used < _RACE:
        climb = climbs[turn % len(climbs)]
        best = climb.generation(_TRAIN_SEED + 100 * (seed + 1) + turn // len(climbs))
        search.note("race", search.used / _RACE, best)
        turn += 1
    search.rate = max(climb.rate for climb in climbs)
    fresh = [_TRAIN_SEED + 50 * (seed + 1) + k for k in range(_FRESH)]
    return sorted(climbs, key=lambda climb: -sum(search.value(climb.answer, day)[0] for day in fresh))


def tune_on_days(
    rule: str,
    scenario: Scenario,
    *,
    seconds: float = float("inf"),
    requests: float = float("inf"),
    seed: int = 0,
    report: Report = lambda phase, done, note: None,
    journal: Journal | None = None,
    on_answer: Incumbent = lambda used, rate, values: None,
) -> SearchResult:
    """The best parameters found until ``seconds`` have passed or ``requests`` were simulated; one of them is finite.

    :param rule: name of a rule with two or more numbers to tune
    :param report: called with (phase, share done, note)
    :param journal: what an interrupted search knew already; it goes on from there
    :param on_answer: called after every generation with (share of the budget spent, rate, what would be the answer)
    :return: ``knee``: goodput in every phase of a validation day of full length; ``score`` and ``default_score``: where
        validation days stand a little beyond the search's last rate, of the answer and of the rule's defaults
    :raises SlalomError: no drift to follow, or a rule that does not fit
    """
    if not drifts(scenario):
        fix = "it needs decisions.reallocate and a workload of kind shift with a duration_s of half an hour or more"
        raise SlalomError("--algo controller", scenario.name, fix)
    begin, short = time.monotonic(), practice(scenario)
    space = Space(rule, short, arranges=rule == RULE)
    search = _Search(space, short, seconds, requests, report, journal or Journal())
    climbs = _race(search, seed)
    first, n = climbs[0], 0
    kept: list[Values] = []
    while search.used < 1.0 - _FINAL:
        best = first.generation(_TRAIN_SEED + 1000 * (seed + 1) + n)
        if len(kept) < len(_MARKS) and search.used >= _MARKS[len(kept)]:
            kept.append(first.answer)
        on_answer(search.used, search.rate, first.answer)
        search.note("refine", (search.used - _RACE) / (1.0 - _FINAL - _RACE), best)
        n += 1
    default = space.defaults
    finalists = [first.answer, *kept, *(climb.answer for climb in climbs[1:]), default | first.choices, default]
    found = []
    for k, values in enumerate(finalists):
        found.append(_validated(search, values))
        search.note("choose", k / len(finalists), found[-1])
    chosen = finalists[found.index(max(found))]
    own, levers = space.split(chosen)
    plans = space.bind(chosen).arrangement if levers != space.split(default)[1] else None
    return SearchResult(
        rule=rule, values=own, knee=_goodput(search, scenario, chosen), default_score=found[-1], score=max(found),
        trials=search.days, requests=search.requests, seconds=round(time.monotonic() - begin, 2), sampler=CONTROLLER,
        plans=None if plans is None else [asdict(plan) for plan in plans],
    )  # fmt: skip


def _validated(search: _Search, values: Values) -> float:
    """Where validation days stand on average, a little beyond the rate of the search."""
    return float(np.mean([search.value(values, day, split="valid", beyond=_BEYOND)[1] for day in _VALID_DAYS]))


def _goodput(search: _Search, scenario: Scenario, values: Values) -> float:
    """Goodput in every phase of one validation day of full length."""
    policy = search.space.bind(values)

    def found() -> float:
        (rate,) = phase_goodput(scenario, policy, _VALID_DAYS[:1], start=search.rate, split="valid", tolerance=_NEAR)
        return rate

    rate = float(search.journal.ask("goodput", found))
    search.report("choose", 1.0, f"{rate:.3g} req/s at {100 * GOAL:.0f} % in every phase")
    return rate

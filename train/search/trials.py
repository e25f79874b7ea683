"""The trials of a rule's search: what is drawn, what it is worth, when it is given up; see ``train.search.tune``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from engine.common.files import digest_of
from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.measure.level import mean_level
from env.scenario import Scenario
from policies.rule import Param, Rule, Value
from train.search.fitness import merged
from train.search.levers import Levers
from train.search.record import Outcome, Record, new_sampler

#: What a trial draws: parameters of the rule, and levers.
Drawn = dict[str, Value]
_LOOK_S = 0.2  # between two looks at the time while trials run elsewhere


class Budget(NamedTuple):
    """Where a search, or a part of it, ends: at so many trials, or with so many simulated requests."""

    trials: int
    requests: float


class Subject:
    """The rule that is tuned.

    :param given: parameters that are not searched
    :param levers: of its arrangement; None: it arranges as it does by itself
    """

    def __init__(self, rule: Rule, given: Mapping[str, Any], levers: Levers | None) -> None:
        self.rule, self.given = rule, given
        self._levers = levers
        self.free: tuple[Param, ...] = tuple(p for p in rule.params if p.name not in given)
        self.free += levers.params if levers else ()

    @property
    def defaults(self) -> Drawn:
        """The rule as published."""
        return self.rule.values(self.given) | (self._levers.defaults if self._levers else {})

    def starts(self) -> list[Drawn]:
        """What is tried before the sampler is asked, after the defaults."""
        return [self.defaults | start for start in self._levers.starts()] if self._levers else []

    def drawn(self, trial: Any) -> Drawn:
        """What a trial of Optuna suggests."""
        found = {p.name: p.suggest(trial) for p in self.free}
        levers = {name: found.pop(name) for name in list(found) if self._levers and name in self._levers.defaults}
        return self.rule.values({**self.given, **found}) | levers

    def values(self, drawn: Drawn) -> Drawn:
        """The rule's own parameters."""
        return {name: value for name, value in drawn.items() if name not in self._names}

    def levers(self, drawn: Drawn) -> Drawn:
        """The rest."""
        return {name: value for name, value in drawn.items() if name in self._names}

    def contender(self, drawn: Drawn) -> Contender:
        """Ready to be measured.

        :raises SlalomError: it does not fit the scenario
        """
        values = self.values(drawn)
        plans = self._levers.plans(drawn, values) if self._levers else None
        return Contender(self.rule.name, values, plans=tuple(asdict(plan) for plan in plans or ()))

    @property
    def _names(self) -> Mapping[str, Value]:
        return self._levers.defaults if self._levers else {}


class Objective:
    """What a trial is worth, and what is known from the trials before it.

    :param keep: how many of the best must not be pruned; 0: no pruning
    :param means: how points are measured and how long runs are, where trials are jobs of their own
    """

    def __init__(
        self,
        subject: Subject,
        here: Evaluator,
        rates: tuple[float, ...],
        seeds: tuple[int, ...],
        keep: int,
        stop: Callable[[], bool],
        means: tuple[Callable[..., Any], Callable[..., int]],
    ) -> None:
        self.subject, self.stop = subject, stop
        self.given_rates, self.rates = rates, tuple(sorted(rates, reverse=True))
        self.finished: list[tuple[Drawn, float]] = []  # trials simulated at every rate
        self.pruned = self.simulated_requests = 0
        self._here, self._seeds, self._keep, self._means = here, seeds, keep, means
        self._highest = [0.0] * len(rates)

    def outlook(self) -> tuple[tuple[float, ...], float]:
        """The best attainment seen at each rate, and the score a trial has to be able to reach."""
        if not self._keep or len(self.finished) < self._keep:
            return self.rates, -1.0
        scores = sorted((score for _, score in self.finished), reverse=True)
        return tuple(self._highest), scores[self._keep - 1]

    def evaluate(self, drawn: Sequence[Drawn], pool: Executor | None) -> Iterator[Outcome | None]:
        """One outcome per setting, in order; None where the time was up."""
        course = _Course(self.rates, self._seeds, self.outlook(), not self.finished, self._means[1])
        contenders = [self._contender(each) for each in drawn]
        if pool is None:
            for contender in contenders:
                before = self._here.simulated_requests
                found = _trial(self._here, contender, course, self.stop)
                requests = self._here.simulated_requests - before
                self.simulated_requests += requests
                yield found and found._replace(requests=requests)
            return
        fixed = (self._here.scenario, self._here.settings, self._means[0])
        late = not course.first and self.stop()  # the first trial is carried out in any case
        jobs = [pool.submit(_remote_trial, *fixed, each, course) for each in (() if late else contenders)]
        try:
            for job in jobs:
                while not job.done() and not (late := not course.first and self.stop()):
                    wait([job], _LOOK_S)
                if late:
                    break
                outcome, requests = job.result()
                self.simulated_requests += requests
                yield outcome and outcome._replace(requests=requests)
        finally:
            for job in jobs:
                job.cancel()  # the time is up, or one of them has failed
        if late:
            yield None

    def _contender(self, drawn: Drawn) -> Contender | None:
        """None where the setting does not fit the cluster.

        :raises SlalomError: the defaults do not
        """
        try:
            return self.subject.contender(drawn)
        except SlalomError:
            if drawn == self.subject.defaults:
                raise
            return None

    def told(self, values: Drawn, outcome: Outcome) -> None:
        """Take note of a finished trial."""
        for place, share in enumerate(outcome.cells):
            self._highest[place] = max(self._highest[place], share)
        if outcome.cells and len(outcome.cells) < len(self.rates):
            self.pruned += 1
        else:
            self.finished.append((values, outcome.value))


class _Course(NamedTuple):
    """What all trials that are told alike have in common.

    :param outlook: see :meth:`Objective.outlook`
    :param first: the defaults, which must fit
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    outlook: tuple[tuple[float, ...], float]
    first: bool
    length: Callable[..., int]


def _trial(
    evaluator: Evaluator, contender: Contender | None, course: _Course, stop: Callable[[], bool]
) -> Outcome | None:
    """Simulate one setting, hardest rate first, as long as it may still get among the best.

    :return: no cells for a setting that does not fit the cluster: it serves nobody
    """
    highest, floor = course.outlook
    cells: list[float] = []
    for rate in course.rates if contender else ():
        assert contender is not None
        if stop():
            return None
        try:
            cells.append(mean_level(evaluator, contender, rate, course.seeds, course.length))
        except SlalomError:
            if course.first:
                raise  # not even the defaults fit this scenario
            return Outcome(merged([0.0]), ())
        most = merged([*cells, *highest[len(cells) :]])
        if floor >= 0.0 and most < floor:
            return Outcome(most, tuple(cells))
    return Outcome(merged(cells or [0.0]), tuple(cells))


def _remote_trial(
    scenario: Scenario,
    settings: PointSettings,
    measure: Callable[..., Any],
    contender: Contender | None,
    course: _Course,
) -> tuple[Outcome | None, int]:
    """As :func:`_trial`, as a job of its own; with the requests simulated."""
    with Evaluator(scenario, settings, measure=measure) as here:
        return _trial(here, contender, course, lambda: False), here.simulated_requests


class Study:
    """A search at given rates, to be gone on with.

    :param first: settings to try before the sampler is asked, after the defaults
    """

    def __init__(
        self,
        objective: Objective,
        sampler: str,
        seed: int,
        storage: str | Path | None,
        identity: list[Any],
        first: Sequence[Drawn],
    ) -> None:
        chosen = new_sampler(sampler, seed)
        self.objective, self.sampler = objective, type(chosen).__name__
        name = f"{objective.subject.rule.name}-{self.sampler}-{digest_of(identity)[:12]}"
        self._record = Record(storage, name)
        self._study = optuna.create_study(direction="maximize", sampler=chosen)
        defaults = objective.subject.defaults
        for drawn in [defaults, *(drawn for drawn in first if drawn != defaults)]:
            self._study.enqueue_trial({p.name: drawn[p.name] for p in objective.subject.free})

    def search(
        self,
        done: int,
        budget: Budget,
        pool: Executor | None,
        width: int,
        on_trial: Callable[[int, float], None] | None,
    ) -> int:
        """Ask and tell until the budget is spent; what is on record is not simulated again, but counts.

        :return: how many were finished before the time was up
        """
        objective, record, study = self.objective, self._record, self._study
        while done < budget.trials and (objective.simulated_requests < budget.requests or not objective.finished):
            # the defaults alone first: if they do not fit the scenario, nothing does
            asked = [study.ask() for _ in range(min(width if done else 1, budget.trials - done))]
            drawn = [objective.subject.drawn(trial) for trial in asked]
            known = [record.find(trial.params) for trial in asked]
            begin = time.perf_counter()
            fresh = objective.evaluate([v for v, old in zip(drawn, known, strict=True) if old is None], pool)
            for trial, values, old in zip(asked, drawn, known, strict=True):
                outcome = next(fresh) if old is None else old
                if outcome is None:
                    return done
                if old is not None:
                    objective.simulated_requests += record.spent_before(trial.params)
                else:
                    record.add(trial, outcome, time.perf_counter() - begin)
                    begin = time.perf_counter()
                study.tell(trial, outcome.value)
                objective.told(values, outcome)
                done += 1
                if on_trial is not None:
                    on_trial(done, max(score for _, score in objective.finished))
        return done

    def once(self, what: str, requests: int) -> int:
        """What ``what`` cost when it was done first: an earlier part of this search may have it on record."""
        return self._record.once(what, requests)


def distinct_best(objective: Objective, finalists: int) -> list[tuple[Drawn, float]]:
    """The best different settings that were simulated at every rate, with the defaults among them."""
    defaults = objective.subject.defaults
    chosen: list[tuple[Drawn, float]] = []
    for values, score in sorted(objective.finished, key=lambda entry: -entry[1]):
        if len(chosen) < finalists and all(values != other for other, _ in chosen):
            chosen.append((values, score))
    if all(values != defaults for values, _ in chosen):
        chosen.append(next(entry for entry in objective.finished if entry[0] == defaults))
    return chosen

"""Optuna search over the parameters a rule declares, with the same budget for every rule.

A learned policy is only compared with rules tuned like this. All trials see the same seeds and rates
(common random numbers); the score is the mean attainment over rates around the knee, where policies differ.
A search that is told the knee follows it: twice on its way it measures the goodput of the best setting so far, and
where that has moved, the rates move with it and the leaders are scored again there. Else a rule that holds three times
the rate of the reference would be searched where all of its settings meet everything.
Search runs on the ``train`` split. The best few, and the defaults, are then ranked again on fresh seeds of
the ``valid`` split, so that luck in the search does not decide; the ``test`` split is never touched.

Pruning uses the common random numbers: rates are simulated from the highest down, and a trial ends as soon as it
would miss the best few even if it did as well at every rate left as any trial ever did on the same arrivals.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.digest import code_sha256, scenario_hash
from env.measure.evaluator import Evaluator, measure
from env.measure.goodput import find_goodput
from policies.registry import get, parse
from policies.rule import Rule, Value
from train.search.tuned import Finalist, TuneResult

if TYPE_CHECKING:
    from train.search.record import Outcome

__all__ = ["KNEE", "MANNER", "VALID_SEED", "knee_rate", "tune"]

#: Rates of the objective as multiples of the knee (goodput at 90 % of the reference rule).
KNEE = (0.85, 1.0, 1.15, 1.3)
#: Part of the names of stored results: how searches go about it, which no digest of the simulator's sources tells.
MANNER = "follows"
VALID_SEED = 1_000  # seeds of the final ranking start here, away from the search's
_FOLLOW = (0.25, 0.55)  # shares of the trials after which the rates follow the best setting's knee
_MOVED = 1.06  # factor between two knees from which on the rates move
_FEW = 8  # trials below which they stay


def knee_rate(
    scenario: Any,
    settings: PointSettings,
    *,
    policy: str = "least_tokens",
    seeds: Sequence[int] = (0, 1),
    start: float = 1.0,
    measure: Callable[..., Any] = measure,
) -> float:
    """Goodput at 90 % of a reference rule on the ``train`` split: where the objective of :func:`tune` looks.

    :raises SlalomError: the reference rule meets the target at no rate
    """
    with Evaluator(scenario, replace(settings, split="train"), measure=measure) as evaluator:
        rate = _knee(evaluator, Contender(policy), start, seeds)
    if rate <= 0.0:
        raise SlalomError("scenario", policy, "its targets are met at no rate; loosen them or change the cluster")
    return rate


def tune(
    rule_name: str,
    scenario: Any,
    trials: int,
    *,
    rates: Sequence[float],
    knee: float | None = None,
    settings: PointSettings | None = None,
    seeds: Sequence[int] = (0, 1),
    valid_seeds: int = 4,
    finalists: int = 5,
    seed: int = 0,
    jobs: int = 1,
    storage: str | Path | None = None,
    sampler: str = "auto",
    prune: bool = False,
    pool: Executor | None = None,
    width: int = 1,
    stop: Callable[[], bool] = lambda: False,
    on_trial: Callable[[int, float], None] | None = None,
    measure: Callable[..., Any] = measure,
) -> TuneResult:
    """Search a rule's parameters; a rule without any returns its (empty) defaults at no cost.

    :param rule_name: name of a rule, or ``name:param=value``: parameters given there stay as given
    :param trials: budget; one trial simulates ``len(rates) * len(seeds) * settings.n_requests`` requests
    :param rates: requests per second of the objective, e.g. ``KNEE`` × :func:`knee_rate`
    :param knee: what ``rates`` are multiples of; they then follow the knee of the best setting. None: they stay
    :param storage: journal file or URL of a database that makes the search resumable; None keeps it in memory
    :param sampler: one of ``train.search.record.SAMPLERS``
    :param prune: end hopeless trials early
    :param pool: where trials run, each as one job; ``width`` of them are asked for at a time, and the same width
        gives the same search
    :param stop: asked before each simulation; once true, the search ends and the final ranking follows
    :param on_trial: called with (trials done, best score so far)
    :raises SlalomError: unknown rule, or a budget below one trial
    """
    if trials < 1 or not rates or not seeds:
        raise SlalomError("tune", trials, "give at least one trial, rate and seed")
    name, fixed = parse(rule_name)
    rule, given = get(name), dict(fixed)
    settings = settings or PointSettings()
    free = [p for p in rule.params if p.name not in given]
    if not free:
        return TuneResult(name, rule.values(given), 0.0, 0.0, 0, 0, "none", tuple(rates), ())
    from train.search.record import choose_sampler

    chosen = choose_sampler(sampler, free)
    inside = replace(settings, split="train")
    identity = [code_sha256(), scenario_hash(scenario), inside.__dict__, given, list(seeds), seed]
    with Evaluator(scenario, inside, jobs=jobs, measure=measure) as here:

        def begin(rates: tuple[float, ...], first: Sequence[dict[str, Value]]) -> _Study:
            objective = _Objective(rule, given, here, rates, tuple(seeds), finalists if prune else 0, stop)
            return _Study(objective, chosen, seed, storage, [*identity, list(rates)], first)

        studies = [begin(tuple(rates), ())]
        done = following = 0
        for share in (*(_FOLLOW if knee and trials >= _FEW else ()), 1.0):
            done = studies[-1].search(done, round(share * trials), pool, width, on_trial)
            if knee is None or share == 1.0 or stop():
                break
            before = here.simulated_requests
            leaders = [values for values, _ in _distinct_best(studies[-1].objective, finalists)]
            found = _knee(here, Contender(name, leaders[0]), knee, seeds, step=1.3, widest=64.0)
            following += here.simulated_requests - before
            if found > 0.0 and max(found / knee, knee / found) > _MOVED:
                rates, knee = tuple(rate * found / knee for rate in rates), found
                studies.append(begin(rates, leaders))
        objectives = [study.objective for study in studies]
    objective = next(o for o in reversed(objectives) if o.finished)  # the time may have been up before the last began
    rates = objective.given_rates
    best = _distinct_best(objective, finalists)
    fresh = range(VALID_SEED, VALID_SEED + valid_seeds)
    valid = Evaluator(scenario, replace(settings, split="valid"), jobs=jobs, measure=measure, pool=pool)
    with valid:
        ranking: list[Finalist] = [
            {"values": values, "search": score, "final": _score(valid, name, values, rates, fresh)}
            for values, score in best
        ]
    default = next(entry["final"] for entry in ranking if entry["values"] == rule.values(given))
    ranking.sort(key=lambda entry: -entry["final"])
    return TuneResult(
        rule=name,
        values=ranking[0]["values"],
        default=default,
        score=ranking[0]["final"],
        trials=done,
        simulated_requests=following + sum(o.simulated_requests for o in objectives) + valid.simulated_requests,
        sampler=studies[0].sampler,
        rates=rates,
        ranking=tuple(ranking),
        pruned=sum(o.pruned for o in objectives),
    )


def _knee(here: Evaluator, contender: Contender, start: float, seeds: Sequence[int], **search: float) -> float:
    """Goodput at 90 % as far as ``here`` tells; 0 where the targets are met at no rate.

    :param search: see :func:`env.measure.goodput.find_goodput`
    """
    found = find_goodput(
        lambda rate: here.attainment(contender, rate, seeds), start, targets=(0.9,), tolerance=0.05, **search
    )
    return found.goodput[0].rate


class _Objective:
    """What a trial is worth, and what is known from the trials before it.

    :param keep: how many of the best must not be pruned; 0: no pruning
    """

    def __init__(
        self,
        rule: Rule,
        given: Mapping[str, Any],
        here: Evaluator,
        rates: tuple[float, ...],
        seeds: tuple[int, ...],
        keep: int,
        stop: Callable[[], bool],
    ) -> None:
        self.rule, self.given, self.stop = rule, given, stop
        self.given_rates, self.rates = rates, tuple(sorted(rates, reverse=True))
        self.finished: list[tuple[dict[str, Value], float]] = []  # trials simulated at every rate
        self.pruned = self.simulated_requests = 0
        self._here, self._seeds, self._keep = here, seeds, keep
        self._highest = [0.0] * len(rates)

    def suggest(self, trial: Any) -> dict[str, Value]:
        drawn = {p.name: p.suggest(trial) for p in self.rule.params if p.name not in self.given}
        return self.rule.values({**self.given, **drawn})

    def outlook(self) -> tuple[tuple[float, ...], float]:
        """The best attainment seen at each rate, and the score a trial has to be able to reach."""
        if not self._keep or len(self.finished) < self._keep:
            return self.rates, -1.0
        scores = sorted((score for _, score in self.finished), reverse=True)
        return tuple(self._highest), scores[self._keep - 1]

    def evaluate(self, drawn: Sequence[dict[str, Value]], pool: Executor | None) -> Iterator[Outcome | None]:
        """One outcome per setting, in order; None where the time was up."""
        outlook, first = self.outlook(), not self.finished
        if pool is None:
            for values in drawn:
                before = self._here.simulated_requests
                found = _trial(self._here, self.rule.name, values, self.rates, self._seeds, outlook, first, self.stop)
                self.simulated_requests += self._here.simulated_requests - before
                yield found
            return
        fixed = (self._here.scenario, self._here.settings, self.rule.name)
        jobs = [pool.submit(_remote_trial, *fixed, values, self.rates, self._seeds, outlook, first) for values in drawn]
        for job in jobs:
            outcome: Any = job.result()
            self.simulated_requests += len(outcome.cells) * len(self._seeds) * self._here.settings.n_requests
            yield outcome

    def told(self, values: dict[str, Value], outcome: Outcome) -> None:
        """Take note of a finished trial."""
        for place, share in enumerate(outcome.cells):
            self._highest[place] = max(self._highest[place], share)
        if outcome.cells and len(outcome.cells) < len(self.rates):
            self.pruned += 1
        else:
            self.finished.append((values, outcome.value))


def _trial(
    evaluator: Evaluator,
    name: str,
    values: Mapping[str, Value],
    rates: Sequence[float],
    seeds: Sequence[int],
    outlook: tuple[Sequence[float], float],
    first: bool,
    stop: Callable[[], bool],
) -> Outcome | None:
    """Simulate one setting, hardest rate first, as long as it may still get among the best.

    :return: no cells for a setting that does not fit the cluster: it serves nobody
    """
    from train.search.record import Outcome

    highest, floor = outlook
    cells: list[float] = []
    for rate in rates:
        if stop():
            return None
        try:
            cells.append(evaluator.attainment(Contender(name, values), rate, seeds))
        except SlalomError:
            if first:
                raise  # not even the defaults fit this scenario
            return Outcome(0.0, ())
        most = (sum(cells) + sum(highest[len(cells) :])) / len(rates)
        if floor >= 0.0 and most < floor:
            return Outcome(most, tuple(cells))
    return Outcome(sum(cells) / len(rates), tuple(cells))


def _remote_trial(
    scenario: Any,
    settings: PointSettings,
    name: str,
    values: Mapping[str, Value],
    rates: Sequence[float],
    seeds: Sequence[int],
    outlook: tuple[Sequence[float], float],
    first: bool,
) -> Outcome | None:
    """As :func:`_trial`, as a job of its own."""
    with Evaluator(scenario, settings) as here:
        return _trial(here, name, values, rates, seeds, outlook, first, lambda: False)


class _Study:
    """A search at given rates, to be gone on with.

    :param first: settings to try before the sampler is asked, after the defaults
    """

    def __init__(
        self,
        objective: _Objective,
        sampler: str,
        seed: int,
        storage: str | Path | None,
        identity: list[Any],
        first: Sequence[dict[str, Value]],
    ) -> None:
        import optuna

        from train.search.record import Record, new_sampler

        chosen = new_sampler(sampler, seed)
        self.objective, self.sampler = objective, type(chosen).__name__
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        name = objective.rule.name
        self._record = Record(storage, f"{name}-{self.sampler}-{digest}" if storage is not None else name)
        self._study = optuna.create_study(direction="maximize", sampler=chosen)
        defaults = objective.rule.values(objective.given)
        for values in [defaults, *(values for values in first if values != defaults)]:
            free = {p.name: values[p.name] for p in objective.rule.params if p.name not in objective.given}
            self._study.enqueue_trial(free)

    def search(
        self,
        done: int,
        until: int,
        pool: Executor | None,
        width: int,
        on_trial: Callable[[int, float], None] | None,
    ) -> int:
        """Ask and tell until ``until`` trials are finished; what is on record is not simulated again.

        :return: how many were finished before the time was up
        """
        objective, record, study = self.objective, self._record, self._study
        while done < until:
            # the defaults alone first: if they do not fit the scenario, nothing does
            asked = [study.ask() for _ in range(min(width if done else 1, until - done))]
            drawn = [objective.suggest(trial) for trial in asked]
            known = [record.find(trial.params) for trial in asked]
            begin = time.perf_counter()
            fresh = objective.evaluate([v for v, old in zip(drawn, known, strict=True) if old is None], pool)
            for trial, values, old in zip(asked, drawn, known, strict=True):
                outcome = next(fresh) if old is None else old
                if outcome is None:
                    return done
                if old is None:
                    record.add(trial, outcome, time.perf_counter() - begin)
                    begin = time.perf_counter()
                study.tell(trial, outcome.value)
                objective.told(values, outcome)
                done += 1
                if on_trial is not None:
                    on_trial(done, max(score for _, score in objective.finished))
        return done


def _score(
    evaluator: Evaluator, name: str, values: Mapping[str, Value], rates: Sequence[float], seeds: Sequence[int]
) -> float:
    contender = Contender(name, values)
    return sum(evaluator.attainment(contender, rate, seeds) for rate in rates) / len(rates)


def _distinct_best(objective: _Objective, finalists: int) -> list[tuple[dict[str, Value], float]]:
    """The best different settings that were simulated at every rate, with the defaults among them."""
    defaults = objective.rule.values(objective.given)
    chosen: list[tuple[dict[str, Value], float]] = []
    for values, score in sorted(objective.finished, key=lambda entry: -entry[1]):
        if len(chosen) < finalists and all(values != other for other, _ in chosen):
            chosen.append((values, score))
    if all(values != defaults for values, _ in chosen):
        chosen.append(next(entry for entry in objective.finished if entry[0] == defaults))
    return chosen

"""Optuna search over a rule's parameters and the levers of its arrangement, with equal budgets for all rules.

A learned policy is only compared with rules tuned like this. All trials see the same seeds and rates (common random
numbers); the score is that of the direct search, it merges levels at rates from where the best so far holds
99 % to beyond its knee. A search that is told the knee follows it: some times on its way it
measures where the best setting so far has its knee, and where that has moved, the rates move with it and the leaders
are scored again there. Else a rule that holds three times the rate of the reference would be searched where all of its
settings meet everything.
Search runs on the ``train`` split. The best few, and the defaults, are then ranked again on fresh seeds of
the ``valid`` split, so that luck in the search does not decide; the ``test`` split is never touched.

Pruning uses the common random numbers: rates are simulated from the highest down, and a trial ends as soon as it
would miss the best few even if it did as well at every rate left as any trial ever did on the same arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.digest import code_sha256, scenario_hash
from env.measure.evaluator import Evaluator
from env.measure.goodput import find_goodput, largest_rate
from env.measure.level import mean_level, measure_level, run_length
from policies.registry import get, parse
from train.search.fitness import merged, rates_between
from train.search.levers import Levers
from train.search.trials import Budget, Drawn, Objective, Study, Subject, distinct_best
from train.search.tuned import Finalist, TuneResult

#: Rates of the objective as multiples of the knee, while nothing is known of where 99 % are held.
KNEE = tuple(rates_between(0.7, 1.0))
#: Part of the names of stored results: how searches go about it, which no digest of the simulator's sources tells.
MANNER = "levels, levers"
VALID_SEED = 1_000  # seeds of the final ranking start here, away from the search's
_KNEE_RULES = ("least_tokens", "predicted_ttft", "static_split", "linear_score")
_FOLLOW = (0.1, 0.3, 0.6)  # shares of the budget after which the rates follow the best setting's knee
_MOVED = 1.06  # factor between two knees from which on the rates move
_FEW = 8  # trials below which they stay
_STRICT = (0.35, 0.95)  # of the knee: least and greatest of the lowest rate


def knee_rate(
    scenario: Any,
    settings: PointSettings,
    *,
    policy: str | Contender = "least_tokens",
    seeds: Sequence[int] = (0, 1),
    start: float | None = None,
    tolerance: float = 0.05,
    measure: Callable[..., Any] = measure_level,
    length: Callable[..., int] = run_length,
) -> float:
    """The largest rate [1/s] at which a policy has a level of 90 % on the ``train`` split: where :func:`tune` looks.

    :param start: first rate tried; None: the scenario's reference rate
    :raises SlalomError: it has that level at no rate
    """
    contender = Contender(policy) if isinstance(policy, str) else policy
    with Evaluator(scenario, replace(settings, split="train"), measure=measure) as evaluator:
        rate = largest_rate(
            lambda rate: mean_level(evaluator, contender, rate, seeds, length), start or scenario.reference_rate,
            tolerance=tolerance,
        )  # fmt: skip
    if rate <= 0.0:
        fix = "its targets are met at no rate; loosen them or change the cluster"
        raise SlalomError("scenario", contender.name, fix)
    return rate


def best_knee(scenario: Any, settings: PointSettings) -> float:
    """The best knee of a few rules at their defaults, where all rules of a scenario are tuned.

    One that does not fit, or never has a level of 90 %, is no help.

    :raises SlalomError: none of them has one
    """
    found, refusal = 0.0, None
    for rule in _KNEE_RULES:
        try:
            found = max(found, knee_rate(scenario, settings, policy=rule, start=found))
        except SlalomError as error:
            refusal = error
    if found == 0.0:
        assert refusal is not None
        raise refusal
    return found


def tune(
    rule_name: str,
    scenario: Any,
    trials: int,
    *,
    rates: Sequence[float] | None = None,
    knee: float | None = None,
    levers: Collection[str] = (),
    requests: float = float("inf"),
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
    measure: Callable[..., Any] = measure_level,
    length: Callable[..., int] = run_length,
) -> TuneResult:
    """Search a rule's parameters; with nothing to search it returns its (empty) defaults at no cost.

    :param rule_name: name of a rule, or ``name:param=value``: parameters given there stay as given
    :param trials: at most; a full one simulates at least ``len(rates) * len(seeds) * settings.n_requests`` requests
    :param rates: requests per second of the objective; None: ``KNEE`` × ``knee``
    :param knee: what ``rates`` are multiples of; they then follow the knee of the best setting. None: they stay
    :param levers: of the arrangement that are searched as well, some of ``train.search.levers.EVERY``
    :param requests: simulated requests after which the search ends, the final ranking not counted
    :param storage: journal file or URL of a database that makes the search resumable; None keeps it in memory
    :param sampler: one of ``train.search.record.SAMPLERS``
    :param prune: end hopeless trials early
    :param pool: where trials run, each as one job; ``width`` of them are asked for at a time, and the same width
        gives the same search
    :param stop: asked before each simulation; once true, the search ends and the final ranking follows
    :param on_trial: called with (trials done, best score so far)
    :param measure: replaces the simulator (tests); its points tell their level
    :param length: says how many requests a run takes, see ``env.measure.level.run_length``
    :raises SlalomError: unknown rule, or a budget below one trial
    """
    rates = [factor * knee for factor in KNEE] if rates is None and knee is not None else rates
    if trials < 1 or not rates or not seeds:
        raise SlalomError("tune", trials, "give at least one trial, rate and seed")
    name, fixed = parse(rule_name)
    subject = Subject(get(name), dict(fixed), _levers(name, scenario, levers) if levers else None)
    settings = settings or PointSettings()
    if not subject.free:
        return TuneResult(name, subject.values(subject.defaults), 0.0, 0.0, 0, 0, "none", tuple(rates), ())
    from train.search.record import choose_sampler

    chosen = choose_sampler(sampler, subject.free)
    inside = replace(settings, split="train")
    identity = [code_sha256(), scenario_hash(scenario), inside.__dict__, dict(fixed), list(seeds), seed]
    identity += ["levers", *levers] if levers else []
    with Evaluator(scenario, inside, jobs=jobs, measure=measure) as here:

        def begin(rates: tuple[float, ...], first: Sequence[Drawn]) -> Study:
            objective = Objective(
                subject, here, rates, tuple(seeds), finalists if prune else 0, stop, (measure, length)
            )
            return Study(objective, chosen, seed, storage, [*identity, list(rates)], first)

        studies = [begin(tuple(rates), subject.starts())]
        done = following = 0
        for share in (*(_FOLLOW if knee and trials >= _FEW else ()), 1.0):
            spent = sum(study.objective.simulated_requests for study in studies[:-1]) + following
            budget = Budget(round(share * trials), share * requests - spent)
            done = studies[-1].search(done, budget, pool, width, on_trial)
            if knee is None or share == 1.0 or stop():
                break
            before = here.simulated_requests
            leaders = [drawn for drawn, _ in distinct_best(studies[-1].objective, finalists)]
            found, strict = _knees(here, subject.contender(leaders[0]), knee, seeds, length)
            following += studies[-1].once("knees", here.simulated_requests - before)
            if found > 0.0 and max(found / knee, knee / found) > _MOVED:
                low, high = _STRICT
                strict = min(max(strict or KNEE[0] * found, low * found), high * found)
                rates = rates_between(strict, found) if len(rates) == len(KNEE) else [r * found / knee for r in rates]
                knee = found
                studies.append(begin(tuple(rates), leaders))
        objectives = [study.objective for study in studies]
    objective = next(o for o in reversed(objectives) if o.finished)  # the time may have been up before the last began
    rates = objective.given_rates
    best = distinct_best(objective, finalists)
    fresh = range(VALID_SEED, VALID_SEED + valid_seeds)
    valid = Evaluator(scenario, replace(settings, split="valid"), jobs=jobs, measure=measure, pool=pool)
    with valid:
        ranking: list[Finalist] = [
            {
                "values": subject.values(drawn),
                "levers": subject.levers(drawn),
                "search": score,
                "final": merged([mean_level(valid, subject.contender(drawn), r, fresh, length) for r in rates]),
            }
            for drawn, score in best
        ]
    plain = subject.defaults
    default = next(e for e, (drawn, _) in zip(ranking, best, strict=True) if drawn == plain)["final"]
    order = sorted(range(len(ranking)), key=lambda i: -ranking[i]["final"])
    return TuneResult(
        rule=name,
        values=ranking[order[0]]["values"],
        default=default,
        score=ranking[order[0]]["final"],
        trials=done,
        simulated_requests=following + sum(o.simulated_requests for o in objectives) + valid.simulated_requests,
        sampler=studies[0].sampler,
        rates=tuple(rates),
        ranking=tuple(ranking[i] for i in order),
        pruned=sum(o.pruned for o in objectives),
        levers=ranking[order[0]]["levers"],
        plans=subject.contender(best[order[0]][0]).plans,
    )


def _levers(rule: str, scenario: Any, free: Collection[str]) -> Levers:
    from env.surrogate.arena import arena_of

    return Levers(rule, arena_of(scenario).setting, free)


def _knees(
    here: Evaluator, contender: Contender, near: float, seeds: Sequence[int], length: Callable[..., int]
) -> tuple[float, float]:
    """The largest rates with a level of 90 and of 99 %, as far as ``here`` tells; 0 where there are none."""
    found = find_goodput(
        lambda rate: mean_level(here, contender, rate, seeds, length), near, targets=(0.9, 0.99), tolerance=0.05,
        step=1.3, widest=64.0,
    )  # fmt: skip
    return found.goodput[0].rate, found.goodput[1].rate

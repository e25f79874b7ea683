"""Optuna search over the parameters a rule declares, with the same budget for every rule.

A learned policy is only compared with rules tuned like this. All trials see the same seeds and rates
(common random numbers); the score is the mean attainment over rates around the knee, where policies differ.
Search runs on the ``train`` split. The best few, and the defaults, are then ranked again on fresh seeds of
the ``valid`` split, so that luck in the search does not decide; the ``test`` split is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from engine.errors import SlalomError
from eval.goodput import find_goodput
from eval.points import Contender, Evaluator, PointSettings, measure
from policies.registry import get, parse
from policies.rule import Rule, Value

if TYPE_CHECKING:
    import optuna

__all__ = ["KNEE", "Finalist", "TuneResult", "knee_rate", "tune"]

#: Rates of the objective as multiples of the knee (goodput at 90 % of the reference rule).
KNEE = (0.85, 1.0, 1.15, 1.3)
_CMA_FROM = 9  # continuous parameters; below, TPE is at least as good at equal budget
_VALID_SEED = 1_000  # seeds of the final ranking start here, away from the search's


class Finalist(TypedDict):
    """A setting of the final ranking: its score in the search and on the fresh validation seeds."""

    values: dict[str, Value]
    search: float
    final: float


@dataclass(frozen=True)
class TuneResult:
    """What a search found and what it cost.

    :param values: parameter values of the winner of the final ranking
    :param default: score of the rule's own defaults in the final ranking (attainment, 0 to 1)
    :param score: score of ``values`` in the final ranking
    :param trials: trials of the search
    :param simulated_requests: requests simulated in the search and in the final ranking
    :param sampler: which Optuna sampler drew the values
    :param ranking: values, search score and final score of every finalist, best first
    """

    rule: str
    values: dict[str, Value]
    default: float
    score: float
    trials: int
    simulated_requests: int
    sampler: str
    rates: tuple[float, ...]
    ranking: tuple[Finalist, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        reference = Contender(policy)
        found = find_goodput(
            lambda rate: evaluator.attainment(reference, rate, seeds), start, targets=(0.9,), tolerance=0.05
        )
    rate = found.goodput[0].rate
    if rate <= 0.0:
        raise SlalomError(
            "scenario", policy, "its targets are met at no rate; loosen them or change the cluster"
        )
    return rate


def tune(
    rule_name: str,
    scenario: Any,
    trials: int,
    *,
    rates: Sequence[float],
    settings: PointSettings | None = None,
    seeds: Sequence[int] = (0, 1),
    valid_seeds: int = 4,
    finalists: int = 5,
    seed: int = 0,
    jobs: int = 1,
    storage: Path | None = None,
    on_trial: Callable[[int, float], None] | None = None,
    measure: Callable[..., Any] = measure,
) -> TuneResult:
    """Search a rule's parameters; a rule without any returns its (empty) defaults at no cost.

    :param rule_name: name of a rule, or ``name:param=value``: parameters given there stay as given
    :param trials: budget; one trial simulates ``len(rates) * len(seeds) * settings.n_requests`` requests
    :param rates: requests per second of the objective, e.g. ``KNEE`` × :func:`knee_rate`
    :param storage: journal file that makes the search resumable; None keeps it in memory
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
    search = Evaluator(scenario, replace(settings, split="train"), jobs=jobs, measure=measure)
    with search:
        study, sampler = _study(free, name, seed, storage)
        _run(study, rule, given, search, trials, rates, seeds, on_trial)
    best = _distinct_best(study, rule, given, finalists)
    fresh = range(_VALID_SEED, _VALID_SEED + valid_seeds)
    valid = Evaluator(scenario, replace(settings, split="valid"), jobs=jobs, measure=measure)
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
        trials=len(study.trials),
        simulated_requests=search.simulated_requests + valid.simulated_requests,
        sampler=sampler,
        rates=tuple(rates),
        ranking=tuple(ranking),
    )


def _study(free: Sequence[Any], name: str, seed: int, storage: Path | None) -> tuple[optuna.Study, str]:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = None
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
    continuous = all(p.choices is None and not p.integer for p in free)
    # CMA-ES keeps a pickled optimiser in its storage and unpickles it on resume: never from a file.
    if storage is None and continuous and len(free) >= _CMA_FROM:
        sampler: optuna.samplers.BaseSampler = optuna.samplers.CmaEsSampler(seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        direction="maximize", sampler=sampler, storage=backend, study_name=name, load_if_exists=True
    )
    return study, type(sampler).__name__


def _run(
    study: optuna.Study,
    rule: Rule,
    given: Mapping[str, Any],
    evaluator: Evaluator,
    trials: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    on_trial: Callable[[int, float], None] | None,
) -> None:
    """Ask and tell until ``trials`` are finished, defaults first."""
    import optuna

    complete = (optuna.trial.TrialState.COMPLETE,)
    done = len(study.get_trials(deepcopy=False, states=complete))
    if done == 0:
        defaults = rule.values(given)
        study.enqueue_trial({p.name: defaults[p.name] for p in rule.params if p.name not in given})
    while done < trials:
        trial = study.ask()
        try:
            score = _score(evaluator, rule.name, _suggest(rule, given, trial), rates, seeds)
        except SlalomError:
            if not study.get_trials(deepcopy=False, states=complete):
                raise  # not even the defaults fit this scenario
            score = 0.0  # this setting does not fit the cluster: it serves nobody
        study.tell(trial, score)
        done += 1
        if on_trial is not None:
            on_trial(done, study.best_value)


def _suggest(rule: Rule, given: Mapping[str, Any], trial: Any) -> dict[str, Value]:
    drawn = {p.name: p.suggest(trial) for p in rule.params if p.name not in given}
    return rule.values({**given, **drawn})


def _score(
    evaluator: Evaluator, name: str, values: Mapping[str, Value], rates: Sequence[float], seeds: Sequence[int]
) -> float:
    contender = Contender(name, values)
    return sum(evaluator.attainment(contender, rate, seeds) for rate in rates) / len(rates)


def _distinct_best(
    study: optuna.Study, rule: Rule, given: Mapping[str, Any], finalists: int
) -> list[tuple[dict[str, Value], float]]:
    """The best different settings of the search, with the defaults among them."""
    import optuna

    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    scored = [(rule.values({**given, **t.params}), float(t.value or 0.0)) for t in finished]
    defaults = rule.values(given)
    chosen: list[tuple[dict[str, Value], float]] = []
    for values, score in sorted(scored, key=lambda entry: -entry[1]):
        if len(chosen) < finalists and all(values != other for other, _ in chosen):
            chosen.append((values, score))
    if all(values != defaults for values, _ in chosen):
        chosen.append(next(entry for entry in scored if entry[0] == defaults))
    return chosen

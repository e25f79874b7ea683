"""``static_plan``: the best fixed arrangement of a scenario's GPUs, searched with the budget of a rule's tuning.

One trial scores one arrangement (of :func:`eval.placement.placement.arrangements`) by the objective of
:func:`train.search.tune.tune`: levels at rates around the knee, on the ``train`` split. At most half of the trials look
at arrangements with default budgets, the rest at the order of queues and the budgets (chunks, prefill batches, SM
splits) of the best ones. The leaders are ranked again on fresh seeds of the ``valid`` split, as a rule's settings are.
Nothing moves at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from engine.errors import SlalomError
from engine.latency import Profile
from env.measure.contender import STATIC_PLAN as NAME
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.measure.level import mean_level, measure_level
from env.scenario import Scenario
from eval.placement.disaggregation import reference, siblings
from eval.placement.fleet import is_tradable
from eval.placement.placement import Arrangement, arrangements, orders, variants
from train.search.fitness import merged
from train.search.tune import VALID_SEED

#: Budget where none is asked for (``--tune 0``).
TRIALS = 40
_SLACK = 0.02  # the level may rise by so much from one rate to the next higher one
_ORDERED = 4  # leaders whose queues are tried in other orders, before all leaders' budgets
_SCREEN = 0.5  # share of the trials that arrangements with default budgets may take


@dataclass(frozen=True)
class StaticFound:
    """The plan, as a contender, and what its search cost; ``ranking``: finalists, best first."""

    contender: Contender
    arrangement: str
    score: float
    trials: int
    simulated_requests: int
    rates: tuple[float, ...]
    ranking: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys of a rule's tuning."""
        return {
            "policy": NAME,
            "rule": self.contender.policy,
            "values": dict(self.contender.values),
            "cluster": [dict(group) for group in self.contender.cluster],
            "arrangement": self.arrangement,
            "default": self.score,
            "score": self.score,
            "trials": self.trials,
            "simulated_requests": self.simulated_requests,
            "sampler": "arrangements, then their budgets",
            "rates": list(self.rates),
            "ranking": list(self.ranking),
        }


def as_contender(found: Arrangement) -> Contender:
    """The arrangement under its simple dispatch, ready to be measured."""
    rule, values = found.policy
    groups = tuple(group.model_dump(mode="json") for group in found.groups)
    return Contender(rule, values, NAME, tuned=True, cluster=groups)


def spread(families: Sequence[Sequence[Arrangement]], most: int) -> list[Arrangement]:
    """At most ``most`` arrangements, taken in turn from each family, evenly over each family's list."""
    share = max(most // max(len(families), 1), 1)
    kept = []
    for members in families:
        n = min(len(members), share if sum(map(len, families)) > most else len(members))
        kept.append([members[i * len(members) // n] for i in range(n)])
    mixed = [a for row in zip_longest(*kept) for a in row if a is not None]
    return mixed[:most]


def place_to_beat(scores: Sequence[float], places: int) -> float:
    """The score that a new trial needs to be among the best ``places``; none where there are fewer."""
    return sorted(scores)[-places] if len(scores) >= places else 0.0


def score_of(level: Callable[[float], float], rates: Sequence[float], floor: float = 0.0) -> float:
    """Levels at ``rates`` merged, asked lowest first; an upper bound of it once that falls below ``floor``."""
    levels: list[float] = []
    for rate in sorted(rates):
        levels.append(level(rate))
        bound = merged([*levels, *[min(levels[-1] + _SLACK, 1.0)] * (len(rates) - len(levels))])
        if bound < floor:
            return bound
    return merged(levels)


def _level(evaluator: Evaluator, arrangement: Arrangement, seeds: Sequence[int]) -> Callable[[float], float]:
    contender = as_contender(arrangement)
    return lambda rate: mean_level(evaluator, contender, rate, seeds)


def search_static(
    scenario: Scenario,
    trials: int,
    *,
    knee: float,
    factors: Sequence[float],
    settings: PointSettings,
    seeds: Sequence[int] = (0, 1),
    valid_seeds: int = 4,
    finalists: int = 5,
    jobs: int = 1,
    requests: float = float("inf"),
    on_trial: Callable[[int, float], None] | None = None,
) -> StaticFound:
    """Search the plan, see the module docstring. Further parameters as those of :func:`train.search.tune.tune`.

    :param knee: requests per second near which rules of the scenario reach their limit; arrangements that hold more
        with default budgets move it up, since an objective that everybody meets tells nothing
    :param factors: rates of the objective as multiples of the knee
    :raises SlalomError: no arrangement fits the scenario's GPUs
    """
    listed = list(arrangements(scenario, scenario.n_gpus()))
    if not listed or trials < 1:
        raise SlalomError(NAME, trials, "give at least one trial, and GPUs enough for one instance")
    scored: list[tuple[float, Arrangement]] = []
    with Evaluator(scenario, replace(settings, split="train"), jobs=jobs, measure=measure_level) as search:
        reached = _knee(search, _probes(scenario, listed, trials), knee)
        rates = [factor * reached for factor in factors]
        for arrangement in _trials(scenario, listed, trials, scored):
            floor = place_to_beat([score for score, _ in scored], finalists)
            scored.append((score_of(_level(search, arrangement, seeds), rates, floor), arrangement))
            if search.simulated_requests >= requests:
                break
            if on_trial is not None:
                on_trial(len(scored), max(score for score, _ in scored))
    best = sorted(scored, key=lambda entry: -entry[0])[:finalists]
    fresh = range(VALID_SEED, VALID_SEED + valid_seeds)
    with Evaluator(scenario, replace(settings, split="valid"), jobs=jobs, measure=measure_level) as valid:
        final = [(score_of(_level(valid, a, fresh), rates), score, a) for score, a in best]
    final.sort(key=lambda entry: -entry[0])
    return StaticFound(
        contender=as_contender(final[0][2]),
        arrangement=final[0][2].label,
        score=final[0][0],
        trials=len(scored),
        simulated_requests=search.simulated_requests + valid.simulated_requests,
        rates=tuple(rates),
        ranking=tuple({"arrangement": a.label, "search": score, "final": last} for last, score, a in final),
    )


def _by_family(listed: Sequence[Arrangement]) -> list[list[Arrangement]]:
    return [[a for a in listed if a.family == family] for family in dict.fromkeys(a.family for a in listed)]


def _screened(scenario: Scenario, listed: Sequence[Arrangement], trials: int) -> list[Arrangement]:
    """What is tried with default budgets; where instances differ, most are hybrids, and no family gets a share."""
    families = _by_family(listed) if is_tradable(scenario) else [listed]
    return spread(families, max(int(_SCREEN * trials), 1))


def _probes(scenario: Scenario, listed: Sequence[Arrangement], trials: int) -> list[Arrangement]:
    """Whose knees count: the middle one of each family; where instances differ, neighbours do too, so all screened."""
    if is_tradable(scenario):
        return [members[len(members) // 2] for members in _by_family(listed)]
    return _screened(scenario, listed, trials)


def _knee(search: Evaluator, probes: Sequence[Arrangement], least: float) -> float:
    """The highest coarse knee of ``probes``, at least ``least``.

    No search of each one's knee (``largest_rate``): the bar only rises, and who does not hold it costs one run.
    """
    knee = least
    for contender in map(as_contender, probes):
        while mean_level(search, contender, 1.2 * knee, (0,)) >= 0.9 and knee < 64.0 * least:
            knee *= 1.2
    return knee


def _trials(
    scenario: Scenario, listed: list[Arrangement], trials: int, scored: list[tuple[float, Arrangement]]
) -> Iterator[Arrangement]:
    """What to try next; ``scored`` grows between two answers."""
    tried = set()
    for arrangement in _screened(scenario, listed, trials):
        tried.add(arrangement.label)
        yield arrangement
    profiles = {reference(scenario, p): p for p in siblings(scenario)}
    leaders = sorted(scored, key=lambda entry: -entry[0])[:_ORDERED]
    ordered = [variant for _, leader in leaders for variant in orders(leader)]
    for variant in chain(ordered, _with_budgets(scored, profiles)):
        if len(tried) >= trials:
            return
        if variant.label not in tried:
            tried.add(variant.label)
            yield variant


def _with_budgets(scored: list[tuple[float, Arrangement]], profiles: Mapping[str, Profile]) -> Iterator[Arrangement]:
    """Budgets of the best so far, again and again, each once: where profiles differ, one may follow from another."""
    done = set()
    while left := [(score, arrangement) for score, arrangement in scored if arrangement.label not in done]:
        _, best = max(left, key=lambda entry: entry[0])
        done.add(best.label)
        yield from variants(best, profiles)

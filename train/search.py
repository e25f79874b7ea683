"""The learner ``search``: Optuna over the parameters a rule declares, within a budget of time or requests.

It also tunes the base rule that PPO starts from. The search itself is ``eval.tune``; here a budget becomes a
number of trials, and the outcome something a later stage, or a resumed run, can start from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import SlalomError
from env.scenario import Scenario
from eval.goodput import find_goodput
from eval.points import Contender, Evaluator, PointSettings
from eval.tune import KNEE, TuneResult, tune
from policies import registry
from policies.rule import Value
from train.config import TrainConfig
from train.progress import Display

__all__ = ["SearchResult", "search_rule"]

_SEEDS = (0, 1)  # of the search, as in eval.tune


class _Ranking(NamedTuple):
    """How the best trials are ranked again on fresh windows."""

    seeds: int
    finalists: int


_FIRST, _LAST = _Ranking(2, 2), _Ranking(8, 4)


def _trials_of(ranking: _Ranking) -> int:
    """Trials that cost as much as a ranking (which takes the defaults along)."""
    return (ranking.finalists + 1) * ranking.seeds // len(_SEEDS)


@dataclass(frozen=True)
class SearchResult:
    """A rule with the best parameters found.

    :param knee: its goodput at 90 % in requests per second on the ``train`` split
    :param default_score: score of the untuned rule in the final ranking, 0 to 1
    :param score: score of ``values`` there
    :param requests: requests simulated for all of it
    :param seconds: wall time of all of it
    """

    rule: str
    values: dict[str, Value]
    knee: float
    default_score: float
    score: float
    trials: int
    requests: int
    seconds: float
    sampler: str

    @property
    def contender(self) -> Contender:
        return Contender(self.rule, self.values, tuned=True)


def search_rule(
    rule: str,
    scenario: Scenario,
    config: TrainConfig,
    display: Display,
    *,
    seconds: float = float("inf"),
    trials: int | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> SearchResult:
    """Tune ``rule`` until the first of the limits; the knee of its goodput is measured before and after.

    Choices and whole numbers (the arrangement) are searched first, with a sixth of the trials, the continuous
    parameters then around the best of them: Optuna's sampler for mixed spaces takes longer over a trial than
    the simulator does, CMA-ES does not.

    :param rule: its name
    :param seconds: wall time, kept to within the final ranking
    :param trials: of the search
    :param requests: simulated requests of the search
    :raises SlalomError: unknown rule, or a scenario whose targets it meets at no rate
    """
    start = time.monotonic()
    settings = PointSettings(n_requests=config.tune_requests, split="train")
    display.phase("knee")
    display.update(0.0, f"goodput of {rule} with its defaults")
    knee = _knee(Contender(rule), scenario, settings, scenario.reference_rate)
    rates = tuple(factor * knee for factor in KNEE)
    display.update(1.0, f"{knee:.3g} requests/s")
    limits = [
        trials,
        requests // (len(rates) * len(_SEEDS) * settings.n_requests) if requests else None,
        _fitting(seconds - (time.monotonic() - start), Contender(rule), scenario, rates, settings),
    ]
    budget = max(4, min(limit for limit in limits if limit is not None))
    display.phase("search")
    found: list[TuneResult] = []
    for free, part, ranking in _rounds(rule, budget):
        before = sum(result.trials for result in found)
        values = found[-1].values if found else registry.get(rule).values()
        if found:  # what a trial costs depends on the rule's values
            left = 0.95 * seconds - (time.monotonic() - start)
            fits = _fitting(left, Contender(rule, values), scenario, rates, settings)
            part = part if fits is None else max(4, min(part, fits - _trials_of(ranking)))
        found.append(
            tune(
                f"{rule}:" + ",".join(f"{n}={v}" for n, v in values.items() if n not in free),
                scenario,
                part,
                rates=rates,
                settings=settings,
                seeds=_SEEDS,
                valid_seeds=ranking.seeds,
                finalists=ranking.finalists,
                seed=seed,
                on_trial=_Watch(display, before, before + part),
            )
        )
    best = max(found, key=lambda result: result.score)
    return SearchResult(
        rule=rule,
        values=best.values,
        knee=_knee(Contender(rule, best.values), scenario, settings, knee),
        default_score=found[0].default,
        score=best.score,
        trials=sum(result.trials for result in found),
        requests=sum(result.simulated_requests for result in found),
        seconds=round(time.monotonic() - start, 2),
        sampler=", ".join(result.sampler for result in found),
    )


@dataclass(frozen=True)
class _Watch:
    """Shows one round of the search on the display."""

    display: Display
    before: int
    budget: int

    def __call__(self, trial: int, best: float) -> None:
        done = self.before + trial
        self.display.update(done / self.budget, f"trial {done} of {self.budget}  best {100 * best:.2f} %")


def _rounds(rule: str, budget: int) -> list[tuple[set[str], int, _Ranking]]:
    """Parameters that are free in each round, its trials, and how its best are ranked."""
    params = registry.get(rule).params
    discrete = {p.name for p in params if p.choices is not None or p.integer}
    if "layout" in discrete:  # a fraction that only one layout reads belongs to the arrangement
        discrete |= {p.name for p in params if p.name == "prefill_fraction"}
    continuous = {p.name for p in params} - discrete
    if not discrete or not continuous or budget < 12:
        return [(discrete | continuous, budget, _LAST)]
    return [(discrete, budget // 6, _FIRST), (continuous, budget - budget // 6, _LAST)]


def _fitting(
    seconds: float, contender: Contender, scenario: Scenario, rates: Sequence[float], settings: PointSettings
) -> int | None:
    """Trials that fit into ``seconds``, by timing one; None when time is no limit."""
    if seconds == float("inf"):
        return None
    start = time.monotonic()
    with Evaluator(scenario, settings) as evaluator:
        for rate in rates:
            evaluator.attainment(contender, rate, _SEEDS)
    one = max(time.monotonic() - start, 1e-3)
    return int(seconds / one) - 1


def _knee(contender: Contender, scenario: Scenario, settings: PointSettings, start: float) -> float:
    """Goodput at 90 % in requests per second on the ``train`` split."""
    with Evaluator(scenario, settings) as evaluator:
        found = find_goodput(
            lambda rate: evaluator.attainment(contender, rate, _SEEDS), start, targets=(0.9,), tolerance=0.03
        )
    if found.goodput[0].rate <= 0.0:
        fix = "its targets are met at no rate; loosen them or change the cluster"
        raise SlalomError("scenario", contender.name, fix)
    return found.goodput[0].rate

"""The learner ``search``: Optuna over the parameters a rule declares, within a budget of time or requests.

It also tunes the base rule that PPO starts from. The search itself is ``eval.tune``; here a budget becomes a
number of trials, and the outcome something a later stage, or a resumed run, can start from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.points import Contender, Evaluator, PointSettings
from eval.tune import KNEE, knee_rate, tune
from policies.rule import Value
from train.config import TrainConfig
from train.progress import Display

__all__ = ["SearchResult", "search_rule"]

_SEEDS = (0, 1)  # of the search, as in eval.tune
_VALID_SEEDS, _FINALISTS = 4, 3


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
    def spec(self) -> str:
        """``rule:parameter=value,...``, exact (``str`` of a float reads back as the same float)."""
        return f"{self.rule}:" + ",".join(f"{name}={value}" for name, value in self.values.items())

    @property
    def contender(self) -> Contender:
        return Contender(self.rule, self.values, tuned=True)


def search_rule(
    rule: str,
    scenario: Any,
    config: TrainConfig,
    display: Display,
    *,
    seconds: float = float("inf"),
    trials: int | None = None,
    requests: int | None = None,
    seed: int = 0,
    storage: Path | None = None,
) -> SearchResult:
    """Tune ``rule`` until the first of the limits; the knee of its goodput is measured before and after.

    :param rule: its name
    :param seconds: wall time, kept to within about a trial
    :param requests: simulated requests of the search
    :param storage: journal file that makes a search resumable
    :raises SlalomError: unknown rule, or a scenario whose targets it meets at no rate
    """
    start = time.monotonic()
    settings = PointSettings(n_requests=config.tune_requests)
    display.phase("knee")
    display.update(0.0, f"goodput of {rule} with its defaults")
    rates = tuple(factor * knee_rate(scenario, settings, policy=rule) for factor in KNEE)
    display.update(1.0, f"{rates[1]:.3g} requests/s")
    per_trial = len(rates) * len(_SEEDS) * settings.n_requests
    limits = [
        trials,
        requests // per_trial if requests is not None else None,
        None
        if seconds == float("inf")
        else _trials_in(seconds - 1.2 * (time.monotonic() - start), rule, scenario, rates, settings),
    ]
    budget = max(2, min(limit for limit in limits if limit is not None))
    display.phase("search")

    def on_trial(done: int, best: float) -> None:
        display.update(done / budget, f"trial {done} of {budget}  best {100 * best:.2f} %")

    found = tune(
        rule,
        scenario,
        budget,
        rates=rates,
        settings=settings,
        seeds=_SEEDS,
        valid_seeds=_VALID_SEEDS,
        finalists=_FINALISTS,
        seed=seed,
        storage=storage,
        on_trial=on_trial,
    )
    result = SearchResult(
        rule=found.rule,
        values=found.values,
        knee=0.0,
        default_score=found.default,
        score=found.score,
        trials=found.trials,
        requests=found.simulated_requests,
        seconds=0.0,
        sampler=found.sampler,
    )
    knee = knee_rate(scenario, settings, policy=result.spec, start=rates[1])
    return replace(result, knee=knee, seconds=round(time.monotonic() - start, 2))


def _trials_in(
    seconds: float, rule: str, scenario: Any, rates: tuple[float, ...], settings: PointSettings
) -> int:
    """Trials that fit, less the final ranking, by timing the first one."""
    start = time.monotonic()
    with Evaluator(scenario, PointSettings(n_requests=settings.n_requests, split="train")) as evaluator:
        for rate in rates:
            evaluator.attainment(Contender(rule), rate, _SEEDS)
    one = max(time.monotonic() - start, 1e-3)
    ranking = (_FINALISTS + 1) * _VALID_SEEDS / len(_SEEDS)
    return int(seconds / one - 1 - ranking)

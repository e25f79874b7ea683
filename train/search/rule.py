"""The learner ``search``: Optuna over the parameters a rule declares, within a budget of time or requests.

It also tunes the base rule that PPO starts from. The search itself is ``train.search.tune``; here a budget becomes a
number of trials, and the outcome something a later stage, or a resumed run, can start from.
"""

from __future__ import annotations

import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from engine.common.files import read_json
from engine.common.progress import Display
from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.level import rate_unit
from env.scenario import Scenario
from policies import registry
from policies.rule import Value
from train.config import TrainConfig
from train.search.space import Design
from train.search.tune import KNEE, knee_rate, tune
from train.search.tuned import TuneResult

#: Tolerance of the knee that a training starts from: its rates follow it.
KNEE_NEAR = 0.03
_SEEDS = (0, 1)  # of the search, as in train.search.tune


class _Ranking(NamedTuple):
    """How the best trials are ranked again on fresh windows."""

    seeds: int
    finalists: int


_FIRST, _LAST = _Ranking(2, 2), _Ranking(4, 4)
_MOST_TRIALS = 20_000


@dataclass(frozen=True)
class SearchResult:
    """A rule with the best parameters found.

    :param plans: arrangement, where it is not the rule's own; ``theta``: see ``train.search.space``
    :param knee: the largest rate at which its level is 90 %, on the ``train`` split, requests per second
    :param default_score: score of the untuned rule in the final ranking, 0 to 1
    :param score: score of ``values`` there
    :param requests: requests simulated for all of it
    :param seconds: wall time of all of it
    :param folder: its checkpoint, where it is more than a rule; ``init``: which is where it comes from as well
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
    plans: list[dict[str, Any]] | None = None
    theta: list[float] | None = None
    folder: str = ""
    universal: bool = False
    init: bool = False

    @classmethod
    def read(cls, path: Path) -> SearchResult:
        """What an earlier part of a run has found.

        :raises SlalomError: missing, or damaged
        """
        content = read_json(path)
        try:
            found = TypeAdapter(cls).validate_python(content)
            theta = found.design.theta
            if theta is not None and not np.isfinite(theta).all():
                raise ValueError("theta")
        except (ValueError, TypeError) as error:
            raise SlalomError("--resume", str(path), "the file is damaged; start anew in another folder") from error
        return found

    @property
    def contender(self) -> Contender:
        """The rule with its values; for more than that (``plans``, ``theta``) its checkpoint, ``folder``."""
        return Contender(self.folder) if self.folder else Contender(self.rule, self.values, tuned=True)

    @property
    def design(self) -> Design:
        """The same for the direct search and for networks."""
        return Design.of(vars(self), self.universal)


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
    storage: str | Path | None = None,
    pool: Executor | None = None,
    width: int = 1,
) -> SearchResult:
    """Tune ``rule`` until the first of the limits; its knee is measured before and after.

    Choices and whole numbers (the arrangement) are searched first, with a sixth of the trials, the continuous
    parameters then around the best of them: Optuna's sampler for mixed spaces takes longer over a trial than
    the simulator does, CMA-ES does not.

    :param rule: its name
    :param seconds: wall time, the final ranking included as far as can be foreseen
    :param trials: of the search
    :param requests: simulated requests of the search
    :param storage: journal file or URL of a database; a search that was killed goes on from there
    :param pool: where trials run, ``width`` at a time; None: here
    :raises SlalomError: unknown rule, or a scenario whose targets it meets at no rate
    """
    start = time.monotonic()
    settings = PointSettings(n_requests=config.tune_requests, split="train")
    display.phase("knee")
    display.update(0.0, f"knee of {rule} with its defaults")
    knee = knee_rate(scenario, settings, policy=rule, tolerance=KNEE_NEAR)
    rates = tuple(factor * knee for factor in KNEE)
    display.update(1.0, f"{knee:.3g} {rate_unit(scenario)}")
    per_trial = len(rates) * len(_SEEDS) * settings.n_requests
    limits = [trials, requests // per_trial if requests else None, _MOST_TRIALS]
    budget = max(4, min(limit for limit in limits if limit is not None))
    display.phase("search")
    found: list[TuneResult] = []
    watch = _Watch(display, budget)
    for free, part, ranking, until in _rounds(rule, budget):
        values = found[-1].values if found else registry.get(rule).values()
        watch.begin(start + until * seconds)
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
                storage=storage,
                prune=True,
                pool=pool,
                width=width,
                stop=watch.out_of_time,
                on_trial=watch.trial,
            )
        )
    best = max(found, key=lambda result: result.score)
    return SearchResult(
        rule=rule,
        values=best.values,
        knee=knee_rate(scenario, settings, policy=Contender(rule, best.values), start=knee, tolerance=KNEE_NEAR),
        default_score=found[0].default,
        score=best.score,
        trials=watch.trials,
        requests=sum(result.simulated_requests for result in found),
        seconds=round(time.monotonic() - start, 2),
        sampler=", ".join(result.sampler for result in found),
    )


class _Watch:
    """Keeps a search within its time and shows it.

    What a trial costs varies tenfold with the rule's values (a rule that holds requests decides often), so no
    number of trials fits a time. Past the deadline the search ends, while the ranking on ``valid`` that follows is
    always carried out.
    """

    def __init__(self, display: Display, budget: int) -> None:
        self.trials = 0
        self.deadline = float("inf")
        self._display, self._budget, self._any = display, budget, False

    def out_of_time(self) -> bool:
        """Whether to end this round of the search; never before its first trial."""
        return self._any and time.monotonic() > self.deadline

    def begin(self, deadline: float) -> None:
        """A round begins."""
        self.deadline, self._any = deadline, False

    def trial(self, number: int, best: float) -> None:
        """A trial is finished."""
        self.trials += 1
        self._any = True
        self._display.update(min(self.trials / self._budget, 1.0), f"trial {self.trials}  best {100 * best:.2f} %")


def _rounds(rule: str, budget: int) -> list[tuple[set[str], int, _Ranking, float]]:
    """Parameters that are free in each round, its trials, how its best are ranked, and its end in time."""
    params = registry.get(rule).params
    discrete = {p.name for p in params if p.choices is not None or p.integer}
    if "layout" in discrete:  # a fraction that only one layout reads belongs to the arrangement
        discrete |= {p.name for p in params if p.name == "prefill_fraction"}
    continuous = {p.name for p in params} - discrete
    if not discrete or not continuous or budget < 12:
        return [(discrete | continuous, budget, _LAST, 0.8)]
    return [(discrete, budget // 6, _FIRST, 0.25), (continuous, budget - budget // 6, _LAST, 0.8)]

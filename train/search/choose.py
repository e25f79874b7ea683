"""What learning starts from when no rule is named: the direct search, and the choice among what it found.

The finalists (refined scores, the designs they came from, the best published rule) are ranked on validation windows
that the search has not seen, in long runs, so the outcome is never below the best rule there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from engine.common.progress import Display
from env.measure.sustained import DEFINITION
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from train.budget import Budget
from train.config import TrainConfig
from train.search.direct import DirectConfig, direct_search
from train.search.fitness import Fitness, rates_between
from train.search.journal import Journal
from train.search.rule import SearchResult
from train.search.space import Design

AUTO = "auto"
_FIRST_SEED = 1_000  # as in train.search.tune
_BEYOND = 1.05  # times the knee: the highest rate of the choice
_RANK_SEEDS, _RANK_SHARE = 2, 0.25  # windows, and requests as a share of the search's
_SHORTEST = 100  # requests of one run of the choice, at least
_LONGEST = 50_000  # requests of one run of the choice, at most
_RANKING_SHARE = 0.12  # of the search's time for the choice


def rank(
    scenario: Scenario, designs: Sequence[Design], rates: Sequence[float], seeds: int, requests: float
) -> list[float]:
    """Score of each design over fresh validation windows, in runs as long as those that measure sustained goodput, as
    far as the budget goes.

    :param requests: simulated for all of them, about
    """
    fitness = Fitness(scenario, arena_of(scenario).setting, "valid")
    n = max(DEFINITION.requests, math.ceil(DEFINITION.seconds * max(rates)))
    n = max(min(n, _LONGEST, int(requests / (len(designs) * len(rates) * seeds))), _SHORTEST)
    return [fitness.score(design, rates, range(_FIRST_SEED, _FIRST_SEED + seeds), n) for design in designs]


def search_all(
    scenario: Scenario,
    config: TrainConfig,
    display: Display,
    budget: Budget,
    alone: bool,
    seed: int,
    journal: Journal | None = None,
) -> SearchResult:
    """The best design within a budget.

    :param alone: the search is the whole training; otherwise it gets ``config.direct_share`` of the time
    :param journal: see :func:`train.search.direct.direct_search`
    """
    share = 1.0 if alone else config.direct_share
    requests: float = config.direct_requests or (budget.frames if alone and budget.frames else float("inf"))
    if requests == float("inf") and budget.seconds == float("inf"):
        requests = 2.0 * (budget.frames or 0)  # ppo with a budget in frames: two simulated requests a frame
    seconds = budget.seconds * share * (1.0 - _RANKING_SHARE) if requests == float("inf") else float("inf")
    sizes = DirectConfig(
        designs=config.designs,
        starts=config.starts,
        n_requests=config.direct_size,
        seeds=config.direct_seeds,
        light_loads=config.light_loads,
        rules=config.rules,
    )
    found = direct_search(
        scenario, sizes, requests=requests, seconds=seconds, seed=seed, report=display.report, journal=journal
    )
    begin = time.monotonic()
    display.phase("choose")
    light = [load * found.knee for load in config.light_loads]
    rates = [*light, *rates_between(found.strict, found.knee, _BEYOND)]
    scores = rank(scenario, found.finalists, rates, _RANK_SEEDS, _RANK_SHARE * found.requests)
    display.update(1.0, "done")
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    design = found.finalists[best]
    return SearchResult(
        **design.facts,
        knee=found.knee,
        default_score=scores[-1],
        score=scores[best],
        trials=len(found.history),
        requests=found.requests,
        seconds=round(found.seconds + time.monotonic() - begin, 2),
        sampler="direct",
    )

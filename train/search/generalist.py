"""One policy for many scenarios: separable CMA-ES on their mean, each at its own knee.

A generalist is a context-conditioned score with no published rule behind it, on clusters of any size: each instance
runs fused steps or both phases on SM shares, whichever its profile is predicted to serve more with. Each generation
draws a few of the scenarios; a scenario may appear in several sizes. What a scenario contributes is its attainment
around the knee that the starting score has there, so all of them count alike, whatever their rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from cmaes import SepCMA

from engine.core.kinds import Batching, Order, Role
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from env.scenario import Scenario
from env.sections import ROLE_CHANGES
from env.surrogate.arena import arena_of
from train.search.fitness import Fitness
from train.search.journal import Journal, Remembered
from train.search.space import Design, Space

_DRAWN = 3  # scenarios of one generation
_LOADS = ((0.8, 1.1), (0.97, 1.2), (0.4, 1.05))
_SEED, _KNEE_EVERY = 40_000, 25

Report = Callable[[str, float, str], None]


def generalist_design() -> Design:
    """Where it starts: SM shares or fused steps, by profile; queues on time, the default score."""
    order = int(Order.ON_TIME)
    shared = InstancePlan(
        role=Role.MULTIPLEXED, batching=Batching.LAYERED, split=-1, headroom=1.0, order=order, prefill_tokens=2048
    )
    mixed = InstancePlan(role=Role.MIXED, batching=Batching.CHUNKED, order=order, chunk_tokens=1024)
    return Design("linear_score", plans=(shared, mixed), universal=True)


def sized(scenario: Scenario, n: int) -> Scenario:
    """The scenario on ``n`` instances of its first group, rates in proportion."""
    before = len(scenario.placements())
    groups = [scenario.cluster[0].model_dump(mode="json") | {"count": n, "role": "mixed", "batching": "chunked"}]
    rates = {"low": scenario.rates.low * n / before / 4, "high": scenario.rates.high * n / before * 4}
    changes = {"cluster": groups, "rates": rates, "reference_rate": scenario.reference_rate * n / before}
    levers = {
        name: value for name, value in scenario.decisions.model_dump(mode="json").items() if name not in ROLE_CHANGES
    }
    return scenario.with_overrides(changes | {"decisions": levers})


def named(text: str) -> Scenario:
    """``NAME``, or ``NAME@16`` for 16 instances."""
    name, _, size = text.partition("@")
    scenario = Scenario.load(name)
    if not size:
        return scenario
    if not size.isdigit() or not 2 <= int(size) <= 64:
        raise SlalomError("scenario", text, "write NAME@SIZE with 2 to 64 instances")
    return sized(scenario, int(size))


def train_generalist(
    scenarios: Sequence[Scenario],
    *,
    requests: float,
    seed: int = 0,
    population: int = 16,
    sigma: float = 0.6,
    report: Report = lambda phase, done, note: None,
    journal: Journal | None = None,
) -> tuple[Design, int, float]:
    """The design, the requests simulated for it, and the wall seconds.

    :param journal: what an interrupted search knew already; it goes on from there
    """
    design, journal = generalist_design(), journal or Journal()
    fits = [Remembered(Fitness(s, arena_of(s).setting), journal) for s in scenarios]
    rng = np.random.default_rng([seed, 4])
    space = Space(fits[0].setting, design)
    optimiser = SepCMA(mean=np.zeros(len(space)), sigma=sigma, population_size=population, seed=seed)
    sizes = [min(max(s.n_requests, 2000), 3000) for s in scenarios]
    knees = [s.reference_rate for s in scenarios]
    generation, used = 0, 0
    while used < requests:
        if generation % _KNEE_EVERY == 0:
            now = replace(design, theta=optimiser.mean.copy())
            found = [f.knee(now, k, (_SEED, _SEED + 1), n) for f, k, n in zip(fits, knees, sizes, strict=True)]
            knees = [new if new > 0.0 else old for new, old in zip(found, knees, strict=True)]
        drawn = rng.choice(len(fits), size=min(_DRAWN, len(fits)), replace=False)
        loads = _LOADS[generation % len(_LOADS)]
        told = []
        for _ in range(optimiser.population_size):
            theta = optimiser.ask()
            candidate = replace(design, theta=theta)
            scores = [
                fits[i].score(candidate, [x * knees[i] for x in loads], (_SEED + 10 + generation,), sizes[i])
                for i in drawn
            ]
            told.append((theta, -sum(scores) / len(scores)))
        optimiser.tell(told)
        generation += 1
        used = sum(f.requests for f in fits)
        note = f"{used / 1e6:.1f} M requests  best {-100 * min(v for _, v in told):.2f} %"
        report("generalist", min(used / requests, 1.0), note)
    return replace(design, theta=optimiser.mean.copy()), used, round(journal.seconds(), 2)

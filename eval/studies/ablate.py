"""What each part of a directly searched policy is worth: goodput with the part taken out.

    python -m eval.studies.ablate runs/azure-conv-4xa100 [more run folders] [--seeds 4]

Parts are taken out of the finished policy, not searched again without them, so a part's figure is what the policy
loses when it goes, and parts that lean on each other both look large. Validation windows, common arrivals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.common.files import read_json
from engine.common.options import refuses
from engine.core.kinds import Order
from engine.errors import SlalomError
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from train.search.fitness import Fitness
from train.search.rule import SearchResult
from train.search.space import Design, Space

_FIRST_SEED = 100
_QUEUES = {
    "queues first come first served": Order.FCFS,
    "queues shortest first": Order.SHORTEST,
    "queues on time": Order.ON_TIME,
}


def variants(design: Design, scenario: Scenario) -> Iterator[tuple[str, Design]]:
    """The design itself, then with each of its parts taken out, its queues' order exchanged."""
    yield "whole", design
    setting = arena_of(scenario).setting
    if design.theta is not None:
        space = Space(setting, design)
        slopes = np.array([c.context is not None for c in space.coordinates])
        budgets = np.array([bool(c.plan) for c in space.coordinates])
        for name, gone in (("no slopes in the context", slopes), ("no moved weights", ~slopes & ~budgets)):
            yield name, replace(design, theta=np.where(gone, 0.0, design.theta))
        yield "no CMA-ES at all", replace(design, theta=None)
    if design.plans is not None:
        for name, order in _QUEUES.items():
            plans = tuple(replace(plan, order=int(order)) for plan in design.plans)
            if plans != design.plans:
                yield name, replace(design, plans=plans)
        theta = design.theta
        if theta is not None:  # coordinates of the arrangement and of its roles go with it
            own = {(c.kind, c.feature, c.context): x for c, x in zip(space.coordinates, theta, strict=True)}
            bare = Space(setting, replace(design, plans=None))
            theta = np.array([own.get((c.kind, c.feature, c.context), 0.0) for c in bare.coordinates])
        yield "the scenario's arrangement", replace(design, plans=None, theta=theta)


@refuses("ablate")
def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on a folder that is no run of ``--algo direct``."""
    parser = argparse.ArgumentParser(prog="python -m eval.studies.ablate", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=4, help="validation windows per rate")
    options = parser.parse_args(arguments)
    print("| scenario | part taken out | rate with a level of 90 %, req/s | of the whole |")
    print("| --- | --- | --- | --- |")
    for run in options.runs:
        _ablate(run, range(_FIRST_SEED, _FIRST_SEED + options.seeds))
    return 0


def _ablate(run: Path, seeds: range) -> None:
    if not (run / "base.json").exists():
        raise SlalomError("run", str(run), "give the folder of a finished train-policy --algo direct")
    scenario = Scenario.load(read_json(run / "run.json")["scenario"])
    found = SearchResult.read(run / "base.json")
    fitness = Fitness(scenario, arena_of(scenario).setting, "valid")
    whole = 0.0
    for name, design in variants(found.design, scenario):
        goodput = fitness.knee(design, found.knee, seeds, scenario.n_requests, 0.015)
        whole = whole or goodput
        print(f"| {scenario.name} | {name} | {goodput:.2f} | {goodput / max(whole, 1e-9):.3f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())

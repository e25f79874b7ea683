"""``python -m train.levers``: what each kind of decision adds, learned alone and together with an equal budget.

    python -m train.levers --scenario shift-pd-8xa100 --budget 60s --out runs/levers

The scenario gets every lever (hold, PLACE_DECODE, REALLOCATE between prefill, decode and mixed, TUNE). From one and
the same start, a score with its published weights on a fixed arrangement, CMA-ES searches the weights of only placement
(PLACE_PREFILL with HOLD, and PLACE_DECODE), only REALLOCATE, only TUNE, or of all together; rules, arrangements and
their budgets are not searched, so that nothing but decisions differs. Two arrangements: the scenario's own, and mixed
instances with chunked prefill, since TUNE has nothing to turn on pure prefill and decode instances.

Printed is goodput at 90 % on validation windows the search has not seen, as a ratio to the start: mean over windows
with its standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.columns import Kind
from engine.core.policy import InstancePlan
from engine.core.state import Batching, Role
from engine.errors import SlalomError
from engine.files import read_json, write_json
from engine.progress import Display
from env.measure.digest import code_sha256
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies.setting import Setting
from train.budget import Budget, parse_budget
from train.search.direct import DirectConfig, direct_search
from train.search.fitness import Fitness
from train.search.space import Design, Space

__all__ = ["KINDS", "Case", "cases", "every_lever", "main", "measure"]

KINDS: dict[str, frozenset[Kind]] = {
    "placement": frozenset({Kind.PLACE_PREFILL, Kind.PLACE_DECODE}),
    "REALLOCATE": frozenset({Kind.REALLOCATE}),
    "TUNE": frozenset({Kind.TUNE}),
    "all together": frozenset(Kind),
}
_STARTS = ("scenario", "mixed")
_WINDOWS = 6
_FIRST_SEED = 8_000  # validation windows away from those of training


@dataclass(frozen=True)
class Case:
    """One search: which decisions it may learn, and from where.

    :param start: ``scenario`` (its own arrangement) or ``mixed``
    :param kinds: a key of ``KINDS``; empty: the start itself
    """

    start: str
    kinds: str
    design: Design


def every_lever(scenario: Scenario) -> Scenario:
    """The scenario with all four kinds of decisions, REALLOCATE to prefill, decode or mixed."""
    levers = {"hold": True, "place_decode": True, "reallocate": True, "tune": True}
    roles = {"decisions.roles": ["prefill", "decode", "mixed"]}
    return scenario.with_overrides({f"decisions.{name}": value for name, value in levers.items()} | roles)


def cases(setting: Setting, starts: tuple[str, ...] = _STARTS) -> Iterator[Case]:
    """Every start alone, then with each set of decisions that can change something there."""
    for start in starts:
        plans = None
        if start == "mixed":
            plan = InstancePlan(role=Role.MIXED, batching=Batching.CHUNKED, chunk_tokens=1024)
            plans = (plan,) * setting.n_instances
        design = Design("linear_score", plans=plans)
        yield Case(start, "", design)
        for name, kinds in KINDS.items():
            if name == "TUNE" and not _can_tune(setting, design):
                continue
            yield Case(start, name, replace(design, kinds=kinds))


def _can_tune(setting: Setting, design: Design) -> bool:
    """Whether any instance has a chunk budget or an SM split to move."""
    plans = design.arrangement(setting)
    roles = setting.roles if plans is None else [p.role for p in plans]
    return any(role in (Role.MIXED, Role.MULTIPLEXED) for role in roles)


def measure(scenario: Scenario, design: Design, start: float) -> list[float]:
    """Goodput at 90 % on each fresh validation window, requests per second."""
    setting = arena_of(scenario).setting
    fitness = Fitness(scenario, setting, "valid", class_floor=0.0)
    seeds = range(_FIRST_SEED, _FIRST_SEED + _WINDOWS)
    return [fitness.knee(design, start, (seed,), scenario.n_requests, 0.01) for seed in seeds]


def _search(scenario: Scenario, case: Case, budget: Budget, seed: int, display: Display) -> dict[str, Any]:
    """Search one case and measure what came out."""
    display.phase(f"{case.start}: {case.kinds or 'start'}")
    spent, design = 0, case.design
    if case.kinds:
        found = direct_search(
            scenario,
            DirectConfig(starts=1, seeds=2),
            requests=float("inf") if budget.frames is None else budget.frames,
            seconds=budget.seconds,
            seed=seed,
            report=lambda phase, done, note: display.update(done, note),
            start=case.design,
        )
        design, spent = found.design, found.requests
    display.update(1.0, "measure")
    return {
        "start": case.start,
        "kinds": case.kinds,
        "weights": len(Space(arena_of(scenario).setting, case.design)) if case.kinds else 0,
        "requests": spent,
        "theta": None if design.theta is None else design.theta.tolist(),
        "goodput": measure(scenario, design, scenario.reference_rate),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: goodput of every case and its ratio to the start it came from."""
    lines = [
        "| arrangement | learned | weights | requests searched | goodput at 90 %, req/s | ratio to the start |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        base = next(r for r in rows if r["start"] == row["start"] and not r["kinds"])
        text = "1" if row is base else _ratio(row["goodput"], base["goodput"])
        lines.append(
            f"| {row['start']} | {row['kinds'] or 'nothing'} | {row['weights']} | {row['requests'] / 1e6:.1f} M "
            f"| {np.mean(row['goodput']):.2f} | {text} |"
        )
    return "\n".join(lines)


def _ratio(ours: list[float], base: list[float]) -> str:
    if min(base) <= 0.0:
        return "-"
    each = np.array(ours) / np.array(base)
    return f"{each.mean():.3f} ± {each.std(ddof=1) / np.sqrt(len(each)):.3f}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m train.levers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", default="shift-pd-8xa100")
    parser.add_argument("--budget", default="60s", help="of each search: 60s, 2m, or 5M simulated requests")
    parser.add_argument("--start", action="append", choices=_STARTS, help="arrangement; default: both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/levers"), help="finished searches are kept here")
    options = parser.parse_args(arguments)
    rows = []
    try:
        budget = parse_budget(options.budget)
        scenario = every_lever(Scenario.load(options.scenario))
        with Display() as display:
            for case in cases(arena_of(scenario).setting, tuple(options.start or _STARTS)):
                name = f"{scenario.name}-{case.start}-{(case.kinds or 'start').replace(' ', '-')}-{options.seed}.json"
                asked = {"scenario": scenario.hash(), "budget": str(budget), "code": code_sha256()}
                stored = options.out / name
                if not stored.exists() or read_json(stored)["asked"] != asked:
                    found = _search(scenario, case, budget, options.seed, display)
                    write_json(stored, found | {"asked": asked})
                rows.append(read_json(stored))
    except SlalomError as error:
        print(f"levers: {error}", file=sys.stderr)
        return 2
    write_json(options.out / "levers.json", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What TUNE could earn at most on a drifting day: the best budgets of each kind of phase, against one set for all.

    python -m eval.studies.budgets daynight-70b-30min

TUNE moves chunk budgets and SM shares while a policy runs. Here every kind of phase (its rate and mix) is played alone
for an hour, under fixed compositions and a grid of budgets: tokens of a chunk or prefill batch, and
the part of the TPOT target that decode may take beside prefill, from which the core splits SMs at every step. Whoever
knows the phase and changes budgets without delay or cost holds in each kind what its best budgets do; what one set for
all kinds holds beside it leaves the room for TUNE. Twice: with the composition that is best for all kinds, which stays,
and with the one that is best for each, as role changes would have it. Training days choose nothing here but which
compositions are worth a grid; what is compared was played on test days.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from typing import Any

import numpy as np

from engine.common.options import refuses
from engine.errors import SlalomError
from env.measure.phases import phase_goodput
from env.scenario import Scenario
from eval.placement.clairvoyant import compositions, followed
from policies.registry import get
from train.control.days import RULE

_LASTS_S = 3600.0  # what is played of each kind of phase
_TOKENS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the planner's own budgets
_BUDGETS = [p for p in get(RULE).params if p.name in ("prefill_tokens", "chunk_tokens")]
_GUARD = (0.8, 1.0, 1.2)
_BEST = 2  # compositions of each kind of phase that get the grid
_COARSE, _FINE = 0.05, 0.01  # relative width of the rate's bracket


@dataclass(frozen=True, order=True)
class Composition:
    prefill: int
    side: str

    def __str__(self) -> str:
        return f"{self.prefill} prefill + others {self.side}"


Budgets = tuple[float, float]  # factor of token budgets, part of the TPOT target
Held = Mapping[tuple[Composition, Budgets], tuple[float, ...]]  # of the day's rate, in each kind of phase


def kinds_of(scenario: Scenario) -> list[tuple[Scenario, float]]:
    """(a day of nothing else, its rate ÷ the day's) of each kind of phase.

    :raises SlalomError: phases are random, or there are none
    """
    phases = getattr(scenario.workload, "phases", None)
    if not phases:
        raise SlalomError("scenario", scenario.name, "name one whose phases are given (workload.phases of kind shift)")
    whole = sum(phase.duration for phase in phases)
    mean = sum(phase.rate * phase.duration for phase in phases) / whole
    found = []
    for rate, weights in dict.fromkeys((phase.rate, phase.weights) for phase in phases):
        only = {"phases": [{"duration": _LASTS_S, "rate": 1.0, "weights": list(weights)}], "duration_s": _LASTS_S}
        workload = scenario.workload.model_dump(mode="json", exclude_unset=True) | only
        found.append((scenario.with_overrides({"workload": workload}), rate / mean))
    return found


def _held(kinds: Sequence[tuple[Scenario, float]], who: Composition, budgets: Budgets, split: Any, near: float
          ) -> tuple[float, ...]:  # fmt: skip
    """What every kind of phase holds, as the rate of a day in which it lies."""
    own = get(RULE).values({"side": who.side, "order": "on_time"})
    tokens, guard = budgets
    scaled = {p.name: int(np.clip(round(float(own[p.name]) * tokens), p.low, p.high)) for p in _BUDGETS}
    values = get(RULE).values(own | scaled | {"guard": guard})
    found, near_enough = [], _COARSE if split == "train" else _FINE
    for scenario, factor in kinds:
        policy = followed([(0.0, who.prefill)], len(scenario.placements()), values)
        held = phase_goodput(scenario, policy, (0,), start=near * factor, split=split, tolerance=near_enough)
        found.append(held[0] / factor)
    return tuple(found)


def ceilings(held: Held) -> dict[str, tuple[float, float]]:
    """(one set of budgets for all kinds of phase, the best for each): with a composition that stays, and with changes.

    A day holds what its worst kind of phase does.
    """
    everyone, sets = sorted({who for who, _ in held}), sorted({budgets for _, budgets in held})
    table = np.array([[held[who, budgets] for budgets in sets] for who in everyone])  # composition, budgets, kind
    return {
        "a composition that stays": (float(table.min(2).max()), float(table.max(1).min(1).max())),
        "the best composition in each phase": (float(table.max(0).min(1).max()), float(table.max((0, 1)).min())),
    }


def study(scenario: Scenario, say: Any = lambda text: None) -> Held:
    """What every composition that is worth it holds with every budget of the grid.

    :raises SlalomError: as :func:`kinds_of`
    """
    kinds, near = kinds_of(scenario), scenario.reference_rate
    plain: dict[Composition, tuple[float, ...]] = {}
    for who in starmap(Composition, compositions(scenario)):
        plain[who] = _held(kinds, who, (1.0, 1.0), "train", near)
        say(f"{who}: {', '.join(f'{rate:.2f}' for rate in plain[who])}")
    worth = {max(plain, key=lambda who: min(plain[who]))}
    for k in range(len(kinds)):
        worth |= set(sorted(plain, key=lambda who: -plain[who][k])[:_BEST])
    held: dict[tuple[Composition, Budgets], tuple[float, ...]] = {}
    for who in sorted(worth):
        for budgets in product(_TOKENS, _GUARD if who.side == "multiplexed" else _GUARD[1:2]):
            held[who, budgets] = _held(kinds, who, budgets, "test", near)
            say(f"{who}, tokens x {budgets[0]:g}, {budgets[1]:g} of TPOT: "
                f"{', '.join(f'{rate:.2f}' for rate in held[who, budgets])}")  # fmt: skip
        for budgets in product(_TOKENS, _GUARD):  # where nothing is multiplexed the guard does nothing
            held.setdefault((who, budgets), held[who, (budgets[0], 1.0)])
    return held


def markdown(held: Held) -> str:
    lines = ["| with | one set of budgets [req/s] | the best for each kind of phase | room for TUNE |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for what, (shared, each) in ceilings(held).items():
        lines.append(f"| {what} | {shared:.2f} | {each:.2f} | {100 * (each / shared - 1):+.1f} % |")
    return "\n".join(lines)


@refuses("budgets")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", help="name of a shipped scenario with given phases, or a YAML file")
    given = parser.parse_args(arguments)
    print(markdown(study(Scenario.load(given.scenario), partial(print, file=sys.stderr, flush=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

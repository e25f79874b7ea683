"""The drift table: who holds how much in every phase of a drifting day, on arrivals that nobody has seen.

    python -m eval.studies.drift daynight-70b --policy checkpoints/policies/daynight-70b --out runs/drift

Every rule gets the search of the controller (``train.control.days.tune_on_days``) with the same budget, each fixed
composition is tried, and ``plan-placement --clairvoyant`` gives the ceiling. All of them meet the same test days. The
figure is goodput in every phase (``env.measure.phases``); ratios are of each day's figures, so what days have in common
drops out, with a Student interval of 95 % over days. A study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from engine.common.files import read_json, write_json
from engine.common.provenance import commit
from engine.core.kinds import Order, Role
from engine.errors import SlalomError
from env.measure.digest import code_sha256
from env.measure.phases import phase_goodput, play_days, worst
from env.measure.roles import role_timeline
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace
from env.surrogate.simulate import bind_policy
from eval.placement.clairvoyant import clairvoyant, followed
from eval.report.plots_drift import roles_under_demand
from policies.rule import BoundPolicy
from train.control.days import practice, tune_on_days

__all__ = ["main", "paired", "study", "table"]

RULES = ("arrow", "dyn_sla", "dopd", "muxwise")
_FIXED_SEED, _COARSE = 0, 0.04  # training day and step of the rate on which fixed compositions are compared
Say = Callable[[str], None]


def paired(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the ratios of each day's figures, and its 95 % interval (Student); NaN bounds for a single day."""
    ratios = np.array(mine) / np.maximum(np.array(other), 1e-9)
    mean, n = float(ratios.mean()), len(ratios)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(student.ppf(0.975, n - 1) * ratios.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def _fixed(scenario: Scenario) -> Iterator[tuple[str, bool, BoundPolicy]]:
    """(name, whether prefill and decode are apart, policy) of every fixed composition that the scenario allows."""
    n, usable = len(scenario.placements()), arena_of(scenario).setting.usable_roles
    for side in (Role.DECODE, Role.MIXED, Role.MULTIPLEXED):
        for k in range(1 if side == Role.DECODE else 0, n) if side in usable else ():
            for order in (Order.FCFS, Order.ON_TIME):
                name = f"{k} prefill + {n - k} {side.name.lower()}, {order.name.lower()}"
                yield name, side == Role.DECODE, followed([(0.0, k)], n, side, order)


def _best_fixed(scenario: Scenario, say: Say) -> dict[str, tuple[str, BoundPolicy]]:
    """The best split into prefill and decode, and the best composition of any kind, on a training day."""
    short, found = practice(scenario), {}
    best = {"fixed split": 0.2 * scenario.reference_rate, "fixed, any roles": 0.2 * scenario.reference_rate}
    for name, apart, policy in _fixed(scenario):
        for label in ("fixed split", "fixed, any roles") if apart else ("fixed, any roles",):
            while worst(play_days(short, policy, best[label], _FIXED_SEED, "train")[1]) >= 0.9:
                best[label], found[label] = best[label] * (1.0 + _COARSE), (name, policy)
    if len(found) < len(best):
        raise SlalomError("scenario", scenario.name, "no fixed composition holds a fifth of its reference rate")
    say("fixed: " + "; ".join(f"{label}: {name}" for label, (name, _) in found.items()))
    return found


def _fixed_row(
    scenario: Scenario, best: Callable[[], dict[str, tuple[str, BoundPolicy]]], label: str, days: Sequence[int]
) -> dict[str, Any]:
    name, policy = best()[label]
    return {"what": name} | _measured(scenario, policy, days, None)


def _measured(scenario: Scenario, policy: Any, days: Sequence[int], near: float | None) -> dict[str, Any]:
    """Goodput in every phase for each test day; role changes and shares of the first day at the mean of it."""
    rates = phase_goodput(scenario, policy, days, start=near)
    mean = float(np.mean(rates))
    if mean <= 0.0:
        return {"goodput": rates, "role_changes": 0, "shares": [], "longest_wait_s": None}
    run, phases = play_days(scenario, policy, mean, days[0], "test")
    started = run.req["first_token"] >= 0
    wait = float((run.req["first_token"] - run.req["arrival"])[started].max()) / 1e12
    return {
        "goodput": rates,
        "role_changes": int(run.cluster["n_switches"]),
        "shares": [phase.share for phase in phases],
        "longest_wait_s": wait,
    }


class _Kept:
    """Finished steps as JSON files in a folder; those of another scenario, effort or code are made anew."""

    def __init__(self, folder: Path, about: Sequence[Any], say: Say) -> None:
        self.folder, self.about, self.say = folder, list(about), say

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        found = dict(read_json(path)) if path.exists() else {}
        if found.get("about") != self.about:
            found = make() | {"about": self.about}
            write_json(path, found)
        self.say(f"{name}: {found.get('goodput') or found.get('knee')}")
        return {key: value for key, value in found.items() if key != "about"}


def study(
    scenario: Scenario, checkpoints: Sequence[str], rules: Sequence[str], *, requests: float, days: int, out: Path,
    say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The whole table as JSON-ready data, also in ``out/result.json``, with a picture ``out/roles.png``.

    :param checkpoints: learned controllers, by folder
    :param requests: simulated for the search of each rule
    :param days: test days
    """
    about = [code_sha256(), scenario.hash(), requests, days]
    kept, tests = _Kept(out, about, say), range(days)
    rows: dict[str, dict[str, Any]] = {}
    for folder in checkpoints:
        name = Path(folder).name
        rows[f"learned ({name})"] = kept.get(f"learned {name}", partial(_measured, scenario, folder, tests, None))
    best = cache(partial(_best_fixed, scenario, say))
    for label in ("fixed split", "fixed, any roles"):
        rows[label] = kept.get(label, partial(_fixed_row, scenario, best, label, tests))
    ceiling = kept.get("clairvoyant", partial(clairvoyant, scenario, seeds=days, say=say))
    rows["clairvoyant"] = ceiling
    for rule in rules:
        tuned = kept.get(f"search {rule}", partial(_tuned, rule, scenario, requests))
        bound = bind_policy(rule, scenario, tuned["values"])
        row = kept.get(f"tuned {rule}", partial(_measured, scenario, bound, tests, tuned["knee"] or None))
        rows[f"{rule}, tuned"] = row | {"values": tuned["values"]}
    result = {
        "scenario": scenario.name, "scenario_sha256": scenario.hash(), "commit": commit(), "days": days,
        "requests": requests, "rows": rows,
    }  # fmt: skip
    write_json(out / "result.json", result)
    if checkpoints:
        _draw(scenario, checkpoints[0], ceiling, rows, out)
    return result


def _tuned(rule: str, scenario: Scenario, requests: float) -> dict[str, Any]:
    found = tune_on_days(rule, scenario, requests=requests, full_days=False)
    return {"values": dict(found.values), "knee": found.knee, "requests": found.requests, "seconds": found.seconds}


def _draw(scenario: Scenario, checkpoint: str, ceiling: dict[str, Any], rows: dict[str, Any], out: Path) -> None:
    """Roles of the learned controller and of the clairvoyant over the first test day, under its demand."""
    rate = float(np.mean(next(iter(rows.values()))["goodput"]))
    trace = build_trace(scenario, rate, math.ceil(rate * scenario.workload.natural_s), 0, "test")
    plan = [(entry["at_s"], entry["prefill"]) for entry in ceiling["schedule"]]
    knowing = followed(plan, len(scenario.placements()), Role[ceiling["side"].upper()], Order[ceiling["order"].upper()])
    lines = {name: role_timeline(scenario, policy, rate, 0) for name, policy in
             (("learned", checkpoint), ("clairvoyant", knowing))}  # fmt: skip
    roles_under_demand(trace, lines).savefig(out / "roles.png", dpi=110)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: who, goodput in every phase, against the fixed split, share of the ceiling's gain."""
    rows = result["rows"]
    fixed, ceiling = rows["fixed split"]["goodput"], rows["clairvoyant"]["goodput"]
    base, top = float(np.mean(fixed)), float(np.mean(ceiling))
    lines = [
        f"{result['scenario']}: goodput in every phase [req/s], {result['days']} test days, commit {result['commit']}",
        "",
        "| who | goodput | ÷ best fixed split (95 %) | of the clairvoyant's gain | role changes a day | longest wait |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in sorted(rows.items(), key=lambda entry: -float(np.mean(entry[1]["goodput"]))):
        mean = float(np.mean(row["goodput"]))
        ratio, low, high = paired(row["goodput"], fixed)
        gain = f"{100 * (mean - base) / (top - base):.0f} %" if top > base else "none to have"
        what = f" ({row['what']})" if "what" in row else ""
        wait = row.get("longest_wait_s")
        lines.append(
            f"| {name}{what} | {mean:.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {gain} | {row['role_changes']} | "
            f"{f'{wait:.0f} s' if wait is not None else ''} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", help="name of a shipped scenario, or a YAML file")
    parser.add_argument("--policy", action="append", default=[], help="checkpoint folder of a learned controller")
    parser.add_argument("--rule", action="append", default=[], help=f"rules to tune (default: {', '.join(RULES)})")
    parser.add_argument("--requests", type=float, default=12e6, help="simulated for the search of each rule")
    parser.add_argument("--days", type=int, default=3, help="test days")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; a stopped study goes on there")
    given = parser.parse_args(arguments)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        result = study(
            Scenario.load(given.scenario), given.policy, given.rule or RULES, requests=given.requests,
            days=given.days, out=given.out, say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    except SlalomError as error:
        print(f"drift: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

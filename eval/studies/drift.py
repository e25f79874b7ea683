"""The drift table: who holds how much in every phase of a drifting day, on arrivals that nobody has seen.

    python -m eval.studies.drift daynight-70b-30min --policy checkpoints/policies/daynight-70b --out runs/drift

Every rule and the controller get the same search (``train.control.days.tune_on_days``) with the same budget and the
same levers; every fixed composition is tried; replanned DistServe follows plans made on each day's own arrivals; and
``plan-placement --clairvoyant`` gives the ceiling, also with the placement that the controllers have learned. All of
them meet the same test days. The figure is goodput in every phase (``env.measure.phases``); ratios are of each day's
figures, so what days have in common drops out, with a Student interval of 95 % over days. Every row is kept as soon as
it is known: a study that was stopped goes on where it was. ``--short`` compresses test days to two hours.

``--parts CHECKPOINT`` says instead what each lever earned: the scenario's own arrangement, the best fixed composition,
the order of its queues, how prompts and decodes are placed, and that roles change.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from engine.common.files import claim, read_json, write_json
from engine.common.options import refuses
from engine.common.provenance import commit
from engine.errors import SlalomError
from engine.jit import sources
from env.measure.contender import Contender
from env.measure.digest import code_sha256, policy_sha256, scenario_hash
from env.measure.evaluator import bound
from env.measure.phases import GOAL, phase_goodput, play_days, standing
from env.measure.roles import role_timeline
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from eval.compare.session import label_of
from eval.placement.clairvoyant import clairvoyant, compositions, followed
from eval.placement.replan import planned
from eval.report.plots_drift import roles_under_demand
from policies.registry import get
from train.control.days import LONGEST_S, RULE, compressed, tune_on_days

RULES = ("arrow", "dyn_sla", "dyn_load", "dopd", "muxwise")
_FIXED_SEED, _COARSE = 0, 0.04  # training day and step of the rate on which fixed compositions are compared
_WINDOWS = (120.0, 300.0)  # of replanning, seconds
_NEAR = 0.02  # relative width of the rate's bracket
Say = Callable[[str], None]
Row = dict[str, Any]
Named = tuple[str, Any]  # a policy, and what to call it


def paired(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the ratios of each day's figures, and its 95 % interval (Student); NaN bounds for a single day."""
    ratios = np.array(mine) / np.maximum(np.array(other), 1e-9)
    mean, n = float(ratios.mean()), len(ratios)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(student.ppf(0.975, n - 1) * ratios.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def _fixed(scenario: Scenario, own: Mapping[str, Any] | None = None) -> Iterator[tuple[str, bool, Any]]:
    """(name, whether prefill and decode are apart, policy) of every fixed composition that the scenario allows.

    :param own: values of the planner that say how prompts and decodes are placed, and the budgets
    """
    n = len(scenario.placements())
    for k, side in compositions(scenario):
        for order in ("fcfs", "on_time"):
            values = get(RULE).values({**(own or {}), "side": side, "order": order})
            yield f"{k} prefill + {n - k} {side}, {order}", side == "decode", followed([(0.0, k)], n, values)


def _best(
    scenario: Scenario, policies: Iterable[Named], known: tuple[float, Named] | None = None
) -> tuple[float, Named]:
    """The one of ``policies`` that holds most on a training day, and the least rate that nobody was seen to hold.

    :param known: what others hold already
    :raises SlalomError: none holds a tenth of the reference rate
    """
    short, rate = compressed(scenario, LONGEST_S), known[0] if known else 0.1 * scenario.reference_rate
    found = known[1] if known else None
    for named in policies:
        while standing(short, *play_days(short, named[1], rate, _FIXED_SEED, "train")) >= GOAL:
            rate, found = rate * (1.0 + _COARSE), named
    if found is None:
        raise SlalomError("scenario", scenario.name, "no fixed composition holds a tenth of its reference rate")
    return rate, found


def _best_fixed(scenario: Scenario, say: Say) -> dict[str, tuple[str, Any]]:
    """The best split into prefill and decode, and the best composition of any kind."""
    of = {apart: [(name, policy) for name, a, policy in _fixed(scenario) if a == apart] for apart in (True, False)}
    split = _best(scenario, of[True])
    found = {"fixed split": split[1], "fixed, any roles": _best(scenario, of[False], split)[1]}
    say("fixed: " + "; ".join(f"{label}: {name}" for label, (name, _) in found.items()))
    return found


def _parts(scenario: Scenario, folder: str) -> Iterator[tuple[str, Any]]:
    """(what is added, policy) of each lever that the controller in ``folder`` uses, one after the other."""
    learned = bound(scenario, Contender(folder)).values
    yield "least predicted TTFT, the scenario's arrangement", bound(scenario, Contender("predicted_ttft"))
    for text, own, orders in (
        ("+ arrangement", {}, ("fcfs",)),
        ("+ order of queues", {}, ("fcfs", "on_time")),
        ("+ placement and budgets", learned, ("fcfs", "on_time")),
    ):
        fixed = _fixed(scenario, own)
        _, (name, policy) = _best(scenario, ((n, policy) for n, _, policy in fixed if n.endswith(orders)))
        yield f"{text}: {name}", policy
    yield "+ role changes: the checkpoint", folder


def _fixed_row(
    scenario: Scenario, best: Callable[[], dict[str, tuple[str, Any]]], label: str, days: Sequence[int]
) -> Row:
    name, policy = best()[label]
    return {"what": name} | measured(scenario, [policy] * len(days), days, None)


def measured(scenario: Scenario, policies: Sequence[Any], days: Sequence[int], near: float | None) -> Row:
    """Goodput in every phase for each test day; role changes and shares of the first day at the mean of it.

    :param policies: one for each day
    """
    rates: list[float] = []
    for policy, day in zip(policies, days, strict=True):
        start = rates[-1] if rates and rates[-1] > 0.0 else near
        rates += phase_goodput(scenario, policy, (day,), start=start, tolerance=_NEAR)
    mean = float(np.mean(rates))
    if mean <= 0.0:
        return {"goodput": rates, "role_changes": 0, "shares": [], "longest_wait_s": None}
    run, phases = play_days(scenario, policies[0], mean, days[0], "test")
    started = run.req["first_token"] >= 0
    wait = float((run.req["first_token"] - run.req["arrival"])[started].max()) / 1e12
    return {
        "goodput": rates,
        "role_changes": int(run.cluster["n_switches"]),
        "shares": [phase.share for phase in phases],
        "longest_wait_s": wait,
    }


def _replanned(scenario: Scenario, days: Sequence[int]) -> Row:
    """DistServe's replanning, made on each day's arrivals at the reference rate, with the better of two windows."""
    n = math.ceil(scenario.reference_rate * scenario.workload.natural_s)
    found: list[tuple[float, Row]] = []
    for window_s in _WINDOWS:
        traces = [build_trace(scenario, scenario.reference_rate, n, day, "test") for day in days]
        plans = [planned(scenario, trace, window_s) for trace in traces]
        row = measured(scenario, [policy for policy, _ in plans], days, 0.6 * scenario.reference_rate)
        found.append((float(np.mean(row["goodput"])), {"what": f"window {window_s:g} s"} | row))
    return max(found, key=lambda entry: entry[0])[1]


class Kept:
    """Finished rows as JSON files in a folder; those of another scenario, effort or code are made anew."""

    def __init__(self, folder: Path, about: Sequence[Any], say: Say) -> None:
        self.folder, self.about, self.say = folder, list(about), say

    def get(self, name: str, make: Callable[[], Row], *more: Any) -> Row:
        """:param more: what this row follows from beside what all of them do"""
        path = self.folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        found, about = dict(read_json(path)) if path.exists() else {}, [*self.about, *more]
        if found.get("about") != about:
            found = make() | {"about": about}
            write_json(path, found)
        self.say(f"{name}: {found.get('goodput') or found.get('knee')}")
        return {key: value for key, value in found.items() if key != "about"}


def _code() -> str:
    """Digest of the code that a row follows from, what is measured and what is searched."""
    rooms = ("env.measure.phases", "train.control.days", "train.control.space", "eval.placement.clairvoyant")
    return sources.sha256([sources.path_of(name) for name in rooms]) + code_sha256()


def study(
    scenario: Scenario, checkpoints: Sequence[str], rules: Sequence[str], *, requests: float, days: int, out: Path,
    seeds: int = 3, say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The whole table as JSON-ready data, also in ``out/result.json``, with a picture ``out/roles.png``.

    :param checkpoints: learned policies, by folder
    :param requests: simulated for the search of each rule, and of the controller with each of ``seeds`` seeds
    :param days: test days
    """
    kept, tests = Kept(out, [_code(), scenario_hash(scenario), days], say), range(days)
    rows: dict[str, Row] = {}
    for name, folder in _named(checkpoints).items():
        measure = partial(measured, scenario, [folder] * days, tests, None)
        rows[f"learned ({name})"] = kept.get(f"learned {name}", measure, policy_sha256(Contender(folder)))
    best = cache(partial(_best_fixed, scenario, say))
    for label in ("fixed split", "fixed, any roles"):
        rows[label] = kept.get(label, partial(_fixed_row, scenario, best, label, tests))
    for seed in range(seeds):
        rows[f"controller, seed {seed}"] = _searched(kept, scenario, RULE, requests, seed, tests)
    for rule in rules:
        rows[f"{rule}, tuned"] = _searched(kept, scenario, rule, requests, 0, tests)
    if {"prefill", "decode"} <= set(scenario.decisions.roles):
        rows["distserve, replanned"] = kept.get("replanned distserve", partial(_replanned, scenario, tests))
    like = [rows[f"controller, seed {seed}"]["values"] for seed in range(seeds)]
    ceiling = kept.get("clairvoyant", partial(clairvoyant, scenario, seeds=days, like=like, say=say), like)
    rows["clairvoyant"] = ceiling
    result = {
        "scenario": scenario.name, "scenario_sha256": scenario.hash(), "commit": commit(), "days": days,
        "requests": requests, "rows": rows,
    }  # fmt: skip
    write_json(out / "result.json", result)
    _draw(scenario, checkpoints, ceiling, rows, out)
    return result


def _searched(kept: Kept, scenario: Scenario, rule: str, requests: float, seed: int, days: Sequence[int]) -> Row:
    """The row of what the search finds for ``rule``."""
    name = f"{rule} {seed}"
    tuned = kept.get(f"search {name}", partial(_tuned, rule, scenario, requests, seed), requests)
    policy = bound(scenario, Contender(rule, tuned["values"], tuned=True, plans=tuned["plans"]))
    measure = partial(measured, scenario, [policy] * len(days), days, tuned["knee"] or None)
    return kept.get(f"tuned {name}", measure, tuned) | {"values": tuned["values"]}


def _tuned(rule: str, scenario: Scenario, requests: float, seed: int) -> Row:
    found = tune_on_days(rule, scenario, requests=requests, seed=seed)
    return {
        "values": dict(found.values), "plans": found.plans, "knee": found.knee, "requests": found.requests,
        "seconds": found.seconds,
    }  # fmt: skip


def _named(checkpoints: Sequence[str]) -> dict[str, str]:
    """Folders by their own names, of a run's ``best`` by the run's; where two are alike, by their paths."""
    labels = [label_of(folder) for folder in checkpoints]
    return {
        label if labels.count(label) == 1 else folder.strip("/").replace("/", "-"): folder
        for label, folder in zip(labels, checkpoints, strict=True)
    }


def _draw(scenario: Scenario, checkpoints: Sequence[str], ceiling: Row, rows: Mapping[str, Row], out: Path) -> None:
    """Roles of what was learned and of the clairvoyant over the first test day, under its demand."""
    learned = [name for name in rows if name.startswith(("learned", "controller"))]
    if not learned:
        return
    name = max(learned, key=lambda name: float(np.mean(rows[name]["goodput"])))
    rate = float(np.mean(rows[name]["goodput"]))
    trace = build_trace(scenario, rate, math.ceil(rate * scenario.workload.natural_s), 0, "test")
    plan = [(entry["at_s"], entry["prefill"]) for entry in ceiling["schedule"]]
    knowing = followed(plan, len(scenario.placements()), ceiling["values"])
    folders = {f"learned ({name})": folder for name, folder in _named(checkpoints).items()}
    policy = folders.get(name) or bound(scenario, Contender(RULE, rows[name]["values"], tuned=True))
    lines = {label: role_timeline(scenario, p, rate, 0) for label, p in (("learned", policy), ("clairvoyant", knowing))}
    roles_under_demand(trace, lines).savefig(out / "roles.png", dpi=110)


def parts(scenario: Scenario, folder: str, *, days: int, out: Path, say: Say) -> str:
    """What each lever of the checkpoint ``folder`` earned, as Markdown; finished rows are kept in ``out``."""
    learned = policy_sha256(Contender(folder))
    kept, lines, before = Kept(out, [_code(), scenario_hash(scenario), days], say), list[str](), list[float]()
    for k, (what, policy) in enumerate(_parts(scenario, folder)):
        row = kept.get(f"part {k}", partial(measured, scenario, [policy] * days, range(days), None), what, learned)
        adds = _ratio(row["goodput"], before) if before else ""
        lines.append(f"| {what} | {float(np.mean(row['goodput'])):.2f} | {adds} | {row['role_changes']} |")
        before = row["goodput"]
    head = ["| lever | goodput in every phase [req/s] | ÷ the row above (95 %) | role changes a day |"]
    return "\n".join([*head, "| --- | ---: | ---: | ---: |", *lines])


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: who, goodput in every phase, against the fixed split, share of the ceiling's gain."""
    rows = result["rows"]
    fixed, ceiling = rows["fixed split"]["goodput"], rows["clairvoyant"]["goodput"]
    tuned = [row["goodput"] for name, row in rows.items() if name.endswith(("tuned", "replanned"))]
    rival = max(tuned, key=lambda rates: float(np.mean(rates)), default=None)
    base, top = float(np.mean(fixed)), float(np.mean(ceiling))
    lines = [
        f"{result['scenario']}: goodput in every phase [req/s], {result['days']} test days, commit {result['commit']}",
        "",
        "| who | goodput | ÷ best fixed split (95 %) | ÷ best rule (95 %) | of the clairvoyant's gain | role changes a "
        "day | longest wait |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in sorted(rows.items(), key=lambda entry: -float(np.mean(entry[1]["goodput"]))):
        mean = float(np.mean(row["goodput"]))
        ratios = " | ".join(_ratio(row["goodput"], other) for other in (fixed, rival))
        gain = f"{100 * (mean - base) / (top - base):.0f} %" if top > base else "none to have"
        what = f" ({row['what']})" if "what" in row else ""
        wait = row.get("longest_wait_s")
        lines.append(
            f"| {name}{what} | {mean:.2f} | {ratios} | {gain} | {row['role_changes']} | "
            f"{f'{wait:.0f} s' if wait is not None else ''} |"
        )
    return "\n".join(lines)


def _ratio(mine: Sequence[float], other: Sequence[float] | None) -> str:
    if other is None:
        return ""
    ratio, low, high = paired(mine, other)
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


@refuses("drift")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", help="name of a shipped scenario, or a YAML file")
    parser.add_argument("--policy", action="append", default=[], help="checkpoint folder of a learned policy")
    parser.add_argument("--rule", action="append", default=[], help=f"rules to tune (default: {', '.join(RULES)})")
    parser.add_argument("--requests", type=float, default=12e6, help="simulated for each search")
    parser.add_argument("--days", type=int, default=3, help="test days")
    parser.add_argument("--seeds", type=int, default=3, help="searches for a controller")
    parser.add_argument("--short", action="store_true", help="test days compressed to two hours")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; a stopped study goes on there")
    parser.add_argument("--parts", metavar="CHECKPOINT", help="say instead what each of its levers earned")
    given = parser.parse_args(arguments)
    claim(given.out)
    scenario = Scenario.load(given.scenario)
    scenario = compressed(scenario, LONGEST_S) if given.short else scenario
    say = partial(print, file=sys.stderr, flush=True)
    if given.parts:
        print(parts(scenario, given.parts, days=given.days, out=given.out, say=say))
        return 0
    result = study(
        scenario, given.policy, given.rule or RULES, requests=given.requests, days=given.days, seeds=given.seeds,
        out=given.out, say=say,
    )  # fmt: skip
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What earned what: sustained goodput as the parts of a learned policy are added one after the other.

    python -m eval.studies.parts                              every scenario with a checkpoint
    python -m eval.studies.parts azure-conv-4xa100 --requests 3M

Rows: least predicted TTFT on the scenario's own arrangement; on the best arrangement that a search finds; with the best
queue order as well; the checkpoint without role changes and TUNE; the checkpoint. Searches are those of
``train.search.tune`` with ``--requests`` simulated requests each (default: as many as the checkpoint's training took).
Test windows, three seeds, the same arrivals for every row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.common.files import read_json, write_json
from engine.common.options import refuses
from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.scenario import Scenario
from env.sections import ROLE_CHANGES
from eval.compare.headline import search_one
from eval.studies.scoreboard import CHECKPOINTS, MOST_TRIALS, OPPONENTS
from train.budget import parse_budget
from train.search.levers import EVERY
from train.search.tune import knee_rate, tune

_RULE = "predicted_ttft"
_TARGETS = (0.9, 0.95, 0.99)
_STILL = (*ROLE_CHANGES, "tune")


def parts_of(name: str, requests: float) -> Iterator[tuple[str, Any, Contender]]:
    """(what is added, scenario, contender), in order.

    :param requests: simulated for each of the two searches
    """
    scenario = Scenario.load(name)
    settings = PointSettings(n_requests=scenario.n_requests)
    yield "least predicted TTFT, the scenario's arrangement", scenario, Contender(_RULE)
    knee = knee_rate(scenario, settings, policy=_RULE)
    for text, levers in (
        ("+ best arrangement", tuple(lever for lever in EVERY if lever != "order")),
        ("+ queue order", EVERY),
    ):
        found = tune(
            _RULE, scenario, MOST_TRIALS, knee=knee, levers=levers, requests=requests, settings=settings, prune=True,
        )  # fmt: skip
        told = ", ".join(f"{key.removeprefix('lever.')} {value}" for key, value in found.levers.items())
        yield f"{text} ({told})", scenario, Contender(_RULE, found.values, tuned=True, plans=found.plans)
    asked = scenario.decisions.model_dump(mode="json")
    still = scenario.with_overrides({"decisions": {k: v for k, v in asked.items() if k not in _STILL}})
    checkpoint = Contender(str(CHECKPOINTS / name))
    yield "+ learned score (the checkpoint without role changes and TUNE)", still, checkpoint
    yield "+ role changes and TUNE (the checkpoint)", scenario, checkpoint


def measured(name: str, requests: float, seeds: int, out: Path) -> list[dict[str, Any]]:
    """One row per part, kept in ``out`` as they are finished."""
    rows = []
    for text, scenario, contender in parts_of(name, requests):
        settings = PointSettings(n_requests=scenario.n_requests)
        found = search_one(scenario, contender, range(seeds), settings, _TARGETS, None)
        rates = {f"{t:g}": found["goodput"][f"{t:g}"]["rate"] for t in _TARGETS}
        rows.append({"scenario": name, "part": text, **rates, "contender": asdict(replace(contender, label=""))})
        print(f"{name}: {text}: {rates}", file=sys.stderr, flush=True)
        write_json(out / f"{name}.json", rows)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the rates, and what each part adds at 90 %."""
    lines = ["| scenario | part | 90 % | 95 % | 99 % | it adds |", "| --- | --- | --- | --- | --- | --- |"]
    before: dict[str, Any] = {}
    for row in rows:
        known = before.get("scenario") == row["scenario"] and before["0.9"] > 0.0
        adds = f"{100 * (row['0.9'] / before['0.9'] - 1):+.1f} %" if known else ""
        rates = " | ".join(f"{row[f'{t:g}']:.2f}" for t in _TARGETS)
        lines.append(f"| {row['scenario']} | {row['part']} | {rates} | {adds} |")
        before = row
    return "\n".join(lines)


@refuses("parts")
def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on a scenario without a checkpoint."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m eval.studies.parts", description=about)
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--requests", help="of each search, e.g. 3M (default: as many as the checkpoint's training)")
    parser.add_argument("--seeds", type=int, default=3, help="test windows per rate")
    parser.add_argument("--read", action="store_true", help="print what --out holds, simulate nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/parts"))
    options = parser.parse_args(arguments)
    known = sorted(path.name for path in CHECKPOINTS.glob("*") if path.name in OPPONENTS)
    rows: list[dict[str, Any]] = []
    for name in options.scenarios or known:
        if name not in known:
            raise SlalomError("scenario", name, f"checkpoints stand for: {', '.join(known)}")
        if options.read:
            stored = options.out / f"{name}.json"
            rows += read_json(stored) if stored.exists() else []
            continue
        training = read_json(CHECKPOINTS / name / "policy.json")["training"]
        spent = parse_budget(options.requests).frames if options.requests else None
        rows += measured(name, float(spent or training["search_requests"]), options.seeds, options.out)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

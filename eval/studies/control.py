"""What each way of learning adds to a controller of roles: search, imitation of who knows the phases, PPO.

    python -m eval.studies.control daynight-70b-30min --requests 8e6 --seeds 5 --out runs/control

For every seed a search (CMA-ES) with half of the requests; from its answer, with the other half, imitation, PPO, and
both; against them a search with all of the requests. All meet the same test days, compressed to two hours as in
training. Goodput is that in every phase (``env.measure.phases``); where days stand is compared at one rate for all.
Interquartile means over seeds and days, intervals by resampling seeds within each day (Agarwal et al. 2021). Every row
is kept as soon as it is known: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.common.files import write_json
from engine.common.options import refuses
from engine.common.provenance import commit
from engine.jit import sources
from env.measure.digest import code_sha256
from env.measure.phases import play_days, standing
from env.measure.stats import stratified_iqm
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from eval.placement.clairvoyant import clairvoyant
from eval.studies.drift import Kept, Row, measured
from policies.rule import BoundPolicy
from policies.rules.planner import RULE, shifted
from train.control.days import practice, tune_on_days
from train.control.shifting import learn_shift

HALF, WHOLE = "CMA-ES, half of the requests", "CMA-ES"
#: What the second half of the requests is spent on: (imitation, PPO).
ARMS = {"CMA-ES, then imitation": (True, False), "CMA-ES, then PPO": (False, True), "all three": (True, True)}


def _searched(scenario: Scenario, requests: float, seed: int) -> Row:
    """The planner's values, and its goodput on a validation day, at which what follows is learned."""
    found = tune_on_days(RULE.name, scenario, requests=requests, seed=seed)
    return {"values": dict(found.values), "rate": found.knee, "requests": found.requests, "valid": found.score}


def _shifted(scenario: Scenario, start: Row, requests: float, seed: int, how: tuple[bool, bool]) -> Row:
    found = learn_shift(
        scenario, start["values"], start["rate"], requests=requests, seed=seed, imitation=how[0], ppo=how[1]
    )
    return {
        "values": start["values"], "rate": start["rate"], "block": found.block.tolist(),
        "chosen": found.chosen, "valid": found.standings,
        "plan": list(found.plan), "requests": start["requests"] + found.requests,
        "stages": {k: v.tolist() for k, v in found.blocks.items()},
    }  # fmt: skip


def _policy(scenario: Scenario, row: Row) -> BoundPolicy:
    planner = RULE.bind(row["values"], arena_of(scenario).setting)
    block = row.get("block")
    return planner if block is None else shifted(planner, np.array(block))


def study(
    scenario: Scenario, *, requests: float, days: int, seeds: int, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """The whole comparison as JSON-ready data, also in ``out/result.json``.

    :param requests: simulated for each learned controller
    """
    rooms = ("train.control.days", "train.control.space", "train.control.shifting", "env.measure.phases")
    code = sources.sha256([sources.path_of(name) for name in rooms]) + code_sha256()
    kept, tests = Kept(out, [code, scenario.hash(), requests], say), range(days)
    rows: dict[str, list[Row]] = {name: [] for name in (HALF, WHOLE, *ARMS)}
    for seed in range(seeds):
        start = kept.get(f"half {seed}", partial(_searched, scenario, requests / 2, seed))
        rows[HALF].append(start)
        rows[WHOLE].append(kept.get(f"whole {seed}", partial(_searched, scenario, requests, seed)))
        for name, how in ARMS.items():
            make = partial(_shifted, scenario, start, requests / 2, seed, how)
            rows[name].append(kept.get(f"{name} {seed}", make))
    for name, learned in rows.items():
        for seed, row in enumerate(learned):
            make = partial(measured, scenario, [_policy(scenario, row)] * days, tests, row.get("rate"))
            row["test"] = kept.get(f"test {name} {seed}", make, row["values"], row.get("block"))
    rate = float(np.mean([row["test"]["goodput"] for row in rows[WHOLE]]))
    for name, learned in rows.items():
        for seed, row in enumerate(learned):
            make = partial(_stands, scenario, _policy(scenario, row), rate, tests)
            row["stands"] = kept.get(f"stands {name} {seed}", make, rate, row["values"], row.get("block"))["stands"]
    like = [row["values"] for row in rows[WHOLE][:1]]
    ceiling = kept.get("clairvoyant", partial(clairvoyant, scenario, seeds=days, like=like, say=say), like)
    result = {
        "scenario": scenario.name, "scenario_sha256": scenario.hash(), "commit": commit(), "days": days,
        "requests": requests, "rate": rate, "rows": rows, "clairvoyant": ceiling["goodput"],
    }  # fmt: skip
    write_json(out / "result.json", result)
    return result


def _stands(scenario: Scenario, policy: BoundPolicy, rate: float, days: Sequence[int]) -> Row:
    return {"stands": [standing(scenario, *play_days(scenario, policy, rate, day, "test")) for day in days]}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows, rate = result["rows"], result["rate"]
    whole = np.array([row["test"]["goodput"] for row in rows[WHOLE]])
    lines = [
        f"{result['scenario']}: {len(whole)} seeds, {result['days']} test days, {result['requests']:.2g} requests, "
        f"commit {result['commit']}; clairvoyant {np.mean(result['clairvoyant']):.2f} req/s",
        "",
        f"| who | goodput in every phase [req/s] | ÷ CMA-ES | stands at {rate:.2f} req/s [%] | kept | role changes |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, learned in rows.items():
        goodput = np.array([row["test"]["goodput"] for row in learned])
        stands = 100 * np.array([row["stands"] for row in learned])
        kept = ", ".join(row.get("chosen", "") for row in learned) if name in ARMS else ""
        changes = np.mean([row["test"]["role_changes"] for row in learned])
        cells = (_iqm(goodput, 2), _iqm(goodput / np.maximum(whole, 1e-9), 3), _iqm(stands, 1))
        lines.append(f"| {name} | {' | '.join(cells)} | {kept} | {changes:.0f} |")
    return "\n".join(lines)


def _iqm(figures: np.ndarray, digits: int) -> str:
    """Interquartile mean of (seeds, days) with its interval."""
    middle, low, high = stratified_iqm(list(figures.T))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@refuses("control")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", help="name of a shipped scenario, or a YAML file")
    parser.add_argument("--requests", type=float, default=8e6, help="simulated for each controller")
    parser.add_argument("--days", type=int, default=3, help="test days")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for results; a stopped study goes on there")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    result = study(
        practice(Scenario.load(given.scenario)), requests=given.requests, days=given.days, seeds=given.seeds,
        out=given.out, say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Who stays good where routers know the cluster late, and only a part of what is placed.

    python -m eval.studies.staleness                                    three scenarios, delays to 1 s, 1 to 4 routers
    python -m eval.studies.staleness azure-conv-4xa100 --rate 24 --budget 0    at one rate, in minutes: shares
    python -m eval.studies.staleness azure-conv-4xa100 --delays 0 0.5 --routers 1 4 --budget 0 --out runs/quick

Sustained goodput at 90 % on test windows over ``observation_delay_s`` and ``routers`` (docs/scenarios.md), for the
shipped checkpoint, which was trained with one router that knows everything, for a policy that ``--algo direct`` trains
here with delays and routers drawn anew for every episode (``randomise``), and for rules. The rules run on the
checkpoint's arrangement and queue order, so that only the placement differs between them and it. A study that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.common.files import read_json, write_bytes, write_json, write_text
from engine.common.options import refuses
from engine.common.provenance import commit
from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings, Split
from env.measure.digest import code_sha256, policy_sha256, scenario_hash
from env.measure.evaluator import Evaluator, bound
from env.measure.sustained_search import Search, measure_sustained
from env.scenario import Scenario
from eval.report.plots import COLOURS, png_of
from eval.studies.scoreboard import CHECKPOINTS

SCENARIOS = ("azure-conv-4xa100", "classes-6xa100", "shift-pd-8xa100")
RULES = ("predicted_ttft", "least_tokens", "power_of_two", "round_robin")
_TARGET = 0.9
_MARKERS = ("o", "s", "^", "v", "D", "x")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much the study takes.

    :param delays: seconds, and ``routers``: every pair is measured
    :param budget: of the training with randomised delays and routers, as for ``train-policy``; "0": none
    :param seeds: windows per rate
    :param rate: only the share of requests that meet both targets at this rate, in runs of ``requests``; None: goodput
    """

    delays: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    routers: tuple[int, ...] = (1, 2, 4)
    budget: str = "6M"
    seeds: int = 2
    split: Split = "test"
    rate: float | None = None
    requests: int = 12_000


def drawn(scenario: Scenario, effort: Effort) -> Scenario:
    """The scenario as training meets it: every delay and number of routers, its windows of choice in the middle."""
    delays, routers = sorted(effort.delays), sorted(effort.routers)
    return scenario.with_overrides(
        {
            "observation_delay_s": delays[len(delays) // 2],
            "routers": routers[len(routers) // 2],
            "randomise": {"observation_delay_s": delays, "routers": routers},
        }
    )


def _train(scenario: Scenario, folder: Path, effort: Effort) -> Path:
    """The checkpoint of a training under randomised delays and routers, read back where it is finished."""
    from train.budget import parse_budget
    from train.run import Request, run_or_read

    path = folder / "scenario.yaml"
    write_text(path, drawn(scenario, effort).to_yaml())
    run_or_read(Request(str(path), "direct", "auto", parse_budget(effort.budget), out=folder / "randomised"))
    return folder / "randomised" / "best"


def contenders(scenario: Scenario, trained: Path | None = None) -> list[Contender]:
    """The shipped checkpoint, the one trained here if any, and the rules on the arrangement of the shipped one.

    :raises SlalomError: no checkpoint is shipped for the scenario
    """
    folder = CHECKPOINTS / scenario.name
    if not (folder / "policy.json").is_file():
        raise SlalomError("scenario", scenario.name, "no checkpoint is shipped for it, and rules take its arrangement")
    shipped = Contender(str(folder), label="learned")
    plans = tuple(asdict(plan) for plan in bound(scenario, shipped).arrangement or ())
    learned = [shipped] + ([Contender(str(trained), label="learned, randomised")] if trained else [])
    return learned + [Contender(rule, plans=plans) for rule in RULES]


def measured(scenario: Scenario, who: Contender, effort: Effort, folder: Path) -> dict[str, Any]:
    """Sustained goodput of one policy and which clause ends it, or at one rate the percentage of requests that meet
    both targets; kept in ``folder`` and read back from there."""
    about: list[Any] = [code_sha256(), scenario_hash(scenario), policy_sha256(who)]
    about += [effort.seeds, effort.split, effort.rate, effort.requests]
    name = who.name.replace(", ", "-")
    path = folder / f"{name}-{scenario.observation_delay_s:g}-{scenario.routers}.json"
    found = dict(read_json(path)) if path.exists() else {}
    if found.get("about") != about:
        cell = {"delay_s": scenario.observation_delay_s, "routers": scenario.routers, "at": effort.rate}
        found = {"scenario": scenario.name, "policy": who.name, "about": about} | cell | _found(scenario, who, effort)
        write_json(path, found)
    return {key: value for key, value in found.items() if key != "about"}


def _found(scenario: Scenario, who: Contender, effort: Effort) -> dict[str, Any]:
    seeds = range(effort.seeds)
    if effort.rate is not None:
        with Evaluator(scenario, PointSettings(effort.requests, effort.split)) as evaluator:
            points = evaluator.points(who, effort.rate, seeds)
        return {"value": 100.0 * sum(point.attainment for point in points) / len(points)}
    with Evaluator(scenario, PointSettings(split=effort.split), measure=measure_sustained) as evaluator:
        best = Search(evaluator, who, seeds, targets=(_TARGET,)).found[0].as_dict()
    return {"value": best["rate"], "fails_above": best["fails_above"]}


def study(scenario: Scenario, effort: Effort, folder: Path, say: Say) -> list[dict[str, Any]]:
    """One row for every policy, delay and number of routers."""
    trained = _train(scenario, folder, effort) if effort.budget != "0" else None
    rows = []
    for who in contenders(scenario, trained):
        for delay in effort.delays:
            for routers in effort.routers:
                cell = scenario.with_overrides({"observation_delay_s": delay, "routers": routers})
                rows.append(measured(cell, who, effort, folder))
                say(f"{scenario.name}, {who.name}, {delay:g} s, {routers} routers: {rows[-1]['value']:.2f}")
    return rows


def _cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, float, int], float]:
    return {(row["scenario"], row["policy"], row["delay_s"], row["routers"]): row["value"] for row in rows}


def _different(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each scenario a line per policy and number of routers, a column per delay; requests per second, or
    at one rate per cent."""
    rates, delays = _cells(rows), _different(rows, "delay_s")
    lines = []
    for scenario in _different(rows, "scenario"):
        lines += [f"| {scenario} | routers | " + " | ".join(f"{delay:g} s" for delay in delays) + " |"]
        lines += ["| --- | --- |" + " --- |" * len(delays)]
        for policy in _different(rows, "policy"):
            for routers in _different(rows, "routers"):
                cells = [rates.get((scenario, policy, delay, routers)) for delay in delays]
                shown = " | ".join("-" if rate is None else f"{rate:.2f}" for rate in cells)
                lines.append(f"| {policy} | {routers} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Goodput over the delay: a row of panels for each scenario, a panel for each number of routers."""
    rates, delays, routers = _cells(rows), _different(rows, "delay_s"), _different(rows, "routers")
    scenarios, policies = _different(rows, "scenario"), _different(rows, "policy")
    figure = Figure(figsize=(3.2 * len(routers), 2.6 * len(scenarios) + 0.6), layout="constrained")
    axes = figure.subplots(len(scenarios), len(routers), sharex=True, sharey="row", squeeze=False)
    for line, scenario in zip(axes, scenarios, strict=True):
        for axis, n in zip(line, routers, strict=True):
            for policy, colour, marker in zip(policies, COLOURS, _MARKERS, strict=False):
                shown = [rates.get((scenario, policy, delay, n), float("nan")) for delay in delays]
                axis.plot(delays, shown, label=policy, color=colour, marker=marker, markersize=4)
            axis.set_ylim(0, None)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{scenario}, {n} router{'s' if n > 1 else ''}", fontsize=8)
        line[0].set_ylabel("sustained [req/s]" if rows[0]["at"] is None else "both targets met [%]", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("observation delay [s]", fontsize=8)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure


@refuses("staleness")
def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on bad input."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m eval.studies.staleness", description=about)
    parser.add_argument("scenario", nargs="*", default=SCENARIOS, help="of the shipped ones that have a checkpoint")
    parser.add_argument("--delays", type=float, nargs="+", default=Effort.delays, help="seconds")
    parser.add_argument("--routers", type=int, nargs="+", default=Effort.routers)
    parser.add_argument("--budget", default=Effort.budget, help="of the randomised training: 6M, 60s; 0: none")
    parser.add_argument("--seeds", type=int, default=Effort.seeds, help="windows per rate")
    parser.add_argument("--rate", type=float, help="the share that meets both targets at this rate, instead of goodput")
    parser.add_argument("--requests", type=int, default=Effort.requests, help="of a run at --rate")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    effort = Effort(
        tuple(options.delays), tuple(options.routers), options.budget, options.seeds, options.split,
        options.rate, options.requests,
    )  # fmt: skip
    for name in options.scenario:
        rows += study(Scenario.load(name), effort, options.out / name, lambda text: print(text, file=sys.stderr))
        write_json(options.out / "staleness.json", {"rows": rows, "commit": commit()})
    write_bytes(options.out / "staleness.png", png_of(picture(rows)))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

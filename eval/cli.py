"""``eval-policy``: compare policies on a scenario and say who wins, by how much and how sure that is.

Progress goes to standard error, the result to standard output: a table, or with ``--json`` one JSON object
and nothing else. Exit codes: 0 done, 2 bad input, 130 interrupted (finished points are kept under ``--out``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from engine.common.options import command_app, listed, none_of, only, option, run_command, takes
from engine.errors import SlalomError
from eval.options import parse_rates, parse_requests

if TYPE_CHECKING:
    from rich.console import Console

    from eval.compare.result import Comparison

app = command_app()
_OF_FIDELITY = ("loads", "repetitions", "run_s", "store")
_OF_BOTH = ("fidelity", "scenario", "policy", "env", "engines", "model", "out", "resume", "as_json")


@dataclass(frozen=True)
class Options:
    """What is compared, where and how closely."""

    scenario: list[str] | None = option(
        None, "Name of a shipped scenario, or a YAML file. Several (repeated, or with commas) or 'all' for the eight "
        "traffic regimes: one table.",
    )  # fmt: skip
    policy: list[str] | None = option(
        None, "Rule, rule:param=value, checkpoint folder, static_plan (the best fixed arrangement, searched), or "
        "'all'. Repeat to compare. With --fidelity --env remote also the address of a router of others.",
    )  # fmt: skip
    env: str = option(
        "surrogate", "Where policies run: surrogate, gpu: the real engine (on a CPU without one), or remote: --engines."
    )
    engines: str = option("", "With --env remote: addresses of engines of others, one for each instance: URL,URL.")
    model: str = option("", "With --env gpu: model to serve; default: that of the scenario's profile.")
    fidelity: bool = option(False, "Run surrogate and engine beside each other and compare them.", "--fidelity")
    loads: str = option("0.5,0.65,0.8", "With --fidelity: loads as shares of the median goodput of the policies.")
    repetitions: int = option(3, "With --fidelity: engine runs of each case.", min=2, max=100)
    run_s: float = option(9.0, "With --fidelity: seconds of arrivals of one run.", min=1.0)
    store: bool = option(True, "With --fidelity: keep the table in the scenario's profile.")
    rates: str | None = option(None, "START:STOP:STEP or a,b,c in requests (or sessions) per second.")
    goodput: bool = option(False, "Search each policy's sustained goodput (default).", "--goodput")
    seeds: int = option(3, "Seeds, the same for every policy.", min=1, max=1000)
    requests: int | None = option(None, "Requests of one run.", min=20)
    tune: int = option(0, "Also compare every rule tuned with so many trials, arrangement and queues included.", min=0)
    tune_requests: str | None = option(None, "Simulated requests of each such search instead of trials, e.g. 3M.")
    only_tuned: bool = option(False, "Leave out rules as published where a tuned one is compared.", "--only-tuned")
    slo_scale: float = option(1.0, "Multiply every TTFT and TPOT target by this.")
    warmup: float = option(0.05, "Share of arrivals left out at the start.")
    drain: float = option(0.0, "Share of arrivals left out at the end.")
    jobs: int = option(1, "Processes that simulate.", min=1, max=64)
    ray: str | None = option(None, "Simulate on a Ray cluster: auto (else started here) or HOST:PORT.")
    out: Path | None = option(None, "Folder for points, result, report and pictures.")
    resume: bool = option(False, "Go on with the points found in --out.", "--resume")
    as_json: bool = option(False, "Print one JSON object instead of a table.", "--json")
    save_detailed: bool = option(
        False, "Keep every request of every run in result.json, as vLLM does.", "--save-detailed"
    )
    markdown: bool = option(False, "Several scenarios: print the table as Markdown.", "--markdown")
    reproduce: str | None = option(
        None, "Published results beside ours: 'all' or S1, S2, S4, S5, S6. Needs no other option."
    )


@app.command()
@takes(Options)
def evaluate(options: Options) -> None:
    """Compare policies on a scenario: paired runs, bootstrap 95 % intervals, HTML report.

    Policies run on the simulator; with --env gpu in real time on the engine. With --fidelity the same arrivals go to
    both, and the table says how far apart they are.

    \b
    Examples:
      eval-policy --scenario azure-conv-4xa100 --policy runs/mine/best \\
          --policy least_tokens --tune 40 --out runs/report
      eval-policy --scenario all --policy all --tune 40 --jobs 2 --out runs/table
      eval-policy --reproduce all --out reproduced
    """
    o = options
    if o.reproduce is not None:
        only(o, ("reproduce", "out", "resume", "jobs", "as_json"), "it does nothing with --reproduce; leave it out")
        _reproduce(o, o.reproduce)
        return
    if not o.scenario or not o.policy:
        missing = "--policy" if o.scenario else "--scenario"
        raise SlalomError(missing, None, "give --scenario and --policy, or --reproduce")
    if o.env not in ("surrogate", "gpu", "remote"):
        raise SlalomError("--env", o.env, "use surrogate, gpu or remote")
    if (o.env == "remote") != bool(o.engines):
        raise SlalomError("--engines", o.engines, "give it with --env remote, and only then")
    urls = tuple(listed(o.engines))
    if o.fidelity:
        from eval.fidelity.fidelity import command

        only(o, _OF_BOTH + _OF_FIDELITY, "it does nothing with --fidelity; leave it out")
        command(
            o.scenario, o.policy, o.loads, o.repetitions, o.run_s, o.model, urls, o.out, o.resume, o.store, o.as_json
        )  # fmt: skip
        return
    none_of(o, _OF_FIDELITY, "give it together with --fidelity")
    if o.rates is not None and o.goodput:
        raise SlalomError("--rates", o.rates, "give either --rates or --goodput")
    several = len(o.scenario) > 1 or o.scenario[0] == "all" or "," in o.scenario[0]
    if several:
        none_of(o, ("ray", "save_detailed"), "with several scenarios it does nothing; leave it out")
        _compare_on_many(o, o.scenario, o.policy)
    else:
        none_of(o, ("markdown",), "it is for several scenarios; leave it out")
        _compare_on_one(o, o.scenario, o.policy)


def _compare_on_one(o: Options, scenario: list[str], policies: list[str]) -> None:
    """Policies on one scenario, see ``eval.compare.session``."""
    from rich.console import Console

    from engine.common.progress import Display
    from env.measure.contender import PointSettings
    from env.scenario import Scenario
    from eval.compare.progress import Bar
    from eval.compare.session import MOST_TRIALS, Request, open_folder, scaled
    from eval.compare.session import evaluate as run

    open_folder(o.out, o.resume)
    chosen = scaled(Scenario.load(scenario[0]), o.slo_scale)
    n_requests = o.requests or chosen.n_requests
    request = Request(
        scenario=chosen,
        policies=tuple(policies),
        rates=None if o.rates is None else parse_rates(o.rates),
        seeds=o.seeds,
        settings=PointSettings(n_requests=n_requests, warmup=o.warmup, drain=o.drain, detailed=o.save_detailed),
        tune=o.tune or (MOST_TRIALS if o.tune_requests else 0),
        tune_requests=parse_requests(o.tune_requests),
        only_tuned=o.only_tuned,
        prune=True,
        jobs=o.jobs,
        out=o.out,
        ray=o.ray,
        slo_scale=o.slo_scale,
        backend=o.env,  # type: ignore[arg-type]
        engines=tuple(listed(o.engines)),
        model=o.model,
        sustained=o.rates is None and o.env == "surrogate",
    )
    console = Console(stderr=True)
    if o.env != "surrogate" and o.rates is None:
        told = "sustained goodput needs 20 minutes of arrivals per rate and seed, in real time on an engine"
        console.print(f"{told}: classic goodput is measured instead", highlight=False)
    with _kept("points", o.out), Display() as display:
        result = run(request, Bar(display))
        display.phase("report", None)
        written = _write(result, o.out)
    for path in written.values():
        console.print(f"wrote {path}", highlight=False)
    if o.as_json:
        sys.stdout.write(json.dumps(result.to_json(), allow_nan=False) + "\n")
    else:
        _print(result, Console(width=None if sys.stdout.isatty() else 120))


def _compare_on_many(o: Options, scenarios: list[str], policies: list[str]) -> None:
    """Every policy on every scenario, see ``eval.compare.table``."""
    if o.rates is not None:
        raise SlalomError("--rates", o.rates, "several scenarios have no rate in common; leave it out")
    if o.env != "surrogate":
        raise SlalomError("--env", o.env, "the engine serves one scenario at a time: name one")
    from rich.console import Console
    from rich.table import Table

    from engine.common.progress import Display
    from eval.compare.session import MOST_TRIALS, open_folder
    from eval.compare.table import TableRequest, run_table, scenario_names
    from eval.report.table_page import markdown, summary, units, write_table

    open_folder(o.out, o.resume, "cells")
    request = TableRequest(
        scenario_names(scenarios), tuple(policies), requests=o.requests, seeds=o.seeds,
        tune=o.tune or (MOST_TRIALS if o.tune_requests else 0),
        tune_requests=parse_requests(o.tune_requests) if o.tune_requests else None,
        only_tuned=o.only_tuned, warmup=o.warmup, drain=o.drain, slo_scale=o.slo_scale,
    )  # fmt: skip
    console = Console(stderr=True)
    with _kept("cells", o.out), Display() as display:
        display.phase("cells", None)
        result = run_table(
            request, jobs=o.jobs, out=o.out, say=lambda text, done, total: display.update(done, text, total)
        )
    for path in (write_table(result, o.out) if o.out is not None else {}).values():
        console.print(f"wrote {path}", highlight=False)
    if o.as_json or o.markdown:
        text = json.dumps(result, allow_nan=False) if o.as_json else markdown(result)
        sys.stdout.write(text.rstrip("\n") + "\n")
        return
    head, rows = summary(result)
    table = Table(title=f"sustained/classic goodput at 90 % [{units(result)}], tuned (untuned)")
    for at, name in enumerate(head):
        table.add_column(name, no_wrap=at == 0, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _reproduce(o: Options, name: str) -> None:
    """Published results, see ``eval.claims.reproduce``."""
    from engine.common.progress import Display
    from eval.claims.reproduce import run

    with _kept("claims", o.out), Display() as display:
        display.phase("claims", None)
        written = run(
            name, o.out, o.as_json, jobs=o.jobs, resume=o.resume,
            say=lambda text, done, total: display.update(done, text, total),
        )  # fmt: skip
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


@contextmanager
def _kept(what: str, out: Path | None) -> Iterator[None]:
    """Turns an interrupt into exit code 130, after saying that finished ``what`` are kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"; finished {what} are in {out}, go on with --resume" if out is not None else ""
        print(f"interrupted{kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def _write(result: Comparison, out: Path | None) -> dict[str, Path]:
    if out is None:
        return {}
    from eval.report.page import write_report

    return write_report(result, out)


def _print(result: Comparison, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from eval.compare.verdict import lost_share, verdict

    kind = f": {'sustained' if result.is_sustained else 'classic'} goodput in {result.rate_unit}"
    title = result.settings["scenario"] + (kind if result.searched else ": attainment in %")
    table = Table(title=escape(title))
    table.add_column("policy", no_wrap=True)
    if result.searched:
        heads = [f"at {100 * t:g} %" for t in result.targets] + ["95 % interval", "per GPU"]
        heads += [f"classic at {100 * result.lead:g} %", "stability"] if result.is_sustained else []
    else:
        heads = [f"{p['rate']:.4g}/s" for p in result.policies[0].points] + ["IQM", "95 % interval"]
    heads.append(f"lost at {result.meeting_point(result.policies[0])['rate']:.4g}/s")
    for head in heads:
        table.add_column(escape(head), justify="right", no_wrap=True)
    for side in result.ranking():
        if over := side.iqm_attainment:
            cells = [f"{100 * p['slo_attainment']:.2f}" for p in side.points]
            cells += [f"{100 * over.value:.2f}", f"{100 * over.low:.2f} to {100 * over.high:.2f}"]
        else:
            cells = [f"{side.at(target).rate:.4g}" for target in result.targets]
            found = side.at(result.lead)
            cells += ["{:.4g} to {:.4g}".format(*found.interval), f"{found.per_gpu:.4g}"]
            if result.is_sustained:
                cells += [f"{side.classic_at(result.lead).rate:.4g}", f"{side.sustained['stability_limit']:.4g}"]
        cells.append(f"{100 * lost_share(result.meeting_point(side)):.2f} %")
        table.add_row(escape(side.label), *cells)
    console.print(table)
    for sentence in verdict(result):
        console.print(f"• {escape(sentence)}", highlight=False)


def main() -> None:
    """Entry point."""
    run_command("eval-policy", app)


if __name__ == "__main__":
    main()

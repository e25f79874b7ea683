"""``eval-policy``: compare policies on a scenario and say who wins, by how much and how sure that is.

Progress goes to standard error, the result to standard output: a table, or with ``--json`` one JSON object
and nothing else. Exit codes: 0 done, 2 bad input, 130 interrupted (finished points are kept under ``--out``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import SlalomError
from eval.options import parse_rates

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a shipped scenario, or a YAML file. Several (repeated, or with commas) or 'all' for the "
            "eight traffic regimes: one table."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Rule, rule:param=value, checkpoint folder, static_plan (the best fixed arrangement, searched), or "
            "'all'. Repeat to compare."
        ),
    ] = None,
    env: Annotated[
        str, typer.Option(help="Where policies run: surrogate, or gpu: the real engine (on a CPU without one).")
    ] = "surrogate",
    model: Annotated[
        str, typer.Option(help="With --env gpu: model to serve; default: that of the scenario's profile.")
    ] = "",
    fidelity: Annotated[
        bool, typer.Option("--fidelity", help="Run surrogate and engine beside each other and compare them.")
    ] = False,
    loads: Annotated[
        str, typer.Option(help="With --fidelity: loads as shares of the median goodput of the policies.")
    ] = "0.5,0.65,0.8",
    repetitions: Annotated[int, typer.Option(min=2, max=100, help="With --fidelity: engine runs of each case.")] = 3,
    run_s: Annotated[float, typer.Option(min=1.0, help="With --fidelity: seconds of arrivals of one run.")] = 9.0,
    store: Annotated[bool, typer.Option(help="With --fidelity: keep the table in the scenario's profile.")] = True,
    rates: Annotated[str | None, typer.Option(help="START:STOP:STEP or a,b,c in requests per second.")] = None,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Search each policy's sustained goodput (default).")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds, the same for every policy.")] = 3,
    requests: Annotated[int | None, typer.Option(min=20, help="Requests of one run.")] = None,
    tune: Annotated[int, typer.Option(min=0, help="Also compare every rule tuned with this many trials.")] = 0,
    slo_scale: Annotated[float, typer.Option(help="Multiply every TTFT and TPOT target by this.")] = 1.0,
    warmup: Annotated[float, typer.Option(help="Share of arrivals left out at the start.")] = 0.05,
    drain: Annotated[float, typer.Option(help="Share of arrivals left out at the end.")] = 0.0,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes that simulate.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Simulate on a Ray cluster: auto (else started here) or HOST:PORT.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for points, result, report and pictures.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the points found in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Keep every request of every run in result.json, as vLLM does.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Several scenarios: print the table as Markdown.")
    ] = False,
    reproduce: Annotated[
        str | None,
        typer.Option(help="Published results beside ours: 'all' or S1, S2, S4, S5, S6. Needs no other option."),
    ] = None,
) -> None:
    """Compare policies on a scenario: paired runs, bootstrap 95 % intervals, HTML report.

    Example: eval-policy --scenario NAME --policy least_tokens --policy runs/my-policy --goodput --out report

    All of them: eval-policy --scenario all --policy all --tune 40 --jobs 2 --out table

    Published results: eval-policy --reproduce all --out reproduced

    On the engine: --env gpu plays each run in real time. With --fidelity the same arrivals go to surrogate and engine,
    and the table says how far apart they are.
    """
    if reproduce is not None:
        from eval.claims.reproduce import run as run_claims

        run_claims(reproduce, out, as_json)
        return
    if not scenario or not policy:
        missing = "--policy" if scenario else "--scenario"
        raise SlalomError(missing, None, "give --scenario and --policy, or --reproduce")
    if env not in ("surrogate", "gpu"):
        raise SlalomError("--env", env, "use surrogate or gpu")
    if fidelity:
        from eval.fidelity.fidelity import command

        command(scenario, policy, loads, repetitions, run_s, model, out, resume, store, as_json)
        return
    if rates is not None and goodput:
        raise SlalomError("--rates", rates, "give either --rates or --goodput")
    from rich.console import Console

    if len(scenario) > 1 or scenario[0] == "all" or "," in scenario[0]:
        if rates is not None:
            raise SlalomError("--rates", rates, "several scenarios have no rate in common; leave it out")
        counts: dict[str, Any] = {"requests": requests, "seeds": seeds, "tune": tune, "warmup": warmup, "drain": drain}
        counts["slo_scale"] = slo_scale
        if env == "gpu":
            raise SlalomError("--env", env, "the engine serves one scenario at a time: name one")
        _table_of(scenario, policy, counts, jobs, out, resume, "json" if as_json else "md" if markdown else "")
        return
    from engine.jit.kernel import is_warm
    from env.measure.contender import PointSettings
    from env.scenario import Scenario
    from eval.compare.session import Request, open_folder, scaled
    from eval.compare.session import evaluate as run

    open_folder(out, resume)
    chosen = scaled(Scenario.load(scenario[0]), slo_scale)
    request = Request(
        scenario=chosen,
        policies=tuple(policy),
        rates=None if rates is None else parse_rates(rates),
        seeds=seeds,
        settings=PointSettings(
            n_requests=requests or chosen.n_requests, warmup=warmup, drain=drain, detailed=save_detailed
        ),
        tune=tune,
        prune=True,
        jobs=jobs,
        out=out,
        ray=ray,
        slo_scale=slo_scale,
        backend="gpu" if env == "gpu" else "surrogate",
        model=model,
        sustained=rates is None and env == "surrogate",
    )
    console = Console(stderr=True)
    if env == "gpu" and rates is None:
        told = "sustained goodput needs 20 minutes of arrivals per rate and seed, in real time on an engine"
        console.print(f"{told}: classic goodput is measured instead", highlight=False)
    if not is_warm("env.surrogate.loop"):
        console.print("first use of this version: compiling takes about a minute, once")
    from engine.common.progress import Display
    from eval.compare.progress import Bar

    try:
        with Display() as display:
            result = run(request, Bar(display))
            display.phase("report", None)
            written = _write(result, out)
    except KeyboardInterrupt:
        kept = f"; finished points are in {out}, go on with --resume" if out is not None else ""
        print(f"interrupted{kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    for path in written.values():
        console.print(f"wrote {path}", highlight=False)
    if as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        _print(result, Console(width=None if sys.stdout.isatty() else 120))


def _table_of(
    scenarios: list[str], policies: list[str], counts: dict[str, Any], jobs: int, out: Path | None, resume: bool,
    form: str,
) -> None:  # fmt: skip
    """Every policy on every scenario, see ``eval.compare.table``; ``form``: json, md or nothing for a terminal's
    table."""
    from rich.console import Console
    from rich.table import Table

    from engine.common.progress import Display
    from eval.compare.session import open_folder
    from eval.compare.table import TableRequest, run_table, scenario_names
    from eval.report.table_page import markdown, summary, write_table

    open_folder(out, resume, "cells")
    request = TableRequest(scenario_names(scenarios), tuple(policies), **counts)
    console = Console(stderr=True)
    try:
        with Display() as display:
            display.phase("cells", None)
            result = run_table(
                request, jobs=jobs, out=out, say=lambda text, done, total: display.update(done, text, total)
            )
    except KeyboardInterrupt:
        kept = f"; finished cells are in {out}, go on with --resume" if out is not None else ""
        print(f"interrupted{kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    for path in (write_table(result, out) if out is not None else {}).values():
        console.print(f"wrote {path}", highlight=False)
    if form:
        text = json.dumps(result, allow_nan=False) if form == "json" else markdown(result)
        sys.stdout.write(text.rstrip("\n") + "\n")
        return
    head, rows = summary(result)
    table = Table(title="classic goodput at 90 % [requests/s], tuned (untuned)")
    for at, name in enumerate(head):
        table.add_column(name, no_wrap=at == 0, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _write(result: dict[str, Any], out: Path | None) -> dict[str, Path]:
    if out is None:
        return {}
    from eval.report.page import write_report

    return write_report(result, out)


def _print(result: dict[str, Any], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from eval.compare.verdict import is_sustained, lost_share, meeting_point, ranking, verdict

    searched, lasting = result["mode"] == "goodput", is_sustained(result)
    kind = ": sustained goodput in requests/s" if lasting else ": classic goodput in requests/s"
    title = result["settings"]["scenario"] + (kind if searched else ": attainment in %")
    table = Table(title=escape(title))
    table.add_column("policy", no_wrap=True)
    if searched:
        heads = [f"at {100 * t:g} %" for t in result["targets"]] + ["95 % interval", "per GPU"]
        heads += [f"classic at {100 * result['targets'][0]:g} %", "stability"] if lasting else []
    else:
        heads = [f"{p['rate']:.4g}/s" for p in result["policies"][0]["points"]] + [
            "IQM",
            "95 % interval",
        ]
    heads.append(f"lost at {meeting_point(result, result['policies'][0])['rate']:.4g}/s")
    for head in heads:
        table.add_column(escape(head), justify="right", no_wrap=True)
    for policy in ranking(result):
        if searched:
            found = [policy["goodput"][f"{t:g}"] for t in result["targets"]]
            cells = [f"{f['rate']:.4g}" for f in found]
            cells += [f"{found[0]['low']:.4g} to {found[0]['high']:.4g}", f"{found[0]['per_gpu']:.4g}"]
            if lasting:
                classic = policy["classic_goodput"][f"{result['targets'][0]:g}"]
                cells += [f"{classic['rate']:.4g}", f"{policy['sustained']['stability_limit']:.4g}"]
        else:
            over = policy["iqm_attainment"]
            cells = [f"{100 * p['slo_attainment']:.2f}" for p in policy["points"]]
            cells += [f"{100 * over['value']:.2f}", f"{100 * over['low']:.2f} to {100 * over['high']:.2f}"]
        cells.append(f"{100 * lost_share(meeting_point(result, policy)):.2f} %")
        table.add_row(escape(policy["label"]), *cells)
    console.print(table)
    for sentence in verdict(result):
        console.print(f"• {escape(sentence)}", highlight=False)


def main() -> None:
    """Entry point: :class:`SlalomError` becomes one line on standard error and exit code 2."""
    try:
        app()
    except SlalomError as error:
        print(f"eval-policy: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""``plan-placement``: how to arrange the GPUs of a scenario when nothing may move, when the load shifts, or for
somebody who knows how it will.

Progress goes to standard error, the result to standard output: a table and one line of reason, or with
``--json`` one JSON object and nothing else. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.common.options import command_app, run_command
from engine.errors import SlalomError

app = command_app()


@app.command()
def place(
    scenario: Annotated[str, typer.Option(help="Name of a shipped scenario, or a YAML file.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="GPU budget (default: the scenario's).")] = None,
    goal: Annotated[float, typer.Option(help="Share of requests that must meet both targets.")] = 0.9,
    requests: Annotated[
        int | None, typer.Option(min=50, help="Requests of one run of the last round; of a workload walked.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of the last round; workloads walked.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--replan",
            help="Instead: walk the workload, split prefill and decode anew whenever the load has shifted, and "
            "measure what that gains.",
        ),
    ] = False,
    knowing: Annotated[
        bool,
        typer.Option(
            "--clairvoyant",
            help="Instead: the best schedule of role changes when the phases of the workload are known beforehand, and "
            "the rate that it sustains in each: a bound for every policy that does not know them.",
        ),
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second; with --clairvoyant those it begins with (default: the scenario's).",
        ),
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(
            help="Seconds of load that are watched (default: 300, or a tenth of the workload).",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Relative change of rate, prompt or output that counts (default: 0.2)."),
    ] = None,
) -> None:
    """Search the best fixed arrangement: roles and counts, chunk budget, SM split, tensor parallelism.

    \b
    Examples:
      plan-placement --scenario distserve-13b-3xa100 --gpus 4 --out plan.json
      plan-placement --scenario shift-pd-8xa100 --replan
      plan-placement --scenario daynight-70b --clairvoyant
    """
    from engine.common.files import write_json
    from engine.common.provenance import commit
    from env.scenario import Scenario

    if out is not None and os.path.isdir(out):
        raise SlalomError("--out", str(out), "this is a folder; name a file")
    if again and knowing:
        raise SlalomError("--clairvoyant", True, "give it or --replan, not both")
    if (again or knowing) and gpus is not None:
        fix = "leave it out with --replan and --clairvoyant: they split the instances of the scenario"
        raise SlalomError("--gpus", gpus, fix)
    if knowing and requests is not None:
        raise SlalomError("--requests", requests, "leave it out with --clairvoyant: a run is an episode")
    needs = (("--rate", rate, again or knowing), ("--window", window, again), ("--threshold", threshold, again))
    for name, value, given in needs:
        if value is not None and not given:
            raise SlalomError(name, value, "it needs --replan" + (" or --clairvoyant" if name == "--rate" else ""))
    loaded = Scenario.load(scenario)
    common: dict[str, Any] = {
        "goal": goal, "n_requests": requests, "seeds": seeds, "say": lambda text: print(text, file=sys.stderr),
    }  # fmt: skip
    text = _text
    try:
        if knowing:
            from eval.placement.clairvoyant import clairvoyant

            del common["n_requests"]
            result, text = clairvoyant(loaded, rate=rate, **common), schedule
        elif again:
            from eval.placement.replan import replan

            limit = 0.2 if threshold is None else threshold
            result, text = replan(loaded, rate=rate, window_s=window, threshold=limit, **common), timeline
        else:
            from eval.placement.placement import plan

            result = plan(loaded, gpus=gpus, **common)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    result["commit"] = commit()
    print(json.dumps(result, allow_nan=False) if as_json else text(result))
    if out is not None:  # after the answer: a place that cannot be written does not cost the search
        write_json(out, result)
        print(f"wrote {out}", file=sys.stderr)


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['scenario']}: {result['gpus']} GPUs, {100 * result['goal']:g} % of requests within targets"]
    rows = (
        ("best", "best"),
        ("runner-up", "runner_up"),
        ("mixed only", "mixed_only"),
        ("disaggregated only", "disaggregated_only"),
        ("multiplexed only", "multiplexed_only"),
    )
    for title, key in rows:
        found = result[key]
        if found is not None:
            figures = f"{found['goodput']:8.3g} req/s {found['goodput_per_gpu']:8.3g} per GPU"
            lines.append(f"{title:19} {figures}  {found['label']}")
    lines.append(result["reason"])
    placed = result["distserve"]
    if placed is not None:
        lines.append(
            f"DistServe's algorithm {placed['algorithm']} at {placed['rate']:g} req/s: {placed['n']} x "
            f"{placed['prefill']} prefill, {placed['m']} x {placed['decode']} decode ({placed['gpus']} GPUs)"
        )
    return "\n".join(lines)


def timeline(result: dict[str, Any]) -> str:
    """The result of :func:`eval.placement.replan.replan` to read."""
    lines = [
        f"{result['scenario']}: {result['requests']} requests at {result['rate']:g} req/s; the split is planned anew "
        f"where rate, prompt or output of the last {result['window_s'] / 2:.0f} s are off by more than "
        f"{100 * result['threshold']:g} %"
    ]
    for workload in result["workloads"]:
        lines.append(
            f"workload {workload['seed']}: load; prefill+decode instances (what they hold by the planner's estimate)"
        )
        for row in workload["timeline"]:
            old, new = row["before"], row["plan"]
            changed = ", ".join(f"{name} {100 * by:+.0f} %" for name, by in row["changed"].items()) or "first plan"
            load = f"{row['rate']:6.1f} req/s {row['prompt']:6.0f} in {row['output']:5.0f} out"
            lines.append(f"{row['at_s']:7.0f} s {load}  {changed}")
            plan = f"{new['split']} ({new['capacity']:.1f} req/s): {100 * new['within_targets']:.1f} % within targets"
            if old is not None:
                plan = (
                    f"{old['split']} ({old['capacity']:.1f} req/s) -> {plan}; kept {100 * old['within_targets']:.1f} %"
                )
                plan += f", switched at no cost {100 * row['switched_at_no_cost']:.1f} %"
            lines.append(f"{'':10}{plan}")
        lines.append(
            f"    in all: first plan kept {100 * workload['first_plan_kept']:.1f} %, planned anew "
            f"{100 * workload['planned_anew']:.1f} % ({workload['role_changes']} role changes), best fixed split in "
            f"hindsight {100 * workload['best_fixed']:.1f} % ({workload['best_fixed_split']}), all mixed "
            f"{100 * workload['all_mixed']:.1f} %"
        )
    mean = {name: f"{100 * share:.1f} %" for name, share in result["mean"].items()}
    lines.append(
        f"mean: first plan kept {mean['first_plan_kept']}, planned anew {mean['planned_anew']}, best fixed split in "
        f"hindsight {mean['best_fixed']}, all mixed (chunked prefill, not tuned) {mean['all_mixed']}"
    )
    searched = max(workload["planning_s"] for workload in result["workloads"])
    lines.append(
        f"A switch costs the drain of each instance that changes its role and {1e3 * result['switch_s']:g} ms (the "
        f"profile's role switch): both are simulated. Not included: the search ({searched:.1f} s) and the reload of "
        "weights that another tensor parallelism would need (it stays as it is)."
    )
    return "\n".join(lines)


def schedule(result: dict[str, Any]) -> str:
    """The result of :func:`eval.placement.clairvoyant.clairvoyant` to read."""
    goal, fixed = 100 * result["goal"], result["fixed"]
    held, kept = (sum(rates) / len(rates) for rates in (result["goodput"], fixed["goodput"]))
    lines = [
        f"{result['scenario']}: knowing the phases, {held:.3g} req/s with {goal:g} % within targets in each of them, "
        f"{held / kept if kept else math.inf:.2f} times what the best fixed split holds ({kept:.3g}, "
        f"{fixed['prefill']} prefill)",
        f"{result['role_changes']} role changes an episode; instances that do not prefill only are {result['side']}, "
        f"queues {result['order']}",
        "        from  prefill only",
    ]
    lines += [f"{row['at_s']:10.0f} s  {row['prefill']}" for row in result["schedule"]]
    shares = ", ".join(f"{100 * share:.1f}" for share in result["shares"])
    lines.append(f"within targets, phase by phase, on the first test day at that rate: {shares} %")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    run_command("plan-placement", app)


if __name__ == "__main__":
    main()

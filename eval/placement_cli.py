"""``plan-placement``: how to arrange the GPUs of a scenario when nothing may move at run time.

Progress goes to standard error, the result to standard output: a table and one line of reason, or with
``--json`` one JSON object and nothing else. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import SlalomError

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def place(
    scenario: Annotated[str, typer.Option(help="Name of a shipped scenario, or a YAML file.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="GPU budget (default: the scenario's).")] = None,
    goal: Annotated[float, typer.Option(help="Share of requests that must meet both targets.")] = 0.9,
    requests: Annotated[int | None, typer.Option(min=50, help="Requests of one run of the last round.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of the last round.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Search the best fixed arrangement: roles and counts, chunk budget, SM split, tensor parallelism.

    Example: plan-placement --scenario distserve-13b-3xa100 --gpus 4 --out plan.json
    """
    from env.scenario import Scenario
    from eval.placement import plan
    from eval.provenance import commit
    from eval.store import write_json

    if out is not None and out.is_dir():
        raise SlalomError("--out", str(out), "this is a folder; name a file")
    loaded = Scenario.load(scenario)
    try:
        result = plan(
            loaded, gpus=gpus, goal=goal, n_requests=requests, seeds=seeds, say=lambda t: print(t, file=sys.stderr)
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    result["commit"] = commit()
    if out is not None:
        write_json(out, result)
        print(f"wrote {out}", file=sys.stderr)
    print(json.dumps(result, allow_nan=False) if as_json else _text(result))


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


def main() -> None:
    """Entry point: :class:`SlalomError` becomes one line on standard error and exit code 2."""
    try:
        app()
    except SlalomError as error:
        print(f"plan-placement: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

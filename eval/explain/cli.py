"""``explain-policy``: what one decision was based on, and what a policy does in general.

    explain-policy --log decisions.jsonl --request 17        one request's decisions and what became of it
    explain-policy --log decisions.jsonl                     the log as a whole
    explain-policy --policy runs/mine/best --scenario NAME   importance, tree, deviations from least_tokens, gain

Text by default, ``--json`` for one JSON object, ``--html FILE`` for a page. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.common.options import run_command
from engine.errors import SlalomError

if TYPE_CHECKING:
    from env.scenario import Scenario

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def explain_policy(
    policy: str, scenario: Scenario, *, rate: float | None = None, requests: int = 1500, seeds: int = 3, depth: int = 3
) -> dict[str, Any]:
    """Everything ``--policy`` shows, as plain data.

    :param rate: requests per second; the scenario's reference rate if not given
    :raises SlalomError: unknown policy or scenario, or scikit-learn is missing
    """
    from engine.core.columns import Kind
    from eval.explain.policy import deviations, distil, gain, importance, record

    rate = rate or scenario.reference_rate
    differing: dict[int, set[int]] = {}
    recorder = None
    for seed in range(seeds):
        recorded = record(scenario, policy, rate=rate, n_requests=requests, seed=seed)
        differing[seed] = recorded.differing_requests
        recorder = recorder or recorded
    assert recorder is not None
    kinds = {}
    for kind in Kind:
        found = deviations(recorder, kind)
        if found is not None:
            tree = distil(recorder, kind, depth=depth) if kind <= Kind.PLACE_DECODE else None
            kinds[kind.name.lower()] = {
                "importance": importance(recorder, kind),
                "tree": tree,
                "deviations": found,
            }
    return {
        "policy": {"name": recorder.name, **recorder.describe()},
        "scenario": scenario.name,
        "rate": rate,
        "kinds": kinds,
        "gain": gain(scenario, policy, rate=rate, n_requests=requests, seeds=range(seeds), differing=differing),
    }


@app.command()
def explain(
    policy: Annotated[str | None, typer.Option(help="Rule, RULE:parameter=value, or checkpoint folder.")] = None,
    scenario: Annotated[str, typer.Option(help="Shipped scenario or YAML file.")] = "azure-conv-4xa100",
    rate: Annotated[float | None, typer.Option(help="Requests per second (default: the scenario's).")] = None,
    requests: Annotated[int, typer.Option(min=100, help="Requests of one run.")] = 1500,
    seeds: Annotated[int, typer.Option(min=1, max=50, help="Paired runs.")] = 3,
    depth: Annotated[int, typer.Option(min=1, max=8, help="Depth of the tree.")] = 3,
    log: Annotated[Path | None, typer.Option(help="Decision log of serve --decision-log.")] = None,
    request: Annotated[str | None, typer.Option(help="Request: 17, or 1f3a9c02-17 of cmpl-1f3a9c02-17.")] = None,
    seq: Annotated[str | None, typer.Option(help="Decision: its number, or SERVER-NUMBER.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
) -> None:
    """Explain one decision of a log, a whole log, or a policy on a scenario."""
    from engine.common.files import write_text
    from eval.explain import render
    from eval.explain.log import explain_decision, summary

    if (policy is None) == (log is None):
        raise SlalomError("--policy, --log", policy, "give one of the two")
    if log is not None and (request is not None or seq is not None):
        result, text = (found := explain_decision(log, request=request, seq=seq)), render.decision_text(found)
    elif log is not None:
        result, text = (found := summary(log)), render.summary_text(found)
    else:
        from env.scenario import Scenario

        assert policy is not None
        loaded = Scenario.load(scenario)
        found = explain_policy(policy, loaded, rate=rate, requests=requests, seeds=seeds, depth=depth)
        result, text = found, render.policy_text(found)
    if html is not None:
        write_text(html, render.page(result, text))
        print(f"wrote {html}", file=sys.stderr)
    print(json.dumps(result, allow_nan=False) if as_json else text)


def main() -> None:
    """Entry point."""
    run_command("explain-policy", app)


if __name__ == "__main__":
    main()

"""``explain-policy``: what one decision was based on, and what a policy does in general.

    explain-policy --log decisions.jsonl --request 17        one request's decisions and what became of it
    explain-policy --log decisions.jsonl                     the log as a whole
    explain-policy --policy runs/mine/best --scenario NAME   importance, tree, deviations from least_tokens, gain

Text by default, ``--json`` for one JSON object, ``--html FILE`` for a page. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.common.options import command_app, only, option, run_command, takes
from engine.errors import SlalomError

if TYPE_CHECKING:
    from env.scenario import Scenario

app = command_app()


def explain_policy(
    policy: str, scenario: Scenario, *, rate: float | None = None, requests: int = 1500, seeds: int = 3, depth: int = 3
) -> dict[str, Any]:
    """Everything ``--policy`` shows, as plain data.

    :param rate: requests per second; the scenario's reference rate if not given
    :raises SlalomError: unknown policy or scenario, or scikit-learn is missing
    """
    from engine.core.columns import Kind
    from env.measure.level import rate_unit
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
        "rate_unit": rate_unit(scenario),
        "kinds": kinds,
        "gain": gain(scenario, policy, rate=rate, n_requests=requests, seeds=range(seeds), differing=differing),
    }


@dataclass(frozen=True)
class Options:
    """What is explained, and in which form."""

    policy: str | None = option(None, "Rule, RULE:parameter=value, or checkpoint folder.")
    scenario: str = option("azure-conv-4xa100", "With --policy: shipped scenario or YAML file.")
    rate: float | None = option(None, "With --policy: requests per second (default: the scenario's).")
    requests: int = option(1500, "With --policy: requests of one run.", min=100)
    seeds: int = option(3, "With --policy: paired runs.", min=1, max=50)
    depth: int = option(3, "With --policy: depth of the tree.", min=1, max=8)
    log: Path | None = option(None, "Decision log of serve --decision-log or route --decision-log.")
    request: str | None = option(None, "With --log: one request: 17, or 1f3a9c02-17 of cmpl-1f3a9c02-17.")
    seq: str | None = option(None, "With --log: one decision: its number, or SERVER-NUMBER.")
    as_json: bool = option(False, "Print one JSON object.", "--json")
    html: Path | None = option(None, "Also write a page to this file.")


@app.command()
@takes(Options)
def explain(options: Options) -> None:
    """Explain one decision of a log, a whole log, or a policy on a scenario.

    \b
    Examples:
      explain-policy --policy runs/mine/best --scenario azure-conv-4xa100 --html why.html
      explain-policy --log decisions.jsonl
      explain-policy --log decisions.jsonl --request cmpl-1f3a9c02-17
    """
    from engine.common.files import write_text
    from eval.explain import render
    from eval.explain.log import explain_decision, summary

    o = options
    if (o.policy is None) == (o.log is None):
        raise SlalomError("--policy, --log", o.policy, "give one of the two")
    shown = ("as_json", "html")
    if o.log is not None:
        only(o, ("log", "request", "seq", *shown), "it belongs to --policy; leave it out with --log")
        one = o.request is not None or o.seq is not None
        result = explain_decision(o.log, request=o.request, seq=o.seq) if one else summary(o.log)
        text = render.decision_text(result) if one else render.summary_text(result)
    else:
        from env.scenario import Scenario

        assert o.policy is not None
        used = ("policy", "scenario", "rate", "requests", "seeds", "depth", *shown)
        only(o, used, "it belongs to --log; leave it out with --policy")
        loaded = Scenario.load(o.scenario)
        result = explain_policy(o.policy, loaded, rate=o.rate, requests=o.requests, seeds=o.seeds, depth=o.depth)
        text = render.policy_text(result)
    print(json.dumps(result, allow_nan=False) if o.as_json else text)
    if o.html is not None:  # after the answer: a place that cannot be written does not cost the simulations
        write_text(o.html, render.page(result, text))
        print(f"wrote {o.html}", file=sys.stderr)


def main() -> None:
    """Entry point."""
    run_command("explain-policy", app)


if __name__ == "__main__":
    main()

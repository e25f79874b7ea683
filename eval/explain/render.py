"""``explain-policy``'s results as text and as one page."""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from eval.explain.policy import BASELINE
from eval.report.html import render


def decision_text(result: dict[str, Any]) -> str:
    """Each decision about a request, its candidates and what became of it."""
    lines = []
    for d in result["decisions"]:
        kind = d["kind"].replace("_", " ")
        lines.append(f"decision {d['seq']} at {d['now_s']:.3f} s: {kind} of request {d['request']}")
        lines += [f"  {sentence}" for sentence in d["why"]]
        columns = [k for k in ("score", "ttft_s", "wait_s", "step_with_s", "outstanding", "run_n", "cached_tokens")
                   if any(k in c for c in d["candidates"])]  # fmt: skip
        lines.append("    " + "".join(f"{c:>14}" for c in ("candidate", *columns)))
        for c in d["candidates"]:
            mark = ">" if c["row"] == d["choice"] else "a" if c["row"] == d["advised"] else " "
            cells = "".join(f"{c[k]:>14.4g}" if c.get(k) is not None else f"{'':>14}" for k in columns)
            lines.append(f"  {mark} {c['action']:>14}{cells}")
        lines.append(f"  took {d['latency_us']:.1f} us")
    outcome = result["outcome"]
    if outcome is None:
        lines.append("no outcome in the log yet")
        return "\n".join(lines)
    for metric in ("ttft", "tpot"):
        actual, predicted = outcome[f"{metric}_s"], outcome[f"predicted_{metric}_s"]
        if actual is not None:
            said = f"predicted {1e3 * predicted:.1f} ms" if predicted else "no prediction"
            met = "met" if outcome[f"{metric}_ok"] else "missed"
            lines.append(f"outcome: {metric.upper()} {1e3 * actual:.1f} ms, {said}, target {met}")
    if outcome["ttft_s"] is None:
        lines.append(f"outcome: {outcome['finish']}")
    return "\n".join(lines)


def summary_text(result: dict[str, Any]) -> str:
    """A log as a whole."""
    n = max(result["decisions"], 1)
    lines = [f"{result['decisions']} decisions: " + ", ".join(f"{v} {k}" for k, v in result["kinds"].items())]
    lines += [f"  {100 * v / n:5.1f} % {k}" for k, v in sorted(result["reasons"].items(), key=lambda x: -x[1])]
    if result["latency_us"]:
        lines.append(f"took {result['latency_us']['p50']:.1f} us (median), {result['latency_us']['p99']:.1f} us (p99)")
    if result["advice_agreement"] is not None:
        lines.append(f"advice agreed with what was done in {100 * result['advice_agreement']:.1f} %")
    if result["attainment"] is not None:
        lines.append(f"{result['requests']} requests ended, {100 * result['attainment']:.1f} % met both targets")
    for metric, ratio in result["actual_over_predicted"].items():
        lines.append(f"actual {metric.upper()} is {ratio:.2f} times the predicted one (median)")
    if result["unreadable"]:
        places = ", ".join(result["unreadable"][:3])
        lines.append(f"{len(result['unreadable'])} lines cannot be read and are left out: {places}")
    last = " (last five)" if len(result["policies"]) > 5 else ""
    lines.append(f"policies: {', '.join(result['policies'][-5:])}{last}")
    return "\n".join(lines)


def policy_text(result: dict[str, Any]) -> str:
    """A policy in general."""
    g = result["gain"]
    low, high = (100 * x for x in g["interval"])
    lines = [
        f"{result['policy']['name']} on {result['scenario']} at {result['rate']:g} {result['rate_unit']}, "
        f"{g['seeds']} x {g['requests']} requests",
        "",
        f"against {BASELINE} on the same arrivals: attainment {100 * g['attainment']['policy']:.1f} % and "
        f"{100 * g['attainment'][BASELINE]:.1f} %, "
        f"difference {100 * g['difference']:+.1f} points (95 %: {low:+.1f} to {high:+.1f})",
    ]
    for key in ("p90_ttft_ms", "p90_tpot_ms"):
        lines.append(f"  {key}: {g[key]['policy']:.1f} against {g[key][BASELINE]:.1f}")
    d = g["deviating_requests"]
    lines.append(
        f"  requests it placed differently: {100 * d['share']:.1f} % of all; "
        f"good {100 * d['good_policy']:.1f} % with it, {100 * d[f'good_{BASELINE}']:.1f} % when {BASELINE} ruled"
    )
    for kind, found in result["kinds"].items():
        lines += ["", kind.replace("_", " "), *_kind_text(found)]
    return "\n".join(lines)


def _kind_text(found: dict[str, Any]) -> list[str]:
    apart = found["deviations"]
    lines = [f"  differs from {BASELINE} in {100 * apart['share']:.1f} % of {apart['decisions']} decisions"]
    for when in apart["when"]:
        lines.append(
            f"    {when['feature']}: {when['differing']:.3g} where it differs, {when['same']:.3g} where not "
            f"({when['standard_deviations']:+.2f} sd)"
        )
    for name, pair in apart["trades"].items():
        lines.append(f"    takes {name} {pair['policy']:.4g} where {BASELINE} would take {pair[BASELINE]:.4g}")
    lines.append("  answers that change when a feature is shuffled:")
    lines += [f"    {100 * f['changed']:5.1f} %  {f['feature']}" for f in found["importance"][:8] if f["changed"] > 0]
    tree = found["tree"]
    if tree is not None:
        lines.append(
            f"  a tree of depth {tree['depth']} agrees in {100 * tree['agreement']:.1f} % of "
            f"{tree['decisions']} unseen decisions ({BASELINE}: {100 * tree['baseline_agreement']:.1f} %):"
        )
        lines += [f"    {line}" for line in tree["text"].splitlines()]
    return lines


_BODY = """
{% for kind, found in kinds.items() %}
<h2>{{ kind.replace("_", " ") }}: answers that change when a feature is shuffled</h2>
<table>
{% for f in found.importance[:12] %}
{% set share = "%.1f" % (100 * f.changed) %}
<tr><td>{{ f.feature }}</td><td class="room"><div class="bar" style="width:{{ share }}%"></div></td>
<td>{{ share }} %</td></tr>
{% endfor %}
</table>
{% endfor %}
<h2>In words</h2><pre>{{ text }}</pre>
<script type="application/json" id="data">{{ data }}</script>
"""


def page(result: dict[str, Any], text: str) -> str:
    """One self-contained page: bars of importance where there are any, the text, and the data."""
    data = Markup(json.dumps(result, allow_nan=False).replace("<", "\\u003c"))
    policy = result.get("policy")  # a log has kinds, too: how many decisions of each
    title, kinds = (str(policy["name"]), result["kinds"]) if policy else ("Decision log", {})
    return render(_BODY, title=title, kinds=kinds, text=text, data=data)

"""The fidelity table for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLUMNS = ("ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "tpot_p99", "attainment")


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """One line per case, then the summary in plain sentences; twice where the machine's speed was measured."""
    _print(result, console)
    if "at_speed" in result:
        slow = result["at_speed"]["slowdown"]
        console.print(
            "\nThe same runs against the surrogate at the speed of the machine around each of them: reference steps "
            f"took {min(slow):.2f} to {max(slow):.2f} times (mean {sum(slow) / len(slow):.2f}) what the profile says.",
            highlight=False,
        )
        _print(result["at_speed"], console)
    _promise(result["promise"], console)


def _promise(promise: Mapping[str, Any], console: Console) -> None:
    """Attainment promised and arrived, with the gain of each policy over the first."""
    table = Table(title="attainment in %, and gain over the first policy in points")
    for head in ("policy", "load", "promised", "arrived", "repetitions", "promised gain", "arrived gain"):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    for r in promise["rows"]:
        cells = ["" if r[k] is None else f"{100 * r[k]:.1f}" for k in ("promised", "arrived")]
        cells.append(f"{100 * r['low']:.1f} to {100 * r['high']:.1f}")
        cells += ["" if r[k] is None else f"{100 * r[k]:+.1f}" for k in ("promised_gain", "arrived_gain")]
        table.add_row(escape(r["policy"]), f"{r['load']:g}", *cells)
    console.print(table)
    share = promise["share_arrived"]
    told = (
        "no gain of 5 points was promised" if share is None else f"of promised gains of 5 points, {share:.0%} arrived"
    )
    console.print(f"• {told}", highlight=False)


def _print(result: Mapping[str, Any], console: Console) -> None:
    for scenario in dict.fromkeys(row["scenario"] for row in result["table"]):
        title = f"{scenario}: surrogate ÷ engine − 1 in % (±: the engine's own noise); attainment in points"
        table = Table(title=escape(title))
        for head in ("policy", "load", *_COLUMNS):
            table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
        for row in (r for r in result["table"] if r["scenario"] == scenario):
            found = [row["figures"][c] for c in _COLUMNS]
            cells = [f"{100 * f['error']:+.1f}±{100 * f['noise']:.1f}" for f in found]
            beyond = "*" if row["own_load"] > 0.8 + 1e-9 else ""
            table.add_row(escape(row["policy"]), f"{row['load']:g}{beyond}", *cells)
        console.print(table)
    s = result["summary"]
    say = [
        f"{s['cases_within']} of {s['cases']} cases are within 80 % of their policy's own goodput; the others (*) "
        "are not part of the errors below."
    ]
    for name, e in s["errors"].items():
        unit = "points" if name == "attainment" else "%"
        say.append(
            f"{name}: off by {100 * e['mean_abs_error']:.1f} {unit} on average (mean {100 * e['mean_error']:+.1f}, "
            f"worst {100 * e['max_abs_error']:.1f}); engine against itself {100 * e['noise']:.1f}"
        )
    for name, found in s["ranking"].items():
        tau, itself = found["tau"], found["engine_against_itself"]
        say.append(
            f"ranking by {name}: Kendall tau {'undefined (ties)' if tau is None else f'{tau:.2f}'}; engine against "
            f"itself {'undefined' if itself is None else f'{itself:.2f}'}"
        )
    src = s["sources"]
    late = f"client late by {src['client_lag_ms']:.2f} ms (p99 {src['client_lag_p99_ms']:.2f})"
    if src["steps"]:  # engines of others do not tell theirs
        say.append(
            f"where it comes from, in % of step time: profile {100 * src['profile']:+.1f}, host "
            f"{100 * src['host']:+.1f}; lanes waited for a core {100 * src['waited_for_core']:.1f} %"
        )
    say.append(late)
    for sentence in say:
        console.print(f"• {escape(sentence)}", highlight=False)

"""The scoreboard as Markdown: who holds what, by how much more, and who fares worst at that rate."""

from __future__ import annotations

import math
from typing import Any

TARGETS = ("0.9", "0.95", "0.99")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: goodput against the best opponent with geometric means, then waits, classes and throughput."""
    lines = [
        "| scenario | learned, req/s | best opponent | its req/s | ratio | 95 % interval | ratio at 95 % | at 99 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        at = found["0.9"]
        others = " | ".join(_ratio_text(found.get(target)) for target in TARGETS[1:])
        lines.append(
            f"| {found['scenario']} | {at['learned']:.2f} | {at['opponent']} | {at['rate']:.2f} "
            f"| {_ratio_text(at)} | {_figure(at['low'])} to {_figure(at['high'])} | {others} |"
        )
    lines.append("")
    lines += [line for target in TARGETS if (line := _mean(rows, target))]
    if any(entry["at"] for found in rows for entry in found.get("held", ())):
        lines += ["", "What each sustains, and who fares worst at its rate:", "", *_sustained(rows)]
    for key, title in (
        ("at_rate", "Where the better of the two holds 90 %:"),
        ("second_rate", "Where the other does:"),
    ):
        standings = [found for found in rows if found.get(key)]
        if standings:
            lines += ["", title, "", *_waits_and_classes(standings, key)]
    return "\n".join(lines)


def _ratio_text(at: dict[str, Any] | None) -> str:
    """A ratio, or who alone holds the target."""
    if at is None:
        return ""
    if at["ratio"] is None:
        return "only learned" if at["learned"] > 0.0 else "nobody"
    return _figure(at["ratio"])


def _mean(rows: list[dict[str, Any]], target: str) -> str:
    """Geometric mean and smallest ratio; scenarios whose ratio has no value are counted, not averaged."""
    known = [found[target]["ratio"] for found in rows if target in found and found[target]["ratio"] is not None]
    if not known:
        return ""
    mean = 0.0 if min(known) <= 0.0 else math.exp(sum(math.log(r) for r in known) / len(known))
    without = len(rows) - len(known)
    left_out = f"; {without} without a ratio left out" if without else ""
    return f"At {100 * float(target):g} %: geometric mean {mean:.3f}, smallest {min(known):.3f}{left_out}."


def _sustained(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| scenario | policy | 90 % | 95 % | 99 % | classic at 90 % | stability limit | P99, longest TTFT s "
        "| refused, unserved | worst class | worst fifth by length | ends by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        for entry in found["held"]:
            rates = " | ".join(f"{entry[key]:.2f}" for key in (*TARGETS, "classic", "limit"))
            lines.append(
                f"| {found['scenario']} | {entry['label']} | {rates} | {_at(entry['at'])} | {entry['ends_by']} |"
            )
    return lines


def _at(at: dict[str, Any] | None) -> str:
    if at is None:
        return "- | - | - | -"
    worst = " | ".join(f"{at[key][1]:.3f} {at[key][0].split(' ', 1)[1]}" for key in ("worst_class", "worst_length"))
    return f"{at['p99_ttft_s']:.2f}, {at['longest_wait_s']:.2f} | {at['refused']}, {at['unserved']} | {worst}"


def _waits_and_classes(rows: list[dict[str, Any]], key: str) -> list[str]:
    """What goodput does not show, at one common rate of each scenario: learned against the best opponent, longest
    waits also against the best rule. Throughput is that of ``vllm bench serve``: finished requests until the last of
    them is, so a few that wait long count against it."""
    lines = [
        "| scenario | at req/s | worst class: learned | opponent | longest wait s: learned | opponent | best rule "
        "| finished/s: learned | opponent | given up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        mine, rival, rule = (found[key][who] for who in ("learned", "opponent", "rule"))
        lost = rival["finished_per_s"] - mine["finished_per_s"]
        given_up = f"{lost:.2f} ({100 * lost / rival['finished_per_s']:.1f} %)" if lost > 0.0 else "nothing"
        longest = [None if p is None else p["worst_wait_s"] for p in (mine, rival, rule)]
        waits = " | ".join("-" if wait is None else f"{wait:.1f}" for wait in longest)
        lines.append(
            f"| {found['scenario']} | {found[key]['rate']:.2f} | {_class(mine)} | {_class(rival)} | {waits} "
            f"| {mine['finished_per_s']:.2f} | {rival['finished_per_s']:.2f} | {given_up} |"
        )
    return lines


def _class(standing: dict[str, Any]) -> str:
    name = f" {standing['worst_class']}" if len(standing["by_class"]) > 1 else ""
    return f"{standing['worst_class_attainment']:.3f}{name}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def told(rows: list[dict[str, Any]]) -> str:
    """What the comparison was, in one line."""
    first = rows[0]
    shares = sorted({found["share"] for found in rows})
    share = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
    scale = "" if first["slo_scale"] == 1.0 else f", targets × {first['slo_scale']:g}"
    return f"Windows: {first['split']}; opponents' budget ÷ the checkpoint's: {share}{scale}."

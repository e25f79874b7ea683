"""A comparison in plain sentences: who wins, by how much, how sure; losses as plainly as gains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "LOST",
    "is_learned",
    "is_sustained",
    "lost_share",
    "meeting_point",
    "percent",
    "ranking",
    "reasons",
    "verdict",
]

LOST = ("shed", "failed", "unfinished")


def is_sustained(result: Mapping[str, Any]) -> bool:
    """Whether the goodput of a result is the sustained one; else it is the classic one."""
    return result.get("goodput_kind") == "sustained"


def reasons(result: Mapping[str, Any]) -> list[str]:
    """Per policy what ends its sustained goodput at the first target, and what its runs lack for the definition."""
    if not is_sustained(result):
        return []
    said = []
    for policy in ranking(result):
        found = policy["goodput"][f"{result['targets'][0]:g}"]
        above = found["above"]
        held = f"sustains {found['rate']:.4g} requests/s" if found["rate"] else "sustains no rate"
        why = f": {above['rate']:.4g} fails by {above['failed']}" if above else ""
        said.append(f"{policy['label']} {held}{why}.")
        said += [f"{policy['label']}: {text}." for text in policy["sustained"]["missing"]]
    return said


def is_learned(policy: Mapping[str, Any]) -> bool:
    """Whether a policy of a result is a checkpoint folder rather than a published rule."""
    return os.path.isdir(policy["policy_id"]) or "/" in policy["policy_id"]


def ranking(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Policies of a result, best first: by goodput at the first target, or by attainment over the rates."""
    if result["mode"] == "goodput":
        key = f"{result['targets'][0]:g}"
        return sorted(result["policies"], key=lambda p: -p["goodput"][key]["rate"])
    return sorted(result["policies"], key=lambda p: -p["iqm_attainment"]["value"])


def verdict(result: Mapping[str, Any]) -> list[str]:
    """One sentence for the winner, then one per pair that matters.

    Each learned policy is held against every rule; without one, the best policy against all others.
    """
    order = ranking(result)
    goodput = result["mode"] == "goodput"
    best = order[0]
    poor = result["settings"].get("poor_fits", [])
    sentences = [*poor, *_empty(result), _opening(result, best), *_price(result, best), *reasons(result)]
    line = _goodput_line if goodput else _attainment_line
    learned = [p for p in order if is_learned(p)]
    for place, subject in enumerate(learned or [best]):
        better_learned = learned[:place]  # that pair was told from the better one's side
        for rival in order:
            if rival is subject or rival in better_learned:
                continue
            pair, flipped = _find(result["pairs"], subject["label"], rival["label"])
            sentences.append(line(result, subject, rival, pair, flipped))
    if len(result["settings"]["seeds"]) == 1:
        sentences.append("One seed only: the intervals cover noise within that run, not between runs.")
    return sentences


def _empty(result: Mapping[str, Any]) -> list[str]:
    """A word where there is nothing to compare: no request finished in any run, so no latency is known."""
    points = [point for policy in result["policies"] for point in policy["points"]]
    if any(lost_share(point) < 1.0 for point in points):
        return []
    ends = ", ".join(f"{sum(p[name] for p in points)} {name}" for name in LOST if any(p[name] for p in points))
    return [
        f"No request finished under any policy ({ends}): look whether prompt and answer fit the KV capacity of an "
        "instance, and at the rates asked."
    ]


def _opening(result: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    share = f"{100 * result['targets'][0]:g} %"
    if result["mode"] == "rates":
        found = best["iqm_attainment"]
        return (
            f"Over the rates asked, {best['label']} meets both targets for {100 * found['value']:.1f} % "
            f"of requests sent "
            f"(interquartile mean, 95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f})."
        )
    found = best["goodput"][f"{result['targets'][0]:g}"]
    if found["rate"] == 0.0:
        if is_sustained(result):
            return f"No policy sustains {share} at any rate."
        return f"No policy holds {share} at any rate: the targets are out of reach on this cluster."
    verb = "sustains" if is_sustained(result) else "holds"
    return (
        f"{best['label']} {verb} {share} of requests sent up to {found['rate']:.4g} requests/s "
        f"(95 % interval {found['low']:.4g} to {found['high']:.4g}; {found['per_gpu']:.4g} per GPU)."
    )


def _price(result: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
    """What the winner's figure costs: requests it gave up, and how long someone waited in vain or not.

    A share of good requests can be bought by giving up the others; the reader must see that.
    """
    point = meeting_point(result, best)
    lost = {name: point[name] for name in LOST if point[name]}
    told = ", ".join(f"{percent(n / _sent(point))} {name}" for name, n in lost.items()) or "none lost"
    longest = point["worst_wait_s"]
    wait = "nobody was served" if longest is None else f"the longest wait for a first token was {longest:.3g} s"
    return [f"At {point['rate']:.4g} requests/s under {best['label']}: {told} of the requests sent; {wait}."]


def meeting_point(result: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any]:
    """Where policies are put side by side: at the best one's goodput, or at the highest rate asked."""
    rate = result["at_rate"] or policy["points"][-1]["rate"]
    return next(p for p in policy["points"] if p["rate"] == rate)


def percent(share: float) -> str:
    """A small share to two digits, all of them as 100 %."""
    return f"{100 * share:.0f} %" if share >= 0.995 else f"{100 * share:.2g} %"


def lost_share(point: Mapping[str, Any]) -> float:
    """Share of requests sent that were never served: shed, failed or unfinished."""
    return sum(point[name] for name in LOST) / _sent(point)


def _sent(point: Mapping[str, Any]) -> int:
    return max(sum(run["num_prompts"] for run in point["runs"]), 1)


def _find(pairs: Sequence[Mapping[str, Any]], a: str, b: str) -> tuple[Mapping[str, Any], bool]:
    for pair in pairs:
        if (pair["a"], pair["b"]) == (a, b):
            return pair, False
        if (pair["a"], pair["b"]) == (b, a):
            return pair, True
    raise KeyError((a, b))


def _goodput_line(
    result: Mapping[str, Any],
    subject: Mapping[str, Any],
    rival: Mapping[str, Any],
    pair: Mapping[str, Any],
    flipped: bool,
) -> str:
    key = f"{result['targets'][0]:g}"
    ours, theirs = subject["goodput"][key]["rate"], rival["goodput"][key]["rate"]
    gap = pair["goodput"][key]["difference"]
    low, high = (-gap["high"], -gap["low"]) if flipped else (gap["low"], gap["high"])
    if theirs == 0.0:
        return f"{_verb(subject, rival, low, high)}: {rival['label']} reaches the target at no rate."
    ratio = pair["goodput"][key]["ratio"]
    bounds = (_inverse(ratio["high"]), _inverse(ratio["low"])) if flipped else (ratio["low"], ratio["high"])
    span = " to ".join("unbounded" if b is None else f"{b:.3f}" for b in bounds)
    verb = _verb(subject, rival, low, high)
    kind = "sustained goodput" if is_sustained(result) else "goodput"
    return f"{verb}: {kind} {ours / theirs:.3f} times as high (95 % interval {span})."


def _attainment_line(
    result: Mapping[str, Any],
    subject: Mapping[str, Any],
    rival: Mapping[str, Any],
    pair: Mapping[str, Any],
    flipped: bool,
) -> str:
    gap = pair["mean_attainment"]
    sign = -1.0 if flipped else 1.0
    low, high = sorted((sign * gap["low"], sign * gap["high"]))
    return (
        f"{_verb(subject, rival, low, high)}: {100 * sign * gap['value']:+.2f} points of attainment "
        f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f})."
    )


def _verb(subject: Mapping[str, Any], rival: Mapping[str, Any], low: float, high: float) -> str:
    if low > 0:
        return f"{subject['label']} beats {rival['label']}"
    if high < 0:
        return f"{subject['label']} loses to {rival['label']}"
    return f"No difference shown between {subject['label']} and {rival['label']}"


def _inverse(value: float | None) -> float | None:
    if value is None:
        return 0.0
    return 1.0 / value if value > 0 else None

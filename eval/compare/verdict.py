"""A comparison in plain sentences: who wins, by how much, how sure; losses as plainly as gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.compare.result import Comparison, Side

LOST = ("shed", "failed", "unfinished")


def reasons(result: Comparison) -> list[str]:
    """Per policy what ends its sustained goodput at the first target, and what its runs lack for the definition."""
    if not result.is_sustained:
        return []
    said = _of_sessions(result.policies[0].sustained)
    for side in result.ranking():
        found = side.at(result.lead)
        above = found.above
        held = f"sustains {found.rate:.4g} {result.rate_unit}" if found.rate else "sustains no rate"
        why = f": {above['rate']:.4g} fails by {above['failed']}" if above else ""
        said.append(f"{side.label} {held}{why}.")
        said += [f"{side.label}: {text}." for text in side.sustained["missing"]]
    return said


def _of_sessions(about: Mapping[str, Any]) -> list[str]:
    """What a rate counts and from when on it was measured, where the workload has sessions."""
    if not about.get("settle_s"):
        return []
    return [
        f"Rates count sessions, of {about['turns']:.3g} requests each; their load settles in "
        f"{about['settle_s'] / 60:.3g} minutes, which are left out."
    ]


def verdict(result: Comparison) -> list[str]:
    """One sentence for the winner, then one per pair that matters.

    Each learned policy is held against every rule; without one, the best policy against all others.
    """
    order = result.ranking()
    best = order[0]
    poor = result.settings.get("poor_fits", [])
    sentences = [*poor, *_empty(result), _opening(result, best), *_price(result, best), *reasons(result)]
    line = _goodput_line if result.searched else _attainment_line
    learned = [side for side in order if side.is_learned]
    for place, subject in enumerate(learned or [best]):
        better_learned = learned[:place]  # that pair was told from the better one's side
        for rival in order:
            if rival is not subject and rival not in better_learned:
                sentences.append(line(result, subject, rival))
    if len(result.settings["seeds"]) == 1:
        sentences.append("One seed only: the intervals cover noise within that run, not between runs.")
    return sentences


def _empty(result: Comparison) -> list[str]:
    """A word where there is nothing to compare: no request finished in any run, so no latency is known."""
    points = [point for side in result.policies for point in side.points]
    if any(lost_share(point) < 1.0 for point in points):
        return []
    ends = ", ".join(f"{sum(p[name] for p in points)} {name}" for name in LOST if any(p[name] for p in points))
    return [
        f"No request finished under any policy ({ends}): look whether prompt and answer fit the KV capacity of an "
        "instance, and at the rates asked."
    ]


def _opening(result: Comparison, best: Side) -> str:
    share = f"{100 * result.lead:g} %"
    if over := best.iqm_attainment:
        return (
            f"Over the rates asked, {best.label} meets both targets for {100 * over.value:.1f} % of requests sent "
            f"(interquartile mean, 95 % interval {100 * over.low:.1f} to {100 * over.high:.1f})."
        )
    found = best.at(result.lead)
    if found.rate == 0.0:
        if result.is_sustained:
            return f"No policy sustains {share} at any rate."
        return f"No policy holds {share} at any rate: the targets are out of reach on this cluster."
    verb = "sustains" if result.is_sustained else "holds"
    return (
        f"{best.label} {verb} {share} of requests sent up to {found.rate:.4g} {result.rate_unit} "
        f"(95 % interval {found.interval[0]:.4g} to {found.interval[1]:.4g}; {found.per_gpu:.4g} per GPU)."
    )


def _price(result: Comparison, best: Side) -> list[str]:
    """What the winner's figure costs: requests it gave up, and how long someone waited in vain or not.

    A share of good requests can be bought by giving up the others; the reader must see that.
    """
    point = result.meeting_point(best)
    lost = {name: point[name] for name in LOST if point[name]}
    told = ", ".join(f"{percent(n / _sent(point))} {name}" for name, n in lost.items()) or "none lost"
    longest = point["worst_wait_s"]
    wait = "nobody was served" if longest is None else f"the longest wait for a first token was {longest:.3g} s"
    return [f"At {point['rate']:.4g} {result.rate_unit} under {best.label}: {told} of the requests sent; {wait}."]


def percent(share: float) -> str:
    """A small share to two digits, all of them as 100 %."""
    return f"{100 * share:.0f} %" if share >= 0.995 else f"{100 * share:.2g} %"


def lost_share(point: Mapping[str, Any]) -> float:
    """Share of requests sent that were never served: shed, failed or unfinished."""
    return sum(point[name] for name in LOST) / _sent(point)


def _sent(point: Mapping[str, Any]) -> int:
    return max(sum(run["num_prompts"] for run in point["runs"]), 1)


def _goodput_line(result: Comparison, subject: Side, rival: Side) -> str:
    ours, theirs = subject.at(result.lead).rate, rival.at(result.lead).rate
    verb = _verb(result, subject, rival)
    if theirs == 0.0:
        return f"{verb}: {rival.label} reaches the target at no rate."
    ratio = result.ratio(subject, rival)
    span = " to ".join("unbounded" if b is None else f"{b:.3f}" for b in (ratio.low, ratio.high))
    kind = "sustained goodput" if result.is_sustained else "goodput"
    return f"{verb}: {kind} {ours / theirs:.3f} times as high (95 % interval {span})."


def _attainment_line(result: Comparison, subject: Side, rival: Side) -> str:
    low, high = result.difference(subject, rival)
    return (
        f"{_verb(result, subject, rival)}: {100 * result.mean_difference(subject, rival):+.2f} points of attainment "
        f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f})."
    )


def _verb(result: Comparison, subject: Side, rival: Side) -> str:
    low, high = result.difference(subject, rival)
    if low > 0:
        return f"{subject.label} beats {rival.label}"
    if high < 0:
        return f"{subject.label} loses to {rival.label}"
    return f"No difference shown between {subject.label} and {rival.label}"

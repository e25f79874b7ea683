"""What the report says beside its pictures: headline figures, starvation, decisions that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.compare.result import Comparison, Side
from eval.compare.verdict import lost_share, percent

Row = Mapping[str, Any]


def cards(result: Comparison) -> Iterator[tuple[str, str, str]]:
    """(figure, what it is, ``win``, ``loss`` or nothing), the most asked for first."""
    subject, rival = result.duel()
    point = result.meeting_point(subject)
    if over := subject.iqm_attainment:
        yield f"{100 * over.value:.1f} %", f"of requests met by {subject.label}", ""
    else:
        found = subject.at(result.lead)
        share = f"{100 * result.lead:g} %"
        kind = "sustained goodput" if result.is_sustained else "goodput"
        yield f"{found.rate:.4g}/s", f"{kind} of {subject.label} at {share} ({found.per_gpu:.3g} per GPU)", ""
        if rival is not None and rival.at(result.lead).rate > 0:
            yield _against(result, subject, rival)
    worst = _worst_class(point)
    if worst is not None:
        yield f"{100 * worst[1]:.1f} %", f"worst class, {worst[0]}, at {point['rate']:.4g} {result.rate_unit}", ""
    yield longest_wait(point), f"longest wait for a first token at {point['rate']:.4g} {result.rate_unit}", ""
    yield percent(lost_share(point)), "of requests shed, failed or unfinished there", ""


def _against(result: Comparison, subject: Side, rival: Side) -> tuple[str, str, str]:
    ratio = subject.at(result.lead).rate / rival.at(result.lead).rate
    low, high = result.difference(subject, rival)
    kind = "win" if low > 0 else "loss" if high < 0 else ""
    shown = f"{100 * (ratio - 1):+.1f} %"
    return shown, f"against the best rule here, {rival.label}{'' if kind else ' (not certain)'}", kind


def longest_wait(point: Row) -> str:
    """``1.23 s``; in words where nobody is waiting any more and nobody was served."""
    seconds = point["worst_wait_s"]
    return "not known: nobody was served" if seconds is None else f"{seconds:.3g} s"


def _worst_class(point: Row) -> tuple[str, float] | None:
    shares = {
        name: share["slo_attainment"]
        for name, share in point["slo_attainment_by_class"].items()
        if share.get("slo_attainment") is not None
    }
    return min(shares.items(), key=lambda entry: entry[1]) if len(shares) > 1 else None


def starved(result: Comparison) -> list[str]:
    """One sentence per policy: its worst class and its longest wait where all policies meet."""
    sentences = []
    for side in result.ranking():
        point = result.meeting_point(side)
        worst = _worst_class(point)
        told = f"at {point['rate']:.4g} {result.rate_unit} "
        if worst is not None:
            gap = 100 * (point["slo_attainment"] - worst[1])
            told += f"its worst class, {worst[0]}, meets its targets for {100 * worst[1]:.1f} % "
            told += f"({gap:.1f} points below all requests together), and "
        sentences.append(f"{side.label}: {told}the longest wait for a first token is {longest_wait(point)}.")
    return sentences


def watched_sentences(watched: Row) -> list[str]:
    """How often the two differ, per kind, and what came of it."""
    sentences = []
    for kind, count in watched["kinds"].items():
        share = 100 * count["differing"] / max(count["decisions"], 1)
        name = kind.lower().replace("_", " ")
        sentences.append(f"{name}: {count['differing']:,} of {count['decisions']:,} decisions differ ({share:.1f} %).")
    group = watched["differing"]["groups"]["placed differently"]
    if group["requests"]:
        sentences.append(
            f"Of the {group['requests']:,} requests placed differently, {group['good']:,} met their targets under "
            f"{watched['subject']} and {group['good_under_rival']:,} under {watched['rival']}: "
            f"{group['gained']:,} gained, {group['lost']:,} lost."
        )
    sentences.append(
        f"{watched['rival']} was asked at every decision of this run and not obeyed; what became of a request under it "
        "comes from its own run on the same arrivals. A request also gains or loses by what is decided about others."
    )
    return sentences


def way_rows(watched: Row) -> list[Sequence[str]]:
    """Rows of the table: both groups, then each way in which a request was placed differently."""
    groups = watched["differing"]["groups"] | watched["differing"]["ways"]
    keys = ("requests", "good", "good_under_rival", "gained", "lost")
    return [[name, *(f"{entry[key]:,}" for key in keys)] for name, entry in groups.items()]

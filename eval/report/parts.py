"""What the report says beside its pictures: headline figures, starvation, decisions that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.compare.verdict import is_learned, is_sustained, lost_share, meeting_point, percent, ranking

__all__ = ["cards", "starved", "watched_sentences", "way_rows"]

Result = Mapping[str, Any]


def _subject_and_rival(result: Result) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The best learned policy (without one, the best of all) and the best rule beside it."""
    order = ranking(result)
    subject = next((p for p in order if is_learned(p)), order[0])
    return subject, next((p for p in order if p is not subject and not is_learned(p)), None)


def cards(result: Result) -> Iterator[tuple[str, str, str]]:
    """(figure, what it is, ``win``, ``loss`` or nothing), the most asked for first."""
    subject, rival = _subject_and_rival(result)
    point = meeting_point(result, subject)
    if result["mode"] == "goodput":
        key = f"{result['targets'][0]:g}"
        found = subject["goodput"][key]
        share = f"{100 * result['targets'][0]:g} %"
        kind = "sustained goodput" if is_sustained(result) else "goodput"
        yield f"{found['rate']:.4g}/s", f"{kind} of {subject['label']} at {share} ({found['per_gpu']:.3g} per GPU)", ""
        if rival is not None and rival["goodput"][key]["rate"] > 0:
            yield _against(result, subject, rival, key)
    else:
        yield f"{100 * subject['iqm_attainment']['value']:.1f} %", f"of requests met by {subject['label']}", ""
    worst = _worst_class(point)
    if worst is not None:
        yield f"{100 * worst[1]:.1f} %", f"worst class, {worst[0]}, at {point['rate']:.4g} requests/s", ""
    yield longest_wait(point), f"longest wait for a first token at {point['rate']:.4g} requests/s", ""
    yield percent(lost_share(point)), "of requests shed, failed or unfinished there", ""


def _against(result: Result, subject: Result, rival: Result, key: str) -> tuple[str, str, str]:
    ratio = subject["goodput"][key]["rate"] / rival["goodput"][key]["rate"]
    for pair in result["pairs"]:
        if {pair["a"], pair["b"]} == {subject["label"], rival["label"]}:
            gap = pair["goodput"][key]["difference"]
            sign = 1.0 if pair["a"] == subject["label"] else -1.0
            low, high = sorted((sign * gap["low"], sign * gap["high"]))
            kind = "win" if low > 0 else "loss" if high < 0 else ""
            shown = f"{100 * (ratio - 1):+.1f} %"
            return shown, f"against the best rule here, {rival['label']}{'' if kind else ' (not certain)'}", kind
    raise KeyError((subject["label"], rival["label"]))


def longest_wait(point: Result) -> str:
    """``1.23 s``; in words where nobody is waiting any more and nobody was served."""
    seconds = point["worst_wait_s"]
    return "not known: nobody was served" if seconds is None else f"{seconds:.3g} s"


def _worst_class(point: Result) -> tuple[str, float] | None:
    shares = {
        name: share["slo_attainment"]
        for name, share in point["slo_attainment_by_class"].items()
        if share.get("slo_attainment") is not None
    }
    return min(shares.items(), key=lambda entry: entry[1]) if len(shares) > 1 else None


def starved(result: Result) -> list[str]:
    """One sentence per policy: its worst class and its longest wait where all policies meet."""
    sentences = []
    for policy in ranking(result):
        point = meeting_point(result, policy)
        worst = _worst_class(point)
        told = f"at {point['rate']:.4g} requests/s "
        if worst is not None:
            gap = 100 * (point["slo_attainment"] - worst[1])
            told += f"its worst class, {worst[0]}, meets its targets for {100 * worst[1]:.1f} % "
            told += f"({gap:.1f} points below all requests together), and "
        sentences.append(f"{policy['label']}: {told}the longest wait for a first token is {longest_wait(point)}.")
    return sentences


def watched_sentences(watched: Result) -> list[str]:
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


def way_rows(watched: Result) -> list[Sequence[str]]:
    """Rows of the table: both groups, then each way in which a request was placed differently."""
    groups = watched["differing"]["groups"] | watched["differing"]["ways"]
    keys = ("requests", "good", "good_under_rival", "gained", "lost")
    return [[name, *(f"{entry[key]:,}" for key in keys)] for name, entry in groups.items()]

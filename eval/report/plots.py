"""Pictures of a comparison, drawn with matplotlib: attainment, latency over rate, goodput bars, break-downs.

Colours are Okabe and Ito's (told apart with any colour vision) and repeat with other line styles and
markers, so no curve is named by colour alone. Every function returns a figure; nothing touches pyplot's
global state, so drawing works without a display and in threads.
"""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from eval.compare.result import Comparison, Side
from eval.report.plots_shadow import decisions, timeline

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_STRICTER = ("D", "v", "s")  # goodput at the second, third, ... target
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def figures(result: Comparison) -> dict[str, tuple[Figure, str]]:
    """All pictures of a result: file stem -> (figure, what it shows, for readers who cannot see it)."""
    drawn = {
        "attainment": (_attainment(result), "SLO attainment over request rate, one line per policy"),
        "latency": (_latency(result), "P90 TTFT and P90 TPOT over request rate, one line per policy"),
        "breakdown": (_breakdown(result), "Attainment per target and per SLO class, one bar per policy"),
    }
    if result.searched:
        kind = "Sustained goodput" if result.is_sustained else "Goodput"
        caption = f"{kind} of every policy with 95 % intervals, best on top; marks: at stricter shares"
        drawn["goodput"] = (_goodput(result), caption)
    if watched := result.shadow:
        where = f"seed {watched['seed']} at {watched['rate']:.4g} {result.rate_unit}"
        caption = f"One run over time ({where}): attainment by time of arrival, load, roles of {watched['subject']}"
        drawn["timeline"] = (timeline(watched), caption)
        if watched["differing"]["ways"]:
            caption = f"Requests that {watched['subject']} placed otherwise than {watched['rival']} would have"
            drawn["decisions"] = (decisions(watched), caption)
    return drawn


def _style(index: int) -> dict[str, Any]:
    n = len(COLOURS)
    return {
        "color": COLOURS[index % n],
        "linestyle": _LINES[(index // n) % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def png_of(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def blank(width: float = 8.0, height: float = 4.8, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure [inches] with so many empty axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _range_of_interest(result: Comparison) -> tuple[float, float]:
    """Rates worth drawing: a search also visits far too low and far too high ones."""
    if not result.searched:
        rates = [point["rate"] for side in result.policies for point in side.points]
        return min(rates), max(rates)
    found = [goodput.rate for side in result.policies for goodput in side.goodput.values() if goodput.rate > 0]
    return (0.6 * min(found), 1.6 * max(found)) if found else (0.0, float("inf"))


def _drawn_points(result: Comparison, side: Side) -> list[dict[str, Any]]:
    low, high = _range_of_interest(result)
    return [point for point in side.points if low <= point["rate"] <= high]


def _legend(figure: Figure, axis: Axes, entries: int) -> None:
    if entries > 1:
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)


def _attainment(result: Comparison) -> Figure:
    figure, (axis,) = blank()
    for index, side in enumerate(result.ranking()):
        points = _drawn_points(result, side)
        rates = [p["rate"] for p in points]
        style = _style(index)
        axis.plot(rates, [100 * p["slo_attainment"] for p in points], label=side.label, **style)
        low, high = [100 * p["low"] for p in points], [100 * p["high"] for p in points]
        axis.fill_between(rates, low, high, color=style["color"], alpha=0.15, linewidth=0)
    target = 100 * result.lead
    axis.axhline(target, color="#555555", linewidth=1)
    axis.annotate(f"{target:g} %", (0.005, target), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    axis.set(xlabel=f"rate [{result.rate_unit}]", ylabel="requests meeting both targets [% of sent]", ylim=(0, 102))
    _legend(figure, axis, len(result.policies))
    return figure


def _latency(result: Comparison) -> Figure:
    figure, axes = blank(width=10.0, columns=2)
    for axis, metric in zip(axes, ("ttft", "tpot"), strict=True):
        key, drawn = f"p90_{metric}_ms", 0
        for index, side in enumerate(result.ranking()):
            points = [p for p in _drawn_points(result, side) if p[key] is not None]
            style = _style(index)
            rates = [p["rate"] for p in points]
            drawn += len(points)
            axis.plot(rates, [p[key] for p in points], label=side.label, **style)
            low, high = [p[f"{key}_range"][0] for p in points], [p[f"{key}_range"][1] for p in points]
            axis.fill_between(rates, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel=f"rate [{result.rate_unit}]", ylabel=f"P90 {metric.upper()} [ms]")
        if not drawn:
            axis.text(0.5, 0.5, "no request finished", transform=axis.transAxes, ha="center")
            continue
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))
    _legend(figure, axes[0], len(result.policies))
    return figure


def _goodput(result: Comparison) -> Figure:
    order = result.ranking()[::-1]
    figure, (axis,) = blank(height=1.4 + 0.42 * len(order))
    for index, side in enumerate(order):
        found = side.at(result.lead)
        low, high = found.interval
        error = [[max(found.rate - low, 0.0)], [max(high - found.rate, 0.0)]]
        colour, hatch = ("#E69F00", "//") if side.tuned else ("#0072B2", "")
        axis.barh(index, found.rate, color=colour, hatch=hatch, edgecolor="white", height=0.7)
        axis.errorbar(found.rate, index, xerr=error, color="black", capsize=3, linewidth=1.2)
        end = max(found.rate, high)
        for mark, target in zip(_STRICTER, result.targets[1:], strict=False):
            rate = side.at(target).rate
            label = f"at {100 * target:g} %" if index == 0 else None
            axis.plot(rate, index, mark, color="white", markeredgecolor="black", markersize=6, label=label)
        if result.is_sustained:
            classic = side.classic_at(result.lead).rate
            label = f"classic at {100 * result.lead:g} %" if index == 0 else None
            axis.plot(classic, index, "|", color="black", markersize=14, markeredgewidth=2, label=label)
            end = max(end, classic)
        axis.annotate(f"{found.rate:.4g}", (end, index), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    if len(result.targets) > 1 or result.is_sustained:
        figure.legend(loc="outside upper right", fontsize=9, frameon=False, ncols=4)
    axis.set_yticks(range(len(order)), [side.label for side in order])
    kind = "sustained goodput" if result.is_sustained else "goodput"
    axis.set_xlabel(f"{kind} at {100 * result.lead:g} % [{result.rate_unit}]; hatched: tuned")
    return figure


def _breakdown(result: Comparison) -> Figure:
    """At the rate where the best policy just holds the target, or at the highest rate asked."""
    rows = [(side.label, result.meeting_point(side)) for side in result.ranking()]
    classes = list(dict.fromkeys(name for _, p in rows for name in p["slo_attainment_by_class"]))
    if len(classes) == 1:
        classes = []  # they are all the requests there are
    groups = ["both", "TTFT", "TPOT", *(f"class {name}" for name in classes)]
    figure, (axis,) = blank(width=max(8.0, 1.6 * len(groups) + 3.0))
    width = 0.8 / len(rows)
    for index, (label, point) in enumerate(rows):
        by_class = point["slo_attainment_by_class"]
        metric = point["slo_attainment_by_metric"]
        shares = [point["slo_attainment"], metric["ttft"], metric["tpot"]]
        shares += [by_class.get(name, {}).get("slo_attainment") or 0.0 for name in classes]
        places = [g + (index + 0.5) * width - 0.4 for g in range(len(groups))]
        n = len(COLOURS)
        axis.bar(
            places,
            [100 * s for s in shares],
            width,
            label=label,
            color=COLOURS[index % n],
            hatch=("", "//", "..", "xx")[(index // n) % 4],
            edgecolor="white",
        )
    axis.set_xticks(range(len(groups)), groups)
    axis.set(ylabel="attainment [% of sent]", ylim=(0, 102), title=f"at {rows[0][1]['rate']:.4g} {result.rate_unit}")
    _legend(figure, axis, len(rows))
    return figure


def claim_figure(claim: Any) -> Figure:
    """A reproduced result (``eval.claims.claim.Claim``): published points as markers, ours as lines over them."""
    figure, (axis,) = blank()
    systems = {label: place for place, label in enumerate(dict.fromkeys(_system(c.label) for c in claim.curves))}
    names = [x for curve in claim.curves for x in curve.x if isinstance(x, str)]
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    for curve in claim.curves:
        style = _style(systems[_system(curve.label)])
        style |= {"linestyle": "none", "markersize": 8, "markerfacecolor": "none"} if curve.published else {}
        known = [(order.get(x, x), y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        axis.plot([x for x, _ in known], [y for _, y in known], label=curve.label, **style)
    if order:
        axis.set_xticks(range(len(order)), list(order), rotation=20 if len(order) > 4 else 0)
    axis.set(xlabel=claim.axes[0], ylabel=claim.axes[1], title=f"{claim.name}: published (hollow) and ours")
    axis.set_ylim(bottom=0)
    _legend(figure, axis, len(claim.curves))
    return figure


def _system(label: str) -> str:
    """The system of a curve, so that published and ours share a colour."""
    return label.removesuffix(", published").removesuffix(", ours")

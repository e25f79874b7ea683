"""The table of :mod:`eval.compare.table` as Markdown (for BENCHMARKS.md), as HTML that opens offline, and for
terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.common.files import write_json, write_text
from eval.report.html import markdown_table, render

Row = list[str]


def _figures(cell: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(untuned or tuned, figures) of a cell, those there are."""
    return [(kind, cell[kind]) for kind in ("untuned", "tuned") if cell.get(kind)]


def _best(cell: Mapping[str, Any]) -> float:
    return max((f["goodput"]["rate"] for _, f in _figures(cell)), default=0.0)


def _cells(result: Mapping[str, Any], scenario: str) -> list[Mapping[str, Any]]:
    mine = [cell for cell in result["cells"] if cell["scenario"] == scenario]
    return sorted(mine, key=lambda cell: -_best(cell))


def _share_of_best(result: Mapping[str, Any]) -> dict[str, float]:
    """Mean over scenarios of a policy's goodput as a share of the best policy's; 0 where it does not fit."""
    shares: dict[str, list[float]] = {label: [] for label in result["policies"]}
    for about in result["scenarios"]:
        cells = _cells(result, about["name"])
        top = max(map(_best, cells), default=0.0) or 1.0
        for cell in cells:
            shares[cell["label"]].append(_best(cell) / top)
    return {label: sum(found) / max(len(found), 1) for label, found in shares.items()}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def summary(result: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Goodput at 90 % of every policy on every scenario, sustained/classic: ``tuned (untuned)``, best first."""
    shares = _share_of_best(result)
    head = ["policy", *(about["name"] for about in result["scenarios"]), "mean share of best"]
    by_place = {(cell["label"], cell["scenario"]): cell for cell in result["cells"]}
    rows = []
    for label in sorted(shares, key=lambda label: -shares[label]):
        row = [label]
        for about in result["scenarios"]:
            found = dict(_figures(by_place[label, about["name"]]))
            rates = [_both(found[k]) for k in ("tuned", "untuned") if k in found]
            row.append("–" if not rates else rates[0] if len(rates) == 1 else f"{rates[0]} ({rates[1]})")
        rows.append([*row, f"{100 * shares[label]:.0f} %"])
    return head, rows


def _both(figures: Mapping[str, Any]) -> str:
    return f"{_number(figures['goodput']['rate'])}/{_number(figures['classic'])}"


def units(result: Mapping[str, Any]) -> str:
    """What the rates of the table count."""
    return " or ".join(dict.fromkeys(about["rate_unit"] for about in result["scenarios"]))


_DETAIL = (
    "policy", "", "sustained at 90 % [{}]", "95 % interval", "classic", "stability", "attainment [%]", "lost [%]",
    "P90 TTFT [ms]", "P90 TPOT [ms]", "P99 ITL [ms]", "decisions/s",
)  # fmt: skip


def _detail(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for cell in cells:
        for kind, f in _figures(cell):
            goodput = f["goodput"]
            interval = f"{_number(goodput['low'])} to {_number(goodput['high'])}"
            rows.append([
                cell["label"], kind, _number(goodput["rate"]), interval, _number(f["classic"]),
                _number(f["stability_limit"]),
                f"{100 * f['attainment']:.1f}", f"{100 * f['lost']:.1f}", _number(f["p90_ttft_ms"]),
                _number(f["p90_tpot_ms"]), _number(f["p99_itl_ms"]), _number(f["decisions_per_second"]),
            ])  # fmt: skip
    return rows


def _sections(result: Mapping[str, Any]) -> list[tuple[str, list[str], Row, list[Row]]]:
    """(title, sentences, head, rows) of the overview and of each scenario."""
    asked = result["settings"]
    effort = f"{asked['tune']} trials per policy and scenario" if asked["tune"] else "nothing tuned but static_plan"
    first = (
        f"Sustained/classic goodput at 90 % [{units(result)}], tuned (untuned), {effort}, {asked['seeds']} seeds of "
        "the test split, the same arrivals for all. Sustained: the largest rate that is held for good (90 % of those "
        "sent in time, nobody waits too long or stays unserved, no backlog grows, every class and length served). "
        "Classic: the first of these clauses alone, over runs as long. 0: held at no rate. "
        "–: does not fit the scenario's levers. static_plan: the best fixed arrangement found with the same trials, "
        "free in all roles, without any lever at run time."
    )
    head, rows = summary(result)
    parts = [("Goodput of every policy on every scenario", [first], head, rows)]
    for about in result["scenarios"]:
        cells = _cells(result, about["name"])
        said = [
            f"{about['description']} Latencies, attainment and decisions per second (event loop included) at "
            f"{about['reference_rate']:g} {about['rate_unit']}, {about['requests']:,} requests per run; goodput in "
            "longer ones."
        ]
        for cell in cells:
            if cell.get("tuned") and "arrangement" in cell["tuned"]:
                said.append(f"static_plan: {cell['tuned']['arrangement']}, dispatch {cell['tuned']['policy']}.")
            said += _whys(cell)
            if cell.get("refused"):
                said.append(f"Left out: {cell['refused']}.")
        parts.append(
            (
                f"{about['name']} ({about['regime']})",
                said,
                [head.format(about["rate_unit"]) for head in _DETAIL],
                _detail(cells),
            )
        )
    return parts


def _whys(cell: Mapping[str, Any]) -> list[str]:
    """What ends the goodput of a cell's better figures, and what their runs lack for the definition."""
    if not (known := [f for _, f in _figures(cell)]):
        return []
    best = max(known, key=lambda f: float(f["goodput"]["rate"]))
    above = best["goodput"]["above"]
    why = [f"{cell['label']}: {_number(above['rate'])} fails by {above['failed']}."] if above else []
    return why + [f"{cell['label']}: {text}." for text in best["missing"]]


def markdown(result: Mapping[str, Any]) -> str:
    """Sections for BENCHMARKS.md: the overview, then one per scenario."""
    lines = [f"Commit `{str(result['settings']['commit'])[:12]}`, {result['settings']['date'][:10]}.", ""]
    for title, said, head, rows in _sections(result):
        lines += [f"## {title}", "", *(f"{sentence}\n" for sentence in said)]
        lines += [*markdown_table(head, rows), ""]
    return "\n".join(lines)


_BODY = """
{% for title, said, head, rows in sections %}
<h2>{{ title }}</h2>
{% for sentence in said %}<p>{{ sentence }}</p>{% endfor %}
{{ table(head, rows) }}
{% endfor %}
<p>Commit {{ settings.commit }}, {{ settings.date }}.</p>
"""


def page(result: Mapping[str, Any]) -> str:
    """The same as one HTML file without scripts."""
    title = "Every policy on every scenario"
    return render(_BODY, title=title, sections=_sections(result), settings=result["settings"])


def write_table(result: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """``table.json``, ``table.md`` and ``table.html`` in ``folder``.

    :raises SlalomError: the folder cannot be written
    """
    written = {kind: folder / f"table.{kind}" for kind in ("json", "md", "html")}
    write_json(written["json"], result)
    write_text(written["md"], markdown(result))
    write_text(written["html"], page(result))
    return written

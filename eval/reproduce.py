"""``python -m eval.reproduce NAME|all``: published results beside ours, with what holds and what does not.

``all`` prints a table and writes one page, Markdown or HTML by the ending of ``--out``. The experiments are in
``eval/claims.py``. Exit codes: 0 done (whether or not a claim holds), 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine.errors import SlalomError
from eval.claims import CLAIMS, Claim
from eval.provenance import commit, machine
from eval.store import write_text

__all__ = ["as_dict", "main", "page_html", "page_markdown", "reproduce"]

_HEAD = ("", "claim", "published", "ours", "pass band", "within")


def reproduce(name: str) -> Claim:
    """Run one experiment.

    :raises SlalomError: unknown name
    """
    if name not in CLAIMS:
        raise SlalomError("claim", name, f"choose one of {', '.join(CLAIMS)} or all")
    return CLAIMS[name]()


def _number(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.3g}"


def _cells(claim: Claim) -> tuple[str, ...]:
    band = f"{claim.band[0]:g} to {claim.band[1]:g}"
    ours = f"{_number(claim.value)} {claim.unit}"
    return (claim.name, claim.title, claim.published, ours, band, "yes" if claim.holds else "no")


def as_dict(claim: Claim) -> dict[str, Any]:
    """JSON-ready; None for a figure without bound."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "name": claim.name,
        "title": claim.title,
        "source": claim.source,
        "published": claim.published,
        "ours": finite(claim.value),
        "unit": claim.unit,
        "band": list(claim.band),
        "holds": claim.holds,
        "note": claim.note,
        "rows": [{"label": label, "figure": finite(figure), "unit": unit} for label, figure, unit in claim.rows],
        "commit": commit(),
        "machine": machine(),
    }


def page_markdown(claims: Sequence[Claim]) -> str:
    """One page: the table, then a section per claim with its note and everything measured."""
    lines = ["# Published results, reproduced", "", f"Commit {commit()}, `python -m eval.reproduce all`.", ""]
    lines += [_row(_HEAD), _row(["---"] * len(_HEAD)), *(_row(_cells(claim)) for claim in claims)]
    for claim in claims:
        lines += ["", f"## {claim.name}: {claim.title}", "", f"Source: {claim.source}.", "", claim.note, ""]
        lines += [_row(("measured", "figure", "unit")), _row(["---"] * 3)]
        lines += [_row((label, _number(figure), unit)) for label, figure, unit in claim.rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page_html(claims: Sequence[Claim]) -> str:
    """The same page as HTML that opens offline."""

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    parts = ["<h1>Published results, reproduced</h1>", f"<p>Commit {escape(str(commit()))}.</p>"]
    parts.append(table(_HEAD, [_cells(claim) for claim in claims]))
    for claim in claims:
        rows = [(label, _number(figure), unit) for label, figure, unit in claim.rows]
        parts += [f"<h2>{escape(claim.name)}: {escape(claim.title)}</h2>", f"<p>Source: {escape(claim.source)}.</p>"]
        parts += [f"<p>{escape(claim.note)}</p>", table(("measured", "figure", "unit"), rows)]
    style = "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    style += "td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Published results, reproduced</title>'
        f"<style>{style}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _print(claim: Claim) -> None:
    _, title, published, ours, band, within = _cells(claim)
    print(f"{claim.name}  {title}\n    published {published}\n    ours {ours}; pass band {band}: {within}")
    print(f"    {claim.note}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.reproduce", description="Published results beside ours.")
    parser.add_argument("name", help=f"{', '.join(CLAIMS)} or all")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.add_argument("--out", type=Path, help="page to write, .md or .html (all: reproduced.md)")
    options = parser.parse_args(arguments)
    out = options.out or (Path("reproduced.md") if options.name == "all" else None)
    try:
        if out is not None and out.suffix not in (".md", ".html"):
            raise SlalomError("--out", str(out), "name a file ending in .md or .html")
        claims = []
        for name in CLAIMS if options.name == "all" else [options.name]:
            print(f"running {name}", file=sys.stderr)
            claims.append(reproduce(name))
            if not options.json:
                _print(claims[-1])
        if options.json:
            print(json.dumps([as_dict(claim) for claim in claims], allow_nan=False))
        if out is not None:
            write_text(out, page_html(claims) if out.suffix == ".html" else page_markdown(claims))
            print(f"wrote {out}", file=sys.stderr)
    except SlalomError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

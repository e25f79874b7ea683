"""``eval-policy --reproduce NAME|all``: published results beside ours, with what holds and what does not.

One page: the published figure, ours with its interval, the pass band and a sentence on each difference, with our
curves drawn over the published points. ``--out FOLDER`` gets ``reproduced.html``, ``.md``, ``.json`` and a PNG per
result; ``FILE.md`` or ``FILE.html`` gets that page alone. ``python -m eval.claims.reproduce NAME|all`` is the same
command. The experiments are in ``eval/claims*.py``. Exit codes: 0 done (whether or not a claim holds), 2 bad input.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.common.files import write_bytes, write_json, write_text
from engine.common.provenance import commit, machine
from engine.errors import SlalomError
from eval.claims.placement import CLAIMS, Claim

__all__ = ["as_dict", "main", "page_html", "page_markdown", "reproduce", "run"]

_HEAD = ("", "claim", "published", "ours", "interval", "pass band", "within")


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
    found = claim.interval
    interval = "–" if found is None else f"{_number(found[0])} to {_number(found[1])}"
    return (claim.name, claim.title, claim.published, ours, interval, band, "yes" if claim.holds else "no")


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
        "interval": None if claim.interval is None else [finite(x) for x in claim.interval],
        "band": list(claim.band),
        "holds": claim.holds,
        "note": claim.note,
        "rows": [{"label": label, "figure": finite(figure), "unit": unit} for label, figure, unit in claim.rows],
        "curves": [
            {"label": c.label, "published": c.published, "x": list(c.x), "y": [finite(y) for y in c.y]}
            for c in claim.curves
        ],
        "axes": list(claim.axes),
        "commit": commit(),
        "machine": machine(),
    }


def page_markdown(claims: Sequence[Claim]) -> str:
    """One page: the table, then a section per claim with its note and everything measured."""
    lines = ["# Published results, reproduced", "", f"Commit {commit()}, `eval-policy --reproduce all`.", ""]
    lines += [_row(_HEAD), _row(["---"] * len(_HEAD)), *(_row(_cells(claim)) for claim in claims)]
    for claim in claims:
        lines += ["", f"## {claim.name}: {claim.title}", "", f"Source: {claim.source}.", "", claim.note, ""]
        lines += [_row(("measured", "figure", "unit")), _row(["---"] * 3)]
        lines += [_row((label, _number(figure), unit)) for label, figure, unit in claim.rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_BODY = """
<p>Commit {{ commit }}.</p>
{{ table(head, overview, "text") }}
{% for claim, rows, picture in claims %}
<h2>{{ claim.name }}: {{ claim.title }}</h2>
<p>Source: {{ claim.source }}.</p>
<p>{{ claim.note }}</p>
{{ picture }}
{{ table(("measured", "figure", "unit"), rows, "text") }}
{% endfor %}
"""


def page_html(claims: Sequence[Claim]) -> str:
    """The same page as HTML that opens offline, with the pictures inside."""
    from eval.report.html import render
    from eval.report.page import embed
    from eval.report.plots import claim_figure

    sections = []
    for claim in claims:
        rows = [(label, _number(figure), unit) for label, figure, unit in claim.rows]
        caption = f"{claim.name}: published points as markers, ours as lines"
        picture = embed(claim_figure(claim), caption, claim.name) if claim.curves else ""
        sections.append((claim, rows, picture))
    overview = [_cells(claim) for claim in claims]
    title = "Published results, reproduced"
    return render(_BODY, title=title, commit=commit(), head=_HEAD, overview=overview, claims=sections)


def _print(claim: Claim) -> None:
    _, title, published, ours, interval, band, within = _cells(claim)
    print(f"{claim.name}  {title}\n    published {published}")
    print(f"    ours {ours} ({interval}); pass band {band}: {within}")
    print(f"    {claim.note}")


def _write(claims: Sequence[Claim], out: Path) -> list[Path]:
    """The page, by the ending of ``out``; a folder gets the page in every form, and the pictures."""
    pages = {".md": page_markdown, ".html": page_html}
    if out.suffix in pages:
        write_text(out, pages[out.suffix](claims))
        return [out]
    from eval.report.plots import claim_figure

    written = [out / "reproduced.json"]
    write_json(written[0], [as_dict(claim) for claim in claims])
    for suffix, page in pages.items():
        written.append(out / f"reproduced{suffix}")
        write_text(written[-1], page(claims))
    for claim in claims:
        if claim.curves:
            picture = io.BytesIO()
            claim_figure(claim).savefig(picture, format="png", dpi=150)
            written.append(out / f"{claim.name}.png")
            write_bytes(written[-1], picture.getvalue())
    return written


def run(name: str, out: Path | None, as_json: bool) -> list[Claim]:
    """Reproduce one result or ``all``, print it and write the page.

    :param out: a folder, or a file ending in .md or .html; ``all`` without it writes to ``reproduced``
    :param as_json: one JSON array on standard output and nothing else
    :raises SlalomError: unknown name, or a place that cannot be written
    """
    out = out or (Path("reproduced") if name == "all" else None)
    if out is not None and (os.path.isfile(out) or out.suffix) and out.suffix not in (".md", ".html"):
        raise SlalomError("--out", str(out), "name a folder, or a file ending in .md or .html")
    asked = [known for known in CLAIMS if name.lower() in ("all", known.lower())] or [name]
    claims = []
    for place, each in enumerate(asked, start=1):
        print(f"running {each} ({place} of {len(asked)})", file=sys.stderr, flush=True)
        claims.append(reproduce(each))
        if not as_json:
            _print(claims[-1])
    if as_json:
        print(json.dumps([as_dict(claim) for claim in claims], allow_nan=False))
    for path in _write(claims, out) if out is not None else []:
        print(f"wrote {path}", file=sys.stderr)
    return claims


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.claims.reproduce", description="Published results beside ours."
    )
    parser.add_argument("name", help=f"{', '.join(CLAIMS)} or all")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.add_argument("--out", type=Path, help="folder, or a page ending in .md or .html (all: reproduced)")
    options = parser.parse_args(arguments)
    try:
        run(options.name, options.out, options.json)
    except SlalomError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

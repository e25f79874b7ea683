"""``eval-policy --reproduce NAME|all``: published results beside ours, with what holds and what does not.

One page: the published figure; ours in runs as long as the original's, with its interval, at steady state, and of
sustained goodput where goodputs are compared; the pass band and which of these readings lies in it; which assumption of
the original, when changed, moves ours there; a sentence on each difference, and our curves drawn over the published
points. ``--out FOLDER`` gets ``reproduced.html``, ``.md``, ``.json`` and a PNG per result, and keeps what is finished
under ``claims``; ``FILE.md`` or ``FILE.html`` gets that page alone. The experiments lie beside this file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.common.files import write_bytes, write_json, write_text
from engine.common.provenance import commit, machine
from engine.errors import SlalomError, no_such
from engine.jit import sources
from env.measure.digest import code_sha256
from eval.claims.claim import ORIGINAL, STEADY, SUSTAINED, Claim, Curve, Reading
from eval.claims.distserve import distserve_search, distserve_vs_vllm
from eval.claims.muxwise import muxwise
from eval.claims.planners import planners
from eval.claims.tropical import tropical
from eval.compare.cells import measured
from eval.compare.session import open_folder

#: name -> experiment, in the order in which they are worth reading
CLAIMS: dict[str, Callable[[], Claim]] = {
    "S1": distserve_search,
    "S2": distserve_vs_vllm,
    "S4": tropical,
    "S5": planners,
    "S6": muxwise,
}

_HEAD = ("", "claim", "published", "pass band", "original's run length", "interval", STEADY, SUSTAINED, "matches")


def reproduce(name: str) -> Claim:
    """Run one experiment.

    :raises SlalomError: unknown name
    """
    if name not in CLAIMS:
        raise no_such("--reproduce", name, (*CLAIMS, "all"))
    return CLAIMS[name]()


@dataclass(frozen=True)
class _Task:
    name: str

    def file(self, folder: Path) -> Path:
        """Where the result is kept: an old one is not read back once a source that it depends on has changed."""
        digest = sources.sha256([sources.path_of("eval.claims.reproduce")])
        return folder / "claims" / f"{self.name}-{digest[:8]}{code_sha256()[:8]}.json"


def _measured(task: _Task) -> dict[str, Any]:
    return as_dict(reproduce(task.name))


# -- a claim in words and as JSON ------------------------------------------------------------------------------


def _number(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.3g}"


def _matches(claim: Claim) -> str:
    return " and ".join(claim.matches) or "neither"


def _cells(claim: Claim) -> tuple[str, ...]:
    band = f"{claim.band[0]:g} to {claim.band[1]:g}"
    found = claim.interval
    interval = "–" if found is None else f"{_number(found[0])} to {_number(found[1])}"
    figures = {reading.label: f"{_number(reading.value)} {claim.unit}" for reading in claim.readings}
    original, steady, sustained = (figures.get(label, "–") for label in (ORIGINAL, STEADY, SUSTAINED))
    about = (claim.name, claim.title, claim.published, band)
    return (*about, original, interval, steady, sustained, _matches(claim))


def _said(claim: Claim) -> list[str]:
    """Sentences: how long runs are, which reading agrees, and which assumption of the original moves ours."""
    length = f"The original's run length: {claim.length}." if claim.length else ""
    said = [f"{length} The published figure matches {_matches(claim)}.".strip(), claim.note]
    if claim.explained:
        said.append(f"Moves ours into the band: {'; '.join(claim.explained)}.")
    elif claim.causes:
        tried = "; ".join(f"{cause.label}: {_number(cause.value)} {claim.unit}" for cause in claim.causes)
        said.append(f"No assumption that was tried moves ours into the band ({tried}).")
    return said


def _rows(claim: Claim) -> list[tuple[str, str, str]]:
    """Everything measured: readings, changed assumptions, and what was measured on the way."""
    figures = [(f"ours, {reading.label}", reading.value, claim.unit) for reading in claim.readings]
    figures += [(f"changed: {cause.label}", cause.value, claim.unit) for cause in claim.causes]
    return [(label, _number(figure), unit) for label, figure, unit in (*figures, *claim.rows)]


def as_dict(claim: Claim) -> dict[str, Any]:
    """JSON-ready; None for a figure without bound."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def listed(readings: Sequence[Reading]) -> list[dict[str, Any]]:
        return [
            {"label": r.label, "figure": finite(r.value), "rest": r.extra, "within": claim.within(r)} for r in readings
        ]

    return {
        "name": claim.name,
        "title": claim.title,
        "source": claim.source,
        "published": claim.published,
        "ours": finite(claim.value),
        "unit": claim.unit,
        "length": claim.length,
        "interval": None if claim.interval is None else [finite(x) for x in claim.interval],
        "band": list(claim.band),
        "rest": claim.extra,
        "holds": claim.holds,
        "lasting": listed(claim.lasting),
        "matches": list(claim.matches),
        "causes": listed(claim.causes),
        "explained": list(claim.explained),
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


def from_dict(found: dict[str, Any]) -> Claim:
    """The claim that :func:`as_dict` wrote down."""

    def bounded(value: float | None) -> float:
        return math.inf if value is None else value

    def listed(readings: list[dict[str, Any]]) -> tuple[Reading, ...]:
        return tuple(Reading(r["label"], bounded(r["figure"]), r["rest"]) for r in readings)

    interval, curves = found["interval"], found["curves"]
    return Claim(
        **{key: found[key] for key in ("name", "title", "source", "published", "unit", "length", "note")},
        value=bounded(found["ours"]),
        extra=found["rest"],
        interval=None if interval is None else (bounded(interval[0]), bounded(interval[1])),
        band=(found["band"][0], found["band"][1]),
        lasting=listed(found["lasting"]),
        causes=listed(found["causes"]),
        rows=tuple((row["label"], bounded(row["figure"]), row["unit"]) for row in found["rows"]),
        curves=tuple(
            Curve(c["label"], tuple(c["x"]), tuple(map(bounded, c["y"])), published=c["published"]) for c in curves
        ),
        axes=(found["axes"][0], found["axes"][1]),
    )


# -- the page --------------------------------------------------------------------------------------------------


def page_markdown(claims: Sequence[Claim]) -> str:
    """One page: the table, then a section per claim with its note and everything measured."""
    from eval.report.html import markdown_table

    lines = ["# Published results, reproduced", "", f"Commit {commit()}, `eval-policy --reproduce all`.", ""]
    lines += markdown_table(_HEAD, map(_cells, claims))
    for claim in claims:
        lines += ["", f"## {claim.name}: {claim.title}", "", f"Source: {claim.source}.", ""]
        lines += [line for sentence in _said(claim) for line in (sentence, "")]
        lines += markdown_table(("measured", "figure", "unit"), _rows(claim))
    return "\n".join(lines) + "\n"


_BODY = """
<p>Commit {{ commit }}.</p>
{{ table(head, overview, "text") }}
{% for claim, said, rows, picture in claims %}
<h2>{{ claim.name }}: {{ claim.title }}</h2>
<p>Source: {{ claim.source }}.</p>
{% for sentence in said %}<p>{{ sentence }}</p>{% endfor %}
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
        caption = f"{claim.name}: published points as markers, ours as lines"
        picture = embed(claim_figure(claim), caption, claim.name) if claim.curves else ""
        sections.append((claim, _said(claim), _rows(claim), picture))
    overview = [_cells(claim) for claim in claims]
    title = "Published results, reproduced"
    return render(_BODY, title=title, commit=commit(), head=_HEAD, overview=overview, claims=sections)


def _print(claim: Claim) -> None:
    _, title, published, band, original, interval, steady, sustained, matches = _cells(claim)
    print(f"{claim.name}  {title}\n    published {published}; pass band {band}")
    print(f"    ours {original} ({interval}) at the original's run length")
    print(f"    {steady} at steady state, {sustained} of sustained goodput")
    print(f"    matches: {matches}")
    for sentence in _said(claim)[1:]:
        print(f"    {sentence}")


def _write(claims: Sequence[Claim], found: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """The page, by the ending of ``out``; a folder gets the page in every form, and the pictures."""
    pages = {".md": page_markdown, ".html": page_html}
    if out.suffix in pages:
        write_text(out, pages[out.suffix](claims))
        return [out]
    from eval.report.plots import claim_figure, png_of

    written = [out / "reproduced.json"]
    write_json(written[0], list(found))
    for suffix, page in pages.items():
        written.append(out / f"reproduced{suffix}")
        write_text(written[-1], page(claims))
    for claim in claims:
        if claim.curves:
            written.append(out / f"{claim.name}.png")
            write_bytes(written[-1], png_of(claim_figure(claim)))
    return written


def run(
    name: str, out: Path | None, as_json: bool, *, jobs: int = 1, resume: bool = False,
    say: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> list[Path]:  # fmt: skip
    """Reproduce one result or ``all``, print it and write the page.

    :param out: a folder, or a file ending in .md or .html; ``all`` without it writes to ``reproduced``
    :param as_json: one JSON array on standard output and nothing else
    :param jobs: results at once, each in its own process
    :param resume: go on with what is finished in the folder ``out``
    :param say: hears what is under way, how many are finished, and of how many
    :return: the files written
    :raises SlalomError: unknown name, a place that cannot be written, or a folder with results without ``resume``
    """
    asked = [known for known in CLAIMS if name.lower() in ("all", known.lower())]
    if not asked:
        reproduce(name)
    out = out or (Path("reproduced") if name == "all" else None)
    if out is not None and (os.path.isfile(out) or out.suffix) and out.suffix not in (".md", ".html"):
        raise SlalomError("--out", str(out), "name a folder, or a file ending in .md or .html")
    folder = None if out is None or out.suffix else out
    open_folder(folder, resume, "claims")
    say(", ".join(asked), 0, len(asked))
    done: dict[str, dict[str, Any]] = {}
    for task, found in measured([_Task(each) for each in asked], _measured, jobs, folder):
        done[task.name] = found
        say(", ".join(each for each in asked if each not in done), len(done), len(asked))
        if not as_json:
            _print(from_dict(found))
    ordered = [done[each] for each in asked]
    if as_json:
        print(json.dumps(ordered, allow_nan=False))
    return _write([from_dict(found) for found in ordered], ordered, out) if out is not None else []

"""The report: one HTML file that opens offline, with its pictures beside it as PNG and the data as JSON.

Pictures are embedded as SVG, a few tens of kB each, so the file needs no script and no network.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from engine.common.files import write_bytes, write_json, write_text
from eval.compare.result import Comparison, Side
from eval.compare.verdict import verdict
from eval.report.html import render
from eval.report.parts import cards, starved, watched_sentences, way_rows

_BODY = """
<div class="cards">
{% for figure, text, kind in cards %}<div class="card {{ kind }}"><b>{{ figure }}</b><span>{{ text }}</span></div>
{% endfor %}</div>
<ul>{% for kind, text in verdict %}<li class="{{ kind }}">{{ text }}</li>{% endfor %}</ul>
{{ drawn.goodput }}{{ drawn.attainment }}{{ drawn.latency }}
<h2>Targets and classes: is anyone starved?</h2>
<ul>{% for text in starved %}<li>{{ text }}</li>{% endfor %}</ul>
{{ drawn.breakdown }}
{% if per_class %}
{{ table(["policy", "rate [" ~ unit ~ "]", "class", "both [%]", "TTFT [%]", "TPOT [%]"], per_class) }}
{% endif %}
{% if watched %}
<h2>One run over time</h2>
{{ drawn.timeline }}
<h2>Where {{ watched.subject }} decides otherwise than {{ watched.rival }}</h2>
<ul>{% for text in watched_sentences(watched) %}<li>{{ text }}</li>{% endfor %}</ul>
{{ drawn.decisions }}
{{ table(["placed", "requests", "good", "good under the rival's own run", "gained", "lost"], way_rows(watched)) }}
{% endif %}
<h2>Numbers</h2>
{% if goodput %}{{ table(*goodput) }}{% endif %}
{{ table(*points) }}
{% if tuning %}
<h2>Tuning</h2>
{{ table(["rule", "trials", "requests simulated", "sampler", "defaults [%]", "tuned [%]", "values"], tuning) }}
{% endif %}
<h2>Settings</h2>
{% if definition %}<p>{{ definition }}</p>{% endif %}
<p>Attainment: share of requests <em>sent</em> that finished and met their TTFT and TPOT targets; shed, failed and
unfinished requests are misses. TTFT: first token − arrival. TPOT: (last − first token) ÷ (tokens − 1), met if one
token. Goodput: largest rate with that attainment. Left out: the first {{ "%g" % (100 * settings.warmup) }} % and the
last {{ "%g" % (100 * settings.drain) }} % of arrivals (token gaps and counters cover the whole run). Policies are
paired: same arrivals, same seeds. Intervals: bootstrap over seeds and blocks of arrivals, 95 %; bands of latencies:
range over seeds.</p>
{{ table(["setting", "value"], values, "text") }}
<h2>Scenario</h2><pre>{{ settings.scenario_yaml }}</pre>
"""


def write_report(result: Comparison, folder: Path) -> dict[str, Path]:
    """Write ``result.json``, ``report.html`` and one PNG per picture into ``folder``.

    :param result: with its ``settings``
    :return: what was written, by name
    :raises SlalomError: the folder cannot be written or the disk is full
    """
    from eval.report.plots import figures, png_of

    written = {"result": folder / "result.json", "report": folder / "report.html"}
    write_json(written["result"], result.to_json())
    drawn = {}
    for stem, (figure, caption) in figures(result).items():
        written[stem] = folder / f"{stem}.png"
        write_bytes(written[stem], png_of(figure))
        drawn[stem] = embed(figure, caption, stem)
    write_text(written["report"], _page(result, drawn))
    return written


def embed(figure: Any, caption: str, stem: str) -> Markup:
    """The figure as inline SVG; identifiers are salted per picture, since all share one document."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem, "svg.id": stem}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    picture = Markup(svg[svg.index("<svg") + 4 :])
    page = '<figure><svg role="img" aria-label="{0}"{1}<figcaption>{0}</figcaption></figure>'
    return Markup(page).format(caption, picture)


def _page(result: Comparison, drawn: Mapping[str, Markup]) -> str:
    settings = result.settings
    title = f"Slalom: {settings['scenario']}"
    if settings.get("slo_scale", 1.0) != 1.0:
        title += f", targets times {settings['slo_scale']:g}"
    return render(
        _BODY,
        title=title,
        settings=settings,
        unit=result.rate_unit,
        drawn=drawn,
        cards=cards(result),
        verdict=[(_kind(text), text) for text in verdict(result)],
        starved=starved(result),
        watched=result.shadow,
        watched_sentences=watched_sentences,
        way_rows=way_rows,
        per_class=_per_class(result),
        goodput=_goodput_table(result) if result.searched else None,
        points=_point_table(result),
        tuning=_tuning(settings),
        definition=_definition(result),
        values=_values(settings),
    )


def _kind(text: str) -> str:
    return "win" if " beats " in text else "loss" if " loses to " in text else "tie" if "No diff" in text else ""


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _goodput_table(result: Comparison) -> tuple[list[str], list[list[str]]]:
    if result.is_sustained:
        return _sustained_table(result)
    head = ["policy", "tuned"]
    for target in result.targets:
        head += [f"goodput at {100 * target:g} % [{result.rate_unit}]", "95 % interval"]
    head.append("per GPU")
    rows = []
    for side in result.ranking():
        row = [side.label, "yes" if side.tuned else "no"]
        for target in result.targets:
            found = side.at(target)
            row += [_figure(found.rate), f"{_figure(found.low)} to {_figure(found.high)}"]
        rows.append([*row, _figure(side.at(result.lead).per_gpu)])
    return head, rows


def _sustained_table(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """Sustained goodput, what it was found with, and the classic figure beside it."""
    shares = [f"{100 * target:g} %" for target in result.targets]
    head = [
        "policy",
        "tuned",
        *(f"sustained at {share} [{result.rate_unit}]" for share in shares),
        "95 % interval",
        "per GPU",
    ]
    head += [f"classic at {shares[0]}", "stability limit", "P99 TTFT [s]", "longest wait [s]"]
    head += ["refused", "unserved", "worst class [%]", "worst length [%]", "no more, because"]
    rows = []
    for side in result.ranking():
        found = side.at(result.lead)
        at = found.at
        row = [side.label, "yes" if side.tuned else "no"]
        row += [_figure(side.at(target).rate) for target in result.targets]
        row += [f"{_figure(found.low)} to {_figure(found.high)}", _figure(found.per_gpu)]
        row += [_figure(side.classic_at(result.lead).rate), _figure(side.sustained["stability_limit"])]
        row += [_figure(at["p99_ttft_s"]), _figure(at["longest_wait_s"])] if at else ["–"] * 2
        row += [str(at["refused"]), str(at["unserved"])] if at else ["–"] * 2
        worst = (at["worst_class"], at["worst_length"]) if at else ()
        row += [f"{name}: {_share(share)}" for name, share in worst] or ["–"] * 2
        rows.append([*row, found.fails_above])
    return head, rows


_COLUMNS = {
    "p90_ttft_ms": "P90 TTFT [ms]",
    "p99_ttft_ms": "P99 TTFT [ms]",
    "p90_tpot_ms": "P90 TPOT [ms]",
    "p99_tpot_ms": "P99 TPOT [ms]",
    "p90_itl_ms": "P90 ITL [ms]",
    "worst_wait_s": "worst wait [s]",
}
_COUNT_COLUMNS = ("shed", "failed", "unfinished", "preemptions", "migrations", "role_switches")


def _points(result: Comparison, side: Side) -> list[Mapping[str, Any]]:
    """Every rate where rates were asked for; after a search only the one where all policies meet."""
    if result.searched and result.at_rate:
        return [p for p in side.points if p["rate"] == result.at_rate]
    return list(side.points)


def _point_table(result: Comparison) -> tuple[list[str], list[list[str]]]:
    head = ["policy", f"rate [{result.rate_unit}]", "attainment [%]", "95 % interval", "TTFT met [%]", "TPOT met [%]"]
    rows = []
    for side in result.ranking():
        for p in _points(result, side):
            metric = p["slo_attainment_by_metric"]
            row = [side.label, _figure(p["rate"]), _share(p["slo_attainment"])]
            row += [
                f"{_share(p['low'])} to {_share(p['high'])}",
                _share(metric["ttft"]),
                _share(metric["tpot"]),
            ]
            row += [_figure(p[key]) for key in _COLUMNS]
            rows.append(row + [str(p[key]) for key in _COUNT_COLUMNS])
    names = [name.replace("_", " ") for name in _COUNT_COLUMNS]
    return [*head, *_COLUMNS.values(), *names], rows


def _per_class(result: Comparison) -> list[list[str]]:
    """One class is all the requests there are: nothing to show."""
    rows = []
    for side in result.ranking():
        for p in _points(result, side):
            for name, share in p["slo_attainment_by_class"].items():
                figures = [_share(share[key]) for key in ("slo_attainment", "ttft", "tpot")]
                rows.append([side.label, _figure(p["rate"]), name, *figures])
    return rows if len({row[2] for row in rows}) > 1 else []


def _tuning(settings: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            found["rule"],
            str(found["trials"]),
            f"{found['simulated_requests']:,}",
            found["sampler"],
            _share(found["default"]),
            _share(found["score"]),
            json.dumps(found["values"] | found.get("levers", {})),
        ]
        for found in settings.get("tuning", [])
    ]


def _definition(result: Comparison) -> str:
    """Sustained goodput in words; empty where the classic figure was measured."""
    if not result.is_sustained:
        return ""
    about, policies = result.definition, [side.sustained for side in result.policies]
    return (
        f"Sustained goodput: the largest rate that, after a warm-up of {policies[0]['warmup_s']:.0f} s, over at "
        f"least {about['seconds'] / 60:g} minutes, {about['requests']:,} requests and {about['lone_times']:g} times "
        "the P90 of a lone request's time in the system, in the runs of all seeds: (a) has that attainment; (b) lets "
        f"nobody wait for a first token longer than {policies[0]['tail_factor']:g} TTFT targets, leaves nobody "
        "unserved and refuses only within the TTFT target; (c) shows no trend of the backlog (Mann and Kendall, Hamed "
        f"and Rao's correction of the variance, {100 * about['trend_level']:g} %) and lies below the stability limit; "
        "(d) brings every class and every fifth of the prompts by length to the target less "
        f"{100 * about['slack']:g} points. Its interval: Student, over the answers of the single seeds. Classic "
        "goodput: clause (a) alone, over runs as long."
    )


def _values(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    skip = ("scenario_yaml", "tuning")
    return [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in settings.items() if k not in skip]

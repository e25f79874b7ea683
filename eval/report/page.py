"""The report: one HTML file that opens offline, with its pictures beside it as PNG and the data as JSON.

Pictures are embedded as SVG, a few tens of kB each, so the file needs no script and no network. Everything
that comes from outside (names, YAML) is escaped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine.common.files import write_bytes, write_json, write_text
from eval.compare.verdict import is_sustained, ranking, verdict
from eval.report.parts import cards, starved, watched_sentences, way_rows

__all__ = ["embed", "write_report"]

_STYLE = """
:root { color-scheme: light; } body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
max-width: 70rem; margin: 2rem auto; padding: 0 1rem; } h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem;
margin-top: 2.2rem; } table { border-collapse: collapse;
font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; } th:first-child,
td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; } .wide { overflow-x: auto;
margin-bottom: 1.4rem; } .text td, .text th { text-align: left; overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; } figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; } figcaption { color: #444; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid #ddd; border-radius: .5rem; padding: .6rem .8rem; } .card b { display: block;
font-size: 1.45rem; font-variant-numeric: tabular-nums; } .card span { color: #444; font-size: .85rem; }
.card.win { border-left: .35rem solid #009E73; } .card.loss { border-left: .35rem solid #D55E00; }
li.win { list-style: "\\25B2  "; } li.loss { list-style: "\\25BC  "; } li.tie { list-style: "=  "; }
"""


def write_report(result: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write ``result.json``, ``report.html`` and one PNG per picture into ``folder``.

    :param result: of :func:`eval.compare.paired.compare`, with its ``settings``
    :return: what was written, by name
    :raises SlalomError: the folder cannot be written or the disk is full
    """
    from eval.report.plots import figures

    written = {"result": folder / "result.json", "report": folder / "report.html"}
    write_json(written["result"], result)
    stems, embedded = [], []
    for stem, (figure, caption) in figures(result).items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        written[stem] = folder / f"{stem}.png"
        write_bytes(written[stem], png.getvalue())
        stems.append(stem)
        embedded.append(embed(figure, caption, stem))
    write_text(written["report"], _page(result, stems, embedded))
    return written


def embed(figure: Any, caption: str, stem: str) -> str:
    """The figure as inline SVG; identifiers are salted per picture, since all share one document."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem, "svg.id": stem}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _page(result: Mapping[str, Any], stems: Sequence[str], pictures: Sequence[str]) -> str:
    settings = result["settings"]
    title = f"Slalom: {settings['scenario']}"
    if settings.get("slo_scale", 1.0) != 1.0:
        title += f", targets times {settings['slo_scale']:g}"
    drawn = dict(zip(stems, pictures, strict=True))
    order = ["goodput", "attainment", "latency"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        _cards(result),
        "<ul>" + "".join(_sentence(s) for s in verdict(result)) + "</ul>",
        *(drawn[stem] for stem in order if stem in drawn),
        "<h2>Targets and classes: is anyone starved?</h2>",
        _starved(result),
        drawn["breakdown"],
        _per_class_table(result),
        *_watched(result, drawn),
        "<h2>Numbers</h2>",
        _goodput_table(result) if result["mode"] == "goodput" else "",
        _point_table(result),
        _tuning(result),
        "<h2>Settings</h2>",
        _sustained_definition(result),
        _definitions(settings),
        _settings_table(settings),
        f"<h2>Scenario</h2><pre>{escape(settings['scenario_yaml'])}</pre>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def _cards(result: Mapping[str, Any]) -> str:
    """The figures that a reader looks for first."""
    boxes = (
        f'<div class="card {kind}"><b>{escape(figure)}</b><span>{escape(text)}</span></div>'
        for figure, text, kind in cards(result)
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def _starved(result: Mapping[str, Any]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in starved(result)) + "</ul>"


def _watched(result: Mapping[str, Any], drawn: Mapping[str, str]) -> list[str]:
    """Timeline and differing decisions, where a run was watched."""
    watched = result.get("shadow")
    if watched is None:
        return []
    head = ["placed", "requests", "good", "good under the rival's own run", "gained", "lost"]
    sentences = "".join(f"<li>{escape(text)}</li>" for text in watched_sentences(watched))
    return [
        "<h2>One run over time</h2>",
        drawn["timeline"],
        f"<h2>Where {escape(watched['subject'])} decides otherwise than {escape(watched['rival'])}</h2>",
        f"<ul>{sentences}</ul>",
        drawn.get("decisions", ""),
        _table(head, way_rows(watched)),
    ]


def _sentence(text: str) -> str:
    kind = "win" if " beats " in text else "loss" if " loses to " in text else "tie" if "No diff" in text else ""
    return f'<li class="{kind}">{escape(text)}</li>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = ("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide {kind}"><table>{body}</table></div>'


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _goodput_table(result: Mapping[str, Any]) -> str:
    if is_sustained(result):
        return _sustained_table(result)
    head = ["policy", "tuned"]
    for target in result["targets"]:
        head += [f"goodput at {100 * target:g} % [1/s]", "95 % interval"]
    head.append("per GPU")
    rows = []
    for policy in ranking(result):
        row = [policy["label"], "yes" if policy["tuned"] else "no"]
        for target in result["targets"]:
            found = policy["goodput"][f"{target:g}"]
            row += [_figure(found["rate"]), f"{_figure(found['low'])} to {_figure(found['high'])}"]
        rows.append([*row, _figure(policy["goodput"][f"{result['targets'][0]:g}"]["per_gpu"])])
    return _table(head, rows)


def _sustained_table(result: Mapping[str, Any]) -> str:
    """Sustained goodput, what it was found with, and the classic figure beside it."""
    shares = [f"{100 * target:g} %" for target in result["targets"]]
    head = ["policy", "tuned", *(f"sustained at {share} [1/s]" for share in shares), "95 % interval", "per GPU"]
    head += [f"classic at {shares[0]}", "stability limit", "P99 TTFT [s]", "longest wait [s]"]
    head += ["refused", "unserved", "worst class [%]", "worst length [%]", "no more, because"]
    first, rows = f"{result['targets'][0]:g}", []
    for policy in ranking(result):
        found, at = policy["goodput"][first], policy["goodput"][first]["at"]
        row = [policy["label"], "yes" if policy["tuned"] else "no"]
        row += [_figure(policy["goodput"][f"{t:g}"]["rate"]) for t in result["targets"]]
        row += [f"{_figure(found['low'])} to {_figure(found['high'])}", _figure(found["per_gpu"])]
        row += [_figure(policy["classic_goodput"][first]["rate"]), _figure(policy["sustained"]["stability_limit"])]
        row += [_figure(at["p99_ttft_s"]), _figure(at["longest_wait_s"])] if at else ["–"] * 2
        row += [str(at["refused"]), str(at["unserved"])] if at else ["–"] * 2
        worst = (at["worst_class"], at["worst_length"]) if at else ()
        row += [f"{name}: {_share(share)}" for name, share in worst] or ["–"] * 2
        rows.append([*row, found["fails_above"]])
    return _table(head, rows)


_COLUMNS = {
    "p90_ttft_ms": "P90 TTFT [ms]",
    "p99_ttft_ms": "P99 TTFT [ms]",
    "p90_tpot_ms": "P90 TPOT [ms]",
    "p99_tpot_ms": "P99 TPOT [ms]",
    "p90_itl_ms": "P90 ITL [ms]",
    "worst_wait_s": "worst wait [s]",
}
_COUNT_COLUMNS = ("shed", "failed", "unfinished", "preemptions", "migrations", "role_switches")


def _points(result: Mapping[str, Any], policy: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every rate where rates were asked for; after a search only the one where all policies meet."""
    if result["mode"] == "goodput" and result["at_rate"]:
        return [p for p in policy["points"] if p["rate"] == result["at_rate"]]
    return list(policy["points"])


def _point_table(result: Mapping[str, Any]) -> str:
    head = ["policy", "rate [1/s]", "attainment [%]", "95 % interval", "TTFT met [%]", "TPOT met [%]"]
    rows = []
    for policy in ranking(result):
        for p in _points(result, policy):
            metric = p["slo_attainment_by_metric"]
            row = [policy["label"], _figure(p["rate"]), _share(p["slo_attainment"])]
            row += [
                f"{_share(p['low'])} to {_share(p['high'])}",
                _share(metric["ttft"]),
                _share(metric["tpot"]),
            ]
            row += [_figure(p[key]) for key in _COLUMNS]
            rows.append(row + [str(p[key]) for key in _COUNT_COLUMNS])
    names = [name.replace("_", " ") for name in _COUNT_COLUMNS]
    return _table([*head, *_COLUMNS.values(), *names], rows)


def _per_class_table(result: Mapping[str, Any]) -> str:
    rows = []
    for policy in ranking(result):
        for p in _points(result, policy):
            for name, share in p["slo_attainment_by_class"].items():
                figures = [_share(share[key]) for key in ("slo_attainment", "ttft", "tpot")]
                rows.append([policy["label"], _figure(p["rate"]), name, *figures])
    if len({row[2] for row in rows}) <= 1:
        return ""  # one class is all the requests there are
    return _table(["policy", "rate [1/s]", "class", "both [%]", "TTFT [%]", "TPOT [%]"], rows)


def _tuning(result: Mapping[str, Any]) -> str:
    rows = [
        [
            found["rule"],
            str(found["trials"]),
            f"{found['simulated_requests']:,}",
            found["sampler"],
            _share(found["default"]),
            _share(found["score"]),
            json.dumps(found["values"]),
        ]
        for found in result["settings"].get("tuning", [])
    ]
    if not rows:
        return ""
    head = ["rule", "trials", "requests simulated", "sampler", "defaults [%]", "tuned [%]", "values"]
    return "<h2>Tuning</h2>" + _table(head, rows)


def _sustained_definition(result: Mapping[str, Any]) -> str:
    if not is_sustained(result):
        return ""
    about, policies = result["definition"], [policy["sustained"] for policy in result["policies"]]
    return (
        f"<p>Sustained goodput: the largest rate that, after a warm-up of {policies[0]['warmup_s']:.0f} s, over at "
        f"least {about['seconds'] / 60:g} minutes, {about['requests']:,} requests and {about['lone_times']:g} times "
        "the P90 of a lone request's time in the system, in the runs of all seeds: (a) has that attainment; (b) lets "
        f"nobody wait for a first token longer than {policies[0]['tail_factor']:g} TTFT targets, leaves nobody "
        "unserved and refuses only within the TTFT target; (c) shows no trend of the backlog (Mann and Kendall, Hamed "
        f"and Rao's correction of the variance, {100 * about['trend_level']:g} %) and lies below the stability limit; "
        "(d) brings every class and every fifth of the prompts by length to the target less "
        f"{100 * about['slack']:g} points. Its interval: Student, over the answers of the single seeds. Classic "
        "goodput: clause (a) alone, over runs as long.</p>"
    )


def _definitions(settings: Mapping[str, Any]) -> str:
    return (
        "<p>Attainment: share of requests <em>sent</em> that finished and met their TTFT and TPOT targets; "
        "shed, failed and unfinished requests are misses. TTFT: first token − arrival. TPOT: (last − first "
        "token) ÷ (tokens − 1), met if one token. Goodput: largest rate with that attainment. Left out: the "
        f"first {100 * settings['warmup']:g} % and the last {100 * settings['drain']:g} % of arrivals (token "
        "gaps and counters cover the whole run). Policies are paired: same arrivals, same seeds. Intervals: "
        "bootstrap over seeds and blocks of arrivals, 95 %; bands of latencies: range over seeds.</p>"
    )


def _settings_table(settings: Mapping[str, Any]) -> str:
    skip = ("scenario_yaml", "tuning")
    rows = [
        [key, value if isinstance(value, str) else json.dumps(value)]
        for key, value in settings.items()
        if key not in skip
    ]
    return _table(["setting", "value"], rows, "text")

"""The one page that every result is shown on: a head, a style, and a table. A page opens offline and runs no script.

A template extends ``base`` and fills its block ``body``; whatever is put into it is escaped, unless it is ``Markup``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import DictLoader, Environment

_BASE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light; } body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
max-width: 80rem; margin: 2rem auto; padding: 0 1rem; } h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem;
margin-top: 2.2rem; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; } th:first-child,
td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; } .wide { overflow-x: auto;
margin-bottom: 1.4rem; } .text td, .text th { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; } figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; } figcaption { color: #444; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid #ddd; border-radius: .5rem; padding: .6rem .8rem; } .card b { display: block;
font-size: 1.45rem; font-variant-numeric: tabular-nums; } .card span { color: #444; font-size: .85rem; }
.card.win { border-left: .35rem solid #009E73; } .card.loss { border-left: .35rem solid #D55E00; }
li.win { list-style: "\25B2  "; } li.loss { list-style: "\25BC  "; } li.tie { list-style: "=  "; }
.bar { background: #2f7de1; height: .8rem; border-radius: 3px; } td.room { width: 24rem; }
</style></head>
<body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""

_TABLE = """{% macro table(head, rows, kind="") -%}
<div class="wide {{ kind }}"><table><thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor -%}
</tbody></table></div>
{%- endmacro %}"""

_PAGES = Environment(autoescape=True, trim_blocks=True, loader=DictLoader({"base": _BASE}))
_PAGES.globals["table"] = getattr(_PAGES.from_string(_TABLE).module, "table")  # noqa: B009  (made by jinja2)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    cells = (head, ["---"] * len(head), *rows)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def render(body: str, **data: Any) -> str:
    """A whole page.

    :param body: template of what stands below the title; has ``table(head, rows, kind)``, ``kind`` ``text`` for words
    :param data: for the template; ``title`` at least
    """
    template = '{% extends "base" %}{% block body %}' + body + "{% endblock %}"
    return _PAGES.from_string(template).render(data)

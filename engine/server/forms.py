"""The form of an answer as requests ask for it: OpenAI's ``response_format``, vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.errors import SlalomError
from engine.model.forms import Form

_FORMAT, _OUTPUTS = "response_format", "structured_outputs"
_MOST_CHOICES = 1000


def form_of(response_format: Mapping[str, Any] | None, outputs: Mapping[str, Any] | None) -> Form | None:
    """:raises SlalomError: both, or something that is not known"""
    asked = {name: value for name, value in (outputs or {}).items() if value is not None}
    first = _of_format(response_format or {})
    if first is not None and asked:
        raise SlalomError(_OUTPUTS, sorted(asked), f"give this or {_FORMAT}, not both")
    return _of_outputs(asked) if asked else first


def _of_format(wanted: Mapping[str, Any]) -> Form | None:
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json", '{"type": "object"}', _FORMAT)
    if kind != "json_schema":
        raise SlalomError(_FORMAT, kind, "its type is text, json_object or json_schema")
    schema = wanted.get("json_schema")
    schema = schema.get("schema") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping):
        raise SlalomError(_FORMAT, kind, "give the schema as json_schema: {name, schema}")
    return Form("json", json.dumps(schema), _FORMAT)


def _of_outputs(asked: Mapping[str, Any]) -> Form:
    ((name, value), *more) = asked.items()
    if more:
        raise SlalomError(_OUTPUTS, sorted(asked), "give one of json, regex, choice, json_object")
    if name == "json" and isinstance(value, str | Mapping):
        return Form("json", value if isinstance(value, str) else json.dumps(value), _OUTPUTS)
    if name == "json_object" and value is True:
        return Form("json", '{"type": "object"}', _OUTPUTS)
    if name == "regex" and isinstance(value, str):
        return Form("regex", value, _OUTPUTS)
    texts = isinstance(value, list) and 0 < len(value) <= _MOST_CHOICES and all(isinstance(x, str) and x for x in value)
    if name == "choice" and texts:
        return Form("choice", json.dumps(value), _OUTPUTS)
    fix = f"give json (a schema), regex (a text), choice (up to {_MOST_CHOICES} texts) or json_object (true)"
    raise SlalomError(_OUTPUTS, name, fix)

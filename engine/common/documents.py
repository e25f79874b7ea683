"""The one reader of documents that a user names: JSON here, YAML in ``yaml_documents``; limits, and never a surprise.

What is read becomes plain data: mappings with text as keys, lists, text, numbers, truth values and null. A document is
refused before it is large in memory: an expansion bomb, a value nested beyond all sense, a number of thousands of
digits, a key that is there twice. Dates stay text. The message is one line with the file, and the line where there
is one. Files of lines are read by ``engine.common.lines``. The engine alone reads no YAML, and needs no package for it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.common.regular import SMALL, check_regular
from engine.errors import SlalomError

if TYPE_CHECKING:  # whoever has such an error has imported it
    from pydantic import ValidationError

#: Values within values.
DEEPEST = 64
#: Values of a JSON document, counted by its punctuation: each takes up to some 100 bytes.
_JSON_VALUES = 3_000_000


def read_text(path: str | Path, field: str, most: int = SMALL) -> str:
    """The whole of a UTF-8 file.

    :param field: who asked for it, for the message
    :param most: bytes
    :raises SlalomError: missing, unreadable, no regular file, larger, or not UTF-8
    """
    check_regular(path, most)
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SlalomError(field, str(path), f"give a readable file ({error.strerror or error})") from error
    except ValueError as error:  # not UTF-8, or a path with a null byte
        raise SlalomError(field, str(path), f"give a UTF-8 text file ({error})") from error


def read_json(path: str | Path, field: str, most: int = SMALL) -> Any:
    """A JSON file.

    :param field: who asked for it, for the message
    :param most: bytes
    :raises SlalomError: as :func:`read_text`, or as :func:`json_of`
    """
    return json_of(read_text(path, field, most), f"{field}: {path}")


def json_of(text: str | bytes, where: str, *, constants: bool = False) -> Any:
    """The value of a JSON text.

    :param where: place of the text, for the message
    :param constants: NaN and Infinity, which are no JSON, are let through
    :raises SlalomError: no JSON, a key twice, too many values, too deep, or a number that is none
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    count = text.count
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(map(count, marks)) > _JSON_VALUES:
        raise SlalomError(where, f"{len(text)} characters", f"a document has at most {_JSON_VALUES} values")
    try:
        refused = None if constants else refuse
        value = json.loads(text, object_pairs_hook=_mapping, parse_constant=refused, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        shown = text[:60] if isinstance(text, str) else text[:60].decode(errors="replace")
        raise SlalomError(where, shown, f"this is not valid JSON: {error}") from error
    if _is_deep(value):
        raise SlalomError(where, text[:60], f"nest values at most {DEEPEST} deep")
    return value


def _whole(text: str) -> int:
    found = int(text) if len(text) < 25 else 2**64
    if abs(found) >= 2**64:
        raise ValueError("a whole number of more than 64 bits")
    return found


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _is_deep(value: Any) -> bool:
    """Whether something lies more than DEEPEST values deep; looked at level by level, since that may be any depth."""
    level = [value]
    for _ in range(DEEPEST):
        inside = [part for part in level if isinstance(part, dict | list)]
        if not inside:
            return False
        level = [x for part in inside for x in (part.values() if isinstance(part, dict) else part)]
    return True


_PLAINLY = {
    "extra_forbidden": "no such key here; correct its spelling or remove it",
    "missing": "this key is missing",
    "int_type": "it must be a whole number",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text",
    "model_type": "it must be a mapping of keys to values",
}


def _said(fault: Any) -> str:
    """What pydantic says of one fault, as an instruction."""
    said = _PLAINLY.get(fault["type"], str(fault["msg"]).removeprefix("Value error, "))
    return re.sub(r"^(?:Input|String|List|Tuple|Dictionary) should ", "it must ", said)


def bad_input(source: str, error: ValidationError) -> SlalomError:
    """The first fault pydantic found, as the one exception users see.

    :param source: file or object the input came from, shown before the field
    """
    found = error.errors(include_url=False)
    first, value = found[0], found[0].get("input")
    place = [str(part) for part in first["loc"]]
    message = _said(first)
    if place and place[-1].startswith("literal["):  # one of several forms: the others have an error each
        *place, _ = place
        forms = [each for each in found if [str(part) for part in each["loc"][:-1]] == place]
        message = ", or ".join(dict.fromkeys(map(_said, forms)))
    where = ".".join(place)
    if value is None and not where:
        message = "the file is empty; it must be a mapping of keys to values"
    if not where and isinstance(value, dict):
        value = value.get("name", sorted(value))  # the whole content would say nothing
    return SlalomError(f"{source}: {where}" if where else source, value, message)

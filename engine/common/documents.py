"""The one reader of documents that a user names: YAML and JSON, with limits, and never a surprise.

What is read becomes plain data: mappings with text as keys, lists, text, numbers, truth values and null. A document is
refused before it is large in memory: an expansion bomb, a value nested beyond all sense, a number of thousands of
digits, a key that is there twice. Dates stay text. The message is one line with the file, and the line where there
is one. Files of lines are read by ``engine.common.lines``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field

from engine.common.regular import SMALL, check_regular
from engine.errors import SlalomError

__all__ = ["DEEPEST", "Name", "json_of", "read_json", "read_text", "read_yaml"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


#: A name that others get to see, on terminals and in reports: it may hold nothing that acts on them.
Name = Annotated[str, Field(max_length=200), AfterValidator(_printable)]

#: Values within values.
DEEPEST = 64
#: Bytes and values of a YAML file: its parser takes a second for so many.
_YAML_BYTES = 2**20
_YAML_VALUES = 50_000
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


def read_yaml(path: str | Path, field: str) -> Any:
    """A YAML file.

    :param field: who asked for it, for the message
    :raises SlalomError: as :func:`read_text`; or no YAML, a key twice, a key that is no text, an alias of something
        that holds it, too many values once aliases are followed, too deep, or a tag that makes objects
    """
    text = read_text(path, field, _YAML_BYTES)
    try:
        return yaml.load(text, Loader=_Plain)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        fix = f"this is not valid YAML: {error.problem}"
        raise SlalomError(f"{field}: {path}{line}", _line_of(text, mark), fix) from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise SlalomError(f"{field}: {path}", text[:60], f"this is not valid YAML: {error}") from error


def _line_of(text: str, mark: yaml.Mark | None) -> str:
    if mark is None:
        return text[:60]
    return text[max(mark.index - mark.column, 0) :][:60].partition("\n")[0]


class _Plain(yaml.SafeLoader):
    """YAML's safe loader without dates, sets and bytes, which refuses what would grow."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}  # values below a node, itself included, aliases followed

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node; what an alias stands for counts every time it is named."""
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node is not None and id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "an alias of what it stands in", mark)
            self._values += self._sizes[id(node)]
        else:
            before = self._values
            self._depth += 1
            self._values += 1
            if self._depth > DEEPEST:
                raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            self._sizes[id(node)] = self._values - before
        if self._values > _YAML_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {_YAML_VALUES} values", mark)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number that others can take as a float or as an index."""
        found: int = super().construct_yaml_int(node) if len(node.value) < 80 else 2**64
        if abs(found) >= 2**64:
            raise yaml.constructor.ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are texts, as they are written, each there once (plain YAML keeps the last)."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key.start_mark)
            if key.tag != _MERGE and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        for key, _ in node.value:
            key.tag = "tag:yaml.org,2002:str"
        return dict(super().construct_mapping(node, deep))


_MERGE = "tag:yaml.org,2002:merge"
_TAGS = ("null", "bool", "int", "float", "seq", "map", "str")
_Plain.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag.split(":")[-1] in _TAGS
}
_Plain.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)

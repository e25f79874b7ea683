"""YAML files, by the rules of ``documents``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from engine.common.documents import DEEPEST, read_text
from engine.errors import SlalomError

#: Bytes and values of a YAML file: its parser takes a second for so many.
_YAML_BYTES = 2**20
_YAML_VALUES = 50_000


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


def yaml_text(content: Any) -> str:
    """What :func:`read_yaml` reads as ``content`` again."""
    return str(yaml.dump(content, Dumper=_Writer, sort_keys=False, width=110))


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


class _Writer(yaml.SafeDumper):
    """YAML's safe dumper with quotes around what ``_Plain`` would not take for text."""


#: Numbers such as 1e6, which YAML 1.1 takes for text.
_POWER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
for _each in (_Plain, _Writer):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _POWER, list("-+.0123456789"))

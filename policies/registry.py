"""Finding a rule by its name: those of ``policies/rules`` and those of other packages.

A rule of ours is a file with a line ``RULE = Rule(...)``, named like the file. Files are looked at as
text, because importing a rule compiles it. Another package adds one through the entry-point group
``slalom.policies``; its entry is a :class:`Rule` or a plain class, see ``policies.rules.parts.python``.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from pathlib import Path

from engine.errors import SlalomError, no_such
from policies.rule import Rule

GROUP = "slalom.policies"


@cache
def _built_in() -> tuple[str, ...]:
    files = (Path(__file__).parent / "rules").glob("*.py")
    return tuple(sorted(f.stem for f in files if "\nRULE = " in f.read_text(encoding="utf-8")))


def _entries() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def names() -> list[str]:
    """Every rule that :func:`get` finds, sorted."""
    return sorted({*_built_in(), *_entries()})


def get(name: str) -> Rule:
    """The rule called ``name``; a rule of ours wins over another package's of the same name.

    :raises SlalomError: unknown name, or an entry that cannot be imported or is no policy
    """
    if name in _built_in():
        rule: Rule = importlib.import_module(f"policies.rules.{name}").RULE
        return rule
    entry = _entries().get(name)
    if entry is None:
        raise no_such("policy", name, names(), "a checkpoint folder")
    try:
        found = entry.load()
    except Exception as error:  # code of another package may fail in any way
        raise SlalomError(f"policy {name}", entry.value, f"its package does not load: {error!r}") from error
    if isinstance(found, Rule):
        return found
    from policies.rules.parts.python import python_rule

    return python_rule(found, name)


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """``"name:a=1,b=2"`` as ``("name", {"a": "1", "b": "2"})``.

    :raises SlalomError: a part without ``=``, or a parameter twice
    """
    name, _, rest = spec.partition(":")
    values: dict[str, str] = {}
    for part in rest.split(",") if rest.strip() else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key in values:
            raise SlalomError("policy", spec, "write NAME:parameter=value,parameter=value, each parameter once")
        values[key] = value
    return name.strip(), values

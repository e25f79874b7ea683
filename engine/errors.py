"""The one exception a user can cause, raised at the borders (CLI, YAML, HTTP, checkpoint, trace)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class SlalomError(ValueError):
    """Bad input: one line with the field, the value found and what to do. Commands turn it into exit code 2.

    :param field: where it is, e.g. ``"scenario.yaml: instances[2].role"``
    :param value: what was found there (shown shortened)
    :param fix: what the user can do about it
    """

    def __init__(self, field: str, value: Any, fix: str) -> None:
        self.field, self.value, self.fix = field, value, fix
        try:
            shown = repr(value)
        except (RecursionError, ValueError):  # nested beyond sense, or a number of thousands of digits
            shown = f"a {type(value).__name__}"
        super().__init__(f"{_line(field, 300)}: got {_line(shown, 120)}; {_line(fix, 1000)}")

    def __reduce__(self) -> tuple[type[SlalomError], tuple[str, Any, str]]:
        return type(self), (self.field, self.value, self.fix)  # raised in another process, told here


def _line(text: str, most: int) -> str:
    """One line that does nothing to a terminal: the field may be a path, the fix may quote a parser or a file."""
    joined = " ".join(text[: 2 * most].split()) if "\n" in text else text[: 2 * most]
    plain = joined if joined.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def no_such(field: str, name: str, known: Iterable[str], other: str = "") -> SlalomError:
    """The answer to a name that nobody knows: the one that was probably meant, then all of them.

    :param other: what may be given instead of a name, e.g. ``"a YAML file"``
    """
    from difflib import get_close_matches

    names = list(known)
    near = get_close_matches(name, names, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return SlalomError(field, name, f"{meant}give {other + ', or ' if other else ''}one of: {', '.join(names)}")


class PromptTooLong(SlalomError):
    """Prompt and answer would not fit. Clients know this one by its code, ``context_length_exceeded``.

    :param limit: tokens that prompt and answer together may have
    """

    def __init__(self, field: str, value: Any, limit: int) -> None:
        super().__init__(field, value, f"prompt and answer together may have {limit} tokens here")
        self.limit = limit

    def __reduce__(self) -> tuple[type[SlalomError], tuple[str, Any, Any]]:
        return type(self), (self.field, self.value, self.limit)

"""A name as the type of a field."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


#: A name that others get to see, on terminals and in reports: it may hold nothing that acts on them.
Name = Annotated[str, Field(max_length=200), AfterValidator(_printable)]

"""The one exception a user can cause, raised at the borders (CLI, YAML, HTTP, checkpoint, trace)."""

from __future__ import annotations

from typing import Any

__all__ = ["PromptTooLong", "SlalomError"]


class SlalomError(ValueError):
    """Bad input: names the field, the value found and what to do. Commands turn it into exit code 2.

    :param field: where it is, e.g. ``"scenario.yaml: instances[2].role"``
    :param value: what was found there (shown shortened)
    :param fix: what the user can do about it
    """

    def __init__(self, field: str, value: Any, fix: str) -> None:
        self.field, self.value, self.fix = field, value, fix
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}: got {shown}; {fix}")

    def __reduce__(self) -> tuple[type[SlalomError], tuple[str, Any, str]]:
        return type(self), (self.field, self.value, self.fix)  # raised in another process, told here


class PromptTooLong(SlalomError):
    """Prompt and answer would not fit. Clients know this one by its code, ``context_length_exceeded``.

    :param limit: tokens that prompt and answer together may have
    """

    def __init__(self, field: str, value: Any, limit: int) -> None:
        super().__init__(field, value, f"prompt and answer together may have {limit} tokens here")
        self.limit = limit

    def __reduce__(self) -> tuple[type[SlalomError], tuple[str, Any, Any]]:
        return type(self), (self.field, self.value, self.limit)

"""Server-sent events of an OpenAI-compatible engine: taken apart, counted, and put together to a whole answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

_JOINED = ("content", "text", "reasoning_content", "reasoning", "refusal", "arguments")


class Splitter:
    """Cuts bytes into events, whatever parts they come in."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> Iterator[bytes]:
        """The events that ``data`` completes, each without the empty line that ends it."""
        data = self._rest + data
        if b"\r" in data:  # nobody's JSON holds one unescaped
            cut = data.endswith(b"\r")  # its newline may come later
            data = data.replace(b"\r\n", b"\n")
            if cut and b"\n\n" not in data:
                self._rest = data
                return
        *events, self._rest = data.split(b"\n\n")
        yield from (event for event in events if event.strip())


def payload(event: bytes) -> bytes | None:
    """The data of an event; None where it has none (a comment that keeps the connection alive)."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def n_tokens(chunk: dict[str, Any], before: int) -> int:
    """Tokens of the answer up to and with ``chunk``: by its usage where it says, else one for each piece of text.

    A piece may be empty (a token whose text waits for the next) except where it only opens or closes the answer.
    """
    usage = chunk.get("usage")
    if usage and isinstance(usage.get("completion_tokens"), int):
        return max(before, usage["completion_tokens"])
    found = 0
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            found += bool(choice.get("text")) or (choice.get("text") == "" and choice.get("finish_reason") is None)
            continue
        text = (
            delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
        )
        found += bool(text) or (delta.get("content") == "" and "role" not in delta and not choice.get("finish_reason"))
    return before + found


def asks_usage_only(chunk: dict[str, Any]) -> bool:
    """Whether ``chunk`` is the last one of a stream with ``include_usage``, which only counts."""
    return not chunk.get("choices") and bool(chunk.get("usage"))


class Whole:
    """Chunks of a stream, put together to what the engine would have answered without one."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def push(self, chunk: dict[str, Any]) -> None:
        """Take the next chunk."""
        self._head |= {k: v for k, v in chunk.items() if k != "choices" and (v is not None or k not in self._head)}
        for choice in chunk.get("choices") or ():
            into = self._choices.setdefault(choice.get("index", 0), {})
            for key, value in choice.items():
                if key == "delta":
                    _merge(into.setdefault("message", {}), value)
                else:
                    _merge(into, {key: value})

    def body(self) -> bytes:
        """The answer, as JSON."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choices[k] for k in sorted(self._choices)]
        for choice in choices:
            for call in choice.get("message", {}).get("tool_calls") or ():
                call.pop("index", None)
            if self._chat:
                choice.setdefault("message", {}).setdefault("content", None)
        return orjson.dumps(self._head | {"object": kind, "choices": choices})


def _merge(into: dict[str, Any], piece: dict[str, Any]) -> None:
    """Add ``piece`` of a stream to what came before: texts grow, lists grow, everything else is replaced."""
    for key, value in piece.items():
        before = into.get(key)
        if value is None and before is not None:
            continue
        if key in _JOINED and isinstance(before, str) and isinstance(value, str):
            into[key] = before + value
        elif key == "tool_calls" and isinstance(value, list):
            calls = into[key] = before if isinstance(before, list) else []
            for call in value:
                known = next((c for c in calls if c.get("index") == call.get("index")), None)
                if known is None:
                    calls.append(known := {})
                _merge(known, call)
        elif isinstance(before, dict) and isinstance(value, dict):
            _merge(before, value)
        elif isinstance(before, list) and isinstance(value, list):
            before.extend(value)
        elif key == "role" and before:
            continue
        else:
            into[key] = value

"""How many tokens a prompt has, for a router that has no tokenizer: from its characters, by what engines counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_FIRST_GUESS = 0.25  # tokens per character of English text
_SMOOTH = 0.05


def token_ids(prompt: Any) -> list[int] | None:
    """The ids of a prompt that is given as such, or as a list with one such; None for any other."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    return None


def letters(value: Any) -> int:
    """Characters of all texts in a part of a request's body (ids count as one token's worth each)."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(letters(inner) for key, inner in value.items() if key != "image_url")
    if isinstance(value, list):
        return sum(letters(inner) for inner in value)
    return int(isinstance(value, int)) * int(1 / _FIRST_GUESS)


def marks(prompt: Any) -> np.ndarray:
    """Numbers that stand for the beginning of a prompt where its token ids are not known, int64: four bytes of its text
    each, about as many as tokens. Prompts that begin alike do so in these too, which is all that a prefix cache asks.
    """
    text = b"".join(_texts(prompt))
    return np.frombuffer(text[: len(text) // 4 * 4], "<u4").astype(np.int64)


def _texts(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass") + b"\0"
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


class Lengths:
    """Tokens per character, of chats and of plain prompts, learnt from the usage that engines report."""

    def __init__(self) -> None:
        self._ratio = {False: _FIRST_GUESS, True: _FIRST_GUESS}

    def guess(self, n_letters: int, *, chat: bool) -> int:
        """Tokens of a prompt of so many characters, at least one."""
        return max(round(n_letters * self._ratio[chat]), 1)

    def learn(self, n_letters: int, tokens: int, *, chat: bool) -> None:
        """An engine counted ``tokens`` in a prompt of so many characters."""
        if n_letters >= 16 and tokens > 0:
            self._ratio[chat] += _SMOOTH * (tokens / n_letters - self._ratio[chat])

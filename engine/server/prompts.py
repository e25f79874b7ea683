"""From what clients write to token ids, beside the event loop: long texts take threads of their own, or are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import PromptTooLong
from engine.model.forms import Form, Forms, Progress
from engine.model.tokenizer import Tokenizer

_SHORT = 1024  # characters that take less time than handing them over
_LOOKED_AT = 8  # characters for each token that fits: of a long text so many are tried first
_THREADS = 2


class Prompts:
    """:param max_tokens: a prompt with as many tokens or more is refused
    :param vocab: tokens that the model knows
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, vocab: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._forms = Forms(tokenizer, vocab)
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizer")

    async def text(self, text: str) -> list[int]:
        """Token ids of a plain prompt.

        :raises SlalomError: it is too long, or no text
        """
        return await self._beside(len(text), lambda: self._encode(text, special=True))

    async def chat(self, messages: Sequence[dict[str, Any]], names: dict[str, Any]) -> list[int]:
        """Token ids of a conversation; ``names`` are for the chat template.

        :raises SlalomError: it is too long, or the template refuses it
        """

        def work() -> list[int]:
            return self._encode(self._tokenizer.render(messages, **names), special=False)

        plain = not names and all(len(message) == 2 for message in messages)
        size = sum(len(message["content"]) for message in messages) + 64 * len(messages)
        return await self._beside(size if plain else _SHORT, work)

    async def form(self, form: Form | None) -> Progress | None:
        """The beginning of an answer of ``form``.

        :raises SlalomError: no such form
        """
        if form is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._forms.begin, form)

    def close(self) -> None:
        """No more prompts come."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _beside(self, size: int, work: Callable[[], list[int]]) -> list[int]:
        if size < _SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        """Of a text far too long only the beginning is tokenised: its first tokens alone are too many."""
        tried = _LOOKED_AT * self._max_tokens
        if len(text) > 2 * tried:
            n = len(self._tokenizer.encode(text[:tried], special=special))
            if n > self._max_tokens + 64:  # the last token may be cut, and special ones were counted
                raise PromptTooLong("prompt", f"more than {n} tokens", self._max_tokens)
        return self._tokenizer.encode(text, special=special)

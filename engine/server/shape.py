"""Answers in OpenAI's words: chunks of a stream, whole ones, and what the model thought of each token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from engine.live.request import Delta, Request
from engine.model.sampling import Logprobs
from engine.model.tokenizer import Tokenizer
from engine.server.protocol import Usage


class Shape:
    """The JSON of one kind of answer.

    :param request: what is answered
    :param chat: chat completion, else plain completion
    :param echo: stands before the text of a plain completion
    """

    def __init__(self, request: Request, model: str, tokenizer: Tokenizer, *, chat: bool, echo: str = "") -> None:
        self._chat, self._echo, self._tokenizer, self._request = chat, echo, tokenizer, request
        self._offset = 0  # of the next token's text in that of all tokens
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.id}",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, delta: Delta, *, first: bool = False) -> dict[str, Any]:
        """One event of a stream."""
        text = delta.text if self._chat or not first else self._echo + delta.text
        logprobs = self._logprobs([delta], self._prompt() if first else [])
        if self._chat:
            content = ({"role": "assistant"} if first else {}) | {"content": text}
            choice: dict[str, Any] = {"index": 0, "delta": content, "logprobs": logprobs, "finish_reason": delta.finish}
        else:
            choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": delta.finish}
        return self._head | {"object": self._kind(".chunk"), "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last event of a stream whose client asked for usage."""
        return self._head | {"object": self._kind(".chunk"), "choices": [], "usage": usage.body()}

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs(deltas, self._prompt())
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": deltas[-1].finish}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": self._echo + text}
        return self._head | {"object": self._kind(""), "choices": [choice], "usage": usage.body()}

    def _prompt(self) -> list[tuple[int, Logprobs | None]]:
        """The prompt's tokens and what the model thought of them, where the request asked."""
        return list(zip(self._request.tokens.tolist(), self._request.prompt_logprobs, strict=False))

    def _logprobs(
        self, deltas: Sequence[Delta], prompt: Sequence[tuple[int, Logprobs | None]]
    ) -> dict[str, Any] | None:
        """Of ``prompt`` and the tokens in ``deltas``, in the words of this kind of answer; None where they have none.

        Of a prompt's first token nothing is known.
        """
        said = [(delta.token, delta.logprobs) for delta in deltas if delta.token is not None and delta.logprobs]
        scored = [*prompt, *said]
        if not scored:
            return None
        if self._chat:
            each = [
                self._named(token, found.token) | {"top_logprobs": [self._named(*other) for other in found.top]}
                for token, found in said
            ]
            return {"content": each}
        texts = [self._text(token) for token, _ in scored]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [found and found.token for _, found in scored],
            "tokens": texts,
            "top_logprobs": [
                {self._text(other): log for other, log in ((token, found.token), *found.top)}
                if found and found.top
                else None
                for token, found in scored
            ],
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    def _kind(self, suffix: str) -> str:
        return f"chat.completion{suffix}" if self._chat else "text_completion"

"""A request as the live engine sees it: its tokens, what is made of them, and who listens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from engine.live.fate import ABORT, ERROR, SERVER, SHED, UNPLACEABLE
from engine.model.forms import Progress
from engine.model.sampling import Logprobs, SamplingParams
from engine.model.stopping import Generation
from engine.model.tokenizer import Tokenizer

__all__ = ["ABORT", "ERROR", "SHED", "UNPLACEABLE", "Delta", "Request", "Ticket"]

_numbers = itertools.count(1)
_UNKNOWN = np.zeros(0, np.int64)


@dataclass(slots=True)
class Delta:
    """What became of a request since the last one.

    :param token: its new token; None when it ended without one
    :param text: text that is now certain (may lag behind the tokens, and may be empty)
    :param finish: why it ended, None while it goes on
    :param logprobs: what the model thought of it, where the request asked

    Not a named tuple, of which making and reading take longer: there is one for every token.
    """

    token: int | None
    text: str
    finish: str | None
    logprobs: Logprobs | None = None


class Ticket:
    """What a scheduler's book knows of a request, wherever it is computed.

    :param n_prompt: tokens of the prompt
    :param max_tokens: tokens that it gives at most
    :param sink: receives every :class:`Delta`, in the engine's thread; must not block
    :param cls: SLO class
    :param ttft_slo: own TTFT target in ticks, 0 for that of the class; ``tpot_slo`` likewise
    :param priority: prompts of a lower value start first
    """

    def __init__(
        self,
        n_prompt: int,
        max_tokens: int,
        sink: Callable[[Delta], None],
        *,
        cls: int = 0,
        ttft_slo: int = 0,
        tpot_slo: int = 0,
        priority: int = 0,
    ) -> None:
        self.number = next(_numbers)
        self.n_prompt, self.max_tokens, self.sink, self.cls = n_prompt, max_tokens, sink, cls
        self.ttft_slo, self.tpot_slo, self.priority = ttft_slo, tpot_slo, priority
        self.tokens = _UNKNOWN  # token ids, as far as they are known
        self.handed_in = 0  # when, a stamp of the engine's clock
        self.slot = -1  # its record in the cluster while it is there
        self.doomed: str | None = None  # why it is being ended from outside
        self.due = 0  # with more tokens than this there is something to do: a prefix hash to make, or it has ended
        self.cached_tokens = 0  # of the prompt, found in the prefix cache
        self.ended = False
        self.reuses = True  # KV of an equal beginning will do
        self.finish: str | None = None  # why its own output ended (stop or length)

    @property
    def id(self) -> str:
        """What clients see, unique across processes: 17 of them later, ``1f3a9c02-17``."""
        return f"{SERVER}-{self.number}"


class Request(Ticket):
    """A request to a model here. ``options`` as :class:`Ticket`.

    :param prompt: token ids
    :param params: ``max_tokens`` is cut to what the engine can hold
    :param form: that the answer is to have, at its beginning
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        sink: Callable[[Delta], None],
        *,
        form: Progress | None = None,
        **options: int,
    ) -> None:
        super().__init__(len(prompt), params.max_tokens, sink, **options)
        self._form = form
        self._plain = form is None and not params.penalises  # what was said does not matter to what comes next
        if not self._plain:  # counts of its own: callers use their parameters again
            params = replace(params, counts={}, allowed=None if form is None else form.allowed)
        self.params = params
        self.n_tokens = len(prompt)
        self.tokens = np.zeros(len(prompt) + params.max_tokens, np.int64)
        self.tokens[: len(prompt)] = prompt
        self.newest = -1  # its last token so far, which its next decode step computes
        self.transfer_failures = 0
        self._generation = Generation(params, tokenizer)
        self.reuses = params.prompt_logprobs is None
        #: What the model thought of each token of the prompt, where the request asked; nothing of the first.
        self.prompt_logprobs: list[Logprobs | None] = [None] * (0 if self.reuses else len(prompt))

    def push(self, token: int, logprobs: Logprobs | None = None) -> Delta:
        """Take the next sampled token. Only the lane that runs the request calls this."""
        text = self._generation.push(token)
        if not self._plain:
            text += self._note(token)
        self.tokens[self.n_tokens] = self.newest = token
        self.n_tokens += 1
        finish = self._generation.finish
        if finish is None:
            return Delta(token, text, None, logprobs)
        self.due, self.finish = -1, str(finish)
        return Delta(token, text, self.finish, logprobs)

    def scored(self, start: int, count: int) -> list[int]:
        """Tokens of the prompt that follow ``count`` others, and whose log-probabilities the request wants."""
        return [] if self.reuses else self.tokens[start + 1 : min(start + count + 1, self.n_prompt)].tolist()

    def _note(self, token: int) -> str:
        """Keep what the choice of the next token depends on; text that this has made certain."""
        counts = self.params.counts
        counts[token] = counts.get(token, 0) + 1
        if self._form is None or self._generation.finish is not None:
            return ""
        self._form.push(token)
        return self._generation.complete() if self._form.over else ""

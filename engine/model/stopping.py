"""One request's output as it grows: text that is safe to show, and when it ends."""

from __future__ import annotations

from enum import StrEnum

from engine.model.sampling import SamplingParams
from engine.model.tokenizer import Tokenizer


class Finish(StrEnum):
    """Why an output ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class Generation:
    """Feed it each sampled token; it says what text became certain and whether that was the end."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.finish: Finish | None = None
        self.n_tokens = 0
        self._stop, self._min_tokens, self._max_tokens = params.stop, params.min_tokens, params.max_tokens
        self._ends = set(params.stop_token_ids) | (set() if params.ignore_eos else tokenizer.eos_ids)
        self._detokenizer = tokenizer.detokenizer()
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Text to append to the output; sets ``finish`` when this token was the last."""
        assert self.finish is None, "a token after the end"
        self.n_tokens += 1
        may_stop = self.n_tokens > self._min_tokens
        if may_stop and token in self._ends:
            return self._end(Finish.STOP)
        if not self._stop and self.n_tokens < self._max_tokens:
            return self._detokenizer.push(token)  # nearly every token of nearly every request
        self._held += self._detokenizer.push(token)
        cut = self._find_stop() if may_stop else -1
        if cut >= 0:
            self.finish, text, self._held = Finish.STOP, self._held[:cut], ""
            return text
        if self.n_tokens >= self._max_tokens:
            return self._end(Finish.LENGTH)
        keep = self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def complete(self) -> str:
        """The output has the form it was to have; returns the text that was held back."""
        return self._end(Finish.STOP)

    def _end(self, finish: Finish) -> str:
        self.finish = finish
        text, self._held = self._held + self._detokenizer.flush(), ""
        return text

    def _find_stop(self) -> int:
        """Where the first stop string begins, or -1."""
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found, default=-1)

    def _possible_stop(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

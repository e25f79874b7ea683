"""Answers of a form that a request prescribes: JSON of a schema, a regular expression, one of several texts.

Which tokens may come next is llguidance's work (Microsoft, MIT; the extra ``structured``). Here its masks become a part
of a request's sampling parameters, so that nothing else needs to know.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import SlalomError
from engine.model.tokenizer import Tokenizer

#: Between the parts of a JSON text: nothing, a space, or a new line with its indentation. A model that may go on with
#: white space for ever does so at times.
_SPACE = r"( ?|\n {0,32})"
_EXTRA = "install the extra: pip install 'slalom[structured]'"


@dataclass(frozen=True)
class Form:
    """:param kind: what ``content`` is: a JSON schema as text, a regular expression, or choices as a JSON list
    :param field: where the request asked for it, for messages
    """

    kind: Literal["json", "regex", "choice"]
    content: str
    field: str


class Progress:
    """How far one answer has come in its form. Only the lane that runs the request goes on with it.

    :ivar allowed: bit k, counted from the lowest of byte 0, says whether token k may come next; changed in place
    :ivar over: the form is complete: nothing may follow
    """

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self.allowed = bytearray(-(-vocab // 8))
        self.over = False
        self._look()

    def push(self, token: int) -> None:
        """Take the next token.

        :raises RuntimeError: it does not fit, or the grammar has become too complex to go on
        """
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the form cannot go on: {self._matcher.get_error()[:200]}")
        self._look()

    def _look(self) -> None:
        self.over = bool(self._matcher.is_stopped())
        if not self.over:
            self.allowed[:] = self._matcher.compute_bitmask()[: len(self.allowed)]
        if self._matcher.is_error():
            raise RuntimeError(f"the form cannot go on: {self._matcher.get_error()[:200]}")


class Forms:
    """The forms of one model's tokens. Any thread may ask.

    :param vocab: tokens that the model knows
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab
        self._lock = threading.Lock()
        self._tokens: Any = None

    def begin(self, form: Form) -> Progress:
        """An answer of ``form`` begins. Takes milliseconds, the first time a second.

        :raises SlalomError: no such schema or expression, or llguidance is not there
        """
        try:
            import llguidance
        except ImportError as error:
            raise SlalomError(form.field, form.kind, _EXTRA) from error
        with self._lock:
            if self._tokens is None:
                ends = sorted(self._tokenizer.eos_ids)
                self._tokens = llguidance.LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab, eos_token=ends)
        matcher: Any = llguidance.LLMatcher
        try:
            if form.kind == "json":
                grammar = matcher.grammar_from_json_schema(form.content, overrides={"whitespace_pattern": _SPACE})
            else:
                grammar = matcher.grammar_from_regex(_expression(form))
            found = matcher(self._tokens, grammar, log_level=0)
            if found.is_error():
                raise ValueError(found.get_error())
            return Progress(found, self._vocab)
        except (ValueError, RuntimeError) as error:
            raise SlalomError(form.field, form.content[:80], " ".join(str(error).split())[:300]) from error


def _expression(form: Form) -> str:
    if form.kind == "regex":
        return form.content
    return "|".join(f"({re.escape(choice)})" for choice in json.loads(form.content))

"""What clients send and get, in OpenAI's words. Fields nobody here knows are ignored: routers add their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.errors import SlalomError
from engine.model.forms import Form
from engine.model.sampling import MOST_LOGPROBS, SamplingParams
from engine.server.forms import form_of
from engine.server.unserved import refuse_unserved

#: Header names of the two targets, in milliseconds; the first one present counts.
_HEADERS = {
    "ttft_s": ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
    "tpot_s": ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
}


T = TypeVar("T")
_Stop = Annotated[str, Field(max_length=1000)]  # looked for in the text after every token
_Few = Annotated[list[T], Field(max_length=16)]  # several prompts are refused in any case


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Lenient):
    """``include_usage``: a last chunk says how many tokens there were."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Generate(_Lenient):
    """What both kinds of request share.

    ``priority``: prompts of a lower value start first on the instance where they are placed (vLLM's sense; SGLang's
    default is the other way round). ``slo_class``: one of the server's classes, as the header ``x-slo-class``.
    """

    model: Annotated[str, Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=1024)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=256)] | None = None
    ignore_eos: bool = False
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Annotated[int, Field(gt=-(2**31), lt=2**31)] = 0
    slo_class: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_served(cls, body: Any) -> Any:
        if isinstance(body, dict):
            refuse_unserved(body, chat="messages" in cls.model_fields)
        return body

    def limit(self) -> int | None:
        """Tokens to generate at most, None when the client leaves it open."""
        return self.max_tokens

    def form(self) -> Form | None:
        """The form that the answer is to have; None for any.

        :raises SlalomError: asked for in a way that is not known
        """
        found = form_of(self.response_format, self.structured_outputs)
        if found is not None and self.min_tokens:
            raise SlalomError("min_tokens", self.min_tokens, "a form says itself when the answer ends: leave one out")
        return found

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to name at each place, None for no logprobs at all.

        :raises SlalomError: asked for in a way that means nothing
        """
        return None

    def sampling(self, default_tokens: int) -> SamplingParams:
        """The request's sampling parameters; OpenAI's defaults where it says nothing.

        :raises SlalomError: a value out of range
        """
        given: dict[str, Any] = {}
        if self.logit_bias:
            given["logit_bias"] = tuple(self.logit_bias.items())
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.top_k is not None and self.top_k > 0:  # some clients send -1 for "all"
            given["top_k"] = self.top_k
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        limit = self.limit() or default_tokens
        return SamplingParams(
            max_tokens=limit,
            min_tokens=min(self.min_tokens, limit),
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.wanted_logprobs(),
            **given,
        )


class CompletionRequest(_Generate):
    """``POST /v1/completions``: a text, its token ids, or a list with one of them."""

    prompt: str | list[int] | _Few[str] | _Few[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS, strict=True)] | Literal[False] | None = None
    echo: bool = False

    def wanted_logprobs(self) -> int | None:
        """As in the base class; with ``echo`` those of the prompt's tokens come first."""
        return None if self.logprobs is False else self.logprobs

    def sampling(self, default_tokens: int) -> SamplingParams:
        """As in the base class.

        :raises SlalomError: as there, or no token is asked for and no echo either
        """
        if self.max_tokens == 0 and not self.echo:
            raise SlalomError("max_tokens", 0, "ask for a token at least, or for the prompt with echo")
        params = super().sampling(default_tokens if self.max_tokens is None else 1)
        return replace(params, prompt_logprobs=params.logprobs) if self.echo else params

    def only_prompt(self) -> str | list[int]:
        """The one prompt.

        :raises SlalomError: several, or none
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if prompt and isinstance(prompt[0], int):
            return prompt
        if len(prompt) != 1:
            raise SlalomError("prompt", f"{len(prompt)} prompts", "send one request for each prompt")
        return prompt[0]  # type: ignore[return-value]


class ContentPart(_Lenient):
    """Part of a message; only text can be served."""

    type: Literal["text"]
    text: str


class Message(_Lenient):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[ContentPart] | None = None

    def plain(self) -> dict[str, Any]:
        """The message with its content as one string, for the chat template."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(_Generate):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def wanted_logprobs(self) -> int | None:
        """As in the base class."""
        if self.top_logprobs and not self.logprobs:
            raise SlalomError("top_logprobs", self.top_logprobs, "set logprobs to true as well")
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def template_names(self) -> dict[str, Any]:
        """What the chat template may name beside the messages.

        :raises SlalomError: names that are fields of the request itself
        """
        names = self.chat_template_kwargs or {}
        for taken in ("self", "messages", "tools"):
            if taken in names:
                raise SlalomError("chat_template_kwargs", taken, "send it as a field of the request")
        return names | ({"tools": self.tools} if self.tools else {})


class Targets(BaseModel):
    """A request's own targets, seconds; None for those of its class."""

    ttft_s: float | None = None
    tpot_s: float | None = None


def targets_of(headers: Mapping[str, str]) -> Targets:
    """Targets from request headers.

    :raises SlalomError: not a positive number of milliseconds
    """
    found: dict[str, float] = {}
    for field, names in _HEADERS.items():
        name = next((name for name in names if name in headers), None)
        if name is None:
            continue
        try:
            milliseconds = float(headers[name])
        except ValueError:
            milliseconds = -1.0
        if not 0.0 < milliseconds <= 86_400_000.0:
            raise SlalomError(name, headers[name], "give a positive number of milliseconds")
        found[field] = milliseconds * 1e-3
    return Targets(**found)


def class_of(headers: Mapping[str, str], field: str | None, names: Sequence[str]) -> int:
    """The SLO class that a request names, the first one when it names none.

    :param field: ``slo_class`` of its body; the header counts where both are there
    :raises SlalomError: no such class
    """
    name = headers.get("x-slo-class", field)
    if name is None:
        return 0
    if name not in names:
        raise SlalomError("slo_class", name, f"this server has {', '.join(names)}")
    return list(names).index(name)


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        """As OpenAI shows it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def error_body(message: str, kind: str, code: int | str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it; ``param``: the field that is wrong."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

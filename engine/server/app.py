"""The application: routes, errors and life of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from engine.core.policy import Policy
from engine.live.engine import Engine
from engine.live.request import Delta
from engine.model.forms import Progress
from engine.server.base import NoSuchModel, base_app
from engine.server.prompts import Prompts
from engine.server.protocol import ChatRequest, CompletionRequest, Usage, class_of, targets_of
from engine.server.refusals import failure, hung_up, refusal
from engine.server.shape import Shape
from engine.server.streams import Mailroom, Stream, unanswered

_log = logging.getLogger("slalom.server")
_DEFAULT_CHAT_TOKENS = 512
_DEFAULT_TOKENS = 16  # OpenAI's default for plain completions
_CLIENT_GONE = 499  # nobody reads it; for the access log
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def create_app(
    engine: Engine,
    model: str,
    *,
    classes: Sequence[str] = ("default",),
    load_policy: Callable[[str], Policy] | None = None,
    drain_s: float = 30.0,
    api_key: str = "",
) -> FastAPI:
    """The HTTP application around a started engine; it closes the engine when the server stops.

    :param model: name shown to clients
    :param classes: names of the cluster's SLO classes, in order; requests that name none belong to the first
    :param load_policy: finds a policy for ``POST /admin/policy``; without it that route refuses
    :param drain_s: open requests get this long to end at shutdown
    :param api_key: what clients must carry, see :mod:`engine.server.keys`; empty: nothing
    """
    prompts = Prompts(engine.tokenizer, engine.max_tokens, engine.vocab_size)

    @asynccontextmanager
    async def inside(app: FastAPI) -> AsyncIterator[None]:
        app.state.mailroom = Mailroom(engine, asyncio.get_running_loop())
        yield
        prompts.close()

    app, _ = base_app(engine, model, inside, classes=classes, load_policy=load_policy, drain_s=drain_s, api_key=api_key)
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "slalom"}
    card |= {"max_model_len": engine.max_tokens}

    def check_model(name: str | None) -> None:
        if name and name != model:
            raise NoSuchModel(name)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model)
        prompt = body.only_prompt()
        tokens = await prompts.text(prompt) if isinstance(prompt, str) else prompt
        form = await prompts.form(body.form())
        return await _answer(engine, model, body, tokens, http, form, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        check_model(body.model)
        messages = [message.plain() for message in body.messages]
        tokens = await prompts.chat(messages, body.template_names())
        form = await prompts.form(body.form())
        return await _answer(engine, model, body, tokens, http, form, chat=True)

    return app


async def _answer(
    engine: Engine,
    model: str,
    body: CompletionRequest | ChatRequest,
    tokens: list[int],
    http: Request,
    form: Progress | None,
    *,
    chat: bool,
) -> Response:
    """Serve one request, streamed or whole. The status is known once its first token, or its end, is."""
    params = body.sampling(_DEFAULT_CHAT_TOKENS if chat else _DEFAULT_TOKENS)
    stream = Stream(engine, http.app.state.mailroom)
    cls = class_of(http.headers, body.slo_class, http.app.state.classes)
    stream.submit(tokens, params, targets_of(http.headers), cls=cls, priority=body.priority, form=form)
    assert stream.request is not None
    echo = _echoed(body, engine)
    shape = Shape(stream.request, model, engine.tokenizer, chat=chat, echo=echo)
    gone = asyncio.ensure_future(hung_up(http))
    try:
        first = await _or_hang_up(stream, gone)
        if body.max_tokens == 0 and first is not None and not unanswered(first):  # the prompt alone was wanted
            first, stream.n_tokens = Delta(None, "", "length"), 0
        if first is not None and body.stream and not unanswered(first):
            return StreamingResponse(_events(stream, first, shape, body), media_type="text/event-stream")
        deltas, delta = [], first
        while delta is not None:
            deltas.append(delta)
            if delta.finish is not None:
                usage = _usage(stream)
                return refusal(delta.finish) if unanswered(delta) else JSONResponse(shape.whole(deltas, usage))
            delta = await _or_hang_up(stream, gone)
        return Response(status_code=_CLIENT_GONE)
    except BaseException:
        stream.close()
        raise
    finally:
        gone.cancel()


def _echoed(body: CompletionRequest | ChatRequest, engine: Engine) -> str:
    """The prompt as text where the answer is to begin with it."""
    if not isinstance(body, CompletionRequest) or not body.echo:
        return ""
    prompt = body.only_prompt()
    return prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)


async def _or_hang_up(stream: Stream, gone: asyncio.Future[None]) -> Delta | None:
    """The next delta; None, and the request is aborted, when the client hung up first."""
    coming = asyncio.ensure_future(stream.next())
    either: set[asyncio.Future[Any]] = {coming, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            return coming.result()
        stream.close()
        return None
    finally:
        coming.cancel()


def _usage(stream: Stream) -> Usage:
    assert stream.request is not None
    return Usage(
        prompt_tokens=stream.request.n_prompt,
        completion_tokens=stream.n_tokens,
        cached_tokens=stream.request.cached_tokens,
    )


async def _events(
    stream: Stream, first: Delta, shape: Shape, body: CompletionRequest | ChatRequest
) -> AsyncIterator[str]:
    """Server-sent events. Closed by the server when the client hangs up, which aborts the request."""
    options = body.stream_options
    begun = False
    try:
        async for delta in stream.rest(first):
            if unanswered(delta):
                yield _event(failure(delta.finish))
                yield "data: [DONE]\n\n"
                return
            # One for each token, also where its text waits for the next: clients count events.
            chunk = shape.chunk(delta, first=not begun)
            if options and options.continuous_usage_stats:
                chunk["usage"] = _usage(stream).body()
            yield _event(chunk)
            begun = True
        if options and options.include_usage:
            yield _event(shape.usage_chunk(_usage(stream)))
        yield "data: [DONE]\n\n"
    finally:
        stream.close()


def _event(data: dict[str, Any]) -> str:
    """One event. Line separators that JSON allows in a string are escaped: many clients split lines at them."""
    text = json.dumps(data, ensure_ascii=False)
    return f"data: {text if text.isascii() else text.translate(_LINE_ENDS)}\n\n"

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
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from engine.core.policy import Policy
from engine.errors import PromptTooLong, SlalomError
from engine.live.engine import Engine, Overloaded, Unavailable
from engine.live.request import ABORT, SHED, UNPLACEABLE, Delta
from engine.model.forms import Progress
from engine.server.admin import add_admin
from engine.server.dashboard import add_dashboard
from engine.server.door import quiet_accepting
from engine.server.ending import say_goodbye
from engine.server.keys import KeyCheck
from engine.server.limits import BodyLimit, most_bytes
from engine.server.metrics import Metrics
from engine.server.prompts import Prompts
from engine.server.protocol import ChatRequest, CompletionRequest, Usage, class_of, error_body, targets_of
from engine.server.shape import Shape
from engine.server.streams import Mailroom, Stream, unanswered

__all__ = ["create_app"]

_log = logging.getLogger("slalom.server")
_DEFAULT_CHAT_TOKENS = 512
_DEFAULT_TOKENS = 16  # OpenAI's default for plain completions
_CLIENT_GONE = 499  # nobody reads it; for the access log
_RETRY_AFTER = {"Retry-After": "1"}
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
    metrics, prompts = Metrics(engine, model, classes), Prompts(engine.tokenizer, engine.max_tokens, engine.vocab_size)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        quiet_accepting(asyncio.get_running_loop())
        app.state.mailroom, app.state.classes = Mailroom(engine, asyncio.get_running_loop()), list(classes)
        ending = asyncio.create_task(say_goodbye(engine, app.state, drain_s))
        yield
        ending.cancel()
        await asyncio.to_thread(engine.close, drain_s)
        prompts.close()

    app = FastAPI(title="Slalom", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=most_bytes(engine.max_tokens))
    if api_key:
        app.add_middleware(KeyCheck, key=api_key)  # added last, asked first
    _add_errors(app, engine)
    add_admin(app, engine, load_policy)
    add_dashboard(app, engine, model, metrics.met)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:  # in the event loop: no queue for threads delays it
        return Response(status_code=200 if engine.accepting else 503)

    @app.api_route("/metrics", methods=["GET", "HEAD"])  # AIPerf probes with HEAD
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "slalom"}
    card |= {"max_model_len": engine.max_tokens}

    def check_model(name: str | None) -> None:
        if name and name != model:
            raise _NoSuchModel(name)

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


class _NoSuchModel(Exception):
    """The model that a request names is not the one served here."""


def _add_errors(app: FastAPI, engine: Engine) -> None:
    bad = "invalid_request_error"

    @app.exception_handler(SlalomError)
    async def bad_value(_: Request, error: SlalomError) -> JSONResponse:
        code: int | str = "context_length_exceeded" if isinstance(error, PromptTooLong) else 400
        return JSONResponse(error_body(str(error), bad, code, error.field), 400)

    @app.exception_handler(_NoSuchModel)
    async def no_such_model(_: Request, error: _NoSuchModel) -> JSONResponse:
        text = f"model: {str(error)[:200]!r} is not served here; /v1/models says what is"
        return JSONResponse(error_body(text, bad, "model_not_found", "model"), 404)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, SlalomError):
            return JSONResponse(error_body(str(ours), bad, 400, ours.field), 400)
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        field = next((str(part) for part in first["loc"][1:]), None)
        return JSONResponse(error_body(f"{where}: {first['msg']}", bad, 400, field), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        """No such route or method, a body that is no JSON: what the framework itself refuses."""
        body = error_body(str(error.detail), bad, error.status_code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Overloaded)
    def overloaded(_: Request, error: Overloaded) -> JSONResponse:
        return JSONResponse(error_body(str(error), "overloaded", 429), 429, headers=_RETRY_AFTER)

    @app.exception_handler(Unavailable)
    def unavailable(_: Request, error: Unavailable) -> JSONResponse:
        again = {} if engine.is_dead else _RETRY_AFTER
        return JSONResponse(error_body(str(error), "unavailable", 503), 503, headers=again)


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
    shape = Shape(stream.request.id, model, engine.tokenizer, chat=chat, echo=echo)
    gone = asyncio.ensure_future(_hung_up(http))
    try:
        first = await _or_hang_up(stream, gone)
        if first is not None and body.stream and not unanswered(first):
            return StreamingResponse(_events(stream, first, shape, body), media_type="text/event-stream")
        deltas, delta = [], first
        while delta is not None:
            deltas.append(delta)
            if delta.finish is not None:
                usage = _usage(stream)
                return _refusal(delta) if unanswered(delta) else JSONResponse(shape.whole(deltas, usage))
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


async def _hung_up(http: Request) -> None:
    """Returns when the client has closed its connection (its request was read before)."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


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


def _refusal(delta: Delta) -> JSONResponse:
    """The answer to a request that ended without one."""
    if delta.finish == SHED:
        body = error_body("the request was shed: its targets cannot be met now", "overloaded", 429)
        return JSONResponse(body, 429, headers=_RETRY_AFTER)
    if delta.finish == UNPLACEABLE:
        body = error_body("no instance can hold this request", "unavailable", 503)
        return JSONResponse(body, 503, headers=_RETRY_AFTER)
    body = _failure(delta)
    return JSONResponse(body, int(body["error"]["code"]))


def _failure(delta: Delta) -> dict[str, Any]:
    """What is said of a request that ended before its time."""
    if delta.finish == ABORT:
        return error_body("the engine is shutting down", "unavailable", 503)
    return error_body("the request failed in the engine", "server_error", 500)


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
                yield _event(_failure(delta))
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

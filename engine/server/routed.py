"""The application of a router: requests go to engines of others as they are, and so their answers come back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from engine.core.policy import Policy
from engine.errors import SlalomError
from engine.remote.lengths import letters, marks, token_ids
from engine.remote.request import RemoteRequest
from engine.remote.router import Router
from engine.server.base import base_app
from engine.server.engine_metrics import EngineMetrics
from engine.server.protocol import class_of, error_body, targets_of
from engine.server.refusals import failure, hung_up, refusal

_CLIENT_GONE = 499  # nobody reads it; for the access log
#: Headers of a client that engines get: their key, and what follows a request through a fleet.
_PASSED_ON = ("authorization", "traceparent", "tracestate", "x-request-id")
#: Header of an answer: what its request is called in the decision log.
_ID = "x-slalom-id"
#: Fields of a body that are ours.
_OURS = ("slo_class", "priority")


def create_router_app(
    router: Router,
    model: str,
    *,
    counts: bool = False,
    deadlines: bool = False,
    classes: Sequence[str] = ("default",),
    load_policy: Callable[[str], Policy] | None = None,
    drain_s: float = 30.0,
    api_key: str = "",
) -> FastAPI:
    """The HTTP application around a started router; it closes the router when the server stops.

    :param model: name that the engines know, for requests that bring none
    :param counts: the engines can count tokens in every chunk (``continuous_usage_stats``)
    :param deadlines: the engines start prompts by ``priority``, and get the time when a first token is due as such
    :param classes: names of the cluster's SLO classes, in order; requests that name none belong to the first
    :param load_policy: finds a policy for ``POST /admin/policy``; without it that route refuses
    :param drain_s: open requests get this long to end at shutdown
    :param api_key: what clients must carry, see :mod:`engine.server.keys`; empty: nothing
    """

    @asynccontextmanager
    async def inside(app: FastAPI) -> AsyncIterator[None]:
        await router.fleet.open()
        yield
        await router.fleet.close()

    app, metrics = base_app(
        router, model, inside, classes=classes, load_policy=load_policy, drain_s=drain_s, api_key=api_key
    )
    passed_on = _PASSED_ON[1:] if api_key else _PASSED_ON  # who knows our key need not know theirs
    metrics.registry.register(EngineMetrics(router))
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "slalom"}
    card |= {"max_model_len": router.max_tokens}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await _answer(router, model, http, "prompt", counts, deadlines, passed_on)

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        return await _answer(router, model, http, "messages", counts, deadlines, passed_on)

    return app


async def _body_of(http: Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await http.body())
    except orjson.JSONDecodeError as error:
        raise SlalomError("body", str(error), "send JSON") from error
    if not isinstance(body, dict):
        raise SlalomError("body", type(body).__name__, "send a JSON object")
    return body


def _priority_of(body: Mapping[str, Any]) -> int:
    found = body.get("priority") or 0
    if type(found) is not int or abs(found) >= 2**31:
        raise SlalomError("priority", found, "give a whole number of at most 31 bits")
    return found


def _class_field(body: Mapping[str, Any]) -> str | None:
    found = body.get("slo_class")
    if found is not None and not isinstance(found, str):
        raise SlalomError("slo_class", found, "give the name of a class")
    return found


def terms_of(body: Mapping[str, Any], headers: Mapping[str, str], field: str, classes: Sequence[str]) -> dict[str, Any]:
    """What :meth:`engine.remote.router.Router.submit` needs to know of a request, whoever sends it to its engine.

    :param field: of ``body``, where the prompt is: ``prompt`` or ``messages``
    :param classes: names of the cluster's SLO classes, in order
    :raises SlalomError: no prompt or several, no such class, a bad target or priority
    """
    prompt = body.get(field)
    ids = token_ids(prompt)
    if not prompt or (field == "prompt" and isinstance(prompt, list) and len(prompt) != 1 and ids is None):
        raise SlalomError(field, prompt if not prompt else f"{len(prompt)} prompts", "send one request for each prompt")
    targets = targets_of(headers)
    return {
        "n_letters": letters(prompt) + letters(body.get("tools")),
        "tokens": marks(prompt) if ids is None else np.asarray(ids, np.int64),
        "known": ids is not None,
        "cls": class_of(headers, _class_field(body), classes),
        "ttft_s": targets.ttft_s,
        "tpot_s": targets.tpot_s,
        "priority": _priority_of(body),
    }


def _for_engines(body: dict[str, Any], model: str, counts: bool) -> tuple[dict[str, Any], bool]:
    """``body`` as engines get it, always with a stream that counts; and whether its client wants no usage in it."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise SlalomError("stream_options", options, "give an object")
    asked = bool(options.get("include_usage") or options.get("continuous_usage_stats"))
    options = options | {"include_usage": True} | ({"continuous_usage_stats": True} if counts else {})
    sent = {key: value for key, value in body.items() if key not in _OURS}
    return sent | {"model": body.get("model") or model, "stream": True, "stream_options": options}, not asked


async def _answer(
    router: Router,
    model: str,
    http: Request,
    field: str,
    counts: bool,
    deadlines: bool,
    passed_on: Sequence[str],
) -> Response:
    """Route one request. The status is known once its first token, or its end, is."""
    body = await _body_of(http)
    terms = terms_of(body, http.headers, field, http.app.state.classes)
    sent, strip = _for_engines(body, model, counts)
    if deadlines:
        in_s = terms["ttft_s"] or float(router.state.cls[terms["cls"]]["ttft_s"])
        sent["priority"] = round(1e3 * (time.time() + in_s))
    request = router.submit(
        http.url.path,
        sent,
        headers={name: http.headers[name] for name in passed_on if name in http.headers},
        whole=not body.get("stream"),
        strip_usage=strip,
        **terms,
    )
    gone = asyncio.ensure_future(hung_up(http))
    coming = asyncio.ensure_future(request.answer.next())
    streaming = False
    named = {_ID: request.id}
    try:
        await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            return Response(status_code=_CLIENT_GONE)
        reply = request.answer.reply
        if coming.result():
            streaming = True
            events = _events(router, request, coming.result())
            return StreamingResponse(events, media_type="text/event-stream", headers=named)
        if reply is not None:
            return Response(reply.body, reply.status, headers=dict(reply.headers) | named)
        return _unanswered(request.answer.failure)
    finally:
        coming.cancel()
        gone.cancel()
        if not streaming:
            router.leave(request)


def _unanswered(reason: str | None) -> JSONResponse:
    if reason == "error":
        return JSONResponse(error_body("the engines failed this request", "bad_gateway", 502), 502)
    return refusal(reason)


async def _events(router: Router, request: RemoteRequest, first: bytes) -> AsyncIterator[bytes]:
    """The engine's events. Closed by the server when the client hangs up, which ends the request at its engine."""
    try:
        part = first
        while part:
            yield part
            part = await request.answer.next()
        if request.answer.failure is not None:
            yield f"data: {json.dumps(failure(request.answer.failure))}\n\ndata: [DONE]\n\n".encode()
    finally:
        router.leave(request)

"""What every server here has around a scheduler: its life, errors, administration, dashboard, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from engine.core.policy import Policy
from engine.errors import PromptTooLong, SlalomError
from engine.live.door import Overloaded, Unavailable
from engine.live.scheduler import Scheduler
from engine.server.admin import add_admin
from engine.server.dashboard import add_dashboard
from engine.server.door import quiet_accepting
from engine.server.ending import say_goodbye
from engine.server.keys import KeyCheck
from engine.server.limits import BodyLimit, most_bytes
from engine.server.metrics import Metrics
from engine.server.protocol import error_body
from engine.server.refusals import RETRY_AFTER


def base_app(
    engine: Scheduler,
    model: str,
    inside: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    *,
    classes: Sequence[str] = ("default",),
    load_policy: Callable[[str], Policy] | None = None,
    drain_s: float = 30.0,
    api_key: str = "",
) -> tuple[FastAPI, Metrics]:
    """An application around a started engine that answers no request yet; it closes the engine when the server stops.

    :param inside: what else lives while it serves; it ends after the engine
    :param api_key: what clients must carry, see :mod:`engine.server.keys`; empty: nothing
    """
    metrics = Metrics(engine, model, classes)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        quiet_accepting(asyncio.get_running_loop())
        app.state.classes = list(classes)
        async with inside(app):
            ending = asyncio.create_task(say_goodbye(engine, app.state, drain_s))
            yield
            ending.cancel()
            await asyncio.to_thread(engine.close, drain_s)

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

    return app, metrics


class NoSuchModel(Exception):
    """The model that a request names is not the one served here."""


def _add_errors(app: FastAPI, engine: Scheduler) -> None:
    bad = "invalid_request_error"

    @app.exception_handler(SlalomError)
    async def bad_value(_: Request, error: SlalomError) -> JSONResponse:
        code: int | str = "context_length_exceeded" if isinstance(error, PromptTooLong) else 400
        return JSONResponse(error_body(str(error), bad, code, error.field), 400)

    @app.exception_handler(NoSuchModel)
    async def no_such_model(_: Request, error: NoSuchModel) -> JSONResponse:
        text = f"model: {str(error)[:200]!r} is not served here; /v1/models says what is"
        return JSONResponse(error_body(text, bad, "model_not_found", "model"), 404)

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, SlalomError):
            return JSONResponse(error_body(str(ours), bad, 400, ours.field), 400)
        if first["type"] == "json_invalid":
            text = f"body: this is not valid JSON: {ours} (at character {first['loc'][-1]})"
            return JSONResponse(error_body(text, bad, 400), 400)
        if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
            text = "body: send a JSON object, with the header content-type: application/json"
            return JSONResponse(error_body(text, bad, 400), 400)
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
        return JSONResponse(error_body(str(error), "overloaded", 429), 429, headers=RETRY_AFTER)

    @app.exception_handler(Unavailable)
    def unavailable(_: Request, error: Unavailable) -> JSONResponse:
        again = {} if engine.is_dead else RETRY_AFTER
        return JSONResponse(error_body(str(error), "unavailable", 503), 503, headers=again)

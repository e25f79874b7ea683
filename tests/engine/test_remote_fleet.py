"""The two sides of the router, each alone: what the event loop reports of engines, and how the scheduler books it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import waiting
from prometheus_client import generate_latest
from test_remote_core import Desk

from engine.core.kinds import RequestState
from engine.live.clock import WallClock
from engine.remote.fleet import Fleet, Patience
from engine.remote.instances import Orders
from engine.remote.reports import End, Report
from engine.remote.request import RemoteRequest
from engine.remote.router import Router
from engine.server.metrics import Metrics
from policies.load import load_policy
from policies.setting import Setting

QUICK = Patience(period_s=0.02, timeout_s=0.5, outage_s=0.2)


def request(**body: Any) -> RemoteRequest:
    options: dict[str, Any] = {"path": "/v1/completions", "headers": {}, "whole": True, "strip_usage": True}
    return RemoteRequest(4, np.zeros(0, np.int64), lambda delta: None, body=body, **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():
            await asyncio.sleep(0.005)


def in_a_fleet(
    work: Callable[[Fleet, list[Report], dict[str, bytes]], Awaitable[None]], *, patience: Patience = QUICK
) -> None:
    """Run ``work`` with a fleet of one engine, what was reported of it, and what that answers, by path."""
    answers: dict[str, bytes] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[head.split(b" ")[1].decode()])
        writer.close()

    async def run() -> None:
        port = waiting.free_port()
        reports: list[Report] = []
        fleet = Fleet([(f"http://127.0.0.1:{port}", False)], patience)
        fleet.hear = reports.extend
        await fleet.open()
        try:
            async with asyncio.timeout(20.0):
                async with await asyncio.start_server(serve, "127.0.0.1", port):
                    await work(fleet, reports, answers)
        finally:
            await fleet.close()

    asyncio.run(run())


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{lines}connection: close\r\n\r\n".encode() + body


def test_an_attempt_that_fails_is_reported_once() -> None:
    async def work(fleet: Fleet, reports: list[Report], answers: dict[str, bytes]) -> None:
        answers |= {"/v1/completions": b"", "/health": b""}  # it hangs up
        fleet.send([(request(), 1, 0), (request(), 1, 0)])
        await until(lambda: len(reports) >= 2)
        await asyncio.sleep(0.1)
        assert sorted(report.request.number for report in reports) == sorted({r.request.number for r in reports})
        assert [report.end for report in reports] == [End.LOST] * 2
        assert not fleet.engines[0].attempts

    in_a_fleet(work)


def test_an_attempt_that_is_given_up_before_it_has_begun_is_not_kept() -> None:
    async def work(fleet: Fleet, reports: list[Report], answers: dict[str, bytes]) -> None:
        one = request()
        fleet.send([(one, 1, 0)])
        fleet.tell_end(one, "abort")
        await asyncio.sleep(0.05)
        assert not fleet.engines[0].attempts

    in_a_fleet(work)


def test_who_refuses_is_spared_as_long_as_it_asks_though_it_is_well() -> None:
    async def work(fleet: Fleet, reports: list[Report], answers: dict[str, bytes]) -> None:
        answers |= {"/v1/completions": http("503 Busy", retry_after="0.5"), "/health": http("200 OK")}
        answers["/metrics"] = http("404 No")
        fleet.send([(request(), 1, 0)])
        await until(lambda: bool(reports))
        assert [report.end for report in reports] == [End.REFUSED]
        (engine,) = fleet.engines
        begin = asyncio.get_running_loop().time()
        await until(lambda: not engine.away)
        assert asyncio.get_running_loop().time() - begin > 0.3
        assert engine.ejections == 0

    in_a_fleet(work)


def test_who_asks_to_be_spared_for_no_number_of_seconds_is_back_soon() -> None:
    async def work(fleet: Fleet, reports: list[Report], answers: dict[str, bytes]) -> None:
        answers |= {"/v1/completions": http("503 Busy", retry_after="nan"), "/health": http("200 OK")}
        answers["/metrics"] = http("404 No")
        fleet.send([(request(), 1, 0)])
        await until(lambda: [report.end for report in reports] == [End.REFUSED])
        await until(lambda: not fleet.engines[0].away)

    in_a_fleet(work)


def test_who_dies_while_it_is_spared_is_not_back_when_that_time_is_up() -> None:
    async def work(fleet: Fleet, reports: list[Report], answers: dict[str, bytes]) -> None:
        said: list[bool] = []
        fleet.set_away = lambda i, away: said.append(away)
        answers |= {"/v1/completions": http("503 Busy", retry_after="0.3"), "/health": http("500 Dead")}
        fleet.send([(request(), 1, 0)])
        await until(lambda: fleet.engines[0].ejections == 1)
        await asyncio.sleep(0.5)
        assert all(said)
        assert fleet.out
        answers |= {"/health": http("200 OK"), "/metrics": http("404 No")}
        await until(lambda: not fleet.engines[0].away)

    in_a_fleet(work)


def test_who_refuses_answers() -> None:
    async def work(fleet: Fleet, reports: list[Report], answers: dict[str, bytes]) -> None:
        answers |= {"/v1/completions": http("429 Busy", retry_after="1"), "/health": http("200 OK")}
        answers["/metrics"] = http("404 No")
        begin = time.monotonic()
        fleet.send([(request(), 1, 0)])
        await until(lambda: fleet.engines[0].away)
        while fleet.engines[0].away:  # for longer than an outage may last
            assert not fleet.out
            await asyncio.sleep(0.01)
        assert time.monotonic() - begin > 2.0 * QUICK.outage_s

    in_a_fleet(work)


# -- the scheduler's side


class Post(Fleet):
    """Engines of which a test tells everything."""

    def __init__(self, n: int) -> None:
        super().__init__([("", False)] * n)
        self.orders: Orders = []

    def send(self, orders: Orders) -> None:
        self.orders += orders

    def tell_end(self, request: RemoteRequest, reason: str) -> None:
        pass

    def report(self, total: int, end: End = End.NONE) -> None:  # type: ignore[override]
        """Of the attempt that was ordered last."""
        request, number, _ = self.orders[-1]
        self.hear([Report(request, number, total, WallClock.stamp(), end)])


@contextmanager
def scheduled() -> Iterator[tuple[Router, Post]]:
    state = Desk(2).state
    post = Post(2)
    router = Router(state, load_policy("least_tokens", Setting.of_state(state)), post).start()
    try:
        yield router, post
    finally:
        assert router.close(5.0)
    assert router.failure is None
    assert router.integrity_faults() == []


def submit(router: Router, n: int = 4) -> RemoteRequest:
    options: dict[str, Any] = {"n_letters": n, "tokens": np.arange(n), "known": True, "headers": {}, "ttft_s": 3600.0}
    return router.submit("", {}, whole=True, strip_usage=True, **options)


def test_tokens_that_nobody_got_are_not_there_when_a_request_is_tried_again() -> None:
    """Else its new attempt counts as an unanswered prompt until it has as many, and keeps others from the engine."""
    with scheduled() as (router, post):
        metrics = Metrics(router, "m", ["a", "b"])
        one = submit(router)
        waiting.until(lambda: len(post.orders) == 1, 240.0)  # the first one may wait for the compiler
        post.report(7)
        waiting.until(lambda: int(router.state.req[one.slot]["generated"]) == 7, 240.0)
        generate_latest(metrics.registry)
        post.report(7, End.LOST)
        waiting.until(lambda: len(post.orders) == 2)
        record = router.call(lambda: router.state.req[one.slot].copy())
        assert (record["target"], record["generated"], record["state"]) == (4, 0, RequestState.PREFILLING)
        assert b'vllm:generation_tokens_total{engine="0",model_name="m"} 7.0' in generate_latest(metrics.registry)
        post.report(1)
        waiting.until(lambda: int(router.state.req[one.slot]["state"]) == RequestState.RUNNING)
        post.report(5, End.DONE)
        waiting.until(lambda: router.n_open == 0)
        cluster = router.state.cluster[0]
        assert (cluster["n_finished"], cluster["tokens_out"], router.state.cls[0]["ttft_ok"]) == (1, 5, 1)

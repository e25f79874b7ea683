"""Requests that somebody else sends: where they go, and what is foretold of engines whose answers pass elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from audit import recount

from engine.core.kinds import RequestState
from engine.core.origin import move_origin
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S
from engine.live.door import Overloaded
from policies.route.elsewhere import Asked, Dispatcher, Refused, asked_of, desk_for
from policies.route.progress import STATS, Progress

PROFILE = "smollm2-cpu"
SHORT = {"prompt": list(range(1, 17)), "max_tokens": 400}
S = RequestState


def served(work: Callable[[Dispatcher], Awaitable[None]], replicas: int = 2, places: int = 0, **given: Any) -> None:
    """Run ``work`` with a dispatcher for replicas a, b, ..., of which there may be ``places``; books must balance."""
    desk = desk_for(places or replicas, {"profile": PROFILE, "prefix_cache": False} | given)

    async def run() -> None:
        dispatcher = Dispatcher(desk)
        assert dispatcher.set_members("abcdefgh"[:replicas]) == []
        try:
            await asyncio.wait_for(work(dispatcher), 30)
            dispatcher.router.call(lambda: recount(dispatcher.router.state))
        finally:
            await asyncio.to_thread(dispatcher.close)
        assert dispatcher.router.failure is None
        assert dispatcher.router.integrity_faults() == []

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def record(dispatcher: Dispatcher, asked: Asked, name: str) -> int:
    return int(dispatcher.router.state.req[name][asked.request.slot])


def test_each_of_a_burst_sees_those_before_it() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        asked = [dispatcher.submit(SHORT, {}) for _ in range(16)]
        places = await asyncio.gather(*(dispatcher.place(each) for each in asked))
        assert Counter(places) == {"a": 8, "b": 8}
        for each in asked:
            dispatcher.done(each)
        await until(lambda: dispatcher.router.n_open == 0)
        assert int(dispatcher.router.state.cluster[0]["n_done"]) == 16

    served(work, places=3)


def test_what_a_replica_has_no_seat_for_is_held_until_an_answer_ends() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        first, second = (dispatcher.submit(SHORT, {}) for _ in range(2))
        assert await dispatcher.place(first) == "a"
        waits = asyncio.ensure_future(dispatcher.place(second))
        await until(lambda: record(dispatcher, first, "generated") >= 2)
        assert not waits.done()
        dispatcher.done(first)
        assert await waits == "a"
        dispatcher.leave(second)
        await until(lambda: dispatcher.router.n_open == 0)

    served(work, replicas=1, max_batch=1)


def test_tokens_are_foretold_at_the_pace_of_the_profile_until_the_truth_is_told() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        asked = dispatcher.submit(SHORT, {})
        await dispatcher.place(asked)
        await until(lambda: record(dispatcher, asked, "generated") >= 20)
        dispatcher.progress(asked, 0, 3)  # it is slower than foretold
        await asyncio.sleep(0.05)
        held = record(dispatcher, asked, "generated")
        await until(lambda: record(dispatcher, asked, "generated") > held)
        dispatcher.progress(asked, 0, 300)  # and now much faster
        await until(lambda: record(dispatcher, asked, "generated") >= 300)
        stamps = dispatcher.router.state.req[asked.request.slot]
        assert stamps["first_token"] > stamps["arrival"]
        dispatcher.done(asked)
        await until(lambda: dispatcher.router.n_open == 0)

    served(work)


def test_what_is_foretold_goes_on_when_the_clock_counts_from_another_origin() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        router, nine_days = dispatcher.router, 9 * 86_400 * TICKS_PER_S

        def move() -> None:
            router.clock.move(nine_days)
            move_origin(router.state, nine_days, router.clock.origin)

        def grow_old() -> None:
            router.clock._zero -= 10 * 86_400 * 10**9

        router.call(grow_old)
        asked = dispatcher.submit(SHORT, {})
        await dispatcher.place(asked)
        await until(lambda: record(dispatcher, asked, "generated") >= 10)
        router.call(move)
        before = record(dispatcher, asked, "generated")
        await until(lambda: record(dispatcher, asked, "generated") >= before + 20)
        dispatcher.done(asked)
        await until(lambda: router.n_open == 0)

    served(work)


def test_nothing_is_foretold_past_what_was_told_until_it_has_caught_up() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        asked = dispatcher.submit(SHORT, {})
        await dispatcher.place(asked)
        await until(lambda: record(dispatcher, asked, "generated") >= 40)
        dispatcher.router.call(lambda: None)
        before = record(dispatcher, asked, "generated")
        for _ in range(40):  # long enough for twenty tokens
            dispatcher.progress(asked, 0, 1)
            await asyncio.sleep(0.01)
        assert record(dispatcher, asked, "generated") <= before + 2
        dispatcher.done(asked)

    served(work)


def test_a_replica_that_says_no_or_is_gone_is_not_the_end() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        asked = dispatcher.submit(SHORT, {})
        first = await dispatcher.place(asked)
        dispatcher.set_members([name for name in "ab" if name != first])
        dispatcher.refused(asked)
        second = await dispatcher.place(asked)
        assert {first, second} == {"a", "b"}
        assert dispatcher.router.instances.retried["refused"] == 1
        assert dispatcher.set_members([second, "c", "d"]) == ["d"]  # c has the place of who is gone
        others = [dispatcher.submit(SHORT, {}) for _ in range(3)]
        assert "c" in [await dispatcher.place(other) for other in others]
        for each in (asked, *others):
            dispatcher.done(each)
        await until(lambda: dispatcher.router.n_open == 0)

    served(work)


def test_while_nobody_is_there_requests_wait() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        dispatcher.set_members([])
        asked = dispatcher.submit(SHORT, {})
        waits = asyncio.ensure_future(dispatcher.place(asked))
        await asyncio.sleep(0.1)
        assert not waits.done()
        dispatcher.set_members(["x"])
        assert await waits == "x"
        dispatcher.leave(asked)
        await until(lambda: dispatcher.router.n_open == 0)

    served(work)


def test_too_many_and_wrong_requests_are_refused() -> None:
    async def work(dispatcher: Dispatcher) -> None:
        with pytest.raises(SlalomError, match="slo_class"):
            dispatcher.submit(SHORT | {"slo_class": "nobody's"}, {})
        with pytest.raises(SlalomError, match="prompt"):
            dispatcher.submit({"prompt": ["a", "b"]}, {})
        dispatcher.set_members([])
        asked = dispatcher.submit(SHORT, {})
        with pytest.raises(Overloaded):
            dispatcher.submit(SHORT, {})
        dispatcher.router.abort_all()
        with pytest.raises(Refused, match="abort"):
            await dispatcher.place(asked)

    served(work, max_requests=1)


def test_targets_come_from_headers_and_from_the_body() -> None:
    body = SHORT | {"slo_ttft_ms": 700, "slo_tpot_ms": 30}

    async def work(dispatcher: Dispatcher) -> None:
        asked = dispatcher.submit(*asked_of([body, SimpleNamespace(headers={"X-SLO-TTFT-MS": "900"})], {}))
        await dispatcher.place(asked)
        assert record(dispatcher, asked, "ttft_slo") == 900 * 10**9
        assert record(dispatcher, asked, "tpot_slo") == 30 * 10**9
        dispatcher.leave(asked)

    served(work)


def test_a_request_is_found_among_the_arguments_of_a_call() -> None:
    class Model:
        def model_dump(self, **_: Any) -> dict[str, Any]:
            return {"messages": [{"role": "user", "content": "x"}]}

    assert asked_of([3], {"body": SHORT, "headers": {"A": "b"}}) == (SHORT, {"a": "b"})
    assert asked_of([Model()], {}) == (Model().model_dump(), {})
    assert asked_of(["ping"], {"n": 1}) == (None, {})


@pytest.mark.parametrize(
    ("replicas", "given", "field"),
    [
        (2, {"profile": PROFILE, "engines": "http://a"}, "engines"),
        (2, {"policy": "least_tokens"}, "profile"),
        (0, {"profile": PROFILE}, "replicas"),
        (2, {"profile": PROFILE, "policy": "no_such"}, "policy"),
    ],
)
def test_wrong_settings_are_named(replicas: int, given: dict[str, Any], field: str) -> None:
    with pytest.raises(SlalomError) as refused:
        desk_for(replicas, given)
    assert field in refused.value.field


def test_replicas_tell_how_far_their_answers_are() -> None:
    async def stream() -> AsyncIterator[str]:
        for word in ("one", "two", "three"):
            yield word

    async def run() -> None:
        progress, seen = Progress(), []
        async for _ in progress.watch(stream(), prompt_tokens=7, request="r"):
            seen.append(progress.stats()[STATS])
        assert seen == [{"r": [7, n]} for n in (1, 2, 3)]
        assert progress.stats() == {STATS: {}}

    asyncio.run(run())

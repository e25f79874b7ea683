"""The router class within Ray Serve's own routing, on replicas that are not there, and with a cluster on this machine.

Needs ``ray[serve]``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("ray.serve.request_router")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest

from engine.errors import SlalomError
from eval.benchmarks.ray_serve import play, run_app
from policies.route.progress import STATS
from policies.route.ray_serve import SlalomRouter

DEPLOYMENT = DeploymentID("model", "app")
BODY = {"prompt": list(range(1, 17)), "max_tokens": 400}


class Replica:
    """What a router sees of a replica."""

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.max_ongoing_requests, self.queue = 100, 0
        self.node_id = self.availability_zone = ""
        self.multiplexed_model_ids: set[str] = set()
        self.routing_stats: dict[str, Any] = {}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue


class Desk:
    """A router for replicas a, b, ..., and requests as Ray hands them to it."""

    def __init__(self, n: int, **kwargs: Any) -> None:
        self.router = SlalomRouter(DEPLOYMENT, DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=False)
        given = {"replicas": n, "profile": "smollm2-cpu", "prefix_cache": False, "policy": "least_tokens"}
        self.router.initialize_state(**(given | kwargs))
        self.replicas = {name: Replica(name) for name in "abcd"[:n]}
        self.router.update_replicas(list(self.replicas.values()))

    def request(self, name: str, *args: Any) -> PendingRequest:
        return PendingRequest(list(args or [BODY]), {}, RequestMetadata(name, name))

    async def choose(self, pending: PendingRequest, *, again: bool = False) -> str:
        replica = await self.router._choose_replica_for_request(pending, is_retry=again)
        return str(replica.replica_id.unique_id)

    def accepted(self, pending: PendingRequest, name: str) -> None:
        self.router.on_request_routed(pending, self.replicas[name].replica_id, None)

    def ended(self, pending: PendingRequest, name: str) -> None:
        self.router.on_request_completed(self.replicas[name].replica_id, pending.metadata.internal_request_id)

    @property
    def scheduler(self) -> Any:
        return self.router._dispatcher.router

    async def empty(self) -> None:
        """Everything that was opened has ended."""
        while self.scheduler.n_open:
            await asyncio.sleep(0.002)
        assert self.router._requests == {}
        assert self.scheduler.failure is None
        assert self.scheduler.integrity_faults() == []


def routed(work: Callable[[Desk], Awaitable[None]], n: int = 2, **kwargs: Any) -> None:
    async def run() -> None:
        desk = Desk(n, **kwargs)
        try:
            await asyncio.wait_for(work(desk), 30)
        finally:
            if desk.router._dispatcher is not None:
                await asyncio.to_thread(desk.router._dispatcher.close)

    asyncio.run(run())


def test_a_burst_is_spread_before_any_of_it_was_sent() -> None:
    async def work(desk: Desk) -> None:
        pending = [desk.request(f"r{k}") for k in range(16)]
        places = await asyncio.gather(*map(desk.choose, pending))
        assert Counter(places) == {"a": 8, "b": 8}
        for each, name in zip(pending, places, strict=True):
            desk.accepted(each, name)
            desk.ended(each, name)
        await desk.empty()
        assert int(desk.scheduler.state.cluster[0]["n_done"]) == 16

    routed(work)


def test_all_that_wait_are_asked_about_and_the_most_urgent_goes_first() -> None:
    """Ray would ask about two at a time here (twice the replicas), in order of arrival."""

    async def work(desk: Desk) -> None:
        first = desk.request("first")
        assert await desk.choose(first) == "a"
        desk.accepted(first, "a")
        late = [desk.request(f"late{k}", BODY | {"priority": 1}) for k in range(4)]
        waiting = [asyncio.ensure_future(desk.choose(each)) for each in late]
        await asyncio.sleep(0.1)
        urgent = desk.request("urgent", BODY | {"priority": -1})
        place = asyncio.ensure_future(desk.choose(urgent))
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in [*waiting, place])
        desk.ended(first, "a")
        assert await place == "a"
        assert not any(task.done() for task in waiting)
        desk.accepted(urgent, "a")
        desk.ended(urgent, "a")
        for task in waiting:
            task.cancel()  # their clients hung up
        await asyncio.gather(*waiting, return_exceptions=True)
        await desk.empty()

    routed(work, n=1, max_batch=1)


def test_a_replica_that_is_full_or_says_no_is_asked_about_anew() -> None:
    async def work(desk: Desk) -> None:
        desk.replicas["a"].queue = desk.replicas["b"].queue = 100
        pending = desk.request("r")
        place = asyncio.ensure_future(desk.choose(pending))
        await asyncio.sleep(0.3)
        assert not place.done()
        desk.replicas["a"].queue = desk.replicas["b"].queue = 0
        first = await place
        again = asyncio.ensure_future(desk.choose(pending, again=True))  # it said no
        second = await again
        desk.ended(pending, first)  # the attempt that it refused
        await asyncio.sleep(0.05)
        desk.accepted(pending, second)
        assert desk.scheduler.n_open == 1
        desk.ended(pending, second)
        await desk.empty()
        assert int(desk.scheduler.state.cluster[0]["n_done"]) == 1
        assert desk.scheduler.instances.retried["refused"] >= 2

    routed(work)


def test_nobody_waits_for_a_request_that_will_not_be_answered() -> None:
    async def work(desk: Desk) -> None:
        first = desk.request("first")
        await desk.choose(first)
        with pytest.raises(BackPressureError):
            await desk.choose(desk.request("second"))
        desk.ended(first, "a")
        await asyncio.sleep(0.05)
        with pytest.raises(SlalomError, match="slo_class"):
            await desk.choose(desk.request("third", BODY | {"slo_class": "nobody's"}))
        assert await desk.choose(desk.request("ping", "a call that is no request")) in "ab"
        await asyncio.sleep(0.1)
        assert desk.router.curr_num_routing_tasks == 0
        await desk.empty()

    routed(work, max_requests=1)


def test_wrong_settings_reach_whoever_asks() -> None:
    async def work(desk: Desk) -> None:
        with pytest.raises(SlalomError, match="no_such"):
            await desk.choose(desk.request("r"))

    routed(work, policy="no_such")


def test_what_replicas_tell_is_booked_and_those_that_go_get_nothing() -> None:
    async def work(desk: Desk) -> None:
        pending = desk.request("r")
        name = await desk.choose(pending)
        desk.accepted(pending, name)
        desk.replicas[name].routing_stats = {STATS: {"r": [16, 123]}}
        desk.router.update_replicas(list(desk.replicas.values()))
        while desk.scheduler.state.req["generated"].max() < 123:
            await asyncio.sleep(0.002)
        desk.router.on_replica_actor_died(desk.replicas[name].replica_id)
        while (desk.scheduler.state.inst["lost"] != 0).sum() != 1:
            await asyncio.sleep(0.002)
        left = {"a": "b", "b": "a"}[name]
        others = [desk.request(f"o{k}") for k in range(4)]
        assert set(await asyncio.gather(*map(desk.choose, others))) == {left}
        for each, at in [(pending, name), *((other, left) for other in others)]:
            desk.ended(each, at)
        await desk.empty()

    routed(work)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray import serve

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_every_token_of_a_burst_comes_and_the_policy_says_from_where(cluster: None) -> None:
    given = argparse.Namespace(
        engine="modelled", profile="llama-8b-a100", replicas=2, max_batch=16, rate=40.0, requests=20, seed=0
    )
    handle = run_app(given, "least_tokens")
    found = asyncio.run(play(handle, given))  # which checks that no token is lost
    assert len(found) == 20
    scheduler = handle._router._asyncio_router.request_router._dispatcher.router
    assert scheduler.failure is None
    assert int(scheduler.state.cluster[0]["n_sent"]) == 20
    assert scheduler.runtime.decisions["place_prefill"] >= 20

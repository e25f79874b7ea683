"""A router for Ray Serve that asks a policy of Slalom where each request goes::

    RequestRouterConfig(
        request_router_class="policies.route.ray_serve:SlalomRouter",
        request_router_kwargs={"policy": "predicted_ttft", "profile": "mine", "replicas": 4, "max_batch": 64},
    )

Ray sends the requests, and their answers do not pass here. What replicas do in between is foretold from the latency
profile (:mod:`policies.route.unseen`) and put right where they tell (:mod:`policies.route.progress`). A request is
booked when its place is decided, before Ray says that it was sent: of a burst each one sees those before it.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from engine.errors import SlalomError
from engine.live.door import Overloaded, Unavailable
from policies.route.elsewhere import Asked, Dispatcher, Refused, asked_of, desk_for
from policies.route.progress import STATS

_log = logging.getLogger("ray.serve")
_DROPPED = ("shed", "unplaceable")


@dataclass(eq=False)
class _Open:
    """A request between its arrival and its end.

    :param replica: where it was sent last
    :param offered: the future of Ray's for which a place was found last
    :param taken: its replica has accepted it
    :param stray: ends that Ray will tell of attempts which its replica did not accept
    """

    pending: PendingRequest
    asked: Asked
    replica: str = ""
    offered: Any = None
    taken: bool = False
    stray: int = 0


class SlalomRouter(RequestRouter):
    """``request_router_kwargs``: ``replicas``, the most that there may be at a time; ``profile``, of one replica; and
    any setting of ``route`` that is about decisions (``docs/remote.md``)."""

    def initialize_state(self, *, replicas: int, **given: Any) -> None:
        """Begin to make ready; requests wait meanwhile."""
        self._requests: dict[str, list[_Open]] = {}  # calls that belong together have one name
        self._most = int(given.get("max_requests", 1024))
        self._dispatcher: Dispatcher | None = None
        makers = ThreadPoolExecutor(1, "slalom")
        self._making = makers.submit(desk_for, replicas, given)
        makers.shutdown(wait=False)

    @property
    def max_num_routing_tasks(self) -> int:
        """All that wait are asked about at once: which of them goes first is a decision, not Ray's order."""
        return self._most

    async def _made(self) -> Dispatcher:
        """The dispatcher, once it is there.

        :raises SlalomError: a setting was wrong
        """
        if self._dispatcher is None:
            desk = await asyncio.wrap_future(self._making)
            if self._dispatcher is None:  # nobody else was as quick
                self._dispatcher = Dispatcher(desk)
                self._look_at_replicas()
        return self._dispatcher

    # -- where to ------------------------------------------------------------------------------------------------

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that the policy chose, once it has; Ray's own choice for calls that ask for no answer of a model,
        and where the scheduler has ended."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        try:
            dispatcher = await self._made()
            name = await self._place(dispatcher, pending_request)
        except Refused as refused:
            if refused.reason not in _DROPPED:
                return [candidate_replicas]
            return self._drop(pending_request, BackPressureError(self._most, self._most), candidate_replicas)
        except Overloaded:
            return self._drop(pending_request, BackPressureError(self._most, self._most), candidate_replicas)
        except SlalomError as error:
            return self._drop(pending_request, error, candidate_replicas)
        except Unavailable:
            return [candidate_replicas]
        except Exception:  # a fault of ours: Ray would let the request hang
            _log.exception("the policy could not be asked")
            return [candidate_replicas]
        if name is None:
            return [candidate_replicas]
        return [[replica] for replica in candidate_replicas if replica.replica_id.unique_id == name]

    async def _place(self, dispatcher: Dispatcher, pending: PendingRequest) -> str | None:
        found = self._find(pending)
        if found is None:
            body, headers = asked_of(pending.args, pending.kwargs)
            if body is None:
                return None
            found = _Open(pending, dispatcher.submit(body, headers))
            self._requests.setdefault(pending.metadata.internal_request_id, []).append(found)
        elif found.offered is not None:  # Ray asks again: the replica was full, or (with a new future) said no
            found.stray += found.offered is not pending.future
            dispatcher.refused(found.asked)
        found.offered = None
        pending.future.add_done_callback(lambda future: self._gone(found) if future.cancelled() else None)
        try:
            found.replica = await dispatcher.place(found.asked)
        except Refused:
            self._forget(found)
            raise
        found.offered = pending.future
        return found.replica

    def _find(self, pending: PendingRequest) -> _Open | None:
        same = self._requests.get(pending.metadata.internal_request_id, ())
        return next((found for found in same if found.pending is pending), None)

    def _forget(self, found: _Open) -> bool:
        """Whether it was still open."""
        key = found.pending.metadata.internal_request_id
        same = self._requests.get(key, [])
        if found not in same:
            return False
        same.remove(found)
        if not same:
            del self._requests[key]
        return True

    def _drop(
        self, pending: PendingRequest, error: Exception, candidates: list[RunningReplica]
    ) -> list[list[RunningReplica]]:
        """Tell whoever waits for ``pending`` why nobody answers; Ray then looks no further."""
        if not pending.future.done():
            pending.future.set_exception(error)
            self._remove_pending_request_from_indices(pending)
        return [candidates[:1]]

    def _gone(self, found: _Open) -> None:
        if self._forget(found) and self._dispatcher is not None:
            self._dispatcher.leave(found.asked)

    # -- what became of it ---------------------------------------------------------------------------------------

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Its replica has accepted it."""
        found = self._find(pending_request)
        if found is not None:
            found.taken = True

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """An attempt ended, also one that its replica did not accept; any thread."""
        self._event_loop.call_soon_threadsafe(self._completed, replica_id.unique_id, internal_request_id)

    def _completed(self, replica: str, key: str) -> None:
        same = self._requests.get(key, ())
        here = [found for found in same if found.taken and found.replica == replica]
        found = next(iter(here or same), None)
        if found is None or self._dispatcher is None:
            return
        if found.taken:
            self._forget(found)
            self._dispatcher.done(found.asked)
        elif found.stray > 0:
            found.stray -= 1
        else:  # it may come again, as a new one
            self._gone(found)

    # -- who is there ----------------------------------------------------------------------------------------------

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came or went, or told something."""
        super().update_replicas(replicas)
        self._look_at_replicas()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Nothing goes there any more."""
        super().on_replica_actor_died(replica_id)
        self._look_at_replicas()

    def _look_at_replicas(self) -> None:
        dispatcher = self._dispatcher
        if dispatcher is None:
            return
        left = dispatcher.set_members([replica_id.unique_id for replica_id in self.curr_replicas])
        if left:
            _log.warning("%d replicas get nothing: raise request_router_kwargs.replicas", len(left))
        for replica in self.curr_replicas.values():
            for key, (prompt_tokens, tokens) in (replica.routing_stats or {}).get(STATS, {}).items():
                for found in self._requests.get(key, ())[:1]:
                    if found.taken:
                        dispatcher.progress(found.asked, prompt_tokens, tokens)

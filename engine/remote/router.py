"""The router as a whole: the scheduler's thread, and the engines of others that it hands requests to."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.errors import PromptTooLong, SlalomError
from engine.live.clock import WallClock
from engine.live.guard import Guard
from engine.live.request import Delta
from engine.live.scheduler import Scheduler, target_ticks
from engine.remote.fleet import Fleet
from engine.remote.handover import can_part
from engine.remote.instances import RemoteInstances
from engine.remote.request import RemoteRequest


class Router(Scheduler):
    """Routes requests until :meth:`close`.

    :param state: an idle cluster of ``remote`` instances; where it asks who decodes, its engines hand KV over
    :param policy: answers its decisions
    :param fleet: the engines, one for each instance
    :param guard: stands between scheduler and policy, and already has ``policy``
    :param kind: how it knows what the engines do
    """

    instances: RemoteInstances

    def __init__(
        self,
        state: ClusterState,
        policy: Policy,
        fleet: Fleet,
        *,
        guard: Guard | None = None,
        kind: type[RemoteInstances] = RemoteInstances,
    ) -> None:
        clock = WallClock()
        instances = kind(state, clock, fleet.send, salt=secrets.randbits(63))
        super().__init__(state, policy, instances, clock, guard)
        self.fleet = fleet
        self._hand_over = bool(state.cluster[0]["ask_decode"])
        self.max_tokens = max(int(p["n_blocks"]) for p in state.pool) * int(state.cluster[0]["block_tokens"]) - 1
        arrival = self.runtime.slots.arrival
        fleet.hear = lambda reports: clock.post(arrival, partial(instances.hear, reports))
        fleet.set_away = lambda i, away: clock.post(arrival, partial(instances.set_away, i, away))
        fleet.abandon = self.abort
        fleet.give_up_waiting = lambda: clock.post(arrival, instances.give_up_waiting)

    @property
    def accepting(self) -> bool:
        """Whether a new request would be taken."""
        return super().accepting and not self.fleet.out

    def _why_not(self) -> str:
        return "no engine answers" if self.fleet.out and self._accepting else super()._why_not()

    def submit(
        self,
        path: str,
        body: dict[str, Any],
        *,
        n_letters: int,
        tokens: np.ndarray,
        known: bool,
        headers: Mapping[str, str],
        whole: bool,
        strip_usage: bool,
        cls: int = 0,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        priority: int = 0,
    ) -> RemoteRequest:
        """Hand in a request; what comes of it is in its ``answer``. In the event loop of the fleet.

        :param path: where engines take it; ``body`` as it goes there
        :param n_letters: characters of its prompt, from which its tokens are guessed where they are not ``known``
        :param tokens: its token ids, or :func:`engine.remote.lengths.marks` of it
        :param whole: the client wants the answer in one piece; ``strip_usage``: and in a stream no usage
        :param ttft_s: own target, that of the class if not given; ``tpot_s`` likewise
        :param priority: prompts of a lower value are handed on first
        :raises SlalomError: a prompt that no engine can hold, a bad class, target or priority
        :raises Overloaded: all slots are taken
        :raises Unavailable: draining, closed or broken, or no engine answers
        """
        if not 0 <= cls < len(self.state.cls):
            raise SlalomError("class", cls, f"classes go from 0 to {len(self.state.cls) - 1}")
        if known and len(tokens) >= self.max_tokens:
            raise PromptTooLong("prompt", f"{len(tokens)} tokens", self.max_tokens)
        guess = self.fleet.lengths.guess(n_letters, chat="messages" in body)
        request = RemoteRequest(
            len(tokens) if known else min(guess, self.max_tokens - 1),
            tokens,
            lambda delta: self._tell(request, delta),
            path=path,
            body=body,
            headers=headers,
            whole=whole,
            strip_usage=strip_usage,
            cls=cls,
            ttft_slo=target_ticks("ttft", ttft_s),
            tpot_slo=target_ticks("tpot", tpot_s),
            priority=priority,
        )
        request.letters = 0 if known else n_letters
        request.apart = self._hand_over and can_part(body)
        self._hand_in(request)
        return request

    def _tell(self, request: RemoteRequest, delta: Delta) -> None:
        if delta.finish is not None:
            self.fleet.tell_end(request, delta.finish)

    def leave(self, request: RemoteRequest) -> None:
        """The client of ``request`` is gone, or has all it will get. In the event loop."""
        self.fleet.leave(request)

"""Instances that only take time: a latency profile in place of a model, on a virtual clock.

With it the engine's own runtime plays a workload in seconds, and it proves that the engine and the surrogate are
one scheduler: the timelines are equal to the last bit.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from engine.core import loop
from engine.core.events.slots import slots_of
from engine.core.kinds import RequestState
from engine.core.policy import Policy
from engine.core.state import NEVER, ClusterState
from engine.jit.rows import addresses
from engine.live.clock import VirtualClock
from engine.live.guard import Guard
from engine.live.runtime import Runtime


class ModelledInstances:
    """Requests that are known beforehand, steps that take what a profile says.

    :param state: a cluster whose first ``n_roots`` requests arrive at their ``arrival`` stamps, in order; the others
        are follow-up turns, sent ``think`` ticks after the request that names them finished
    :param true_profile: PROFILE (N,) and ``true_share`` SHARE (N, M): what steps really take, per instance; the
        cluster's own profile if not given
    """

    def __init__(
        self,
        state: ClusterState,
        clock: VirtualClock,
        n_roots: int,
        true_profile: np.ndarray | None = None,
        true_share: np.ndarray | None = None,
    ) -> None:
        self._state, self._clock, self._words = state, clock, addresses(state)
        self._slots = slots_of(len(state.inst), len(state.link))
        rows = state.inst["profile"]
        self._tables = (
            state.profile[rows] if true_profile is None else true_profile,
            state.share[rows] if true_share is None else true_share,
        )
        self._truth = addresses(self._tables)
        self._roots = range(n_roots)
        self._next_root = 0
        self._turns: list[tuple[int, int]] = []  # heap of (arrival, request)
        self._expect()

    def _expect(self) -> None:
        """Put the next arrival on the clock."""
        when = NEVER
        if self._next_root in self._roots:
            when = int(self._state.req[self._next_root]["arrival"])
        if self._turns:
            when = min(when, self._turns[0][0])
        self._clock.at(self._slots.arrival, when)

    # -- what the runtime starts and hears of ----------------------------------------------------------------

    def start_lane(self, i: int, l: int) -> None:
        self._clock.at(2 * i + l, self._clock.now + loop.step_ticks(self._words, self._truth, i, l))

    def start_link(self, link: int) -> None:
        ticks = loop.link_ticks(self._words, self._truth, link)
        self._clock.at(self._slots.links + link, self._clock.now + ticks)

    def start_switch(self, i: int) -> None:
        self._clock.at(self._slots.switches + i, self._clock.now + loop.switch_ticks(self._truth, i))

    def lane_ends(self, i: int, l: int, outcome: Any) -> None:
        loop.finish_lane(self._words, i, l, self._clock.now)

    def link_ends(self, link: int, outcome: Any) -> None:
        if loop.finish_transfer(self._words, link, self._clock.now):
            self.start_link(link)

    def arrives(self, outcome: Any) -> None:
        if self._turns and self._turns[0][0] <= self._clock.now:
            r = heapq.heappop(self._turns)[1]
        else:
            r = self._next_root
            self._next_root += 1
        loop.begin(self._words, r, self._clock.now)
        self._expect()

    def settled(self) -> None:
        """Send the next turn of each session whose last turn was answered; a refused turn ends its session."""
        while (r := loop.next_ended(self._words)) >= 0:
            ended = self._state.req[r]
            if ended["state"] == RequestState.FINISHED:
                turn = (int(ended["finished"]) + int(ended["think"]), int(ended["next_turn"]))
                heapq.heappush(self._turns, turn)
                self._expect()

    def is_over(self) -> bool:
        cluster = self._state.cluster[0]
        return bool(cluster["n_done"] == cluster["n_sent"]) and not self._clock.is_set(self._slots.arrival)


def play(
    state: ClusterState,
    policy: Policy,
    *,
    n_roots: int,
    true_profile: np.ndarray | None = None,
    true_share: np.ndarray | None = None,
    guard: Guard | None = None,
) -> Runtime:
    """Serve the requests of ``state`` under ``policy``; their records then hold the timeline.

    See :class:`ModelledInstances` and, for ``guard``, :class:`engine.live.runtime.Runtime` for the parameters.
    The run ends at the cluster's ``horizon_ticks``.
    """
    horizon = int(state.cluster[0]["horizon_ticks"])
    clock = VirtualClock(slots_of(len(state.inst), len(state.link)).total, horizon)
    instances = ModelledInstances(state, clock, n_roots, true_profile, true_share)
    runtime = Runtime(state, policy, instances, clock, guard)
    runtime.run()
    return runtime

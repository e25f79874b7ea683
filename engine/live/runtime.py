"""The runtime: drives the scheduling core of one cluster, with any clock and with real or modelled instances.

One loop, in one thread, is the only code that touches the cluster's state::

    decide what is due → start what may start → hand out what came of it → wait for the next event → book it

It is the surrogate's loop step by step (``env/surrogate/loop.py``); with modelled instances and a virtual clock the
timelines agree to the last bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Protocol

import numpy as np

from engine.core import loop
from engine.core.columns import N_CANDIDATE, N_CONTEXT, Kind, Need, max_candidates
from engine.core.decide.safe import safe_choice
from engine.core.events.slots import slots_of
from engine.core.lists import HELD
from engine.core.origin import move_origin, shift_for
from engine.core.policy import Policy
from engine.core.state import NEVER, ClusterState
from engine.jit.rows import addresses
from engine.live.clock import Clock
from engine.live.guard import Guard

_log = logging.getLogger("slalom.runtime")
_KINDS = tuple(kind.name.lower() for kind in Kind)


class Instances(Protocol):
    """What the runtime schedules for: it starts things here, and hears of their end from the clock."""

    def start_lane(self, i: int, l: int) -> None:
        """Run the step that is written in lane (i, l)."""
        ...

    def start_link(self, link: int) -> None:
        """Move the KV of the request at the head of ``link``."""
        ...

    def start_switch(self, i: int) -> None:
        """Change the role of the drained instance ``i``."""
        ...

    def lane_ends(self, i: int, l: int, outcome: Any) -> None:
        """The step of lane (i, l) ended: book it with :func:`engine.core.loop.finish_lane`."""
        ...

    def link_ends(self, link: int, outcome: Any) -> None:
        """The transfer at the head of ``link`` ended: book it with :func:`engine.core.loop.finish_transfer`."""
        ...

    def arrives(self, outcome: Any) -> None:
        """Something came from outside: a request, for example."""
        ...

    def settled(self) -> None:
        """Everything that follows from an event is under way: tell those who wait for it."""
        ...

    def is_over(self) -> bool:
        """Whether the loop should end."""
        ...


class Runtime:
    """:param state: the cluster; nobody else may write to it while the loop runs
    :param policy: answers the decisions; what it gets wrong, ``decide.safe.safe_choice`` answers instead
    :param instances: where steps and transfers run
    :param clock: shared with ``instances``, which set or post the ends of what they start
    :param guard: asks the policy in the runtime's place, and has its own
    """

    def __init__(
        self,
        state: ClusterState,
        policy: Policy,
        instances: Instances,
        clock: Clock,
        guard: Guard | None = None,
    ) -> None:
        n = len(state.inst)
        self.state, self.instances, self.clock = state, instances, clock
        self.slots = slots_of(n, len(state.link))
        self.words = addresses(state)
        self.decisions: Counter[str] = Counter()  # by kind
        self.fallbacks: Counter[str] = guard.fallbacks if guard else Counter()  # by reason
        self._held = state.lists[HELD].data  # as an array, reading an entry takes several times as long
        self._started = np.zeros(self.slots.deadline, np.int32)
        self._wake = NEVER  # when held requests are asked for again
        rows = max_candidates(n)
        self._context = np.zeros(N_CONTEXT)
        self._candidates = np.zeros((rows, N_CANDIDATE))
        self._mask = np.zeros(rows, np.uint8)
        self.guard = guard
        if guard is None:
            self.set_policy(policy)
        else:
            self.policy = guard.policy

    def set_policy(self, policy: Any) -> None:
        """Let ``policy`` (or what the guard made of it) answer from now on; its memory is fresh. Loop thread only."""
        if self.guard is not None:
            self.guard.adopt(policy)
            self.policy = self.guard.policy
            return
        self.policy = policy
        self._memory = policy.memory.copy()
        self._needs = int(policy.needs) | int(Need.LOAD)

    def run(self) -> None:
        """Serve until ``instances.is_over()`` or, with a virtual clock, until nothing will happen any more."""
        self.state.inst["dirty"] = 1
        self.clock.at(self.slots.control, int(self.state.cluster[0]["control_ticks"]))
        while True:
            self._settle()
            if self.instances.is_over():
                return
            event = self.clock.next()
            if event is None:
                return
            if self.clock.is_far:
                shift = shift_for(self.state, self.clock.now)
                self.clock.move(shift)
                move_origin(self.state, shift, self.clock.origin)
                self._wake -= shift if self._wake < NEVER else 0
            self._handle(event.slot, event.outcome)

    # -- after each event ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        now = self.clock.now
        self._decide(now)
        self._start_idle(now)
        while self._held[2] > 0 and loop.wake_idle(self.words):
            self._decide(now)
            self._start_idle(now)
        self.instances.settled()
        if self._held[2] > 0:
            when = loop.wake_time(self.words, now, self._wake)
            if when != self._wake:
                self._wake = when
                self.clock.at(self.slots.hold, when)

    def _start_idle(self, now: int) -> None:
        for slot in self._started[: loop.start_idle(self.words, now, self._started)].tolist():
            self._start(slot)

    def _start(self, slot: int) -> None:
        if slot < self.slots.links:
            self.instances.start_lane(slot // 2, slot % 2)
        elif slot < self.slots.switches:
            self.instances.start_link(slot - self.slots.links)
        else:
            self.instances.start_switch(slot - self.slots.switches)

    def _decide(self, now: int) -> None:
        """Ask the policy until nothing is left to decide."""
        guard = self.guard
        while True:
            needs = self._needs if guard is None else guard.needs
            kind, subject, k = loop.ask(self.words, now, needs, self._context, self._candidates, self._mask)
            if kind < 0:
                return
            if guard is None:
                action = self._choose(kind, self._candidates[:k], self._mask[:k])
            else:
                asked = (self._context, self._candidates[:k], self._mask[:k])
                action = guard.choose(kind, subject, now + self.clock.origin, *asked)
            loop.answer(self.words, kind, subject, action, now)
            self.decisions[_KINDS[kind]] += 1

    def _choose(self, kind: int, candidates: np.ndarray, mask: np.ndarray) -> int:
        policy = self.policy
        try:
            action = int(policy.decide(self._context, candidates, mask, policy.params, self._memory))
        except Exception as error:  # a policy is somebody else's code
            return self._fall_back("error", f"raised {error!r}", kind, candidates, mask)
        if 0 <= action < len(mask) and mask[action]:
            return action
        return self._fall_back("invalid", f"answered {action}", kind, candidates, mask)

    def _fall_back(self, reason: str, what: str, kind: int, candidates: np.ndarray, mask: np.ndarray) -> int:
        if self.fallbacks[reason] == 0:
            _log.warning("policy %s %s; answering for it (said once)", self.policy.name, what)
        self.fallbacks[reason] += 1
        return safe_choice(kind, candidates, mask)

    # -- events --------------------------------------------------------------------------------------------

    def _handle(self, slot: int, outcome: Any) -> None:
        now, slots = self.clock.now, self.slots
        if slot < slots.links:
            self.instances.lane_ends(slot // 2, slot % 2, outcome)
        elif slot < slots.switches:
            self.instances.link_ends(slot - slots.links, outcome)
        elif slot < slots.deadline:
            loop.finish_switch(self.words, slot - slots.switches)
        elif slot == slots.control:
            loop.end_control(self.words, now)
            self.clock.at(slots.control, now + int(self.state.cluster[0]["control_ticks"]))
        elif slot == slots.hold:
            self._wake = NEVER
            loop.wake(self.words, now)
        else:
            self.instances.arrives(outcome)

"""Runs of months and years: the simulated clock's origin moves as the live one's does (``engine.core.origin``).

Stamps are picoseconds in 64 bits, which end after 106 days. A long run is played in stretches. Between two of them the
event loop is at rest and every stamp of what is open moves; stamps of what has ended are put aside, with the origin
that they count from. Within a stretch nothing is different: short runs pay nothing, and long ones hardly anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.core.events.slots import slots_of
from engine.core.kinds import LaneKind, RequestState
from engine.core.origin import FAR, STAMPS, move_origin, shift_for
from engine.core.state import ClusterState
from engine.core.ticks import LONGEST_STRETCH_S, check_length
from engine.latency.evaluate import TICKS_PER_S
from env.surrogate.clock import NEVER, Sim
from env.workload import Trace

_LATER = 2 * FAR  # an arrival in a stretch to come


def is_long(trace: Trace) -> bool:
    """Whether the arrivals of ``trace`` take more than one stretch."""
    return bool(trace.n_roots and trace.arrival_s[trace.n_roots - 1] > LONGEST_STRETCH_S)


class LongRun:
    """One run in stretches.

    :param horizon_s: when the run is cut, seconds
    :raises SlalomError: it would last longer than ``engine.core.ticks.LONGEST_RUN_S``
    """

    def __init__(self, trace: Trace, horizon_s: float) -> None:
        check_length(f"trace {trace.name}", trace.arrival_s[: trace.n_roots])
        self._arrival_s, self._roots = trace.arrival_s[: trace.n_roots], trace.n_roots
        self._end_s = horizon_s
        self.trace = replace(trace, arrival_s=np.where(trace.arrival_s < np.inf, trace.arrival_s.clip(max=0.0), np.inf))

    def play(self, state: ClusterState, sim: Sim, go_on: Callable[[], None]) -> np.ndarray:
        """Play ``state``, made from :attr:`trace`, to its end.

        :param go_on: runs the event loop until the horizon that stands in the state, or the end
        :return: float64 (R,): seconds that the stamps of each request, now in ``state``, count from
        """
        req, q = state.req, sim.sim[0]
        kept, origin_s = {name: req[name].copy() for name in STAMPS}, np.zeros(len(req))
        put_aside = np.zeros(len(req), np.bool_)
        origin = 0  # ticks; grows beyond 64 bits
        while True:
            self._arrivals(state, sim, origin)
            left = self._end_s * TICKS_PER_S - origin
            state.cluster["horizon_ticks"] = int(min(left, q["now"] + FAR))
            go_on()
            ended = (req["state"] >= RequestState.FINISHED) & ~put_aside
            for name in STAMPS:
                kept[name][ended] = req[name][ended]
            origin_s[ended] = origin / TICKS_PER_S
            put_aside |= ended
            if self._over(state, sim) or q["now"] >= left:
                break
            shift = shift_for(state, int(q["now"]))
            origin += shift
            move_origin(state, shift, origin)
            _move_clock(state, sim, shift)
        origin_s[~put_aside] = origin / TICKS_PER_S
        for name in STAMPS:
            req[name][put_aside] = kept[name][put_aside]
        never = np.arange(len(req)) >= q["next_root"]
        req["arrival"][never & (np.arange(len(req)) < self._roots)] = -1  # not sent before the end
        return origin_s

    def _over(self, state: ClusterState, sim: Sim) -> bool:
        cluster, q = state.cluster[0], sim.sim[0]
        return bool(cluster["n_done"] == cluster["n_sent"] and q["next_root"] == q["n_roots"] and q["heap_n"] == 0)

    def _arrivals(self, state: ClusterState, sim: Sim, origin: int) -> None:
        """Count those to come from ``origin``, and set the event of the next one."""
        q = sim.sim[0]
        first = int(q["next_root"])
        ticks = self._arrival_s[first:] * TICKS_PER_S - origin
        state.req["arrival"][first : self._roots] = np.rint(np.minimum(ticks, _LATER)).astype(np.int64)
        coming = [int(state.req["arrival"][first])] if first < self._roots else []
        coming += [int(sim.heap_t[0])] if q["heap_n"] else []
        sim.when[slots_of(len(state.inst), len(state.link)).arrival] = min(coming, default=NEVER)
        _lay_out(sim)


def _move_clock(state: ClusterState, sim: Sim, shift: int) -> None:
    """Every time of the event queue, ``shift`` ticks earlier."""
    q = sim.sim[0]
    assert q["beta"] == 0.0, "rewards are discounted from a time that does not move"
    q["now"] -= shift
    for times in (sim.when, sim.heap_t[: q["heap_n"]]):
        times[times < NEVER] -= shift
    busy = state.lane["kind"] != LaneKind.IDLE
    sim.clock["t0"][busy] -= shift


def _lay_out(sim: Sim) -> None:
    """The tournament over the events anew, as ``env.surrogate.clock.start`` does it."""
    when, tree = sim.when, sim.tree
    for k in range(int(sim.sim[0]["size"]) - 1, 0, -1):
        found = [slot for slot in (int(tree[2 * k]), int(tree[2 * k + 1])) if slot >= 0]
        tree[k] = min(found, key=lambda slot: (when[slot], slot), default=-1)

"""No order of a queue lets a prompt wait for ever: its second deadline, and who goes first when that comes near.

``Order.ON_TIME`` puts prompts last that it gives up, the shortest-first orders put long ones last. Each of them is due
``tail_factor`` TTFT targets after its arrival all the same. At a step boundary the queue is walked as it would be
computed; while everyone is done by then, the order stays what it is. Who would not be goes ahead of the others, the
earliest second deadline first, which keeps every such deadline that any sequence keeps (Jackson 1955). ON_TIME serves
prompts that can be in time first for as long as the given up ones, next in line after that step, still make it.

Where even that is too late, the load is above what the instance can serve, and the longest prompt of those is given up
a second time, so that as few as possible are late (Moore 1968). From then on it waits behind all others of its
priority, in the order in which that happened; once in the time of a second deadline the first of them has its turn.
Such prompts pile up while the load stays, so nobody walks past them: a step costs no more, however long an overload
lasts. A first-come-first-served queue lets nobody overtake. Priorities, which a user sets, come before any deadline.

``watch`` spares most looks: before it no bound can be near, and whatever joins the queue brings it forward. ``turn`` is
when the next one that was given up twice goes first.
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Order, RequestState
from engine.core.lists import TWICE, push_before, push_last, queue_of, remove
from engine.core.schedule.on_time import pace_of, tail_due
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel

_WAITING = int(RequestState.WAITING)
_PREEMPTIVE, _ON_TIME = int(Order.SHORTEST_PREEMPTIVE), int(Order.ON_TIME)

#: Predictions err: a second deadline counts as near when this part of the time to it would be used up.
_NEAR = 0.9


@kernel
def _is_free(s, i, r):
    """Whether waiting request ``r`` may change its place in the queue of ``i``: it has not answered, nor started."""
    req = s.req[r]
    if req.state != _WAITING or req.generated > 0:
        return False
    return req.blocks == 0 or s.inst[i].order == _PREEMPTIVE


@kernel
def _yields(s, i, q, r):
    """Whether queued ``q`` lets ``r`` go ahead, whose second deadline is near."""
    mine, theirs = s.req[r], s.req[q]
    if theirs.priority != mine.priority:
        return theirs.priority > mine.priority
    if not _is_free(s, i, q):
        return False
    return theirs.late >= 0 or tail_due(s, q) > tail_due(s, r)


@kernel
def _move(s, i, r, ahead):
    """Put request ``r`` of the queue of ``i`` ``ahead`` among those whose second deadline is near, or last."""
    queue = queue_of(i)
    remove(s.lists, s.req, queue, r)
    if not ahead:
        push_last(s.lists, s.req, queue, r)
        return
    other = s.lists[queue, 0]
    while other >= 0 and not _yields(s, i, other, r):
        other = s.req[other].next
    push_before(s.lists, s.req, queue, r, other)


@kernel
def _bring_forward(s, i, r):
    """Request ``r`` would come too late: it goes first, and so do those before it that are due no later.

    :return: their predicted work, ticks
    """
    due, work = tail_due(s, r), np.int64(0)
    q = s.lists[queue_of(i), 0]
    while q >= 0:
        after = s.req[q].next
        same = s.req[q].priority == s.req[r].priority and s.req[q].late >= 0 and _is_free(s, i, q)
        in_time = s.inst[i].order == _ON_TIME and s.req[q].late == 0
        if q == r or (same and not in_time and tail_due(s, q) <= due):
            s.req[q].late = -1
            _move(s, i, q, True)
            work += s.req[q].work
        if q == r:
            break
        q = after
    return work


@kernel
def _longest_near(s, i, last):
    """The prompt of most work from the head of the queue to ``last`` whose second deadline is near, -1 if none."""
    found, most = np.int32(-1), np.int64(-1)
    q = s.lists[queue_of(i), 0]
    while q >= 0:
        if s.req[q].late == -1 and s.req[q].blocks == 0 and _is_free(s, i, q) and s.req[q].work > most:
            found, most = q, s.req[q].work
        if q == last:
            break
        q = s.req[q].next
    return found


@kernel(forceinline=True)
def _span(s, r):
    """Ticks that request ``r`` may wait."""
    return s.cluster[0].tail_factor * s.req[r].ttft_slo


@kernel
def _give_up_again(s, i, r):
    """Request ``r`` cannot keep its second deadline either: it waits for its turn behind all others."""
    s.req[r].late = TWICE
    s.turn[i] = min(s.turn[i], tail_due(s, r) + _span(s, r))
    _move(s, i, r, False)


@kernel
def _take_turn(s, i, r, now):
    """Request ``r``, given up twice, goes first; the next such one a while later."""
    s.req[r].late = -TWICE
    s.turn[i] += _span(s, r) * np.floor((now - s.turn[i]) / _span(s, r) + 1.0)  # not from now: looks are rare or often
    _move(s, i, r, True)


@kernel
def keep_bounds(s, i, budget, now):
    """Let prompts of instance ``i`` whose second deadline is near go first, from ``now`` on.

    :param budget: tokens that the next step may compute
    """
    if s.lists[queue_of(i), 2] == 0:
        s.watch[i] = _NEVER
        s.turn[i] = _NEVER
        return
    pace = pace_of(s, i)
    lowest, late = s.req[s.lists[queue_of(i), 1]].priority, False
    on_time = s.inst[i].order == _ON_TIME
    room = float(_NEVER)
    level = np.int64(-(2**40))
    end = first = float(now)  # of the queue as it stands; of those that go before the given up ones in any case
    behind = 0.0  # work of the given up ones passed
    tokens = 0
    r = s.lists[queue_of(i), 0]
    while r >= 0:
        req = s.req[r]
        after = req.next
        if req.priority != level:
            level, first, behind, tokens = np.int64(req.priority), end, 0.0, 0
        work = req.work * pace
        end += work
        if not _is_free(s, i, r):
            first += work
        elif req.late < 0:
            first += work
            room = 0.0
            if req.late > -TWICE and first > tail_due(s, r):
                longest = _longest_near(s, i, r)
                if longest >= 0:
                    first -= s.req[longest].work * pace
                    _give_up_again(s, i, longest)
                    late = True
        elif req.late >= TWICE:
            late = True
            if now >= s.turn[i]:
                _take_turn(s, i, r, now)
                first += work
            elif req.priority == lowest:
                break  # only such ones follow
        elif on_time and req.late == 0:
            if tokens < budget or tokens == 0:
                first += work
                tokens += req.target - req.computed
        else:
            behind += work
            due = req.arrival + _NEAR * (tail_due(s, r) - req.arrival)
            room = min(room, due - end)
            if end > due and (not on_time or first + behind > due):
                forward = _bring_forward(s, i, r) * pace
                first += forward
                behind -= forward
        r = after
    if not late:
        s.turn[i] = _NEVER
    s.watch[i] = min(now + max(0.5 * room, 0.0), s.turn[i])

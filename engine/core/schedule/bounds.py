"""No order of a queue lets a prompt wait for ever: its second deadline, and who goes first when that comes near.

``Order.ON_TIME`` puts prompts last that it gives up, the shortest-first orders put long ones last. Each of them is due
``tail_factor`` TTFT targets after its arrival all the same. At a step boundary the queue is walked as it would be
computed; while everyone is done by then, the order stays what it is. Who would not be goes ahead of the others, the
earliest second deadline first, which keeps every such deadline that any sequence keeps (Jackson 1955). ON_TIME serves
prompts that can be in time first for as long as the given up ones, next in line after that step, still make it.

Where even that is too late, the load is above what the instance can serve: the longest prompt of those is given up once
more and due after ten times as long, so that as few as possible are late (Moore 1968). A first-come-first-served queue
lets nobody overtake, and priorities, which a user sets, come before any deadline.

``watch`` spares most looks: before it no bound can be near, and whatever joins the queue brings it forward.
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Order, RequestState
from engine.core.lists import push_before, queue_of, remove
from engine.core.schedule.on_time import line_up, pace_of, tail_due
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel

_WAITING = int(RequestState.WAITING)
_PREEMPTIVE, _ON_TIME = int(Order.SHORTEST_PREEMPTIVE), int(Order.ON_TIME)

#: Predictions err: a second deadline counts as near when this part of the time to it would be used up.
_NEAR = 0.9
#: Times that a prompt can be given up.
_MOST = 10


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
    if not ahead and s.inst[i].order == _ON_TIME:
        line_up(s, i, r)
        return
    other = s.lists[queue, 0]
    while other >= 0:
        if _yields(s, i, other, r) if ahead else s.req[other].priority > s.req[r].priority:
            break
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
            s.req[q].late = -max(s.req[q].late, 1)
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
        if s.req[q].late < 0 and s.req[q].blocks == 0 and _is_free(s, i, q) and s.req[q].work > most:
            found, most = q, s.req[q].work
        if q == last:
            break
        q = s.req[q].next
    return found


@kernel
def keep_bounds(s, i, budget, now):
    """Let prompts of instance ``i`` whose second deadline is near go first, from ``now`` on.

    :param budget: tokens that the next step may compute
    """
    pace = pace_of(s, i)
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
            if first > tail_due(s, r):
                longest = _longest_near(s, i, r)
                if longest >= 0:
                    first -= s.req[longest].work * pace
                    s.req[longest].late = min(1 - s.req[longest].late, _MOST)
                    _move(s, i, longest, False)
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
    s.watch[i] = now + max(0.5 * room, 0.0)

"""Queue order ON_TIME: as many prompts as possible meet their TTFT target.

On one machine with all jobs at hand, the number of late jobs is least when jobs run in order of their deadlines and,
whenever one would be late, the longest job up to there is put last (Moore 1968, Hodgson's algorithm). Prompts arrive
one by one and run at a pace that decode sets, so the core repeats the test at every step boundary with what it
predicts then. A prompt once given up stays so: it is computed when no prompt that can be in time waits, or when its
second deadline comes near (``engine.core.bounds``).
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Batching, RequestState, Role
from engine.core.lists import TWICE, push_before, push_last, queue_of, remove
from engine.core.schedule.predict import expected_row, prefill_share, running_ctx, whole_device
from engine.jit.kernel import kernel
from engine.latency.evaluate import decode_s, fused_shared_s, prefill_s

_, _DECODE, _MIXED, _MULTIPLEXED = (int(r) for r in Role)
_PREFILL_FIRST = int(Batching.PREFILL_FIRST)
_WAITING = int(RequestState.WAITING)

#: Prefill beside decode is taken to be no slower than this, until a closer look says how slow it is.
_SLOWER = 8.0


@kernel(forceinline=True)
def deadline_of(s, r):
    """When the first token of request ``r`` is due, ticks."""
    return s.req[r].arrival + s.req[r].ttft_slo


@kernel
def tail_due(s, r):
    """The second deadline of request ``r``, ticks: ``tail_factor`` TTFT targets after its arrival."""
    return s.req[r].arrival + s.cluster[0].tail_factor * s.req[r].ttft_slo


@kernel
def watch_bound(s, i, r, now):
    """Request ``r`` joined the queue of instance ``i`` or fell back in it: note when a bound may be near there.

    Whoever else waits may have to wait for it too, and it for all of them.
    """
    s.req[r].late = abs(s.req[r].late)
    left = tail_due(s, r) - now - _SLOWER * s.inst[i].queue_work
    s.watch[i] = min(s.watch[i] - _SLOWER * s.req[r].work, now + 0.5 * left)


@kernel(forceinline=True)
def _band(late):
    """Who starts first in order ON_TIME: second deadlines that are near, then prompts in time, then given up ones.

    Of these the ones that were given up twice come last."""
    return 0 if late < 0 else (1 if late == 0 else 2)


@kernel
def goes_before(s, r, q):
    """Whether request ``r``, not yet queued, starts before queued ``q``: by priority, band, then deadline."""
    mine, theirs = s.req[r], s.req[q]
    if theirs.state != _WAITING or theirs.blocks > 0 or theirs.generated > 0:
        return False
    if theirs.priority != mine.priority:
        return theirs.priority > mine.priority
    if mine.generated > 0:
        return True
    band = _band(mine.late)
    if _band(theirs.late) != band:
        return _band(theirs.late) > band
    if band == 2:
        return mine.late < TWICE and (theirs.late >= TWICE or theirs.arrival > mine.arrival)
    if band == 0:
        return tail_due(s, q) > tail_due(s, r)
    return deadline_of(s, q) > deadline_of(s, r)


@kernel
def pace_of(s, i):
    """Predicted seconds on instance ``i`` per second of prefill work alone, with the decodes that run there now."""
    inst = s.inst[i]
    if inst.run_n == 0:
        return 1.0
    p = inst.profile
    profile, full = s.profile[p], s.share[p, whole_device(s, i)]
    if inst.role == _MULTIPLEXED:
        part = s.share[p, prefill_share(s, i, expected_row(s, i))]
        n = float(max(inst.queue_tokens / max(s.lists[queue_of(i), 2], 1), 1.0))
        alone = prefill_s(profile, full, n * n, 0.0, n)
        return max(prefill_s(profile, part, n * n, 0.0, n) * part.corun_prefill / max(alone, 1e-9), 1.0)
    step = decode_s(profile, full, running_ctx(s, i), inst.run_n)
    if inst.role == _DECODE:
        return 1.0 + step * s.lists[queue_of(i), 2] / max(inst.queue_work * 1e-12, 1e-9)
    if inst.role == _MIXED and inst.batching != _PREFILL_FIRST:
        room = max(float(inst.chunk_tokens - inst.run_n), 16.0)
        alone = prefill_s(profile, full, room * room, 0.0, room)
        beside = max(step - fused_shared_s(full, alone, step), 0.0)
        return 1.0 + beside / max(alone, 1e-9)
    return 1.0


@kernel
def _longest_until(s, i, last):
    """The waiting prompt of most work from the head of the queue to ``last`` that is not given up, -1 if none."""
    found, most = np.int32(-1), np.int64(-1)
    q = s.lists[queue_of(i), 0]
    while q >= 0:
        req = s.req[q]
        if req.state == _WAITING and req.blocks == 0 and req.generated == 0 and req.late == 0 and req.work > most:
            found, most = q, req.work
        if q == last:
            break
        q = req.next
    return found


@kernel
def line_up(s, i, r):
    """Put request ``r`` where it belongs in the queue of instance ``i``."""
    queue = queue_of(i)
    if s.req[r].late >= TWICE:
        push_last(s.lists, s.req, queue, r)
        return
    other = s.lists[queue, 0]
    while other >= 0 and not goes_before(s, r, other):
        other = s.req[other].next
    push_before(s.lists, s.req, queue, r, other)


@kernel
def give_up_late(s, i, now):
    """Walk the queue of instance ``i`` as it would be computed from ``now``; where a prompt would be late, put the
    longest one up to there behind those that can be in time."""
    queue = queue_of(i)
    if s.lists[queue, 2] == 0:
        return
    pace = pace_of(s, i)
    end = float(now)
    lowest = s.req[s.lists[queue, 1]].priority
    r = s.lists[queue, 0]
    while r >= 0:
        after = s.req[r].next
        if s.req[r].late > 0 and s.req[r].priority == lowest:
            return  # only such ones follow
        end += s.req[r].work * pace
        if s.req[r].late == 0 and s.req[r].generated == 0 and end > deadline_of(s, r):
            victim = _longest_until(s, i, r)
            if victim >= 0:
                end -= s.req[victim].work * pace
                s.req[victim].late = 1
                remove(s.lists, s.req, queue, victim)
                line_up(s, i, victim)
                watch_bound(s, i, victim, now)
        r = after

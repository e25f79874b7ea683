"""Blocks for the next decode step, and who gives way when there is none: the newest request is recomputed later."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Order, RequestState, Role
from engine.core.kv import grow, release
from engine.core.lists import place_by_work, push_before, push_front, queue_of, remove
from engine.core.schedule.predict import whole_device
from engine.core.slo import end_request
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel
from engine.latency.evaluate import prefill_s, times, to_ticks

_WAITING = int(RequestState.WAITING)
_RUNNING = int(RequestState.RUNNING)
_FAILED = int(RequestState.FAILED)
_PREEMPTIVE = int(Order.SHORTEST_PREEMPTIVE)
_PREFILL = int(Role.PREFILL)


@kernel
def gives_up_decodes(s, i):
    """Whether instance ``i`` must be rid of its decodes before its pending role change."""
    role = s.inst[i].target_role
    return role >= 0 and (role == _PREFILL or s.profile[s.inst[i].profile].switch_full == 1)


@kernel(forceinline=True)
def note_due(s, i, r):
    """Count running request ``r`` in its class's least "first token + TPOT target × tokens" on instance ``i``."""
    c = s.req[r].cls
    due = s.req[r].first_token + times(s.req[r].tpot_slo, s.req[r].generated)
    if due < s.due[i, c]:
        s.due[i, c] = due


@kernel
def recount_due(s, i):
    for c in range(s.cluster[0].n_classes):
        s.due[i, c] = _NEVER
    for slot in range(s.inst[i].run_n):
        note_due(s, i, s.run[i, slot])


@kernel
def requeue(s, i, r):
    """Request ``r`` lost its blocks: book it for recomputation in the queue of instance ``i``."""
    req = s.req[r]
    req.computed = 0
    req.target = req.prompt + req.generated
    req.state = _WAITING
    req.n_preempt += 1
    req.chain += 1
    p = s.inst[i].profile
    n = float(req.target)
    req.work = to_ticks(prefill_s(s.profile[p], s.share[p, whole_device(s, i)], n * n, 0.0, n))
    s.inst[i].queue_tokens += req.target
    s.inst[i].queue_work += req.work
    s.watch[i] = 0.0


@kernel
def preempt(s, i, r):
    """Take request ``r`` off its blocks: to the head of the queue when it was running, to its place when partly
    prefilled."""
    req = s.req[r]
    queued = req.state != _RUNNING
    if not queued:
        s.inst[i].run_ctx -= req.computed
        push_front(s.lists, s.req, queue_of(i), r)
    else:
        s.inst[i].started_n -= 1
        s.inst[i].held_tokens -= req.computed
        s.inst[i].queue_tokens -= req.target - req.computed
        s.inst[i].queue_work -= req.work
    release(s, r)
    requeue(s, i, r)
    if queued and req.generated == 0 and s.inst[i].order == _PREEMPTIVE:
        queue = queue_of(i)
        remove(s.lists, s.req, queue, r)
        req.late = abs(req.late)
        push_before(s.lists, s.req, queue, r, place_by_work(s.lists, s.req, queue, r))
    s.inst[i].preempted += 1
    s.cluster[0].n_preempted += 1


@kernel
def partly_prefilled(s, i):
    """The last queued request that holds blocks and is not in a step in flight, -1 if none."""
    started, found = s.inst[i].started_n, np.int32(-1)
    r = s.lists[queue_of(i), 0]
    while r >= 0 and started > 0:  # they stand near the head, and the queue may be long
        if s.req[r].blocks > 0:
            started -= 1
            if s.req[r].state == _WAITING:
                found = r
        r = s.req[r].next
    return found


@kernel
def secure_decode(s, i, now):
    """Give every running request of ``i`` a block for its next token, preempting the newest where there is none."""
    size = s.cluster[0].block_tokens
    p = s.inst[i].pool
    before = s.inst[i].run_n
    freed = False
    slot = 0
    while slot < s.inst[i].run_n:
        r = s.run[i, slot]
        if s.req[r].computed < s.req[r].blocks * size:
            slot += 1
            continue
        while s.pool[p].free == 0:
            freed = True
            victim = partly_prefilled(s, i)
            if victim < 0:
                victim = s.run[i, s.inst[i].run_n - 1]
                s.inst[i].run_n -= 1
            if victim == r and s.req[r].blocks == s.pool[p].n_blocks:
                s.inst[i].run_ctx -= s.req[r].computed
                release(s, r)
                end_request(s, r, now, _FAILED)
            else:
                preempt(s, i, victim)
            if victim == r:
                break
        if slot >= s.inst[i].run_n:
            break
        s.req[r].tail = grow(s, p, s.req[r].tail, s.req[r].blocks, s.req[r].blocks + 1)
        s.req[r].blocks += 1
        slot += 1
    if s.inst[i].run_n < before:
        recount_due(s, i)
    if freed:
        # The blocks given up may let a prompt start: the queue was looked at before, or on the other lane.
        touch_pool(s, i)


@kernel
def give_way(s, i, head):
    """Partly prefilled prompts of several instances fill a shared pool: the latest arrival gives up its blocks.

    :return: whether that was somebody else, so that ``head`` of instance ``i`` may go on
    """
    owner, victim = i, head
    alone = True
    for j in range(s.cluster[0].n_instances):
        if j == i or s.inst[j].pool != s.inst[i].pool:
            continue
        r = partly_prefilled(s, j)
        alone = alone and s.inst[j].started_n == 0
        if r >= 0 and s.req[r].arrival > s.req[victim].arrival:
            owner, victim = j, r
    if s.req[victim].blocks == 0 or (victim == head and alone):
        return False
    preempt(s, owner, victim)
    touch_pool(s, i)
    return victim != head


@kernel
def touch_pool(s, i):
    """Blocks were freed in the pool of instance ``i``: everyone on it may have something new to do."""
    if s.pool[s.inst[i].pool].sharers == 1:
        s.inst[i].dirty = 1
        return
    for j in range(s.cluster[0].n_instances):
        if s.inst[j].pool == s.inst[i].pool:
            s.inst[j].dirty = 1

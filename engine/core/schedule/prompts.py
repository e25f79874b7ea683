"""Which prompts the next step of a lane computes: admission, token budgets, and who gives way when blocks run out."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Order, RequestState, Role
from engine.core.kv import adopt, blocks_for, evictable_cost, find_prefix, grow
from engine.core.lists import queue_of, ready_of
from engine.core.schedule.bounds import keep_bounds
from engine.core.schedule.on_time import give_up_late
from engine.core.schedule.preemption import give_way, partly_prefilled, preempt, touch_pool
from engine.jit.kernel import kernel

_PREFILL = int(Role.PREFILL)
_PREFILLING = int(RequestState.PREFILLING)
_ON_TIME, _FCFS = int(Order.ON_TIME), int(Order.FCFS)


@kernel
def _admit(s, i, r, budget, reserve, now):
    """Tokens of queued request ``r`` that the next step may compute (0: no blocks, or no budget for a whole prompt).

    :param budget: tokens left; negative means that only the whole rest of the prompt will do
    :param reserve: blocks a request that holds none yet must leave free
    """
    req = s.req[r]
    p = s.inst[i].pool
    size = s.cluster[0].block_tokens
    prefix, n_prefix = np.int32(-1), 0
    if req.blocks == 0:
        prefix, n_prefix = find_prefix(s, p, r)
    have = req.blocks + n_prefix
    start = max(req.computed, n_prefix * size)
    n = req.target - start
    if budget >= 0:
        n = min(n, budget)
    need = blocks_for(start + n, size)
    cost = need - have
    if req.blocks == 0:
        if s.pool[p].sharers > 1 or s.inst[i].whole_prompt == 1:
            # Prompts started by several instances would take each other's blocks: start only what fits as a whole.
            cost = blocks_for(req.target, size) - have
        cost += reserve + evictable_cost(s, prefix, n_prefix)
    if n <= 0 or cost > s.pool[p].free:
        return 0
    if req.blocks == 0:
        adopt(s, p, prefix, n_prefix)
        s.inst[i].started_n += 1
        s.inst[i].queue_tokens -= start
        s.inst[i].held_tokens += start
        req.tail = prefix
        req.blocks = n_prefix
        req.computed = start
        if req.prefill_start < 0:
            req.prefill_start = now
            req.cached = start
            if s.cluster[0].hash_tokens > 0:
                s.cluster[0].looked_up_tokens += req.prompt
                s.cluster[0].cached_tokens += start
    req.tail = grow(s, p, req.tail, req.blocks, need)
    req.blocks = max(need, req.blocks)
    return n


@kernel
def take(s, i, l, k, r, n):
    """Add ``n`` tokens of request ``r`` to the step of lane (i, l) as its ``k``-th prompt."""
    lane = s.lane[i, l]
    x, done = float(n), float(s.req[r].computed)
    lane.sum_n += n
    lane.sum_n2 += x * x
    lane.sum_nr += x * done
    rest = s.req[r].target - s.req[r].computed
    lane.work += s.req[r].work if n == rest else s.req[r].work * n // rest
    s.prefills[i, k] = r
    lane.n_prefills = k + 1
    s.req[r].sched = n
    s.req[r].state = _PREFILLING


@kernel
def _has_seat(s, i):
    """Whether one more prompt of instance ``i`` may start and later join its running set."""
    seats = s.inst[i].run_n + s.lists[ready_of(i), 2] + s.inst[i].started_n
    return seats < s.inst[i].max_batch or s.inst[i].role == _PREFILL


@kernel
def admit_alone(s, i, r, now):
    """Blocks for the whole rest of queued request ``r``: the tokens to compute, 0 where there is no room for it."""
    if s.req[r].blocks == 0 and not _has_seat(s, i):
        return 0
    return _admit(s, i, r, -1, int(s.pool[s.inst[i].pool].n_blocks * s.inst[i].watermark), now)


@kernel
def _plan_prompts(s, i, l, budget, chunked, limit, now):
    """Fill the step of lane (i, l) with prompts from the queue.

    :param budget: tokens; a single longer prompt may exceed it unless ``chunked``
    :param chunked: prompts may be cut to fit
    :param limit: prompts at most
    """
    lane = s.lane[i, l]
    reserve = int(s.pool[s.inst[i].pool].n_blocks * s.inst[i].watermark)
    idle = s.inst[i].run_n == 0
    r = s.lists[queue_of(i), 0]
    k = 0
    while r >= 0 and k < limit:
        after = s.req[r].next
        left = budget - lane.sum_n
        if s.req[r].blocks == 0 and not _has_seat(s, i):
            break
        if chunked:
            if left <= 0:
                break
        elif k > 0 and s.req[r].target - s.req[r].computed > left:
            break
        n = _admit(s, i, r, left if chunked else -1, 0 if idle and k == 0 else reserve, now)
        if n == 0:
            break
        take(s, i, l, k, r, n)
        k += 1
        r = after
    return k


@kernel
def _unblock(s, i):
    """Nothing runs and the queue's head has no room: take the newest partly prefilled request off its blocks.

    :return: whether it is worth planning again
    """
    if s.inst[i].run_n > 0 or s.lists[ready_of(i), 2] > 0:
        return False
    victim = partly_prefilled(s, i)
    if victim < 0:
        return False
    head = s.lists[queue_of(i), 0]
    if victim != head:
        preempt(s, i, victim)
        touch_pool(s, i)
        return True
    return s.pool[s.inst[i].pool].sharers > 1 and give_way(s, i, head)


@kernel
def plan_queue(s, i, l, budget, chunked, limit, now):
    """``_plan_prompts``, but never stuck behind blocks that only queued requests hold."""
    order = s.inst[i].order
    if order != _FCFS:
        if order == _ON_TIME:
            give_up_late(s, i, now)
        if now >= s.watch[i]:
            keep_bounds(s, i, budget, now)
    k = _plan_prompts(s, i, l, budget, chunked, limit, now)
    while k == 0 and budget > 0 and s.lists[queue_of(i), 2] > 0 and _unblock(s, i):
        k = _plan_prompts(s, i, l, budget, chunked, limit, now)
    return k

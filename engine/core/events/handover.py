"""From prefill to decode: hand-over in place or by a pull over a link, with back-pressure on the sender."""

from __future__ import annotations

from engine.core.kinds import LaneKind, RequestState
from engine.core.kv import adopt, blocks_for, evictable_cost, find_prefix, grow, publish, release, release_chain
from engine.core.lists import (
    HANDOVER,
    inbound_of,
    link_list,
    pop_front,
    push_back,
    queue_of,
    ready_of,
    remove,
)
from engine.core.schedule.preemption import requeue, touch_pool
from engine.core.slo import end_request
from engine.jit.kernel import kernel

_INBOUND = int(RequestState.INBOUND)
_MOVING = int(RequestState.MOVING)
_READY = int(RequestState.READY)
_FAILED = int(RequestState.FAILED)
_IDLE = int(LaneKind.IDLE)


@kernel
def hand_over(s, r, dest, now):
    """Answer PLACE_DECODE: request ``r`` (HANDOVER) will be decoded by ``dest``, which pulls its KV in time."""
    remove(s.lists, s.req, HANDOVER, r)
    req = s.req[r]
    src = req.inst
    req.dest = dest
    if s.inst[dest].pool == s.inst[src].pool:
        s.inst[src].out_n -= 1
        s.inst[src].held_tokens -= req.computed
        s.inst[dest].held_tokens += req.computed
        req.inst = dest
        req.state = _READY
        push_back(s.lists, s.req, ready_of(dest), r)
        if s.inst[src].target_role >= 0:
            s.inst[src].dirty = 1  # this may have been the last that its role change waited for
    else:
        req.state = _INBOUND
        s.inst[dest].inbound_tokens += req.computed
        push_back(s.lists, s.req, inbound_of(dest), r)
    s.inst[dest].dirty = 1


@kernel
def drop_handover(s, r, now):
    """Request ``r`` (HANDOVER) fits into no instance that decodes: it ends as FAILED."""
    remove(s.lists, s.req, HANDOVER, r)
    i = s.req[r].inst
    s.inst[i].out_n -= 1
    s.inst[i].held_tokens -= s.req[r].computed
    release(s, r)
    end_request(s, r, now, _FAILED)
    touch_pool(s, i)


@kernel
def _at_rest(s, p):
    """Whether nothing that goes on in pool ``p`` will free a block (a prompt that waits for one does not)."""
    for i in range(s.cluster[0].n_instances):
        inst = s.inst[i]
        if inst.pool == p:
            busy = s.lane[i, 0].kind != _IDLE or s.lane[i, 1].kind != _IDLE or inst.switching == 1
            if busy or inst.run_n + s.lists[ready_of(i), 2] + inst.moving_n > 0:
                return False
    return True


@kernel
def _recompute_here(s, i, r):
    """Two instances at rest wait for each other's blocks: request ``r`` gives up its KV and is recomputed on ``i``."""
    req = s.req[r]
    src = req.inst
    remove(s.lists, s.req, inbound_of(i), r)
    s.inst[i].inbound_tokens -= req.computed
    s.inst[src].out_n -= 1
    s.inst[src].held_tokens -= req.computed
    release(s, r)
    touch_pool(s, src)
    requeue(s, i, r)
    push_back(s.lists, s.req, queue_of(i), r)
    req.inst = i
    s.inst[src].preempted += 1
    s.cluster[0].n_preempted += 1
    s.inst[i].dirty = 1


@kernel
def pull(s, i):
    """Instance ``i`` reserves blocks for inbound requests, first come first served, and puts them on its link.

    The source keeps its blocks until ``transfer_done``: a full receiver therefore stalls the sender's prefill.
    """
    inbound = inbound_of(i)
    p = s.inst[i].pool
    size = s.cluster[0].block_tokens
    link = s.inst[i].link
    while s.lists[inbound, 2] > 0:
        r = s.lists[inbound, 0]
        req = s.req[r]
        seats = s.inst[i].run_n + s.lists[ready_of(i), 2] + s.inst[i].moving_n
        prefix, n_prefix = find_prefix(s, p, r)
        need = blocks_for(req.computed + 1, size)
        cost = need - n_prefix + evictable_cost(s, prefix, n_prefix)
        if seats >= s.inst[i].max_batch or cost > s.pool[p].free:
            if not (_at_rest(s, p) and _at_rest(s, s.inst[req.inst].pool)):
                return
            _recompute_here(s, i, r)
            continue
        remove(s.lists, s.req, inbound, r)
        adopt(s, p, prefix, n_prefix)
        req.dst_tail = grow(s, p, prefix, n_prefix, need)
        req.dst_blocks = need
        req.dst_cached = n_prefix * size
        req.state = _MOVING
        s.inst[i].moving_n += 1
        s.link[link].tokens += req.computed - req.dst_cached
        push_back(s.lists, s.req, link_list(s.cluster[0].n_instances, link), r)


@kernel
def transfer_done(s, link, now):
    """The transfer at the head of ``link`` arrived: the source lets go of its blocks, the receiver may run it."""
    r = pop_front(s.lists, s.req, link_list(s.cluster[0].n_instances, link))
    req = s.req[r]
    src, dest = req.inst, req.dest
    release_chain(s, s.inst[src].pool, req.tail, req.blocks)
    s.inst[src].out_n -= 1
    s.inst[src].held_tokens -= req.computed
    touch_pool(s, src)
    req.tail, req.blocks = req.dst_tail, req.dst_blocks
    req.dst_tail, req.dst_blocks = -1, 0
    req.chain += 1
    req.inst = dest
    req.state = _READY
    s.inst[dest].moving_n -= 1
    s.inst[dest].inbound_tokens -= req.computed
    s.inst[dest].held_tokens += req.computed
    s.inst[dest].dirty = 1
    moved = req.computed - req.dst_cached
    s.link[link].tokens -= moved
    s.link[link].busy = 0
    s.cluster[0].n_migrated += 1
    s.cluster[0].migrated_tokens += moved
    publish(s, s.inst[dest].pool, r, req.dst_cached, req.computed)
    push_back(s.lists, s.req, ready_of(dest), r)
    return r


@kernel
def start_link(s, link):
    """Whether ``link`` was idle and its next transfer starts now."""
    if s.link[link].busy == 1 or s.lists[link_list(s.cluster[0].n_instances, link), 2] == 0:
        return False
    s.link[link].busy = 1
    return True

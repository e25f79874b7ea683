"""What the surrogate never needs: clients hang up, links break, instances die, an administrator changes a role.

Entry points like those of ``engine.core.loop``: the address vector of a cluster and plain numbers.
"""

from __future__ import annotations

import numpy as np

from engine.core.events.handover import start_link
from engine.core.events.roles import begin_role_change, count_able, may_change
from engine.core.kinds import LaneKind, RequestState, Role
from engine.core.kv import release, release_chain
from engine.core.lists import HANDOVER, HELD, PLACING, inbound_of, link_list, push_back, queue_of, ready_of, remove
from engine.core.schedule.preemption import recount_due, touch_pool
from engine.core.slo import end_request
from engine.core.state import attach
from engine.jit.kernel import kernel

_PREFILL, _MIXED = int(Role.PREFILL), int(Role.MIXED)
_K_IDLE, _K_DECODE, _K_FUSED = int(LaneKind.IDLE), int(LaneKind.DECODE), int(LaneKind.FUSED)
(_NEW, _PLACING, _HELD, _WAITING, _PREFILLING, _HANDOVER, _INBOUND, _MOVING, _READY, _RUNNING, _FINISHED,
 _, _FAILED) = (int(x) for x in RequestState)  # fmt: skip


@kernel
def _leave_source(s, r):
    """Take request ``r``, which waits outside the running set with its KV in place, off its blocks."""
    i = s.req[r].inst
    s.inst[i].held_tokens -= s.req[r].computed
    release(s, r)
    touch_pool(s, i)


@kernel
def leave_running(s, i, r):
    kept = 0
    for slot in range(s.inst[i].run_n):
        other = s.run[i, slot]
        if other != r:
            s.run[i, kept] = other
            kept += 1
    s.inst[i].run_n = kept
    s.inst[i].run_ctx -= s.req[r].computed
    recount_due(s, i)
    release(s, r)
    touch_pool(s, i)


@kernel
def _leave_link(s, r, link):
    """Take request ``r`` off its link: its blocks at the receiver are given back."""
    dest = s.req[r].dest
    remove(s.lists, s.req, link_list(s.cluster[0].n_instances, link), r)
    s.link[link].tokens -= s.req[r].computed - s.req[r].dst_cached
    s.inst[dest].moving_n -= 1
    s.inst[dest].inbound_tokens -= s.req[r].computed
    release_chain(s, s.inst[dest].pool, s.req[r].dst_tail, s.req[r].dst_blocks)
    s.req[r].dst_tail, s.req[r].dst_blocks = -1, 0
    touch_pool(s, dest)
    s.inst[s.req[r].inst].out_n -= 1
    _leave_source(s, r)


@kernel
def _decoding(s, i):
    """Whether a step with the running set of instance ``i`` is in flight."""
    first, second = s.lane[i, 0].kind, s.lane[i, 1].kind
    return first in (_K_FUSED, _K_DECODE) or second == _K_DECODE


@kernel
def detach(s, r):
    """Take request ``r`` out of whatever list or set it is in, and off its blocks.

    :return: False while a step or transfer in flight uses its blocks
    """
    req = s.req[r]
    i, state = req.inst, req.state
    if state == _PREFILLING or (state == _RUNNING and _decoding(s, i)):
        return False
    if state == _PLACING:
        remove(s.lists, s.req, PLACING, r)
    elif state == _HELD:
        remove(s.lists, s.req, HELD, r)
    elif state == _WAITING:
        remove(s.lists, s.req, queue_of(i), r)
        s.inst[i].queue_tokens -= req.target - req.computed
        s.inst[i].queue_work -= req.work
        s.inst[i].dirty = 1
        if req.blocks > 0:
            s.inst[i].started_n -= 1
            _leave_source(s, r)
    elif state == _HANDOVER:
        remove(s.lists, s.req, HANDOVER, r)
        s.inst[i].out_n -= 1
        _leave_source(s, r)
    elif state == _INBOUND:
        remove(s.lists, s.req, inbound_of(req.dest), r)
        s.inst[req.dest].inbound_tokens -= req.computed
        s.inst[req.dest].dirty = 1
        s.inst[i].out_n -= 1
        _leave_source(s, r)
    elif state == _MOVING:
        link = s.inst[req.dest].link
        if s.link[link].busy == 1 and s.lists[link_list(s.cluster[0].n_instances, link), 0] == r:
            return False
        _leave_link(s, r, link)
    elif state == _READY:
        remove(s.lists, s.req, ready_of(i), r)
        _leave_source(s, r)
    else:
        leave_running(s, i, r)
    return True


@kernel
def start_over(s, r):
    """Request ``r``, which holds nothing any more, is placed anew and recomputed."""
    req = s.req[r]
    req.computed = 0
    req.target = req.prompt + req.generated
    req.n_preempt += 1
    req.chain += 1
    req.inst = -1
    req.dest = -1
    req.state = _PLACING
    push_back(s.lists, s.req, PLACING, r)


@kernel
def abort(words, r, now):
    """The client of request ``r`` is gone: give back every block it holds and end it as FAILED.

    :return: False while a step or transfer in flight uses its blocks; ask again when that has ended
    """
    s = attach(words)
    state = s.req[r].state
    if state == _NEW or state >= _FINISHED:
        return True
    if not detach(s, r):
        return False
    end_request(s, r, now, _FAILED)
    return True


@kernel
def lose(words, i):
    """The thread or process of instance ``i`` is gone: nothing is placed there from now on.

    Where nobody else could decode, one of the others becomes MIXED without delay: it has all it needs for that.
    """
    s = attach(words)
    s.inst[i].lost = 1
    if s.inst[i].target_role >= 0 and s.inst[i].switching == 0:
        s.inst[i].target_role = -1
        s.cluster[0].moving_roles -= 1
    heir = -1
    for j in range(s.cluster[0].n_instances):
        if s.inst[j].lost == 1:
            continue
        if s.inst[j].role != _PREFILL and s.inst[j].target_role != _PREFILL:
            return
        heir = j if heir < 0 else heir
    if heir < 0:
        return
    if s.inst[heir].switching == 1:
        s.inst[heir].target_role = _MIXED
    elif s.inst[heir].target_role >= 0:
        s.inst[heir].target_role = -1
        s.cluster[0].moving_roles -= 1
    if s.inst[heir].role == _PREFILL:
        s.inst[heir].role = _MIXED
        s.cluster[0].n_switches += 1
    s.inst[heir].dirty = 1


@kernel
def evacuate(words, i):
    """Place anew, for recomputation, every request that needs lost instance ``i``, on which no step is in flight.

    What is on its way over a link is left to :func:`fail_transfer`, or to another call once it has arrived.

    :return: how many requests start over
    """
    s = attach(words)
    for l in range(2):
        lane = s.lane[i, l]
        for k in range(lane.n_prefills):
            s.req[s.prefills[i, k]].state = _WAITING
            s.req[s.prefills[i, k]].sched = 0
        lane.kind = _K_IDLE
        lane.n_prefills = 0
        lane.layer_to = 0
    for k in range(s.inst[i].parked_n):
        r = s.prefills[s.cluster[0].n_instances + i, k]
        s.req[r].state = _WAITING
        s.req[r].sched = 0
    s.inst[i].parked_n = 0
    s.inst[i].parked_work = 0
    n = 0
    for r in range(s.cluster[0].n_requests):
        req = s.req[r]
        if req.state < _WAITING or req.state >= _FINISHED:
            continue
        if req.state == _INBOUND and req.dest == i and req.inst != i:
            remove(s.lists, s.req, inbound_of(i), r)
            s.inst[i].inbound_tokens -= req.computed
            req.state = _HANDOVER
            req.dest = -1
            push_back(s.lists, s.req, HANDOVER, r)
        elif (req.inst == i or (req.state == _MOVING and req.dest == i)) and detach(s, r):
            start_over(s, r)
            n += 1
    return n


@kernel
def fail_transfer(words, link, keep):
    """The transfer at the head of ``link`` failed: its request starts over with a PLACE_PREFILL decision.

    :param keep: the receiver's blocks may still be written to; they stay reserved for ``release_blocks``
    :return: (last block and number of blocks kept, whether the next transfer starts)
    """
    s = attach(words)
    r = s.lists[link_list(s.cluster[0].n_instances, link), 0]
    req = s.req[r]
    tail, blocks = np.int32(-1), np.int32(0)
    if keep:
        tail, blocks = req.dst_tail, req.dst_blocks
        req.dst_tail, req.dst_blocks = -1, 0
    _leave_link(s, r, link)
    start_over(s, r)
    s.link[link].busy = 0
    return tail, blocks, start_link(s, link)


@kernel
def release_blocks(words, i, tail, n):
    """Give back a chain of ``n`` blocks of the pool of instance ``i`` that no request owns any more."""
    s = attach(words)
    release_chain(s, s.inst[i].pool, tail, n)
    touch_pool(s, i)


@kernel
def request_role(words, i, role):
    """Begin the change of instance ``i`` to ``role``, as a REALLOCATE answer would.

    :return: False where the scenario does not allow it: too many changes under way, or too few instances that could
        prefill or decode
    """
    s = attach(words)
    prefill, decode = count_able(s, i)
    if not may_change(s, i, role, prefill, decode):
        return False
    if s.inst[i].role != role:
        begin_role_change(s, i, role)
    return True

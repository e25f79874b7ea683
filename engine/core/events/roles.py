"""Role changes: drain, pay for the switch, serve in the new role. No request is lost on the way.

An instance that may not decode in its new role is rid of its running requests in one of two ways, as the scenario says:
it waits for their end, or it hands them over. Then, at every step boundary, it gives as many to others as those have
room for and their links are free for; they pull the KV as after a prefill, and the rest goes on decoding meanwhile.

Engines of others hand no running decode over, and their roles are what the router uses them for: a change costs the
drain and nothing else.
"""

from __future__ import annotations

from engine.core.kinds import LaneKind, RequestState, Role
from engine.core.kv import blocks_for
from engine.core.lists import HANDOVER, PLACING, inbound_of, pop_front, push_back, queue_of, ready_of, remove
from engine.core.schedule.preemption import gives_up_decodes, recount_due
from engine.jit.kernel import kernel

_PREFILL, _DECODE, _, _MULTIPLEXED = (int(r) for r in Role)
_PLACING = int(RequestState.PLACING)
_WAITING = int(RequestState.WAITING)
_HANDOVER = int(RequestState.HANDOVER)
_IDLE, _K_PREFILL = int(LaneKind.IDLE), int(LaneKind.PREFILL)
#: Requests that one receiver has on the way at most: each stands still for no longer than so many transfers.
_ON_THE_WAY = 4


@kernel
def count_able(s, but):
    """Instances other than ``but`` that can prefill and that can decode, and still can after their role change."""
    prefill, decode = 0, 0
    for i in range(s.cluster[0].n_instances):
        if i == but or s.inst[i].lost != 0:
            continue
        role, target = s.inst[i].role, s.inst[i].target_role
        prefill += 1 if role != _DECODE and target != _DECODE else 0
        decode += 1 if role != _PREFILL and target != _PREFILL else 0
    return prefill, decode


@kernel
def may_change(s, i, role, prefill, decode):
    """Whether instance ``i`` may begin a change to ``role``, (``prefill``, ``decode``) being ``count_able(s, i)``.

    No change takes away what the stated minima need, while it drains or afterwards.
    """
    c, inst = s.cluster[0], s.inst[i]
    if (c.roles_allowed >> role) & 1 == 0 or c.moving_roles >= c.at_once or inst.target_role >= 0 or inst.lost != 0:
        return False
    if inst.role != _DECODE and role == _DECODE and prefill < c.min_prefill:
        return False
    return not (inst.role != _PREFILL and role == _PREFILL and decode < c.min_decode)


@kernel
def _receiver(s, i, j):
    """Whether instance ``j`` is one that draining instance ``i`` may hand decodes to."""
    other = s.inst[j]
    return j != i and other.lost == 0 and other.target_role < 0 and other.role != _PREFILL


@kernel
def _room(s, i):
    """What others can take from draining instance ``i`` now: (requests, blocks, most blocks of one request).

    Half of what is free is left to the growth of those that are there.
    """
    n, blocks, most = 0, 0, 0
    for j in range(s.cluster[0].n_instances):
        if not _receiver(s, i, j):
            continue
        other = s.inst[j]
        coming = s.lists[inbound_of(j), 2] + other.moving_n
        seats = other.max_batch - other.run_n - s.lists[ready_of(j), 2] - coming
        free = s.pool[other.pool].free // 2
        n += max(min(seats, _ON_THE_WAY - coming), 0)
        blocks += free
        most = max(most, free)
    return n - s.lists[HANDOVER, 2], blocks, most


@kernel
def _to_hand_over(s, i, r):
    """Request ``r``, out of the running set and every list, waits for a PLACE_DECODE answer."""
    s.req[r].state = _HANDOVER
    s.req[r].dest = -1
    s.inst[i].out_n += 1
    push_back(s.lists, s.req, HANDOVER, r)


@kernel
def hand_out(s, i):
    """A step of instance ``i`` ended, or its role change begins: hand over what others have room for, the newest first.

    Nothing is done while a step with the running set is in flight, nor where the scenario has decodes waited for.
    """
    if s.cluster[0].hand_over == 0 or not gives_up_decodes(s, i):
        return
    for l in range(2):
        if s.lane[i, l].kind != _IDLE and s.lane[i, l].kind != _K_PREFILL:
            return
    n, blocks, most = _room(s, i)
    ready, before = ready_of(i), s.inst[i].run_n
    while n > 0 and s.inst[i].run_n + s.lists[ready, 2] > 0:
        waits = s.lists[ready, 2] > 0
        r = s.lists[ready, 1] if waits else s.run[i, s.inst[i].run_n - 1]
        need = blocks_for(s.req[r].computed + 1, s.cluster[0].block_tokens)
        if need > most or need > blocks:
            break
        if waits:
            remove(s.lists, s.req, ready, r)
        else:
            s.inst[i].run_n -= 1
            s.inst[i].run_ctx -= s.req[r].computed
            s.inst[i].held_tokens += s.req[r].computed
        _to_hand_over(s, i, r)
        n -= 1
        blocks -= need
    if s.inst[i].run_n < before:
        recount_due(s, i)


@kernel
def begin_role_change(s, i, role):
    """Answer REALLOCATE: drain instance ``i`` and then make it ``role``.

    Prompts not yet started are placed anew, and so is inbound KV when the new role cannot decode.
    """
    s.inst[i].target_role = role
    s.cluster[0].moving_roles += 1
    r = s.lists[queue_of(i), 0]
    while r >= 0:
        after = s.req[r].next
        if s.req[r].state == _WAITING and s.req[r].blocks == 0 and s.req[r].generated == 0:
            remove(s.lists, s.req, queue_of(i), r)
            s.inst[i].queue_tokens -= s.req[r].target
            s.inst[i].queue_work -= s.req[r].work
            s.req[r].state = _PLACING
            s.req[r].inst = -1
            push_back(s.lists, s.req, PLACING, r)
        r = after
    if role == _PREFILL:
        while s.lists[inbound_of(i), 2] > 0:
            r = pop_front(s.lists, s.req, inbound_of(i))
            s.inst[i].inbound_tokens -= s.req[r].computed
            s.req[r].state = _HANDOVER
            s.req[r].dest = -1
            push_back(s.lists, s.req, HANDOVER, r)
    hand_out(s, i)
    s.inst[i].dirty = 1


@kernel
def role_change_ready(s, i):
    """Whether instance ``i`` has drained far enough for its pending role change."""
    role = s.inst[i].target_role
    if role < 0 or s.inst[i].switching == 1:
        return False
    busy = s.lane[i, 0].kind != _IDLE or s.lane[i, 1].kind != _IDLE
    if s.inst[i].remote == 1:  # its lane stands for running decodes at all times: here only prompts count
        busy = s.lane[i, 0].n_prefills > 0
    if busy or s.lists[queue_of(i), 2] > 0:
        return False
    if s.profile[s.inst[i].profile].switch_full == 1:
        pool = s.pool[s.inst[i].pool]
        # A transfer that was given up may still write into blocks that no request holds (``interrupt.fail_transfer``).
        if s.inst[i].out_n > 0 or (pool.sharers == 1 and pool.free < pool.n_blocks):
            return False
    if gives_up_decodes(s, i):
        waiting = s.lists[ready_of(i), 2] + s.lists[inbound_of(i), 2] + s.inst[i].moving_n
        return s.inst[i].run_n == 0 and waiting == 0
    return True


@kernel
def _flush_cache(s, p):
    """Forget every cached block of pool ``p`` (nobody references any)."""
    for k in range(s.pool[p].n_buckets):
        s.bucket[s.pool[p].bucket_base + k] = -1
    base = s.pool[p].base
    for k in range(s.pool[p].n_blocks):
        s.block[base + k].hashed = 0
        s.spare[base + k] = base + k
    s.pool[p].spare_n = s.pool[p].n_blocks
    s.pool[p].lru_head = -1
    s.pool[p].lru_tail = -1
    s.pool[p].cached = 0


@kernel
def end_role_change(s, i):
    """The switch of instance ``i`` has been paid for: it serves in its new role from now on."""
    if s.profile[s.inst[i].profile].switch_full == 1 and s.pool[s.inst[i].pool].sharers == 1:
        _flush_cache(s, s.inst[i].pool)
    if (s.inst[i].role == _MULTIPLEXED) != (s.inst[i].target_role == _MULTIPLEXED):
        s.inst[i].batching, s.inst[i].batching_after = s.inst[i].batching_after, s.inst[i].batching
    s.inst[i].role = s.inst[i].target_role
    s.inst[i].target_role = -1
    s.inst[i].switching = 0
    s.inst[i].decode_turn = 0
    s.inst[i].dirty = 1
    s.lane[i, 0].layer_to = 0
    s.cluster[0].moving_roles -= 1
    s.cluster[0].n_switches += 1

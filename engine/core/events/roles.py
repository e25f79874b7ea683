"""Role changes: drain, pay for the switch, serve in the new role. No request is lost on the way."""

from __future__ import annotations

from engine.core.kinds import LaneKind, RequestState, Role
from engine.core.lists import HANDOVER, PLACING, inbound_of, pop_front, push_back, queue_of, ready_of, remove
from engine.jit.kernel import kernel

__all__ = ["begin_role_change", "end_role_change", "role_change_ready"]

_PREFILL = int(Role.PREFILL)
_PLACING = int(RequestState.PLACING)
_WAITING = int(RequestState.WAITING)
_HANDOVER = int(RequestState.HANDOVER)
_IDLE = int(LaneKind.IDLE)


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
    s.inst[i].dirty = 1


@kernel
def role_change_ready(s, i):
    """Whether instance ``i`` has drained far enough for its pending role change."""
    role = s.inst[i].target_role
    if role < 0 or s.inst[i].switching == 1:
        return False
    if s.lane[i, 0].kind != _IDLE or s.lane[i, 1].kind != _IDLE or s.lists[queue_of(i), 2] > 0:
        return False
    full = s.profile[s.inst[i].profile].switch_full == 1
    if full and s.inst[i].out_n > 0:
        return False
    if full or role == _PREFILL:
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
    s.inst[i].role = s.inst[i].target_role
    s.inst[i].target_role = -1
    s.inst[i].switching = 0
    s.inst[i].decode_turn = 0
    s.inst[i].dirty = 1
    s.lane[i, 0].layer_to = 0
    s.cluster[0].moving_roles -= 1
    s.cluster[0].n_switches += 1

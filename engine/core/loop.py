"""The scheduler's loop: what may start, in which order, and what the end of it does.

One text for two clocks. The kernels that take a state ``s`` are called by the surrogate, which adds its jumps over
decode steps. Those that take ``words``, the address vector of a cluster (``rows.addresses``), and plain numbers are the
way in for a driver outside compiled code: the live engine and its modelled twin, where a decode step is booked when it
ends. A driver only adds *when* things end.
"""

from __future__ import annotations

import numpy as np

from engine.core.decide.decision import apply, build, next_decision, open_control
from engine.core.decide.patience import hold_event, wake_due, wake_for_idle
from engine.core.durations import step_ticks as _step_ticks
from engine.core.durations import transfer_ticks
from engine.core.events.handover import pull, start_link, transfer_done
from engine.core.events.lifecycle import arrive, book_decode, close_window, complete_prefill, stop, wake_held
from engine.core.events.observed import hand_on
from engine.core.events.roles import end_role_change, hand_out, role_change_ready
from engine.core.events.slots import slots_of
from engine.core.kinds import LaneKind
from engine.core.kv import mixed
from engine.core.lists import (
    ENDED,
    inbound_of,
    link_list,
    pop_front,
    queue_of,
)
from engine.core.schedule.batching import plan_lane
from engine.core.state import attach
from engine.jit.kernel import kernel
from engine.jit.rows import make_attach
from engine.latency.evaluate import PROFILE, SHARE, to_ticks

_IDLE, _K_PREFILL, _K_DECODE, _K_FUSED = (int(k) for k in LaneKind)


# -- decisions ---------------------------------------------------------------------------------------------


@kernel
def ask(words, now, needs, context, candidates, mask):
    """The decision due now, described: (kind, subject, number of candidates); kind -1 when there is none."""
    s = attach(words)
    kind, subject = next_decision(s, now)
    if kind < 0:
        return kind, subject, 0
    return kind, subject, build(s, kind, subject, now, needs, context, candidates, mask)


@kernel
def answer(words, kind, subject, action, now):
    """Carry out ``action`` for decision (kind, subject)."""
    apply(attach(words), kind, subject, action, now)


# -- what may start ----------------------------------------------------------------------------------------


@kernel(forceinline=True)
def next_changed(s, i):
    """The next instance after ``i``, in turn, where something changed: it counts as looked at. -1: there is none."""
    n = s.cluster[0].n_instances
    for _ in range(n):
        i = i + 1 if i + 1 < n else 0  # a division would cost more than all the rest
        if s.inst[i].dirty == 1:
            s.inst[i].dirty = 0
            return i
    return -1


@kernel(forceinline=True)
def kick(s, i, now, started, n):
    """Pull KV, change role and start idle lanes of instance ``i``.

    :param started: int32: the event slots (``events.slots``) of what starts are written to ``started[n:]``, at most 4
    :return: the end of what is written
    """
    slots = slots_of(s.cluster[0].n_instances, s.cluster[0].n_links)
    if s.inst[i].remote == 1 and hand_on(s, i, now) > 0:
        started[n] = 2 * i
        n += 1
    if s.lists[inbound_of(i), 2] > 0 and s.inst[i].switching == 0 and s.inst[i].lost == 0:
        pull(s, i)
        link = s.inst[i].link
        if start_link(s, link):
            started[n] = slots.links + link
            n += 1
    ready = role_change_ready(s, i)
    if s.inst[i].remote == 1:
        if ready:
            end_role_change(s, i)  # its role is the router's own affair: nothing is paid but the drain
        return n
    if ready:
        s.inst[i].switching = 1
        started[n] = slots.switches + i
        n += 1
    for l in range(2):
        if s.lane[i, l].kind == _IDLE:
            plan_lane(s, i, l, now)
            if s.lane[i, l].kind != _IDLE:
                started[n] = 2 * i + l
                n += 1
    return n


@kernel
def start_idle(words, now, started):
    """Start whatever may start on instances where something changed.

    :param started: out, int32 (3 N + L,): its event slots
    :return: how many
    """
    s = attach(words)
    n = 0
    i = next_changed(s, -1)
    while i >= 0:
        n = kick(s, i, now, started, n)
        i = next_changed(s, i)
    return n


# -- events ------------------------------------------------------------------------------------------------


@kernel
def begin(words, r, now):
    """Request ``r``, whose record is filled in, arrives."""
    arrive(attach(words), r, now)


@kernel
def last_token(words, r):
    """The token of request ``r`` that the step in flight gives is its last (stop token or stop string)."""
    stop(attach(words), r)


@kernel(forceinline=True)
def end_step(s, i, l, steps, first, delta, now):
    """The step of lane (i, l), or the last of ``steps`` decode steps, ended: book them and leave the lane idle.

    :param first: ticks that the first of them took; each further one took ``delta`` longer
    """
    lane = s.lane[i, l]
    if lane.kind == _K_DECODE or lane.kind == _K_FUSED:
        book_decode(s, i, l, steps, first, delta, now, False)
    if lane.kind == _K_PREFILL or lane.kind == _K_FUSED:
        if lane.layer_to == 0 or lane.layer_to >= s.profile[s.inst[i].profile].n_layers:
            queued = s.lists[queue_of(i), 2]
            complete_prefill(s, i, l, now)
            # Every prompt that is through makes room for one that was held.
            wake_held(s, queued - s.lists[queue_of(i), 2])
    lane.kind = _IDLE
    hand_out(s, i)
    s.inst[i].dirty = 1


@kernel
def finish_lane(words, i, l, now):
    """:func:`end_step` of the one step that lane (i, l) ran."""
    s = attach(words)
    end_step(s, i, l, 1, now - s.lane[i, l].start, 0, now)


@kernel
def end_transfer(s, link, now):
    """The transfer at the head of ``link`` arrived; returns whether the next one starts."""
    transfer_done(s, link, now)
    return start_link(s, link)


@kernel
def finish_transfer(words, link, now):
    """:func:`end_transfer`."""
    return end_transfer(attach(words), link, now)


@kernel
def finish_switch(words, i):
    """Instance ``i`` serves in its new role from now on."""
    end_role_change(attach(words), i)


@kernel
def end_interval(s, now):
    """A control interval ended: the next one begins, and its decisions are due."""
    close_window(s, now)
    open_control(s)


@kernel
def end_control(words, now):
    """:func:`end_interval`."""
    end_interval(attach(words), now)


@kernel
def wake(words, now):
    """The time for held requests has come: ask again for some of them, and for all whose time is up."""
    wake_due(attach(words), now)


@kernel
def wake_idle(words):
    """Ask again for a held request that an idle instance could prefill; returns whether there was one."""
    return wake_for_idle(attach(words))


@kernel
def wake_time(words, now, when):
    """When :func:`wake` is due, given that it was to be at ``when`` (``NEVER``: not at all)."""
    return hold_event(attach(words), now, when)


@kernel
def next_ended(words):
    """The next ended request that a further turn follows, -1 when there is none."""
    s = attach(words)
    return pop_front(s.lists, s.req, ENDED)


# -- what a step consists of -------------------------------------------------------------------------------


@kernel
def _write_chain(s, base, tail, n, out):
    """Block ids of a chain of ``n`` blocks, first block first, counted from ``base``."""
    b = tail
    for k in range(n - 1, -1, -1):
        out[k] = b - base
        b = s.block[b].parent


#: What a row of a lane's block table already holds: the first ``blocks`` blocks of a chain of ``request``, that
#: arrived then. A chain only grows, and a request that moves away and comes back has another one.
_KNOWN = np.dtype([("arrival", np.int64), ("request", np.int32), ("chain", np.int32), ("blocks", np.int32)], align=True)
_STEP = [
    ("request", np.int32, 1), ("start", np.int64, 1), ("n_tokens", np.int64, 1), ("sample", np.uint8, 1),
    ("n_blocks", np.int32, 1), ("table", np.int32, 2), ("known", _KNOWN, 1),
]  # fmt: skip
_attach_step = make_attach("Step", _STEP)


def step_columns(rows: int, width: int) -> tuple[np.ndarray, ...]:
    """What :func:`describe_step` writes for a lane, of up to ``rows`` sequences of up to ``width`` blocks:

    ``request`` int32 (S,): request slot; ``start`` int64 (S,): tokens whose KV exists; ``n_tokens`` int64 (S,): tokens
    to compute; ``sample`` uint8 (S,): the last of them gives a new token; ``n_blocks`` int32 (S,); ``table`` int32
    (S, W): block ids within the pool; and what it knows of the table's rows.
    """
    return tuple(np.zeros((rows, width)[:axes], dtype) for _, dtype, axes in _STEP)


@kernel
def describe_step(words, columns, i, l):
    """The sequences of the step that lane (i, l) starts: prompts first, then the running set.

    Of a block table only what was added since the step before is written: chains are long, and grow by a block in many
    steps.

    :param columns: addresses of :func:`step_columns`, always the same for a lane
    :return: (sequences, those that are prompts, first layer, end of the layers or 0 for all, whether every row is of
        the request that it was of when last written)
    """
    s, out = attach(words), _attach_step(columns)
    lane = s.lane[i, l]
    base = s.pool[s.inst[i].pool].base
    n = 0
    for k in range(lane.n_prefills):
        r = s.prefills[i, k]
        out.request[n], out.start[n], out.n_tokens[n] = r, s.req[r].computed, s.req[r].sched
        out.sample[n] = 1 if s.req[r].computed + s.req[r].sched >= s.req[r].target else 0
        n += 1
    if lane.kind != _K_PREFILL:
        for slot in range(lane.bs):
            r = s.run[i, slot]
            out.request[n], out.start[n], out.n_tokens[n], out.sample[n] = r, s.req[r].computed, 1, 1
            n += 1
    same = True
    for k in range(n):
        r = out.request[k]
        req, known = s.req[r], out.known[k]
        if known.request != r or known.arrival != req.arrival or known.chain != req.chain:
            known.request, known.arrival, known.chain, known.blocks = r, req.arrival, req.chain, 0
            same = False
        b = req.tail
        for at in range(req.blocks - 1, known.blocks - 1, -1):
            out.table[k, at] = b - base
            b = s.block[b].parent
        known.blocks = req.blocks
        out.n_blocks[k] = req.blocks
    return n, lane.n_prefills, lane.layer_from, lane.layer_to, same


@kernel
def describe_transfer(words, link, source, target):
    """The transfer at the head of ``link``: which blocks go where.

    :param source: out, int32 (W,): block ids within the sender's pool; ``target`` within the receiver's
    :return: (request, sending instance, receiving instance, number of blocks)
    """
    s = attach(words)
    r = s.lists[link_list(s.cluster[0].n_instances, link), 0]
    req = s.req[r]
    size = s.cluster[0].block_tokens
    _write_chain(s, s.pool[s.inst[req.inst].pool].base, req.tail, req.blocks, source)
    _write_chain(s, s.pool[s.inst[req.dest].pool].base, req.dst_tail, req.dst_blocks, target)
    skip = req.dst_cached // size
    n = (req.computed + size - 1) // size - skip
    for k in range(n):
        source[k] = source[skip + k]
        target[k] = target[skip + k]
    return r, req.inst, req.dest, n


@kernel
def chain_hashes(words, r, tokens, n, salt):
    """Extend the prefix hashes of request ``r`` to what its first ``n`` tokens fill, as far as they are known.

    They are chained: an entry stands for everything up to its end.

    :param tokens: int64 (T,): those that are known
    :param salt: uint64, of this process, so that nobody outside can aim at a collision
    """
    s = attach(words)
    req, size = s.req[r], s.cluster[0].hash_tokens
    for k in range(req.hash_n, min(n, len(tokens)) // size):
        h = s.hashes[req.hash_off + k - 1] if k > 0 else salt
        for j in range(k * size, (k + 1) * size):
            h = mixed(h, tokens[j])
        s.hashes[req.hash_off + k] = max(h, np.uint64(1))
        req.hash_n = k + 1


# -- how long things take by a profile ---------------------------------------------------------------------

_attach_truth = make_attach("Truth", [("profile", PROFILE, 1), ("share", SHARE, 2)])


@kernel
def step_ticks(words, truth, i, l):
    """Ticks that the step of lane (i, l) takes by ``truth``, the addresses of PROFILE (N,) and SHARE (N, M)."""
    s, true = attach(words), _attach_truth(truth)
    lane = s.lane[i, l]
    ticks, _ = _step_ticks(true.profile[i], true.share[i, lane.share], lane)
    return ticks


@kernel
def link_ticks(words, truth, link):
    """Ticks that the transfer at the head of ``link`` takes."""
    s = attach(words)
    r = s.lists[link_list(s.cluster[0].n_instances, link), 0]
    return transfer_ticks(s, _attach_truth(truth).profile[s.req[r].dest], link, r)


@kernel
def switch_ticks(truth, i):
    """Ticks that a role switch of instance ``i`` takes after its drain."""
    return to_ticks(_attach_truth(truth).profile[i].switch_s)

"""What happens to requests and instances: arrive, place, complete a step, hand over, migrate, change role.

Every function takes the time as an argument and leaves the state consistent: a request is in exactly one list or
running set, its blocks are counted, and instances that may have something new to do are marked ``dirty``.
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import LaneKind, Order, RequestState, Role
from engine.core.kv import blocks_for, find_prefix, grow, publish, release
from engine.core.lists import (
    HANDOVER,
    HELD,
    PLACING,
    lets_ahead,
    place_by_work,
    pop_front,
    push_back,
    push_before,
    queue_of,
    ready_of,
    remove,
)
from engine.core.schedule.on_time import line_up, watch_bound
from engine.core.schedule.predict import whole_device
from engine.core.schedule.preemption import note_due, touch_pool
from engine.core.slo import end_request, on_first_token, record_gaps
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel
from engine.latency.evaluate import prefill_s, to_ticks

_PREFILL, _DECODE, _MIXED, _MULTIPLEXED = (int(r) for r in Role)
_PLACING = int(RequestState.PLACING)
_HELD = int(RequestState.HELD)
_WAITING = int(RequestState.WAITING)
_HANDOVER = int(RequestState.HANDOVER)
_INBOUND = int(RequestState.INBOUND)
_MOVING = int(RequestState.MOVING)
_READY = int(RequestState.READY)
_FINISHED = int(RequestState.FINISHED)
_SHED = int(RequestState.SHED)
_FAILED = int(RequestState.FAILED)
_IDLE = int(LaneKind.IDLE)
_FCFS, _SHORTEST, _PREEMPTIVE, _ON_TIME = (int(o) for o in Order)


@kernel
def set_targets(s, r):
    """Fill in the targets of request ``r`` from its class, where it brings none of its own (0)."""
    c = s.cls[s.req[r].cls]
    if s.req[r].ttft_slo <= 0:
        seconds = c.ttft_s
        if c.ttft_factor > 0.0:
            n = float(s.req[r].prompt)
            p = s.inst[0].profile
            alone = prefill_s(s.profile[p], s.share[p, whole_device(s, 0)], n * n, 0.0, n)
            seconds = max(seconds, c.ttft_factor * (alone + s.profile[p].step_overhead_s))
        s.req[r].ttft_slo = max(to_ticks(seconds), 1)
    if s.req[r].tpot_slo <= 0:
        s.req[r].tpot_slo = max(to_ticks(c.tpot_s), 1)


@kernel
def arrive(s, r, now):
    """Request ``r`` (its prompt, output, class, targets and hashes are set) reaches the cluster."""
    cluster = s.cluster[0]
    req = s.req[r]
    req.arrival = now
    req.target = req.prompt
    req.state = _PLACING
    set_targets(s, r)
    gap = float(now - cluster.last_arrival)
    if cluster.n_sent == 1:
        cluster.ema_gap = gap
    elif cluster.n_sent > 1:
        cluster.ema_gap += 0.02 * (gap - cluster.ema_gap)
    cluster.last_arrival = now
    cluster.n_sent += 1
    cluster.win_arrivals += 1
    cluster.win_prompt += req.prompt
    cluster.mean_prompt += (req.prompt - cluster.mean_prompt) / min(cluster.n_sent, 200)
    s.cls[req.cls].sent += 1
    push_back(s.lists, s.req, PLACING, r)


@kernel
def _enqueue(s, i, r):
    """Put request ``r`` into the prefill queue of ``i``: by priority, then in the order that instance keeps."""
    queue = queue_of(i)
    last, priority = s.lists[queue, 1], s.req[r].priority
    if s.inst[i].order == _FCFS and (last < 0 or s.req[last].priority <= priority):
        push_back(s.lists, s.req, queue, r)
        return
    if s.inst[i].order == _PREEMPTIVE:
        push_before(s.lists, s.req, queue, r, place_by_work(s.lists, s.req, queue, r))
        return
    if s.inst[i].order == _ON_TIME:
        line_up(s, i, r)
        return
    other = s.lists[queue, 0]
    rest = s.req[r].target - s.req[r].computed
    while other >= 0:
        started = s.req[other].state != _WAITING or s.req[other].blocks > 0
        longer = s.req[other].target - s.req[other].computed > rest
        shorter = s.inst[i].order == _SHORTEST and lets_ahead(s.req[other], longer)
        behind = s.req[other].priority > priority or (s.req[other].priority == priority and shorter)
        if not started and behind:
            break
        other = s.req[other].next
    push_before(s.lists, s.req, queue, r, other)


@kernel
def place(s, r, i, now):
    """Answer PLACE_PREFILL: request ``r`` (PLACING) will be prefilled on instance ``i``; its load is booked at once."""
    req = s.req[r]
    remove(s.lists, s.req, PLACING, r)
    req.state = _WAITING
    req.inst = i
    if req.first_inst < 0:
        req.first_inst = i
    req.placed = now
    req.late = 0
    p = s.inst[i].profile
    reused = 0.0
    if req.hash_n > 0:
        _, n_prefix = find_prefix(s, s.inst[i].pool, r)
        reused = float(n_prefix * s.cluster[0].block_tokens)
    n = req.target - reused
    req.work = to_ticks(prefill_s(s.profile[p], s.share[p, whole_device(s, i)], n * n, n * reused, n))
    s.inst[i].queue_tokens += req.target
    s.inst[i].queue_work += req.work
    _enqueue(s, i, r)
    if s.inst[i].order != _FCFS:
        watch_bound(s, i, r, now)
    s.inst[i].dirty = 1


@kernel
def hold(s, r):
    """Answer PLACE_PREFILL with HOLD: ask again later, by priority, then oldest first."""
    remove(s.lists, s.req, PLACING, r)
    s.req[r].state = _HELD
    other, priority = s.lists[HELD, 0], s.req[r].priority
    while other >= 0 and (
        s.req[other].priority < priority
        or (s.req[other].priority == priority and s.req[other].arrival <= s.req[r].arrival)
    ):
        other = s.req[other].next
    push_before(s.lists, s.req, HELD, r, other)


@kernel
def wake_held(s, n):
    """Ask again for the first ``n`` held requests."""
    for _ in range(n):
        r = pop_front(s.lists, s.req, HELD)
        if r < 0:
            return
        s.req[r].state = _PLACING
        push_back(s.lists, s.req, PLACING, r)


@kernel
def shed(s, r, now):
    """Answer PLACE_PREFILL with SHED: the request ends unserved and counts as missed."""
    remove(s.lists, s.req, PLACING, r)
    end_request(s, r, now, _SHED)


@kernel
def _finish(s, r, now):
    i = s.req[r].inst
    release(s, r)
    end_request(s, r, now, _FINISHED)
    touch_pool(s, i)


@kernel
def stop(s, r):
    """The model ends request ``r`` (stop token): the token that is booked next is its last."""
    s.req[r].output = s.req[r].generated + 1


@kernel
def _cover(s, i, n, k, more):
    """Take the blocks that ``k`` decode steps of the running set have filled, and those of a step in flight.

    Before any request ends: step by step, the blocks of a step are taken before the sequences it ends give theirs back.
    """
    size = s.cluster[0].block_tokens
    for slot in range(n):
        req = s.req[s.run[i, slot]]
        covered = req.computed + k + (1 if more else 0)
        if covered > req.blocks * size:
            need = blocks_for(covered, size)
            req.tail = grow(s, s.inst[i].pool, req.tail, req.blocks, need)
            req.blocks = need


@kernel
def book_decode(s, i, l, k, first, delta, now, more):
    """Book ``k`` decode steps of lane (i, l) that lasted ``first``, ``first + delta``, ... ticks and ended at ``now``.

    :param more: a further step of the same batch is already in flight, so its blocks are taken here
    """
    lane = s.lane[i, l]
    end_first = now - (k - 1) * first - delta * ((k - 1) * (k - 2) // 2 + (k - 1))
    p = s.inst[i].pool
    n = lane.bs
    last_end = s.inst[i].last_decode_end
    common = 0
    kept = 0
    context = np.int64(0)
    finished = False
    for c in range(s.cluster[0].n_classes):
        s.due[i, c] = _NEVER
    if k > 1 or more:
        _cover(s, i, n, k, more)
    for slot in range(n):
        r = s.run[i, slot]
        req = s.req[r]
        if req.last_token == last_end:
            common += 1
        else:
            record_gaps(s.itl, end_first - req.last_token, 0, 1, 1)
        computed = req.computed + k
        req.generated += k
        req.computed = computed
        req.last_token = now
        if req.hash_n > 0:
            publish(s, p, r, computed - k, computed)
        if req.generated >= req.output:
            finished = True
            release(s, r)
            end_request(s, r, now, _FINISHED)
            continue
        if kept < slot:
            s.run[i, kept] = r
        kept += 1
        context += computed
        note_due(s, i, r)
    if common == n and end_first - last_end == first:
        record_gaps(s.itl, first, delta, k, n)
    else:
        if common > 0:
            record_gaps(s.itl, end_first - last_end, 0, 1, common)
        if k > 1:
            record_gaps(s.itl, first + delta, delta, k - 1, n)
    s.inst[i].run_n = kept
    s.inst[i].run_ctx = context
    s.inst[i].last_decode_end = now
    s.inst[i].unbooked = 0
    lane.sum_ctx = context
    s.cluster[0].tokens_out += n * k
    if finished:
        touch_pool(s, i)


@kernel
def _emit_from_prefill(s, i, r, now):
    """The prefill of request ``r`` ended: its next token exists; decide where it goes from here."""
    req = s.req[r]
    remove(s.lists, s.req, queue_of(i), r)
    s.inst[i].started_n -= 1
    req.generated += 1
    s.cluster[0].tokens_out += 1
    if req.first_token < 0:
        on_first_token(s, r, now)
    else:
        record_gaps(s.itl, now - req.last_token, 0, 1, 1)
    req.last_token = now
    if req.generated >= req.output:
        s.inst[i].held_tokens -= req.computed
        _finish(s, r, now)
    elif s.inst[i].role == _PREFILL or s.inst[i].target_role == _PREFILL or s.cluster[0].ask_decode == 1:
        req.state = _HANDOVER
        s.inst[i].out_n += 1
        push_back(s.lists, s.req, HANDOVER, r)
    else:
        req.state = _READY
        req.dest = i
        push_back(s.lists, s.req, ready_of(i), r)
    s.inst[i].dirty = 1


@kernel(forceinline=True)
def complete_prompt(s, i, r, now):
    """Book the tokens of request ``r`` that the step of instance ``i`` which just ended has computed."""
    req = s.req[r]
    before = req.computed
    rest = req.target - before
    done = req.sched
    work = req.work if done == rest else req.work * done // rest
    req.work -= work
    req.computed = before + done
    req.sched = 0
    req.state = _WAITING
    s.inst[i].queue_work -= work
    s.inst[i].queue_tokens -= done
    s.inst[i].held_tokens += done
    publish(s, s.inst[i].pool, r, before, req.computed)
    if req.computed >= req.target:
        _emit_from_prefill(s, i, r, now)


@kernel(forceinline=True)
def complete_prefill(s, i, l, now):
    """Book the prompts of the step (or last slice) that lane (i, l) just ended."""
    lane = s.lane[i, l]
    for k in range(lane.n_prefills):
        complete_prompt(s, i, s.prefills[i, k], now)
    lane.n_prefills = 0


@kernel
def close_window(s, now):
    """End a control interval: its statistics become what REALLOCATE and TUNE decisions read."""
    c = s.cluster[0]
    span = max((now - c.win_start) * 1e-12, 1e-9)
    c.last_span_s = span
    c.last_rate = c.win_arrivals / span
    c.last_prompt = c.win_prompt / max(c.win_arrivals, 1)
    c.last_output = c.win_output / max(c.win_finished, 1)
    c.last_ttft_s = c.win_ttft / max(c.win_first, 1)
    c.last_tpot_s = c.win_tpot / max(c.win_timed, 1)
    c.win_start = now
    c.win_arrivals = 0
    c.win_prompt = 0.0
    c.win_finished = 0
    c.win_output = 0.0
    c.win_first = 0
    c.win_ttft = 0.0
    c.win_timed = 0
    c.win_tpot = 0.0

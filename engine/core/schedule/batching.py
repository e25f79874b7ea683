"""What a lane does next: forming steps from queues and running sets, with blocks, budgets and preemption.

``plan_lane`` is called for an idle lane at a step boundary and writes the step into the lane's record; nothing is
promised to a request before its blocks are there. The rules are those engines use: running decodes come first,
prompts first come first served (or shortest remaining first), and when decode runs out of blocks the newest
request is preempted and recomputed later (vLLM V1).
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Batching, LaneKind, Order, RequestState, Role, Split
from engine.core.lists import pop_front, push_back, queue_of, ready_of
from engine.core.schedule.layer_preemption import overtaker, park, unpark
from engine.core.schedule.predict import (
    predict_step,
    prefill_share,
    row_on_demand,
    running_ctx,
    split_for,
    table_row,
    whole_device,
)
from engine.core.schedule.preemption import gives_up_decodes, note_due, recount_due, secure_decode
from engine.core.schedule.prompts import admit_alone, plan_queue, take
from engine.jit.kernel import kernel
from engine.latency.evaluate import decode_s, prefill_s, to_ticks

_PREFILL, _DECODE, _MIXED, _MULTIPLEXED = (int(r) for r in Role)
_, _PREFILL_FIRST, _LAYERED = (int(b) for b in Batching)
_IDLE, _K_PREFILL, _K_DECODE, _K_FUSED = (int(k) for k in LaneKind)
_READY = int(RequestState.READY)
_RUNNING = int(RequestState.RUNNING)
_AUTO, _TABLE, _ON_DEMAND = (int(x) for x in Split)
_PREEMPTIVE = int(Order.SHORTEST_PREEMPTIVE)
_ON_TIME = int(Order.ON_TIME)


@kernel
def join_ready(s, i):
    """Move requests whose KV is here into the running set, as far as its limits allow."""
    k = ready_of(i)
    while s.lists[k, 2] > 0 and s.inst[i].run_n < s.inst[i].max_batch:
        r = s.lists[k, 0]
        context = s.inst[i].run_ctx + s.inst[i].run_n + s.req[r].computed + 1
        if s.inst[i].run_n > 0 and context > s.inst[i].max_ctx:
            return
        pop_front(s.lists, s.req, k)
        s.req[r].state = _RUNNING
        s.run[i, s.inst[i].run_n] = r
        s.inst[i].run_n += 1
        s.inst[i].run_ctx += s.req[r].computed
        note_due(s, i, r)
        s.inst[i].held_tokens -= s.req[r].computed


@kernel
def _line_up(s, i):
    """Rotation: who decoded last goes to the end of the line for the next step, when the line matters.

    It matters when someone waits, when a prompt comes in between, or when the grown contexts exceed ``max_ctx``.
    """
    inst = s.inst[i]
    waits = s.lists[ready_of(i), 2] > 0 or s.lists[queue_of(i), 2] > 0
    if inst.run_n == 0 or not (waits or inst.run_ctx + inst.run_n > inst.max_ctx):
        return
    for slot in range(inst.run_n):
        r = s.run[i, slot]
        s.req[r].state = _READY
        push_back(s.lists, s.req, ready_of(i), r)
    inst.held_tokens += inst.run_ctx
    inst.run_ctx = 0
    inst.run_n = 0
    recount_due(s, i)


@kernel
def _clear_lane(lane, now):
    lane.kind = _IDLE
    lane.n_prefills = 0
    lane.work = 0
    lane.bs = 0
    lane.layer_from = 0
    lane.layer_to = 0
    lane.sum_n = 0
    lane.sum_n2 = 0.0
    lane.sum_nr = 0.0
    lane.sum_ctx = 0
    lane.corun = 0
    lane.start = now
    lane.max_steps = 1


@kernel
def _take_running(s, i, l):
    lane = s.lane[i, l]
    lane.bs = s.inst[i].run_n
    lane.sum_ctx = s.inst[i].run_ctx


@kernel
def _jump_limit(s, i):
    """Decode steps of the present running set until the first request ends or blocks might run out."""
    if s.cluster[0].hand_over == 1 and gives_up_decodes(s, i):
        return np.int64(1)  # after every step some are handed over
    size = s.cluster[0].block_tokens
    pool = s.pool[s.inst[i].pool]
    if s.lists[queue_of(i), 2] > 0 and pool.cached > 0 and pool.spare_n < s.inst[i].run_n:
        # The next blocks are taken from the prefix cache. A waiting prompt that loses its hits there may fit chunk
        # by chunk where it did not fit with them, so it is looked at after every step.
        return np.int64(1)
    if s.lists[queue_of(i), 2] > 0 and s.inst[i].order == _ON_TIME:
        return np.int64(1)  # who is given up depends on the time of each look
    steps = np.int64(2**31)
    for slot in range(s.inst[i].run_n):
        r = s.run[i, slot]
        steps = min(steps, np.int64(s.req[r].output - s.req[r].generated))
        if s.req[r].hash_n * s.cluster[0].hash_tokens > s.req[r].computed:
            # It will publish the block it is filling: the order among requests is that of the steps.
            steps = min(steps, np.int64(size - s.req[r].computed % size))
    if s.inst[i].rotate == 1:
        if s.lists[ready_of(i), 2] > 0:
            return np.int64(1)
        steps = min(steps, (s.inst[i].max_ctx - s.inst[i].run_ctx) // s.inst[i].run_n)
    per_request = s.pool[s.inst[i].pool].free // max(s.inst[i].run_n, 1) - 1
    return max(min(steps, (per_request - 1) * size), 1)


@kernel
def _look_up(s, i):
    """Split TABLE: a prefill batch starts, so the row for the present decode batch comes into force."""
    if s.inst[i].split == _TABLE:
        s.inst[i].row = table_row(s, i, s.inst[i].run_n + s.lists[ready_of(i), 2])


@kernel
def _stand_aside(s, i, now):
    """Park the batch under way in lane (i, 0) where a short prompt should go first, and there is room for it."""
    r = overtaker(s, i, now)
    n = admit_alone(s, i, r, now) if r >= 0 else 0
    if n > 0:
        park(s, i)
        _clear_lane(s.lane[i, 0], now)
        take(s, i, 0, 0, r, n)
        _look_up(s, i)


@kernel
def _plan_layers(s, i, now):
    """Next slice of the prefill lane of a MULTIPLEXED instance: layers enough to last one decode step."""
    lane = s.lane[i, 0]
    p = s.inst[i].profile
    layers = s.profile[p].n_layers
    goes_on = lane.layer_to > 0 and lane.layer_to < layers
    preempts = s.inst[i].parked_n > 0
    if not goes_on:
        _clear_lane(lane, now)
        if preempts:
            unpark(s, i)
            goes_on, preempts = True, False
        elif plan_queue(s, i, 0, s.inst[i].prefill_tokens, False, s.inst[i].max_prefills, now) == 0:
            return
        else:
            _look_up(s, i)
    if goes_on and not preempts and s.inst[i].stand_aside == 1:
        _stand_aside(s, i, now)
    lane.kind = _K_PREFILL
    lane.start = now
    lane.layer_from = lane.layer_to
    decoding = s.inst[i].run_n > 0 or s.lists[ready_of(i), 2] > 0
    if not decoding:
        lane.share = whole_device(s, i)
        lane.layer_to = layers
        return
    context = running_ctx(s, i)
    row = split_for(s, i, context, s.inst[i].run_n)
    lane.share = prefill_share(s, i, row)
    if s.inst[i].layer_tokens > 0:
        slice_layers = int(s.inst[i].layer_tokens // lane.sum_n)
    else:
        whole = prefill_s(s.profile[p], s.share[p, lane.share], lane.sum_n2, lane.sum_nr, lane.sum_n)
        decode = decode_s(s.profile[p], s.share[p, row], context, s.inst[i].run_n) * s.share[p, row].guard
        slice_layers = int(np.ceil(max(decode, 1e-3) * layers / max(whole, 1e-9)))
    lane.layer_to = min(lane.layer_from + max(slice_layers, 1), layers)


@kernel
def _plan_beside(s, i, now):
    """Lane 0 of a MULTIPLEXED instance: a slice or chunk of prefill on the SMs that decode leaves it."""
    lane = s.lane[i, 0]
    if s.inst[i].batching == _LAYERED:
        _plan_layers(s, i, now)
    else:
        _clear_lane(lane, now)
        if plan_queue(s, i, 0, s.inst[i].chunk_tokens, True, s.inst[i].max_prefills, now) > 0:
            _look_up(s, i)
            lane.kind = _K_PREFILL
            lane.share = whole_device(s, i)
            if s.inst[i].run_n > 0 or s.lists[ready_of(i), 2] > 0:
                lane.share = prefill_share(s, i, split_for(s, i, running_ctx(s, i), s.inst[i].run_n))
    if lane.kind == _K_PREFILL:
        lane.corun = 1 if s.lane[i, 1].kind != _IDLE else 0


@kernel
def _plan_decode_beside(s, i, now):
    """Lane 1 of a MULTIPLEXED instance: a decode step, on its share while prefill runs."""
    lane = s.lane[i, 1]
    _clear_lane(lane, now)
    join_ready(s, i)
    secure_decode(s, i, now)
    if s.inst[i].run_n == 0:
        return
    _take_running(s, i, 1)
    lane.kind = _K_DECODE
    beside = s.lane[i, 0].kind != _IDLE
    lane.corun = 1 if beside else 0
    lane.share = split_for(s, i, lane.sum_ctx, lane.bs) if beside else whole_device(s, i)
    # The predictor rule may pick another row as the context grows, so it is asked at every step; so is ON_DEMAND.
    lane.max_steps = 1 if beside and s.inst[i].split in (_AUTO, _ON_DEMAND) else _jump_limit(s, i)


@kernel
def _plan_on_demand(s, i, now):
    """Split ON_DEMAND, both lanes idle: a fused step on all SMs, taken apart into two lanes where it would be late.

    Lane 1 then takes as many decode steps as end before the chunk in lane 0 does, at least one; the next step is
    decided when both are idle.
    """
    lane = s.lane[i, 0]
    _plan_mixed(s, i, now)
    if lane.kind != _K_FUSED:
        return
    row = row_on_demand(s, i)
    if row >= 0:
        s.inst[i].row = row
        lane.kind = _K_PREFILL
        lane.share = prefill_share(s, i, row)
        lane.corun = 1
        lane.bs = 0
        lane.sum_ctx = 0


@kernel
def _ends_first(s, i, now):
    """Split ON_DEMAND: whether a decode step that starts now is predicted to end no later than the chunk in lane 0."""
    chunk = s.lane[i, 0]
    if now == chunk.start:
        return True
    p = s.inst[i].profile
    share = s.share[p, s.inst[i].row]
    step = decode_s(s.profile[p], share, s.inst[i].run_ctx, s.inst[i].run_n) * share.corun_decode
    return now + to_ticks(step) <= chunk.start + to_ticks(predict_step(s, i, 0))


@kernel
def _plan_multiplexed(s, i, l, now):
    first = s.lane[i, 0].kind
    if l == 1 and first in (_K_FUSED, _K_DECODE):
        # Lane 0 has the running set, also when a TUNE answer has just ended ON_DEMAND.
        return
    if s.inst[i].split == _ON_DEMAND:
        if l == 0 and s.lane[i, 1].kind == _IDLE:
            _plan_on_demand(s, i, now)
        elif l == 1 and first == _K_PREFILL and s.lane[i, 0].corun == 1 and _ends_first(s, i, now):
            _plan_decode_beside(s, i, now)
    elif l == 0:
        _plan_beside(s, i, now)
    else:
        _plan_decode_beside(s, i, now)


@kernel
def _plan_mixed(s, i, now):
    lane = s.lane[i, 0]
    _clear_lane(lane, now)
    lane.share = whole_device(s, i)
    if s.inst[i].rotate == 1:
        _line_up(s, i)
    else:
        join_ready(s, i)
    if s.inst[i].batching == _PREFILL_FIRST and s.lists[queue_of(i), 2] > 0:
        if plan_queue(s, i, 0, s.inst[i].prefill_tokens, False, s.inst[i].max_prefills, now) > 0:
            lane.kind = _K_PREFILL
            return
    if s.inst[i].rotate == 1:
        join_ready(s, i)
    before = s.inst[i].preempted
    secure_decode(s, i, now)
    _take_running(s, i, 0)
    paused = s.inst[i].pause_preempt == 1 and s.inst[i].preempted > before and lane.bs > 0
    paused = paused and s.req[s.lists[queue_of(i), 0]].blocks == 0
    # Also an instance that was MULTIPLEXED, and LAYERED, before a role change, or whose split is ON_DEMAND.
    if s.inst[i].batching != _PREFILL_FIRST and s.lists[queue_of(i), 2] > 0 and not paused:
        plan_queue(s, i, 0, s.inst[i].chunk_tokens - lane.bs, True, s.inst[i].max_prefills, now)
    if lane.bs > 0:
        if lane.n_prefills > 0:
            lane.kind = _K_FUSED
        else:
            lane.kind = _K_DECODE
            lane.max_steps = _jump_limit(s, i)
    elif lane.n_prefills > 0:
        lane.kind = _K_PREFILL


@kernel
def _plan_decode(s, i, now):
    """DECODE role: a prompt multiplexed in here runs whole and alone (Tropical), decode steps in between."""
    lane = s.lane[i, 1]
    _clear_lane(lane, now)
    lane.share = whole_device(s, i)
    if s.inst[i].rotate == 1:
        _line_up(s, i)
    join_ready(s, i)
    waiting = s.lists[queue_of(i), 2] > 0
    if waiting and (s.inst[i].decode_turn == 0 or s.inst[i].run_n == 0):
        if plan_queue(s, i, 1, 1, False, 1, now) > 0:
            lane.kind = _K_PREFILL
            s.inst[i].decode_turn = 1
            return
    secure_decode(s, i, now)
    s.inst[i].decode_turn = 0
    if s.inst[i].run_n > 0:
        _take_running(s, i, 1)
        lane.kind = _K_DECODE
        lane.max_steps = 1 if waiting else _jump_limit(s, i)


@kernel
def plan_lane(s, i, l, now):
    """Form the next step of idle lane ``l`` of instance ``i``; ``s.lane[i, l].kind`` says what came of it.

    Lane 0 is the prefill lane (PREFILL, MULTIPLEXED) or the fused lane (MIXED), lane 1 the decode lane
    (DECODE, MULTIPLEXED). An instance that is switching roles, or lost, plans nothing.
    """
    role = s.inst[i].role
    if s.inst[i].switching == 1 or s.inst[i].lost == 1:
        return
    if role == _MIXED:
        if l == 0:
            _plan_mixed(s, i, now)
    elif role == _PREFILL:
        if l == 0:
            lane = s.lane[i, 0]
            _clear_lane(lane, now)
            lane.share = whole_device(s, i)
            chunked = s.inst[i].order == _PREEMPTIVE
            budget = s.inst[i].chunk_tokens if chunked else s.inst[i].prefill_tokens
            if plan_queue(s, i, 0, budget, chunked, s.inst[i].max_prefills, now) > 0:
                lane.kind = _K_PREFILL
    elif role == _DECODE:
        if l == 1:
            _plan_decode(s, i, now)
    else:
        _plan_multiplexed(s, i, l, now)
    if s.lane[i, l].kind != _IDLE:
        s.inst[i].steps += 1
        s.cluster[0].steps += 1

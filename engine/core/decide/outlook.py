"""What the scheduler expects of a placement: waits, stalls, slacks and transfers, from the nominal profile."""

from __future__ import annotations

import numpy as np

from engine.core.kinds import Batching, LaneKind, Order, RequestState, Role, Split
from engine.core.lists import lets_ahead, queue_of
from engine.core.schedule.layer_preemption import parked_rest_s
from engine.core.schedule.on_time import goes_before
from engine.core.schedule.predict import expected_row, predict_step, prefill_share, running_ctx, whole_device
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel
from engine.latency.evaluate import decode_s, fused_shared_s, prefill_s, times, to_ticks

_PREFILL, _DECODE, _MIXED, _MULTIPLEXED = (int(r) for r in Role)
_PREFILL_FIRST = int(Batching.PREFILL_FIRST)
_IDLE, _K_DECODE = int(LaneKind.IDLE), int(LaneKind.DECODE)
_, _SHORTEST, _PREEMPTIVE, _ON_TIME = (int(o) for o in Order)
_WAITING, _IN_STEP = int(RequestState.WAITING), int(RequestState.PREFILLING)
_ON_DEMAND = int(Split.ON_DEMAND)

#: Slack of an instance that decodes, or queues, nothing.
NO_SLACK_S = 1e3


@kernel
def residual_s(s, i, now):
    """Predicted seconds until the prefill work in flight on instance ``i`` ends (half a step for a decode step)."""
    l = 1 if s.inst[i].role == _DECODE else 0
    lane = s.lane[i, l]
    if lane.kind == _IDLE:
        return 0.0
    if lane.kind == _K_DECODE:
        p = s.inst[i].profile
        return 0.5 * decode_s(s.profile[p], s.share[p, lane.share], running_ctx(s, i), lane.bs)
    predicted = predict_step(s, i, l)
    passed = (now - lane.start) * 1e-12
    if s.inst[i].remote == 1 and lane.work > 0:
        # An engine that is slower than predicted has not begun with the prompts behind the first.
        passed = min(passed, predicted * s.req[s.prefills[i, 0]].work / lane.work)
    rest = max(predicted - passed, 0.0)
    layers = s.profile[s.inst[i].profile].n_layers
    if lane.layer_to > lane.layer_from and lane.layer_to < layers:
        rest += predicted * (layers - lane.layer_to) / (lane.layer_to - lane.layer_from)
    return rest + parked_rest_s(s, i)


@kernel
def min_slack_s(s, i, now):
    """Least of first token + TPOT target × tokens − now over the running set: how long decode may stall."""
    if s.inst[i].run_n == 0:
        return NO_SLACK_S
    least = np.int64(_NEVER)
    for c in range(s.cluster[0].n_classes):
        if s.due[i, c] < _NEVER:
            least = min(least, s.due[i, c] + times(to_ticks(s.cls[c].tpot_s), s.inst[i].unbooked))
    return (least - now) * 1e-12


@kernel
def prefill_forecast(s, i, n, reused, now):
    """Predicted (wait, own prefill, stall of the running decodes) in seconds for ``n`` new tokens on instance ``i``."""
    inst = s.inst[i]
    p = inst.profile
    profile, full = s.profile[p], s.share[p, whole_device(s, i)]
    own = prefill_s(profile, full, n * n, n * reused, n) + profile.step_overhead_s
    lane = s.lane[i, 1 if inst.role == _DECODE else 0]
    begun = lane.work + inst.parked_work if lane.kind != _IDLE else np.int64(0)
    queued_s = max(inst.queue_work - begun, 0) * 1e-12
    wait = residual_s(s, i, now) + queued_s
    if inst.run_n == 0:
        return wait, own, 0.0
    step = decode_s(profile, full, running_ctx(s, i), inst.run_n)
    stall = own
    if inst.role == _DECODE:
        wait += step * s.lists[queue_of(i), 2]
    elif inst.role == _MULTIPLEXED and inst.split != _ON_DEMAND:
        row = expected_row(s, i)
        part = s.share[p, prefill_share(s, i, row)]
        slower = prefill_s(profile, part, n * n, n * reused, n) * part.corun_prefill / max(own, 1e-9)
        own *= slower
        wait += queued_s * (slower - 1.0)
        beside = decode_s(profile, s.share[p, row], running_ctx(s, i), inst.run_n) * s.share[p, row].corun_decode
        stall = own * max(1.0 - step / max(beside, 1e-9), 0.0)
    elif inst.batching != _PREFILL_FIRST:
        # Every chunk carries the running decodes with it.
        room = max(float(inst.chunk_tokens - inst.run_n), 16.0)
        beside = max(step - fused_shared_s(full, full.prefill[3] + full.prefill[2] * room, step), 0.0)
        wait += beside * (inst.queue_tokens / room)
        own += beside * np.ceil(n / room)
    return wait, own, stall


@kernel
def transfer_s(s, j, tokens):
    """Predicted seconds to move ``tokens`` of KV to instance ``j``, after what is already on its way there."""
    link = s.link[s.inst[j].link]
    profile = s.profile[s.inst[j].profile]
    seconds = link.latency_s if link.latency_s >= 0.0 else profile.migrate_latency_s
    if link.bytes_per_s > 0.0:
        seconds += (tokens + s.inst[j].inbound_tokens) * profile.kv_bytes_per_token / link.bytes_per_s
    return seconds


@kernel
def hand_over_s(s, i, tokens):
    """Least predicted transfer of a prompt prefilled on ``i`` to an instance that decodes; 0 where it may stay."""
    if s.inst[i].role != _PREFILL:
        return 0.0
    least = NO_SLACK_S
    for j in range(s.cluster[0].n_instances):
        if s.inst[j].role != _PREFILL and s.inst[j].target_role < 0 and s.inst[j].lost == 0:
            if s.inst[j].pool == s.inst[i].pool:
                return 0.0
            least = min(least, transfer_s(s, j, tokens))
    return least if least < NO_SLACK_S else 0.0


@kernel
def _overtakes(s, i, r, own, q):
    """Whether a new prompt ``r`` (predicted prefill ``own`` ticks) goes before queued ``q``, as ``place`` does it."""
    order, mine, theirs = s.inst[i].order, s.req[r].priority, s.req[q].priority
    if order == _PREEMPTIVE:
        shorter = lets_ahead(s.req[q], s.req[q].work > own)
        return s.req[q].generated == 0 and (theirs > mine or (theirs == mine and shorter))
    if order == _ON_TIME:
        return goes_before(s, r, q)
    waits = s.req[q].state == _WAITING and s.req[q].blocks == 0
    longer = s.req[q].target - s.req[q].computed > s.req[r].target - s.req[r].computed
    shorter = order == _SHORTEST and lets_ahead(s.req[q], longer)
    return waits and (theirs > mine or (theirs == mine and shorter))


@kernel(forceinline=True)
def _rest_of(req):
    """Predicted prefill work of queued ``req`` that no step in flight does, ticks."""
    done = req.sched if req.state == _IN_STEP else 0
    return req.work if done == 0 else req.work - req.work * done // (req.target - req.computed)


@kernel
def work_ahead_s(s, i, r, own_s, now):
    """Predicted seconds of prefill work before the place that request ``r``, which takes ``own_s``, would get in queue
    ``i``."""
    own, end = to_ticks(own_s), to_ticks(residual_s(s, i, now))
    q = s.lists[queue_of(i), 0]
    while q >= 0 and not _overtakes(s, i, r, own, q):
        end += _rest_of(s.req[q])
        q = s.req[q].next
    return end * 1e-12


@kernel
def queue_outlook(s, i, r, own_s, placing, now):
    """Seconds (ahead, slack): prefill work before request ``r``, and the least TTFT slack of the prompts queued here.

    Each queued prompt is computed after those before it; ``r``, which takes ``own_s``, stands in its place when
    ``placing`` (else ``ahead`` is all the work).
    """
    own = to_ticks(own_s)
    ahead = 0.0
    end = to_ticks(residual_s(s, i, now))
    pending = placing
    least = np.int64(_NEVER)
    q = s.lists[queue_of(i), 0]
    while q >= 0:
        req = s.req[q]
        if pending and _overtakes(s, i, r, own, q):
            ahead = end * 1e-12
            end += own
            pending = False
        end += _rest_of(req)
        if req.first_token < 0:
            least = min(least, req.arrival + req.ttft_slo - now - end)
        q = req.next
    if pending or not placing:
        ahead = end * 1e-12
    return ahead, least * 1e-12 if least < _NEVER else NO_SLACK_S

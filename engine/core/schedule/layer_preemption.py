"""A layer-sliced prefill batch that stands aside, half computed, while a short prompt goes by (MuxWise's preemption).

MuxWise (section 4, optional): a prefill P2 that arrives while P1 runs may preempt it at a layer boundary, if P1 is
no preemptor itself and, with P2 served first, still meets its TTFT target. Inferred: P2 is one prompt, the first in
the queue that would miss its target behind P1, meets it now, and takes less than what is left of P1; a prompt of
less priority than P1's never goes first.

The parked batch keeps its blocks and the layers it has computed: its prompts stay PREFILLING and in their queue, what
the lane knew of it moves to the ``parked_*`` fields of the instance, its prompts to row N + i of ``prefills``.
"""

from __future__ import annotations

import numpy as np

from engine.core.kinds import RequestState
from engine.core.lists import TWICE, queue_of, ready_of
from engine.core.schedule.predict import prefill_share, running_ctx, split_for, whole_device
from engine.core.state import NEVER as _NEVER
from engine.jit.kernel import kernel
from engine.latency.evaluate import prefill_s, to_ticks

_WAITING = int(RequestState.WAITING)


@kernel
def _prefill_s(s, i, sum_n2, sum_nr, sum_n):
    """Predicted seconds of a whole prefill that starts on instance ``i`` now, on the SMs that decode leaves it."""
    p = s.inst[i].profile
    if s.inst[i].run_n == 0 and s.lists[ready_of(i), 2] == 0:
        full = s.share[p, whole_device(s, i)]
        return prefill_s(s.profile[p], full, sum_n2, sum_nr, sum_n) + s.profile[p].step_overhead_s
    part = s.share[p, prefill_share(s, i, split_for(s, i, running_ctx(s, i), s.inst[i].run_n))]
    return prefill_s(s.profile[p], part, sum_n2, sum_nr, sum_n) * part.corun_prefill + s.profile[p].step_overhead_s


@kernel
def overtaker(s, i, now):
    """The waiting prompt for which the batch under way in lane (i, 0) should stand aside now; -1: none."""
    lane = s.lane[i, 0]
    layers = s.profile[s.inst[i].profile].n_layers
    left = _prefill_s(s, i, lane.sum_n2, lane.sum_nr, lane.sum_n) * (layers - lane.layer_to) / layers
    due = np.int64(_NEVER)
    for k in range(lane.n_prefills):
        req = s.req[s.prefills[i, k]]
        if req.first_token >= 0:
            return np.int32(-1)  # it is computed anew, between two of its tokens: no time to stand aside
        due = min(due, req.arrival + req.ttft_slo)
    priority, lowest = s.req[s.prefills[i, 0]].priority, s.req[s.lists[queue_of(i), 1]].priority
    r = s.lists[queue_of(i), 0]
    while r >= 0:
        req = s.req[r]
        if req.late < 0 and req.state == _WAITING:
            return np.int32(-1)  # its second deadline is near, and it goes first
        if req.late >= TWICE and req.priority == lowest and req.blocks == 0:
            return np.int32(-1)  # only such ones follow, whose target has long passed
        if req.state == _WAITING and req.first_token < 0 and req.priority <= priority:
            n = float(req.target - req.computed)
            own = _prefill_s(s, i, n * n, n * req.computed, n)
            target = req.arrival + req.ttft_slo
            late = now + to_ticks(left + own)
            if own < left and late > target and now + to_ticks(own) <= target and late <= due:
                return r
        r = req.next
    return np.int32(-1)


@kernel
def park(s, i):
    """Put the batch under way in lane (i, 0) aside."""
    lane, inst = s.lane[i, 0], s.inst[i]
    row = s.cluster[0].n_instances + i
    for k in range(lane.n_prefills):
        s.prefills[row, k] = s.prefills[i, k]
    inst.parked_n = lane.n_prefills
    inst.parked_layer = lane.layer_to
    inst.parked_sum_n = lane.sum_n
    inst.parked_sum_n2 = lane.sum_n2
    inst.parked_sum_nr = lane.sum_nr
    inst.parked_work = lane.work
    inst.stood_aside += 1


@kernel
def unpark(s, i):
    """Put the parked batch of instance ``i`` back into its cleared lane 0, behind the layers it has computed."""
    lane, inst = s.lane[i, 0], s.inst[i]
    row = s.cluster[0].n_instances + i
    for k in range(inst.parked_n):
        s.prefills[i, k] = s.prefills[row, k]
    lane.n_prefills = inst.parked_n
    lane.layer_to = inst.parked_layer
    lane.sum_n = inst.parked_sum_n
    lane.sum_n2 = inst.parked_sum_n2
    lane.sum_nr = inst.parked_sum_nr
    lane.work = inst.parked_work
    inst.parked_n = 0
    inst.parked_work = 0


@kernel
def parked_rest_s(s, i):
    """Predicted seconds that the parked batch of instance ``i`` still takes; 0 without one."""
    inst = s.inst[i]
    if inst.parked_n == 0:
        return 0.0
    layers = s.profile[inst.profile].n_layers
    whole = _prefill_s(s, i, inst.parked_sum_n2, inst.parked_sum_nr, inst.parked_sum_n)
    return whole * (layers - inst.parked_layer) / layers
